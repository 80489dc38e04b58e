package sandbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/checkpoint"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
	"github.com/cordonhq/cordon/internal/share"
)

// This file is the way of a sandbox from a request to its record, from top to bottom:
// check, reserve, origin, boot, claim, record, and then publish. Copies, resumes and
// resets go the same way from their origin on.

// Create starts a sandbox and returns when its agent answers, its policy is in
// force and its record is on disk. Nothing is left behind by a failed one.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (rec Record, err error) {
	began := time.Now()

	// Check.
	lifetime, err := m.cfg.check(&req)
	if err != nil {
		return Record{}, err
	}
	compiled, err := policy.Compile(req.Egress, m.cfg.Operator, 1)
	if err != nil {
		return Record{}, err
	}

	// Reserve.
	room, err := m.reserve(req.Owner, Running)
	if err != nil {
		return Record{}, err
	}
	defer room.release()
	if err := m.launch.space.Check(req.Owner); err != nil {
		return Record{}, err
	}

	// Origin.
	o, err := m.origin(ctx, req.Owner, req.Template)
	if err != nil {
		return Record{}, err
	}
	defer o.close()

	// Boot, if no spare is waiting.
	var undo Cleanup
	defer undo.OnError(ctx, &err)
	up, err := m.spares.take(ctx, o)
	if up == nil && err == nil {
		up, err = o.Start(ctx, sandboxid.New(), compiled)
	}
	if err != nil {
		return Record{}, err
	}
	undo.Add("sandbox", up.discard)

	// Claim.
	rec = newRecord(req, o, up)
	rec.Timeout, rec.Expires = lifetime, began.Add(lifetime).UTC()
	if err := up.claim(ctx, &rec, compiled); err != nil {
		return Record{}, err
	}

	// Record.
	if err := m.record(ctx, &rec, compiled, room); err != nil {
		return Record{}, err
	}

	// Publish.
	if up.spare {
		m.spawn(func(ctx context.Context) { m.host.assign(ctx, rec.ID, rec.Owner) })
	}
	m.announce(ctx, &rec, Event{Name: "create"})
	m.cfg.Log.Info("sandbox started", "sandbox", rec.ID, "template", rec.Template, "spare", up.spare, "took", time.Since(began))
	return rec, nil
}

// Check.

// check looks at everything of a request but its rules, and returns the lifetime.
func (c *Config) check(req *CreateRequest) (time.Duration, error) {
	lifetime, err := c.lifetime(cmp.Or(req.Timeout, req.IdleTimeout))
	if err != nil {
		return 0, err
	}
	if _, err := c.lifetime(req.IdleTimeout); err != nil {
		return 0, errs.New(errs.Invalid, "idleTimeout is %d seconds, this server allows 1 to %d", int64(req.IdleTimeout.Seconds()), int64(c.MaxTimeout.Seconds()))
	}
	if err := ValidMaskHost(req.MaskRequestHost); err != nil {
		return 0, err
	}
	if c.DefaultPrivate && req.AllowPublicTraffic == nil {
		public := false
		req.AllowPublicTraffic = &public
	}
	if req.MaskOrigin && req.MaskRequestHost == "" {
		return 0, errs.New(errs.Invalid, "maskOrigin needs maskRequestHost: name the host that services are to see, such as localhost:${PORT}")
	}
	return lifetime, ValidLabels(req.Metadata, req.EnvVars)
}

// lifetime checks a requested time; 0 asks for the default.
func (c *Config) lifetime(d time.Duration) (time.Duration, error) {
	switch {
	case d == 0:
		return min(DefaultTimeout, c.MaxTimeout), nil
	case d < 0:
		return 0, errs.New(errs.Invalid, "timeout must be positive, got %d seconds", int64(d.Seconds()))
	case d > c.MaxTimeout:
		return 0, errs.New(errs.Invalid, "timeout is %d seconds, this server allows at most %d", int64(d.Seconds()), int64(c.MaxTimeout.Seconds()))
	}
	return d, nil
}

// Origin.

// launcher is what sandboxes are started with.
type launcher struct {
	cfg    *Config
	starts *share.Gate // of starts, restores and checkpoints
	host   *host
	vault  *checkpoint.Vault
	warm   *checkpoint.Warm
	space  *checkpoint.Space
}

// origin is what a sandbox starts from: an image, and where dir is set a
// checkpoint of a sandbox of that image, from a snapshot, a pause or a warm copy.
type origin struct {
	*launcher
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
	verify  func(context.Context) error
	release func() error // of the checkpoint; nil without one
}

// origin finds what a template's name or ID stands for: one of the owner's
// snapshots, else an image. The caller closes it.
func (m *Manager) origin(ctx context.Context, owner, template string) (*origin, error) {
	template = cmp.Or(template, m.cfg.DefaultTemplate)
	if snap, ok := m.snapshots.find(owner, template); ok {
		return m.launch.fromSnapshot(ctx, owner, snap)
	}
	if err := m.cfg.Refuse(template); err != nil {
		return nil, err
	}
	img, err := m.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return nil, err
	}
	return m.launch.fromImage(owner, img), nil
}

// fromImage is the origin that is an image alone.
func (l *launcher) fromImage(owner string, img Image) *origin {
	r, d := img.Resources, l.cfg.Defaults
	return &origin{launcher: l, owner: owner, img: img, resources: Resources{
		CPUs:      cmp.Or(r.CPUs, d.CPUs),
		MemoryMB:  cmp.Or(r.MemoryMB, d.MemoryMB),
		DiskMB:    cmp.Or(r.DiskMB, d.DiskMB),
		Processes: cmp.Or(r.Processes, d.Processes),
	}}
}

// fromCheckpoint is the origin that is an image with a checkpoint from the vault.
func (l *launcher) fromCheckpoint(owner string, img Image, r Resources, name string) (*origin, error) {
	read, err := l.vault.Open(name)
	if err != nil {
		return nil, err
	}
	if err := l.cfg.Runtime.Restorable(read.Dir); err != nil {
		return nil, errors.Join(err, read.Close())
	}
	return &origin{launcher: l, owner: owner, img: img, resources: r, dir: read.Dir, memory: read.Bytes(), token: read.Token, verify: read.Verify, release: read.Close}, nil
}

// imageOf returns a template's image if it is still the build that a checkpoint
// was made over: a checkpoint holds what differs from it, and open files of it.
func (l *launcher) imageOf(ctx context.Context, template, digest string) (Image, error) {
	img, err := l.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return Image{}, err
	}
	if img.Digest != digest {
		return Image{}, errs.New(errs.Conflict, "it was made on another build of template %q (%s, now %s)", template, digest, img.Digest)
	}
	return img, nil
}

// close gives back an origin that nothing is started from any more.
func (o *origin) close() {
	if o.release == nil {
		return
	}
	if err := o.release(); err != nil {
		o.cfg.Log.Warn("checkpoint not removed", "err", err)
	}
}

// Boot.

// started is a running sandbox that has no owner yet: no identity, and
// unless it was started with a policy no network beyond the host's own
// connections to its agent.
type started struct {
	*launcher
	id           ID
	img          Image
	lease        Lease
	controlToken string // the agent's until it is claimed
	resources    Resources
	spare        bool // it was waiting
	policed      bool // its policy is in force
}

// Start runs a sandbox up to the point where its agent answers, and an image's start
// command is ready. What starts from a checkpoint is under policy p from its first
// instruction on: its processes go on where they were. What starts from an image waits
// without a network for its claim.
func (o *origin) Start(ctx context.Context, id ID, p *policy.Compiled) (*started, error) {
	switch {
	case o.dir != "":
		return o.boot(ctx, id, p)
	case len(o.img.Start) > 0:
		return o.startWarm(ctx, id)
	default:
		return o.boot(ctx, id, nil)
	}
}

// boot takes a network slot and runs the processes in it. The policy, if there is one,
// is in force before the first instruction.
func (o *origin) boot(ctx context.Context, id ID, p *policy.Compiled) (_ *started, err error) {
	leave, err := turn(ctx, o.starts, o.owner)
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, cancel := context.WithTimeout(ctx, o.cfg.StartTimeout)
	defer cancel()
	release, err := o.host.fit(ctx, o)
	if err != nil {
		return nil, err
	}
	defer release()
	var undo Cleanup
	defer undo.OnError(ctx, &err)
	up := &started{launcher: o.launcher, id: id, img: o.img, controlToken: cmp.Or(o.token, newControlToken("")), resources: o.resources}
	if up.lease, err = o.cfg.Network.Acquire(ctx, id); err != nil {
		return nil, fmt.Errorf("acquire network slot: %w", err)
	}
	undo.Add("network slot", func(ctx context.Context) error { return o.cfg.Network.Release(ctx, up.lease) })
	if p != nil {
		if err := up.enforce(ctx, o.owner, p); err != nil {
			return nil, err
		}
		if err := o.cfg.Network.Repin(up.lease, o.pins); err != nil {
			return nil, err
		}
	}
	undo.Add("runtime", func(ctx context.Context) error { return o.cfg.Runtime.Destroy(ctx, id) })
	if o.dir == "" {
		return up, o.cold(ctx, up)
	}
	return up, o.restore(ctx, up)
}

// cold runs the processes of an image and waits for the agent.
func (o *origin) cold(ctx context.Context, up *started) error {
	if err := o.cfg.Runtime.Create(ctx, o.spec(up)); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := o.cfg.Runtime.Start(ctx, up.id); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	return up.ready(ctx)
}

// restore runs the processes of a checkpoint and waits for the agent. What a damaged
// checkpoint runs is never handed out.
func (o *origin) restore(ctx context.Context, up *started) error {
	g, ctx := errgroup.WithContext(ctx)
	if o.verify != nil {
		g.Go(func() error { return o.verify(ctx) })
	}
	g.Go(func() error {
		if err := o.cfg.Runtime.Restore(ctx, o.spec(up), o.dir); err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		return up.ready(ctx)
	})
	return g.Wait()
}

func (o *origin) spec(up *started) RuntimeSpec {
	hash := sha256.Sum256([]byte(up.controlToken))
	key := hex.EncodeToString(hash[:])
	args, env := slices.Clone(o.cfg.AgentArgs), []string(nil)
	if ProvenToken(up.controlToken) {
		env = []string{"CORDON_CONTROL_KEY=" + key} // users of the sandbox can read arguments
	} else {
		args = append(args, "--control-hash", key) // checkpoints are restored under the arguments they began with
	}
	return RuntimeSpec{
		ID: up.id, Owner: o.owner, Rootfs: o.img.Rootfs, NetNS: up.lease.NetNS, Hostname: string(up.id),
		Resources: up.resources,
		Args:      args,
		Env:       env,
		Binds:     slices.Concat(o.img.Binds, o.cfg.Binds),
	}
}

func (up *started) agent() AgentAddr { return up.lease.agent(up.controlToken) }

func (up *started) ready(ctx context.Context) error {
	if err := up.cfg.Agents.WaitReady(ctx, up.agent()); err != nil {
		return fmt.Errorf("wait for agent: %w", err)
	}
	return nil
}

// discard frees a sandbox that was never handed out, or whose hand-out failed.
func (up *started) discard(ctx context.Context) error {
	return errors.Join(
		up.cfg.Network.Release(ctx, up.lease),
		up.cfg.Runtime.Destroy(ctx, up.id),
	)
}

// Claim.

// newRecord is the record of a sandbox about to be claimed.
func newRecord(req CreateRequest, o *origin, up *started) Record {
	now := time.Now().UTC()
	rec := Record{
		ID: up.id, Owner: req.Owner,
		TemplateID: o.img.TemplateID, Template: o.img.Name, ImageRef: o.img.Digest,
		Runtime: o.cfg.Runtime.Name(),
		State:   Running, Created: now, Started: now,
		Metadata: maps.Clone(req.Metadata), EnvVars: maps.Clone(req.EnvVars),
		OnTimeout: cmp.Or(req.OnTimeout, KillOnTimeout), AutoResume: req.AutoResume, AutoResumeOn: req.AutoResumeOn,
		IdleTimeout: req.IdleTimeout,
		Resources:   up.resources,
		AllowIn:     slices.Clone(req.AllowIn),
		Egress:      req.Egress, Generation: 1,
		AllowPublicTraffic: req.AllowPublicTraffic, MaskRequestHost: req.MaskRequestHost, MaskOrigin: req.MaskOrigin,
		HTTPSPorts:   slices.Clone(req.HTTPSPorts),
		ControlToken: newControlToken(up.controlToken), Lease: up.lease,
	}
	if s := o.snapshot; s != nil {
		rec.TemplateID, rec.Template, rec.Image = s.ID, s.label(), s.Image
	}
	if req.Secure {
		rec.AccessToken = sandboxid.NewToken()
	}
	if !rec.Public() {
		rec.TrafficToken = sandboxid.NewToken()
	}
	return rec
}

// claim makes a started sandbox the record's: first its policy, then
// its identity, so that nothing it is told to run finds an open network.
func (up *started) claim(ctx context.Context, rec *Record, p *policy.Compiled) error {
	if !up.policed {
		if err := up.enforce(ctx, rec.Owner, p); err != nil {
			return err
		}
	}
	vars := up.cfg.commandEnv(up.img)
	maps.Copy(vars, rec.EnvVars)
	err := up.cfg.Agents.Init(ctx, up.agent(), AgentInit{
		SandboxID: rec.ID, TemplateID: rec.TemplateID, Hostname: string(rec.ID),
		EnvVars: vars, AccessToken: rec.AccessToken,
		DefaultUser: up.img.User, DefaultWorkdir: up.img.Workdir, Time: time.Now(),
		ControlToken: rec.ControlToken,
	})
	if err != nil {
		return fmt.Errorf("initialise agent: %w", err)
	}
	return nil
}

// enforce puts an owner's policy in force.
func (up *started) enforce(ctx context.Context, owner string, p *policy.Compiled) error {
	if err := up.cfg.Network.Own(up.lease, owner); err != nil {
		return err
	}
	if err := up.cfg.Network.Apply(ctx, up.lease, p); err != nil {
		return fmt.Errorf("apply policy: %w", err)
	}
	up.policed = true
	return nil
}

// commandEnv is the environment of commands before the owner's part.
func (c *Config) commandEnv(img Image) map[string]string {
	vars := map[string]string{}
	maps.Copy(vars, img.Env)
	maps.Copy(vars, c.CommandEnv)
	return vars
}

// newControlToken returns a control token for the agent that has an old one, or for
// a new agent. Tokens say how they are used, because an agent outlives the server
// that started it, in a running sandbox as in a checkpoint.
func newControlToken(old string) string {
	if old != "" && !ProvenToken(old) {
		return sandboxid.NewToken()
	}
	return provenPrefix + sandboxid.NewToken()
}

const provenPrefix = "proven_"

// ProvenToken reports whether an agent proves that it knows its control token, and
// is not to be sent it. Agents of older versions are.
func ProvenToken(token string) bool { return strings.HasPrefix(token, provenPrefix) }

// Record.

// record stores the record of a claimed sandbox and makes it found, in the room that was
// reserved for it.
func (m *Manager) record(ctx context.Context, rec *Record, p *policy.Compiled, room *reservation) (err error) {
	if rec.Revision, err = m.cfg.Store.PutSandbox(ctx, *rec); err != nil {
		return fmt.Errorf("store record: %w", err)
	}
	m.domains.add(rec)
	m.table.add(*rec, p, room)
	return nil
}
