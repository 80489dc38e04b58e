package sandbox

import (
	"context"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/share"
)

// Running sandboxes of all owners share the machine's memory and threads. A start is
// refused when its owner holds its share or the machine has no room. What runs already
// goes on growing, so each owner's group has a limit in the kernel too. The limits follow
// what is in use: together they never come to more than there is, so when memory runs out
// it is within one owner's group, and what ends is one of that owner's sandboxes.

// balanceEvery is how often the limits follow. Between two looks an owner can use its
// part of what was free.
const balanceEvery = time.Second

// startMemory is what a sandbox without a checkpoint is expected to use at first, in
// bytes. One of the base template takes some 40 MB when it is idle.
const startMemory = 64 << 20

// meters count what sandboxes hold of the host; nil ones have no limit.
type meters struct {
	memory, threads *share.Meter
}

func newMeters(host Use) (m meters) {
	if host.Memory > 0 {
		m.memory = share.NewMeter(share.Memory.Of(host.Memory, 0))
	}
	if host.Threads > 0 {
		m.threads = share.NewMeter(share.Threads.Of(host.Threads, 0))
	}
	return m
}

// Of one owner, startQueue starts may wait, each for startWait. Rules are put in force one
// set after another by the kernel, so two updates at a time keep it busy: one is the most
// that one owner has under way, whatever the number and the size of its updates.
const (
	startQueue      = 512
	startWait       = time.Minute
	parallelUpdates = 2
)

// turn waits until it is the owner's turn at a gate.
func turn(ctx context.Context, g *share.Gate, owner string) (leave func(), err error) {
	leave, err = g.Enter(ctx, owner, "")
	switch {
	case err == nil:
		return leave, nil
	case ctx.Err() != nil:
		return nil, errs.Wrap(errs.Unavailable, err, "the server is busy with other sandboxes: try again")
	}
	return nil, share.Explain(err, "try again, or ask for less at a time")
}

// Pools are the counts of what sandboxes share, for metrics.
func (m *Manager) Pools() (pools []*share.Pool) {
	pools = []*share.Pool{m.launch.starts.Pool(), m.updates.Pool(), m.launch.space.Pool()}
	for _, meter := range []*share.Meter{m.meters.memory, m.meters.threads} {
		if meter != nil {
			pools = append(pools, meter.Pool())
		}
	}
	return pools
}

// fit holds memory for a start until release is called, when the memory is in use, or
// says whose limit there is no memory within.
func (m *Manager) fit(ctx context.Context, o *origin) (release func(), err error) {
	if m.meters.memory == nil {
		return func() {}, nil
	}
	need := max(min(o.memory, o.resources.MemoryMB<<20), startMemory) // a checkpoint has files, too
	if m.cfg.HostFree != nil {
		if free := m.cfg.HostFree(); free < need {
			return nil, errs.New(errs.Unavailable, "the server's machine is short of memory: the sandbox needs some %d MiB and %d MiB are free above the reserve: kill sandboxes, or lower sandboxes.reserve_memory_mb",
				need>>20, max(free, 0)>>20)
		}
	}
	mine, err := m.cfg.Runtime.Use(ctx, o.owner)
	if err != nil {
		return nil, err
	}
	all, err := m.cfg.Runtime.UseOfAll(ctx)
	if err != nil {
		return nil, err
	}
	m.meters.memory.MeasuredOne(all.Memory, o.owner, mine.Memory)
	release, err = m.meters.memory.Promise(o.owner, need)
	if err != nil {
		return nil, share.Explain(err, "kill or pause sandboxes")
	}
	return release, nil
}

// balance sets the limits of all owners' groups by what they hold now.
func (m *Manager) balance(ctx context.Context) {
	if m.cfg.Host == (Use{}) {
		return
	}
	owners := map[string]Use{}
	for _, e := range m.table.all() {
		if rec := &e.view.Load().rec; rec.State == Running {
			owners[rec.Owner] = Use{}
		}
	}
	all, err := m.cfg.Runtime.UseOfAll(ctx)
	if err != nil {
		m.cfg.Log.Warn("memory of sandboxes not read", "err", err)
		return
	}
	memory, threads := map[string]int64{}, map[string]int64{}
	for owner := range owners {
		u, err := m.cfg.Runtime.Use(ctx, owner)
		if err != nil {
			continue // its last sandbox is ending
		}
		owners[owner], memory[owner], threads[owner] = u, u.Memory, u.Threads
	}
	if m.meters.memory != nil {
		m.meters.memory.Measured(all.Memory, memory)
	}
	if m.meters.threads != nil {
		m.meters.threads.Measured(all.Threads, threads)
	}
	for owner, u := range owners {
		most := Use{
			Memory:  ceiling(share.Memory.Of(m.cfg.Host.Memory, 0), u.Memory, all.Memory, len(owners)),
			Threads: ceiling(share.Threads.Of(m.cfg.Host.Threads, 0), u.Threads, all.Threads, len(owners)),
		}
		if err := m.cfg.Runtime.Limit(ctx, owner, most); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("limits of a key's sandboxes not set", "key", owner, "err", err)
		}
	}
}

// ceiling is what one of some owners may hold until the next look: its share, no more
// than its part of what is free beside what it has, and always a little more than it has.
// 0 is no limit.
func ceiling(r share.Resource, held, used int64, owners int) int64 {
	if r.Whole == 0 {
		return 0
	}
	free := max(r.Whole-used, 0)
	return max(min(r.Most(held, used), held+free/int64(owners)), held+held/16+1)
}

// assign has a sandbox draw from its owner's part of the host. Until then it draws from
// that of the spares, which costs its owner nothing, so the caller does not wait for it.
func (m *Manager) assign(ctx context.Context, id ID, owner string) {
	err := m.cfg.Runtime.Assign(ctx, id, owner)
	if _, gone := m.table.entry(id); err != nil && gone == nil && ctx.Err() == nil {
		m.cfg.Log.Error("sandbox not in its key's group: its use of the host counts for no key", "sandbox", id, "key", owner, "err", err)
	}
}
