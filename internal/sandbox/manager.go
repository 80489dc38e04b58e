package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/share"
)

// Config is what a Manager is made of. Runtime, Network, Images, Store, Agents
// and AgentArgs are required.
type Config struct {
	Runtime Runtime
	Network Network
	Images  Images
	Store   Store
	Agents  Agents

	// Operator is the policy layer above every sandbox's rules; may be nil.
	Operator *policy.Operator
	// AgentArgs is the agent's command line inside a sandbox, without the hash
	// of its control token, which is appended.
	AgentArgs []string
	// CommandEnv is the default environment of commands, over the image's and
	// under the user's.
	CommandEnv map[string]string
	// Binds are shown read-only in every sandbox: the agent, the CA bundle.
	Binds []Bind
	// DefaultTemplate is what a request without a template gets; "" means "base".
	DefaultTemplate string
	// SnapshotDir keeps the memory of paused sandboxes, snapshots and images that
	// have a start command. Its file system is the one that is kept from being
	// full: put writable layers and records on the same or look after theirs.
	SnapshotDir string
	// MaxPaused and MaxSnapshots limit what is kept there; 0 means 1,000 each.
	MaxPaused    int
	MaxSnapshots int
	// MinFree is how many bytes of that file system stay free; 0 means 2 GiB or
	// a twentieth of it, whichever is less, and less than 0 none.
	MinFree int64
	// Refuse says why no new sandbox is made of a template; those that there are go on.
	// nil refuses none.
	Refuse func(template string) error
	// Defaults are the limits of a sandbox whose image names none.
	Defaults Resources
	// Spares says how many running spares to keep for each template.
	Spares map[string]int
	// Host is what all running sandboxes may hold of the machine; 0 is no limit.
	Host Use
	// HostFree returns how many bytes of memory the machine could still give to sandboxes,
	// whatever else uses it. May be nil.
	HostFree func() int64
	// MaxSandboxes limits running sandboxes; 0 means 1,000.
	MaxSandboxes int
	// Proof is what binding a custom domain demands; nil: nothing.
	Proof *DomainProof
	// DefaultPrivate makes sandboxes private whose create does not say.
	DefaultPrivate bool
	// Allowance returns how many one owner may have; nil: as many as the server.
	// It must answer from memory.
	Allowance func(owner string) Allowance
	// MaxTimeout is the longest time a sandbox may ask for; 0 means 24 h.
	MaxTimeout time.Duration
	// StartTimeout is how long a sandbox may take until its agent answers; 0 means 30 s.
	StartTimeout time.Duration

	// InUse reports whether a request to a sandbox is under way, which keeps one
	// with an idle time from ending. May be nil.
	InUse func(ID) bool

	Log *slog.Logger
}

func (c *Config) setDefaults() {
	c.DefaultTemplate = cmp.Or(c.DefaultTemplate, "base")
	c.MaxSandboxes = cmp.Or(c.MaxSandboxes, 1000)
	c.MaxPaused = cmp.Or(c.MaxPaused, 1000)
	c.MaxSnapshots = cmp.Or(c.MaxSnapshots, 1000)
	c.MaxTimeout = cmp.Or(c.MaxTimeout, 24*time.Hour)
	c.StartTimeout = cmp.Or(c.StartTimeout, 30*time.Second)
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	if c.Refuse == nil {
		c.Refuse = func(string) error { return nil }
	}
	if c.InUse == nil {
		c.InUse = func(ID) bool { return false }
	}
	if c.Allowance == nil {
		c.Allowance = func(string) Allowance { return Allowance{} }
	}
}

// Manager makes, changes and ends sandboxes. Its methods are safe for concurrent use;
// Run must be running for sandboxes to expire and for crashes to be noticed.
type Manager struct {
	cfg     Config
	changes changes
	updates *share.Gate // of rules
	tasks   chan func(context.Context)
	ended   chan struct{} // closed when Run has returned

	launch    *launcher
	table     *table
	snapshots *snapshots
	domains   *domains
	spares    *spares
	history   *history
	events    *events
	host      *host
	disk      *disk
}

// New returns a Manager that has started nothing yet: call Reconcile, then Run.
func New(cfg Config) *Manager {
	cfg.setDefaults()
	m := &Manager{
		cfg:     cfg,
		updates: share.NewGate(share.RuleUpdates.Of(parallelUpdates, 0), startQueue, startWait),
		tasks:   make(chan func(context.Context)),
		ended:   make(chan struct{}),
		table:   newTable(), domains: newDomains(cfg.Proof, cfg.Operator), history: newHistory(),
		events: &events{store: cfg.Store, log: cfg.Log},
	}
	vault := checkpoint.NewVault(cfg.SnapshotDir)
	m.snapshots = newSnapshots(cfg.Store, vault, cfg.Log)
	m.host = newHost(&m.cfg, m.table)
	m.disk = &disk{table: m.table, snapshots: m.snapshots, history: m.history, vault: vault}
	m.launch = &launcher{
		cfg: &m.cfg, host: m.host, vault: vault, warm: checkpoint.NewWarm(vault),
		starts: share.NewGate(share.Starts.Of(int64(max(4, 2*runtime.NumCPU())), 0), startQueue, startWait),
		space:  checkpoint.NewSpace(cfg.SnapshotDir, cfg.MinFree, m.disk.shares),
	}
	m.spares = newSpares(m.launch, m.table.starting)
	return m
}

// Run expires sandboxes, notices crashes, keeps the spares filled, samples what
// sandboxes use and watches over the disk until ctx ends. The sandboxes themselves
// go on; spares are destroyed.
func (m *Manager) Run(ctx context.Context) error {
	var owned sync.WaitGroup
	defer owned.Wait()
	defer close(m.ended)
	owned.Go(func() { m.spares.run(ctx) })
	owned.Go(func() { every(ctx, sampleEvery, m.sample) })
	owned.Go(func() { every(ctx, guardTick, m.guardDisk) })
	owned.Go(func() { every(ctx, balanceEvery, m.host.balance) })
	for _, e := range m.table.all() {
		if v := e.view.Load(); v.rec.State == Running {
			owned.Go(func() { m.watch(ctx, v.rec.ID) })
		}
	}
	tick := time.NewTicker(expiryTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case task := <-m.tasks:
			owned.Go(func() { task(ctx) })
		case now := <-tick.C:
			for _, id := range m.table.expired(now) {
				owned.Go(func() { m.expire(ctx, id) })
			}
		}
	}
}

// expiryTick is how often sandboxes are checked for the end of their time: a
// user counts in seconds.
const expiryTick = 200 * time.Millisecond

// spawn hands a task to Run, which owns the goroutine. Once Run has returned
// the task is not run: the next server's Run watches what it adopts.
func (m *Manager) spawn(task func(context.Context)) {
	select {
	case m.tasks <- task:
	case <-m.ended:
	}
}

// announce tells that a recorded sandbox runs from now on, by what step, and watches it.
func (m *Manager) announce(ctx context.Context, rec *Record, step Event) {
	id := rec.ID
	m.spawn(func(ctx context.Context) { m.watch(ctx, id) })
	m.changes.publish(id, Started)
	m.events.add(ctx, rec, step)
}

// watch waits for a sandbox to end by itself and then clears away what is left.
func (m *Manager) watch(ctx context.Context, id ID) {
	v, err := m.table.find("", id)
	if err != nil {
		return
	}
	var reports sync.WaitGroup
	defer reports.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reports.Go(func() { reportKills(ctx, m.cfg.Agents, m.events, v) })
	err = m.cfg.Runtime.Wait(ctx, id)
	detail := "the sandbox's processes ended unexpectedly"
	switch {
	case ctx.Err() != nil:
		return
	case errors.Is(err, ErrOutOfMemory):
		detail = err.Error()
	case err != nil:
		m.cfg.Log.Warn("sandbox wait ended early", "sandbox", id, "err", err)
	}
	select {
	case <-v.done: // killed or paused by us
		return
	default:
	}
	m.cfg.Log.Error("sandbox ended by itself", "sandbox", id, "err", err)
	if errors.Is(err, ErrOutOfMemory) {
		m.events.add(ctx, &v.rec, Event{Name: "oom", Detail: detail})
	}
	if err := m.remove(ctx, id, Event{Name: "exit", Detail: detail}); err != nil && !errs.Is(err, errs.NotFound) {
		m.cfg.Log.Error("sandbox clean-up", "sandbox", id, "err", err)
	}
}

// Pools are the counts of what sandboxes share, for metrics.
func (m *Manager) Pools() (pools []*share.Pool) {
	pools = []*share.Pool{m.launch.starts.Pool(), m.updates.Pool(), m.launch.space.Pool()}
	for _, meter := range []*share.Meter{m.host.memory, m.host.threads} {
		if meter != nil {
			pools = append(pools, meter.Pool())
		}
	}
	return pools
}

// Endpoint is what the ingress and the proxies need to know of a sandbox.
type Endpoint struct {
	Record Record
	Policy *policy.Compiled
	// Done is closed when this run of the sandbox ends.
	Done <-chan struct{}
}

// Endpoint looks a sandbox up in memory; the second result is false when there
// is none. A paused sandbox has an endpoint whose Done is closed.
func (m *Manager) Endpoint(id ID) (Endpoint, bool) {
	v, err := m.table.find("", id)
	if err != nil {
		return Endpoint{}, false
	}
	return Endpoint{Record: v.rec, Policy: v.policy, Done: v.done}, true
}

// Policy returns the policy in force for a sandbox.
func (m *Manager) Policy(id ID) (*policy.Compiled, bool) {
	v, err := m.table.find("", id)
	if err != nil {
		return nil, false
	}
	return v.policy, true
}

// save stores a changed record and shows it to everyone. done is kept unless
// the caller gives a new one.
func (m *Manager) save(ctx context.Context, e *entry, next view) error {
	rev, err := m.cfg.Store.PutSandbox(ctx, next.rec)
	if err != nil {
		return fmt.Errorf("store record: %w", err)
	}
	next.rec.Revision = rev
	e.view.Store(&next)
	return nil
}

// restate writes a record again after a write that failed, for a write that
// failed may have reached the disk all the same.
func (m *Manager) restate(ctx context.Context, e *entry, v view) error {
	all, err := m.cfg.Store.Sandboxes(ctx)
	if err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	for _, stored := range all {
		if stored.ID == v.rec.ID && stored.Revision != v.rec.Revision {
			v.rec.Revision = stored.Revision
			return m.save(ctx, e, v)
		}
	}
	return nil
}
