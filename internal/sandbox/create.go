package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Create starts a sandbox and returns when its agent answers, its policy is in
// force and its record is on disk. Nothing is left behind by a failed one.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (rec Record, err error) {
	began := time.Now()
	timeout, err := m.valid(&req)
	if err != nil {
		return Record{}, err
	}
	compiled, err := policy.Compile(req.Egress, m.cfg.Operator, 1)
	if err != nil {
		return Record{}, err
	}
	place, err := m.reserve(req.Owner)
	if err != nil {
		return Record{}, err
	}
	defer place.release()
	if err := m.space.Check(req.Owner); err != nil {
		return Record{}, err
	}
	o, err := m.from(ctx, req.Owner, req.Template)
	if err != nil {
		return Record{}, err
	}
	defer m.finish(o)
	var undo Cleanup
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run(context.WithoutCancel(ctx)))
		}
	}()
	up, err := m.acquire(ctx, o, compiled)
	if err != nil {
		return Record{}, err
	}
	undo.Add("sandbox", func(ctx context.Context) error { return m.discard(ctx, up) })
	rec = newRecord(req, o, up)
	rec.Timeout, rec.Expires = timeout, began.Add(timeout).UTC()
	rec.Runtime = m.cfg.Runtime.Name()
	if err := m.claim(ctx, &rec, up, claimed{o.img, compiled, o.pins}); err != nil {
		return Record{}, err
	}
	if err := m.open(ctx, &rec, compiled, place); err != nil {
		return Record{}, err
	}
	if up.spare {
		m.spawn(func(ctx context.Context) { m.assign(ctx, rec.ID, rec.Owner) })
	}
	m.event(ctx, &rec, Event{Name: "create"})
	m.cfg.Log.Info("sandbox started", "sandbox", rec.ID, "template", rec.Template, "spare", up.spare, "took", time.Since(began))
	return rec, nil
}

// valid checks everything of a request but its rules, and returns the lifetime.
func (m *Manager) valid(req *CreateRequest) (time.Duration, error) {
	timeout, err := m.timeout(cmp.Or(req.Timeout, req.IdleTimeout))
	if err != nil {
		return 0, err
	}
	if _, err := m.timeout(req.IdleTimeout); err != nil {
		return 0, errs.New(errs.Invalid, "idleTimeout is %d seconds, this server allows 1 to %d", int64(req.IdleTimeout.Seconds()), int64(m.cfg.MaxTimeout.Seconds()))
	}
	if err := ValidMaskHost(req.MaskRequestHost); err != nil {
		return 0, err
	}
	if private := m.cfg.DefaultPrivate; private && req.AllowPublicTraffic == nil {
		public := false
		req.AllowPublicTraffic = &public
	}
	if req.MaskOrigin && req.MaskRequestHost == "" {
		return 0, errs.New(errs.Invalid, "maskOrigin needs maskRequestHost: name the host that services are to see, such as localhost:${PORT}")
	}
	return timeout, ValidLabels(req.Metadata, req.EnvVars)
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

// open stores the record of a claimed sandbox and shows it to everyone.
func (m *Manager) open(ctx context.Context, rec *Record, p *policy.Compiled, place *reservation) (err error) {
	if rec.Revision, err = m.cfg.Store.PutSandbox(ctx, *rec); err != nil {
		return fmt.Errorf("store record: %w", err)
	}
	m.admit(*rec, p, place)
	id := rec.ID
	m.spawn(func(ctx context.Context) { m.watch(ctx, id) })
	return nil
}

// newRecord is the record of a sandbox about to be claimed.
func newRecord(req CreateRequest, o *origin, up *started) Record {
	now := time.Now().UTC()
	rec := Record{
		ID: up.id, Owner: req.Owner,
		TemplateID: o.img.TemplateID, Template: o.img.Name, ImageRef: o.img.Digest,
		State: Running, Created: now, Started: now,
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

// claimed is what a sandbox is claimed with besides its record.
type claimed struct {
	img    Image
	policy *policy.Compiled
	pins   []Pin
}

// claim makes a started, nameless sandbox the record's: first its policy, then
// its identity, so that nothing it is told to run finds an open network.
func (m *Manager) claim(ctx context.Context, rec *Record, up *started, c claimed) error {
	if !up.policed {
		if err := m.cfg.Network.Own(rec.Lease, rec.Owner); err != nil {
			return err
		}
		if err := m.cfg.Network.Apply(ctx, rec.Lease, c.policy); err != nil {
			return fmt.Errorf("apply policy: %w", err)
		}
		if err := m.cfg.Network.Repin(rec.Lease, c.pins); err != nil {
			return err
		}
	}
	return m.initAgent(ctx, rec, up.lease.agent(up.controlToken), c.img)
}

// initAgent tells an agent, which answers to at's token, whose it is from now on.
func (m *Manager) initAgent(ctx context.Context, rec *Record, at AgentAddr, img Image) error {
	vars := m.commandEnv(img)
	maps.Copy(vars, rec.EnvVars)
	err := m.cfg.Agents.Init(ctx, at, AgentInit{
		SandboxID: rec.ID, TemplateID: rec.TemplateID, Hostname: string(rec.ID),
		EnvVars: vars, AccessToken: rec.AccessToken,
		DefaultUser: img.User, DefaultWorkdir: img.Workdir, Time: time.Now(),
		ControlToken: rec.ControlToken,
	})
	if err != nil {
		return fmt.Errorf("initialise agent: %w", err)
	}
	return nil
}

// commandEnv is the environment of commands before the owner's part.
func (m *Manager) commandEnv(img Image) map[string]string {
	vars := map[string]string{}
	maps.Copy(vars, img.Env)
	maps.Copy(vars, m.cfg.CommandEnv)
	return vars
}

// acquire takes a spare of the image, or starts a sandbox to order. One from a
// snapshot is under its policy from its first instruction on: its processes go
// on where they were.
func (m *Manager) acquire(ctx context.Context, o *origin, p *policy.Compiled) (*started, error) {
	if o.dir == "" {
		fits, err := m.fit(ctx, o)
		if err != nil {
			return nil, err
		}
		fits() // a spare has its memory already
		if up := m.spares.take(o.owner, o.img); up != nil {
			return up, nil
		}
	}
	return m.startFrom(ctx, sandboxid.New(), o, p)
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
