package sandbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/policy"
)

// origin is what a sandbox starts from: an image, and where dir is set a
// checkpoint of a sandbox of that image.
type origin struct {
	owner     string // of what is started from it; "": a spare
	img       Image
	resources Resources
	snapshot  *Snapshot // that dir belongs to, if any

	dir    string // of the checkpoint; empty for a cold start
	memory int64  // how much of it there is, in bytes
	token  string // the control token that the agent in the checkpoint answers to
	pins   []Pin  // that the checkpoint's processes may go on using
	// verify compares the checkpoint with what was written, beside the restore;
	// nil where there is no need.
	verify func(context.Context) error
	close  func() error
}

// cold is the origin that is an image alone.
func (m *Manager) cold(img Image) *origin {
	return &origin{img: img, resources: m.resources(img), close: func() error { return nil }}
}

// kept is an image with a checkpoint from the vault. The caller closes it.
func (m *Manager) kept(img Image, name string, r Resources) (*origin, error) {
	read, err := m.vault.Open(name)
	if err != nil {
		return nil, err
	}
	if err := m.cfg.Runtime.Restorable(read.Dir); err != nil {
		return nil, errors.Join(err, read.Close())
	}
	return &origin{img: img, resources: r, dir: read.Dir, memory: read.Bytes(), token: read.Token, verify: read.Verify, close: read.Close}, nil
}

// finish closes an origin that nothing is started from any more.
func (m *Manager) finish(o *origin) {
	if err := o.close(); err != nil {
		m.cfg.Log.Warn("checkpoint not removed", "err", err)
	}
}

// from finds what a template's name or ID stands for: one of the owner's
// snapshots, else an image. The caller closes it.
func (m *Manager) from(ctx context.Context, owner, template string) (*origin, error) {
	template = cmp.Or(template, m.cfg.DefaultTemplate)
	if snap, ok := m.snapshot(owner, template); ok {
		return m.fromSnapshot(ctx, owner, snap)
	}
	if err := m.cfg.Refuse(template); err != nil {
		return nil, err
	}
	img, err := m.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return nil, err
	}
	o := m.cold(img)
	o.owner = owner
	return o, nil
}

// started is a running sandbox that belongs to nobody yet: no identity, and
// unless it was started with a policy no network beyond the host's own
// connections to its agent.
type started struct {
	id           ID
	lease        Lease
	controlToken string // the agent's until it is claimed
	imageRef     string
	resources    Resources
	spare        bool // it was waiting
	policed      bool // its policy is in force
}

// boot starts a sandbox from o up to the point where its agent answers. Its
// policy is in force before its first instruction; without one, it waits
// without a network for a claim.
func (m *Manager) boot(ctx context.Context, id ID, o *origin, p *policy.Compiled) (_ *started, err error) {
	leave, err := turn(ctx, m.starts, o.owner)
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, cancel := context.WithTimeout(ctx, m.cfg.StartTimeout)
	defer cancel()
	fits, err := m.fit(ctx, o)
	if err != nil {
		return nil, err
	}
	defer fits()
	var undo Cleanup
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run(context.WithoutCancel(ctx)))
		}
	}()
	up := &started{id: id, controlToken: cmp.Or(o.token, newControlToken("")), imageRef: o.img.Digest, resources: o.resources}
	if up.lease, err = m.cfg.Network.Acquire(ctx, id); err != nil {
		return nil, fmt.Errorf("acquire network slot: %w", err)
	}
	undo.Add("network slot", func(ctx context.Context) error { return m.cfg.Network.Release(ctx, up.lease) })
	if p != nil {
		if err := m.cfg.Network.Own(up.lease, o.owner); err != nil {
			return nil, err
		}
		if err := m.cfg.Network.Apply(ctx, up.lease, p); err != nil {
			return nil, fmt.Errorf("apply policy: %w", err)
		}
		if err := m.cfg.Network.Repin(up.lease, o.pins); err != nil {
			return nil, err
		}
		up.policed = true
	}
	undo.Add("runtime", func(ctx context.Context) error { return m.cfg.Runtime.Destroy(ctx, id) })
	if err := m.launch(ctx, up, o); err != nil {
		return nil, err
	}
	return up, nil
}

// launch runs the processes and waits for the agent. What a damaged checkpoint
// runs is never handed to anybody.
func (m *Manager) launch(ctx context.Context, up *started, o *origin) error {
	spec, agent := m.runtimeSpec(up, o), up.lease.agent(up.controlToken)
	if o.dir == "" {
		if err := m.cfg.Runtime.Create(ctx, spec); err != nil {
			return fmt.Errorf("create: %w", err)
		}
		if err := m.cfg.Runtime.Start(ctx, up.id); err != nil {
			return fmt.Errorf("start: %w", err)
		}
		return m.answers(ctx, agent)
	}
	g, ctx := errgroup.WithContext(ctx)
	if o.verify != nil {
		g.Go(func() error { return o.verify(ctx) })
	}
	g.Go(func() error {
		if err := m.cfg.Runtime.Restore(ctx, spec, o.dir); err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		return m.answers(ctx, agent)
	})
	return g.Wait()
}

func (m *Manager) answers(ctx context.Context, a AgentAddr) error {
	if err := m.cfg.Agents.WaitReady(ctx, a); err != nil {
		return fmt.Errorf("wait for agent: %w", err)
	}
	return nil
}

// discard frees a sandbox that was never handed out, or whose hand-out failed.
func (m *Manager) discard(ctx context.Context, up *started) error {
	return errors.Join(
		m.cfg.Network.Release(ctx, up.lease),
		m.cfg.Runtime.Destroy(ctx, up.id),
	)
}

func (m *Manager) runtimeSpec(up *started, o *origin) RuntimeSpec {
	hash := sha256.Sum256([]byte(up.controlToken))
	key := hex.EncodeToString(hash[:])
	args, env := slices.Clone(m.cfg.AgentArgs), m.cfg.Env
	if ProvenToken(up.controlToken) {
		env = append(slices.Clone(env), "CORDON_CONTROL_KEY="+key) // users of the sandbox can read arguments
	} else {
		args = append(args, "--control-hash", key) // checkpoints are restored under the arguments they began with
	}
	return RuntimeSpec{
		ID: up.id, Owner: o.owner, Rootfs: o.img.Rootfs, NetNS: up.lease.NetNS, Hostname: string(up.id),
		Resources: up.resources,
		Args:      args,
		Env:       env,
		Binds:     append(append([]Bind{}, o.img.Binds...), m.cfg.Binds...),
	}
}

// resources are the image's limits, with the server's where it names none.
func (m *Manager) resources(img Image) Resources {
	r, d := img.Resources, m.cfg.Defaults
	return Resources{
		CPUs:      cmp.Or(r.CPUs, d.CPUs),
		MemoryMB:  cmp.Or(r.MemoryMB, d.MemoryMB),
		DiskMB:    cmp.Or(r.DiskMB, d.DiskMB),
		Processes: cmp.Or(r.Processes, d.Processes),
	}
}
