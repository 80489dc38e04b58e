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

// host divides the machine's memory and threads between the owners of running sandboxes.
type host struct {
	cfg             *Config
	table           *table
	memory, threads *share.Meter // nil: no limit
}

func newHost(cfg *Config, t *table) *host {
	h := &host{cfg: cfg, table: t}
	if cfg.Host.Memory > 0 {
		h.memory = share.NewMeter(share.Memory.Of(cfg.Host.Memory, 0))
	}
	if cfg.Host.Threads > 0 {
		h.threads = share.NewMeter(share.Threads.Of(cfg.Host.Threads, 0))
	}
	return h
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

// fit reserves memory for a start until release is called, when the memory is in use, or
// says whose limit there is no memory within.
func (h *host) fit(ctx context.Context, o *origin) (release func(), err error) {
	if h.memory == nil {
		return func() {}, nil
	}
	need := max(min(o.memory, o.resources.MemoryMB<<20), startMemory) // a checkpoint has files, too
	if h.cfg.HostFree != nil {
		if free := h.cfg.HostFree(); free < need {
			return nil, errs.New(errs.Unavailable, "the server's machine is short of memory: the sandbox needs some %d MiB and %d MiB are free above the reserve: kill sandboxes, or lower sandboxes.reserve_memory_mb",
				need>>20, max(free, 0)>>20)
		}
	}
	mine, err := h.cfg.Runtime.Use(ctx, o.owner)
	if err != nil {
		return nil, err
	}
	all, err := h.cfg.Runtime.UseOfAll(ctx)
	if err != nil {
		return nil, err
	}
	h.memory.MeasuredOne(all.Memory, o.owner, mine.Memory)
	release, err = h.memory.Promise(o.owner, need)
	if err != nil {
		return nil, share.Explain(err, "kill or pause sandboxes")
	}
	return release, nil
}

// balance sets the limits of all owners' groups by what they hold now.
func (h *host) balance(ctx context.Context) {
	if h.cfg.Host == (Use{}) {
		return
	}
	owners := map[string]Use{}
	for _, e := range h.table.all() {
		if rec := &e.view.Load().rec; rec.State == Running {
			owners[rec.Owner] = Use{}
		}
	}
	all, err := h.cfg.Runtime.UseOfAll(ctx)
	if err != nil {
		h.cfg.Log.Warn("memory of sandboxes not read", "err", err)
		return
	}
	memory, threads := map[string]int64{}, map[string]int64{}
	for owner := range owners {
		u, err := h.cfg.Runtime.Use(ctx, owner)
		if err != nil {
			continue // its last sandbox is ending
		}
		owners[owner], memory[owner], threads[owner] = u, u.Memory, u.Threads
	}
	if h.memory != nil {
		h.memory.Measured(all.Memory, memory)
	}
	if h.threads != nil {
		h.threads.Measured(all.Threads, threads)
	}
	for owner, u := range owners {
		most := Use{
			Memory:  ceiling(share.Memory.Of(h.cfg.Host.Memory, 0), u.Memory, all.Memory, len(owners)),
			Threads: ceiling(share.Threads.Of(h.cfg.Host.Threads, 0), u.Threads, all.Threads, len(owners)),
		}
		if err := h.cfg.Runtime.Limit(ctx, owner, most); err != nil && ctx.Err() == nil {
			h.cfg.Log.Warn("limits of a key's sandboxes not set", "key", owner, "err", err)
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
func (h *host) assign(ctx context.Context, id ID, owner string) {
	err := h.cfg.Runtime.Assign(ctx, id, owner)
	if _, gone := h.table.entry(id); err != nil && gone == nil && ctx.Err() == nil {
		h.cfg.Log.Error("sandbox not in its key's group: its use of the host counts for no key", "sandbox", id, "key", owner, "err", err)
	}
}
