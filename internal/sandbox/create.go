package sandbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Create starts a sandbox and returns when its agent answers, its policy is in
// force and its record is on disk. Nothing is left behind by a failed one.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (rec Record, err error) {
	began := time.Now()
	timeout, err := m.timeout(req.Timeout)
	if err != nil {
		return Record{}, err
	}
	compiled, err := policy.Compile(req.Egress, m.cfg.Operator, 1)
	if err != nil {
		return Record{}, err
	}
	if err := ValidMaskHost(req.MaskRequestHost); err != nil {
		return Record{}, err
	}
	if err := m.reserve(); err != nil {
		return Record{}, err
	}
	defer m.unreserve()
	img, err := m.cfg.Images.Resolve(ctx, cmp.Or(req.Template, m.cfg.DefaultTemplate))
	if err != nil {
		return Record{}, err
	}
	var undo Cleanup
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run(context.WithoutCancel(ctx)))
		}
	}()
	up, err := m.acquire(ctx, img)
	if err != nil {
		return Record{}, err
	}
	undo.Add("sandbox", func(ctx context.Context) error { return m.discard(ctx, up) })
	rec = newRecord(req, img, up)
	rec.Expires = began.Add(timeout).UTC()
	rec.Runtime = m.cfg.Runtime.Name()
	if err := m.claim(ctx, &rec, img, compiled); err != nil {
		return Record{}, err
	}
	if rec.Revision, err = m.cfg.Store.PutSandbox(ctx, rec); err != nil {
		return Record{}, fmt.Errorf("store record: %w", err)
	}
	m.admit(rec, compiled)
	m.spawn(func(ctx context.Context) { m.watch(ctx, rec.ID) })
	m.event(ctx, &rec, Event{Name: "create"})
	m.cfg.Log.Info("sandbox started", "sandbox", rec.ID, "template", rec.Template, "spare", up.spare, "took", time.Since(began))
	return rec, nil
}

// timeout checks a requested lifetime; 0 asks for the default.
func (m *Manager) timeout(d time.Duration) (time.Duration, error) {
	switch {
	case d == 0:
		return min(DefaultTimeout, m.cfg.MaxTimeout), nil
	case d < 0:
		return 0, errs.New(errs.Invalid, "timeout must be positive, got %d seconds", int64(d.Seconds()))
	case d > m.cfg.MaxTimeout:
		return 0, errs.New(errs.Invalid, "timeout is %d seconds, this server allows at most %d", int64(d.Seconds()), int64(m.cfg.MaxTimeout.Seconds()))
	}
	return d, nil
}

// newRecord is the record of a sandbox about to be claimed.
func newRecord(req CreateRequest, img Image, up *started) Record {
	now := time.Now().UTC()
	rec := Record{
		ID: up.id, Owner: req.Owner,
		TemplateID: img.TemplateID, Template: img.Name, ImageRef: img.Digest,
		State: Running, Created: now, Started: now,
		Metadata: maps.Clone(req.Metadata), EnvVars: maps.Clone(req.EnvVars),
		OnTimeout: cmp.Or(req.OnTimeout, KillOnTimeout), AutoResume: req.AutoResume,
		Resources: up.resources,
		Egress:    req.Egress, Generation: 1,
		AllowPublicTraffic: req.AllowPublicTraffic, MaskRequestHost: req.MaskRequestHost,
		ControlToken: up.controlToken, Lease: up.lease,
	}
	if req.Secure {
		rec.AccessToken = newToken()
	}
	if !rec.Public() {
		rec.TrafficToken = newToken()
	}
	return rec
}

// claim makes a started, nameless sandbox the record's: first its policy, then
// its identity, so that nothing it is told to run finds an open network.
func (m *Manager) claim(ctx context.Context, rec *Record, img Image, p *policy.Compiled) error {
	if err := m.cfg.Network.Apply(ctx, rec.Lease, p); err != nil {
		return fmt.Errorf("apply policy: %w", err)
	}
	return m.initAgent(ctx, rec, img)
}

func (m *Manager) initAgent(ctx context.Context, rec *Record, img Image) error {
	vars := maps.Clone(img.Env)
	if vars == nil {
		vars = map[string]string{}
	}
	maps.Copy(vars, m.cfg.CommandEnv)
	maps.Copy(vars, rec.EnvVars)
	err := m.cfg.Agents.Init(ctx, rec.Agent(), AgentInit{
		SandboxID: rec.ID, TemplateID: rec.TemplateID, Hostname: string(rec.ID),
		EnvVars: vars, AccessToken: rec.AccessToken,
		DefaultUser: img.User, DefaultWorkdir: img.Workdir, Time: time.Now(),
	})
	if err != nil {
		return fmt.Errorf("initialise agent: %w", err)
	}
	return nil
}

// started is a running sandbox that belongs to nobody yet: no identity, no
// network beyond the host's own connections to its agent.
type started struct {
	id           ID
	lease        Lease
	controlToken string
	imageRef     string
	resources    Resources
	spare        bool // it was waiting
}

// acquire takes a spare of the image, or starts a sandbox to order.
func (m *Manager) acquire(ctx context.Context, img Image) (*started, error) {
	if up := m.spares.take(img); up != nil {
		return up, nil
	}
	return m.start(ctx, img)
}

// start boots a sandbox up to the point where its agent answers.
func (m *Manager) start(ctx context.Context, img Image) (_ *started, err error) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.StartTimeout)
	defer cancel()
	select {
	case m.starts <- struct{}{}:
		defer func() { <-m.starts }()
	case <-ctx.Done():
		return nil, errs.Wrap(errs.Unavailable, ctx.Err(), "the server is busy starting other sandboxes: try again")
	}
	var undo Cleanup
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run(context.WithoutCancel(ctx)))
		}
	}()
	up := &started{id: NewID(), controlToken: newToken(), imageRef: img.Digest, resources: m.resources(img)}
	if up.lease, err = m.cfg.Network.Acquire(ctx, up.id); err != nil {
		return nil, fmt.Errorf("acquire network slot: %w", err)
	}
	undo.Add("network slot", func(ctx context.Context) error { return m.cfg.Network.Release(ctx, up.lease) })
	undo.Add("runtime", func(ctx context.Context) error { return m.cfg.Runtime.Destroy(ctx, up.id) })
	if err := m.cfg.Runtime.Create(ctx, m.runtimeSpec(up, img)); err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	if err := m.cfg.Runtime.Start(ctx, up.id); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	if err := m.cfg.Agents.WaitReady(ctx, up.lease.agent(up.controlToken)); err != nil {
		return nil, fmt.Errorf("wait for agent: %w", err)
	}
	return up, nil
}

// discard frees a sandbox that was never handed out, or whose hand-out failed.
func (m *Manager) discard(ctx context.Context, up *started) error {
	return errors.Join(
		m.cfg.Network.Release(ctx, up.lease),
		m.cfg.Runtime.Destroy(ctx, up.id),
	)
}

func (m *Manager) runtimeSpec(up *started, img Image) RuntimeSpec {
	hash := sha256.Sum256([]byte(up.controlToken))
	return RuntimeSpec{
		ID: up.id, Rootfs: img.Rootfs, NetNS: up.lease.NetNS, Hostname: string(up.id),
		Resources: up.resources,
		Args:      append(append([]string{}, m.cfg.AgentArgs...), "--control-hash", hex.EncodeToString(hash[:])),
		Env:       m.cfg.Env,
		Binds:     append(append([]Bind{}, img.Binds...), m.cfg.Binds...),
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

// newToken returns 128 random bits or more in lower-case letters and digits.
func newToken() string { return strings.ToLower(rand.Text()) }
