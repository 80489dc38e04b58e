package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

var errBroken = errors.New("broken on purpose")

// world is a host in memory: what runs, which slots are taken and under which
// policy, what is on disk. Any named step can be made to fail.
type world struct {
	mu      sync.Mutex
	fail    map[string]bool
	steps   []string // what happened, in order
	running map[ID]chan struct{}
	slots   map[ID]*policy.Compiled // nil: no policy yet
	pins    map[ID][]Pin
	stored  map[ID]Record
	paused  map[ID]bool
	snaps   map[string]Snapshot
	revs    uint64
	events  []Event
	agents  map[netip.Addr]AgentInit
	nextIP  byte
	owners  map[ID]string
	memory  map[ID]int64 // bytes that each uses
	limits  map[string]Use
	kills   chan Kill // for want of memory, as the agents tell them
}

func newWorld() *world {
	return &world{
		fail: map[string]bool{}, running: map[ID]chan struct{}{}, slots: map[ID]*policy.Compiled{}, pins: map[ID][]Pin{},
		stored: map[ID]Record{}, paused: map[ID]bool{}, snaps: map[string]Snapshot{}, agents: map[netip.Addr]AgentInit{}, nextIP: 1, kills: make(chan Kill),
		owners: map[ID]string{}, memory: map[ID]int64{}, limits: map[string]Use{},
	}
}

// step notes that something was tried and fails if the test asked for that.
func (w *world) step(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps = append(w.steps, name)
	if w.fail[name] {
		return fmt.Errorf("%s: %w", name, errBroken)
	}
	return nil
}

func (w *world) failAt(name string, fail bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[name] = fail
}

// empty reports what a finished test must not leave.
func (w *world) leftovers() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var left []string
	for id := range w.running {
		left = append(left, "process "+string(id))
	}
	for id := range w.slots {
		left = append(left, "slot "+string(id))
	}
	for id := range w.stored {
		left = append(left, "record "+string(id))
	}
	slices.Sort(left)
	return left
}

func (w *world) policyOf(id ID) *policy.Compiled {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.slots[id]
}

type fakeRuntime struct{ *world }

func (fakeRuntime) Name() string { return "memory/1" }

func (r fakeRuntime) Create(_ context.Context, s RuntimeSpec) error {
	r.assign(s.ID, s.Owner)
	return r.step("create")
}

// assign notes whose part of the host a sandbox draws from.
func (r fakeRuntime) assign(id ID, owner string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.owners[id] = owner
}

func (r fakeRuntime) Assign(_ context.Context, id ID, owner string) error {
	if err := r.step("assign"); err != nil {
		return err
	}
	r.assign(id, owner)
	return nil
}

func (r fakeRuntime) Use(_ context.Context, owner string) (u Use, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, o := range r.owners {
		if o == owner {
			u.Memory += r.memory[id]
			u.Threads++
		}
	}
	return u, nil
}

func (r fakeRuntime) UseOfAll(context.Context) (u Use, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.owners {
		u.Memory += r.memory[id]
		u.Threads++
	}
	return u, nil
}

func (r fakeRuntime) Limit(_ context.Context, owner string, most Use) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.limits[owner] = most
	return nil
}

func (r fakeRuntime) Start(_ context.Context, id ID) error {
	if err := r.step("start"); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running[id] = make(chan struct{})
	return nil
}

func (r fakeRuntime) Pause(_ context.Context, id ID) error  { return r.freeze(id, true) }
func (r fakeRuntime) Resume(_ context.Context, id ID) error { return r.freeze(id, false) }

func (r fakeRuntime) freeze(id ID, stop bool) error {
	if err := r.step(map[bool]string{true: "freeze", false: "thaw"}[stop]); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paused[id] == stop {
		return errs.New(errs.Conflict, "sandbox %s is so already", id)
	}
	r.paused[id] = stop
	return nil
}

func (fakeRuntime) Restorable(string) error { return nil }

func (r fakeRuntime) Checkpoint(_ context.Context, id ID, dir string) error {
	if err := r.step("checkpoint"); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "memory"), []byte(id), 0o644) // as gVisor does
}

func (r fakeRuntime) Restore(ctx context.Context, s RuntimeSpec, dir string) error {
	if err := r.step("restore"); err != nil {
		return err
	}
	if b, err := os.ReadFile(filepath.Join(dir, "memory")); err != nil || !ID(b).Valid() {
		return fmt.Errorf("wrong snapshot: %q, %w", b, err)
	}
	r.assign(s.ID, s.Owner)
	return r.Start(ctx, s.ID)
}

func (r fakeRuntime) Wait(ctx context.Context, id ID) error {
	r.mu.Lock()
	done, ok := r.running[id]
	r.mu.Unlock()
	if !ok { // it has ended already
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-done:
		return nil
	}
}

func (fakeRuntime) Stats(context.Context, ID) (Stats, error) { return Stats{}, nil }

func (r fakeRuntime) Destroy(_ context.Context, id ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if done, ok := r.running[id]; ok {
		close(done)
		delete(r.running, id)
	}
	delete(r.paused, id)
	delete(r.owners, id)
	delete(r.memory, id)
	r.steps = append(r.steps, "destroy")
	return nil
}

func (r fakeRuntime) List(context.Context) ([]ID, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Keys(r.running)), nil
}

// crash ends a sandbox from inside.
func (r fakeRuntime) crash(id ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.running[id])
	delete(r.running, id)
}

type fakeNetwork struct{ *world }

func (n fakeNetwork) Acquire(_ context.Context, id ID) (Lease, error) {
	if err := n.step("acquire"); err != nil {
		return Lease{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.slots[id] = nil
	n.nextIP++
	return Lease{Sandbox: id, Addr4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, n.nextIP}), 30)}, nil
}

func (n fakeNetwork) Own(Lease, string) error { return nil }

func (n fakeNetwork) Apply(_ context.Context, l Lease, p *policy.Compiled) error {
	if err := n.step("apply"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.slots[l.Sandbox] = p
	return nil
}

func (n fakeNetwork) Pins(id ID) []Pin {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pins[id]
}

func (n fakeNetwork) Repin(l Lease, pins []Pin) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.slots[l.Sandbox] == nil {
		return errors.New("pinned before a policy was applied")
	}
	n.pins[l.Sandbox] = pins
	return nil
}

func (n fakeNetwork) Release(_ context.Context, l Lease) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.slots, l.Sandbox)
	n.steps = append(n.steps, "release")
	return nil
}

func (n fakeNetwork) Reconcile(_ context.Context, inUse map[ID]Held) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.slots = map[ID]*policy.Compiled{}
	for id, h := range inUse {
		n.slots[id] = h.Policy
	}
	return nil
}

type fakeImages struct{ *world }

func (i fakeImages) Resolve(_ context.Context, template string) (Image, error) {
	if err := i.step("resolve"); err != nil {
		return Image{}, err
	}
	if template != "base" {
		return Image{}, errs.New(errs.NotFound, "template %q not found", template)
	}
	return Image{TemplateID: "base", Name: "base", Digest: "sha256:1", Rootfs: "/", User: "user", Env: map[string]string{"PATH": "/bin"}}, nil
}

type fakeStore struct{ *world }

func (s fakeStore) Sandboxes(context.Context) ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.stored)), nil
}

func (s fakeStore) PutSandbox(_ context.Context, r Record) (uint64, error) {
	if err := s.step("put"); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stored[r.ID].Revision != r.Revision {
		return 0, errs.New(errs.Conflict, "revision %d is stored, not %d", s.stored[r.ID].Revision, r.Revision)
	}
	s.revs++
	r.Revision = s.revs
	s.stored[r.ID] = r
	return r.Revision, nil
}

func (s fakeStore) DeleteSandbox(_ context.Context, id ID) error {
	if err := s.step("delete"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.stored, id)
	return nil
}

func (s fakeStore) Snapshots(context.Context) ([]Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.snaps)), nil
}

func (s fakeStore) PutSnapshot(_ context.Context, snap Snapshot) error {
	if err := s.step("put snapshot"); err != nil {
		return err
	}
	time.Sleep(2 * time.Millisecond) // as a disk: others get to run
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snaps[snap.ID] = snap
	return nil
}

func (s fakeStore) DeleteSnapshot(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.snaps, id)
	return nil
}

func (s fakeStore) AppendEvent(_ context.Context, e Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	return nil
}

func (s fakeStore) Events(context.Context) ([]Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events), nil
}

type fakeAgents struct{ *world }

func (a fakeAgents) WaitReady(context.Context, AgentAddr) error { return a.step("ready") }

func (a fakeAgents) Init(_ context.Context, addr AgentAddr, in AgentInit) error {
	if err := a.step("init"); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.agents[addr.Addr.Addr()] = in
	return nil
}

func (a fakeAgents) Start(context.Context, AgentAddr, AgentStart) error {
	return a.step("start command")
}

func (a fakeAgents) Metrics(context.Context, AgentAddr) (Metrics, error) {
	return Metrics{Time: time.Now()}, a.step("metrics")
}

// Kills answers the kills put into the world, once.
func (a fakeAgents) Kills(ctx context.Context, _ AgentAddr, after int64) ([]Kill, int64, error) {
	if after < 0 {
		return nil, 0, nil
	}
	select {
	case k := <-a.kills:
		return []Kill{k}, after + 1, nil
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
}

// newManager returns a Manager over a fresh world.
func newManager(t *testing.T, w *world, edit ...func(*Config)) *Manager {
	t.Helper()
	cfg := Config{
		Runtime: fakeRuntime{w}, Network: fakeNetwork{w}, Images: fakeImages{w}, Store: fakeStore{w}, Agents: fakeAgents{w},
		AgentArgs: []string{"/agent"}, SnapshotDir: t.TempDir(), Defaults: Resources{CPUs: 1, MemoryMB: 64},
	}
	for _, e := range edit {
		e(&cfg)
	}
	return New(cfg)
}

// runManager runs m until the test ends.
func runManager(t *testing.T, m *Manager) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
