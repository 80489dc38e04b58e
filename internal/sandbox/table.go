package sandbox

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// table is the sandboxes there are, and the room reserved for more.
type table struct {
	mu       sync.Mutex // guards the others
	live     map[ID]*entry
	reserved map[State]reserved // by the state a sandbox is about to be in
}

// entry is one sandbox. Lookups read view without a lock; a change holds op
// from the first step to the last, so that changes of one sandbox are serialised.
type entry struct {
	op   sync.Mutex
	view atomic.Pointer[view]
}

// view is an immutable picture of a sandbox.
type view struct {
	rec    Record
	policy *policy.Compiled
	// done is closed when this run of the sandbox ends: it was killed, paused or crashed.
	done chan struct{}
}

// end closes done unless it is closed; callers hold the entry's op.
func (v *view) end() {
	select {
	case <-v.done:
	default:
		close(v.done)
	}
}

func newTable() *table {
	return &table{live: map[ID]*entry{}, reserved: map[State]reserved{Running: {}, Paused: {}}}
}

// NotFound is the error for a sandbox that is not there, in the wording the
// SDKs' users know.
func NotFound(id ID) error {
	return errs.New(errs.NotFound, "Sandbox %q doesn't exist or you don't have access to it", string(id))
}

func (t *table) entry(id ID) (*entry, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.live[id]
	if !ok {
		return nil, NotFound(id)
	}
	return e, nil
}

// find looks a sandbox up for a caller: a key sees the sandboxes it made, an
// admin key, whose owner is "", sees all. Another's sandbox does not exist.
func (t *table) find(owner string, id ID) (*view, error) {
	e, err := t.entry(id)
	if err != nil {
		return nil, err
	}
	v := e.view.Load()
	if owner != "" && owner != v.rec.Owner {
		return nil, NotFound(id)
	}
	return v, nil
}

// hold locks an owner's sandbox, see find, for a change; the caller unlocks the
// entry's op. No key waits for another key's sandbox. The second look-up is for a call
// that removed the sandbox meanwhile.
func (t *table) hold(owner string, id ID) (*entry, error) {
	if _, err := t.find(owner, id); err != nil {
		return nil, err
	}
	e, err := t.entry(id)
	if err != nil {
		return nil, err
	}
	e.op.Lock()
	if _, err := t.entry(id); err != nil {
		e.op.Unlock()
		return nil, err
	}
	return e, nil
}

// all returns all sandboxes, in no order.
func (t *table) all() []*entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*entry, 0, len(t.live))
	for _, e := range t.live {
		out = append(out, e)
	}
	return out
}

// expired returns the running sandboxes whose time is over and that no call is
// changing: what takes longer than a tick must not be waited for at each.
func (t *table) expired(now time.Time) []ID {
	var out []ID
	for _, e := range t.all() {
		if v := e.view.Load(); v.rec.State == Running && !now.Before(v.rec.Expires) && e.op.TryLock() {
			e.op.Unlock()
			out = append(out, v.rec.ID)
		}
	}
	return out
}

// add makes a sandbox found by others, in the room reserved for it, if any was.
func (t *table) add(rec Record, p *policy.Compiled, room *reservation) *view {
	e, v := &entry{}, &view{rec: rec, policy: p, done: make(chan struct{})}
	e.view.Store(v)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live[rec.ID] = e
	room.drop()
	return v
}

func (t *table) remove(id ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, id)
}

// reserve keeps room for a sandbox of an owner that is about to be in a state.
func (t *table) reserve(owner string, in State, most limits) (*reservation, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	have := map[string]int{}
	for _, e := range t.live {
		if rec := &e.view.Load().rec; rec.State == in {
			have[rec.Owner]++
		}
	}
	return t.reserved[in].take(&t.mu, owner, have, most)
}

// starting reports whether room is reserved for sandboxes that are to run.
func (t *table) starting() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.reserved[Running]) > 0
}

// limits are how many there may be on the server and of one owner, where 0 is no limit,
// and what is said when there are as many, with the number for %d.
type limits struct {
	server, owner         int
	serverFull, ownerFull string
}

// reserved is how many are about to be, by owner.
type reserved map[string]int

// reservation is room kept for one that is about to be, until it is there or never
// will be.
type reservation struct {
	mu    *sync.Mutex // guards in
	in    reserved
	owner string
}

// take needs mu. have is how many each owner has.
func (r reserved) take(mu *sync.Mutex, owner string, have map[string]int, most limits) (*reservation, error) {
	all, mine := 0, have[owner]+r[owner]
	for _, counts := range []map[string]int{have, r} {
		for n := range maps.Values(counts) {
			all += n
		}
	}
	switch {
	case most.server > 0 && all >= most.server:
		return nil, errs.New(errs.Exhausted, most.serverFull, most.server)
	case most.owner > 0 && mine >= most.owner:
		return nil, errs.New(errs.Exhausted, most.ownerFull, most.owner)
	}
	r[owner]++
	return &reservation{mu: mu, in: r, owner: owner}, nil
}

// release gives the room back; a second time does nothing.
func (r *reservation) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop()
}

// drop is release for a caller that holds mu.
func (r *reservation) drop() {
	if r == nil || r.in == nil {
		return
	}
	if r.in[r.owner]--; r.in[r.owner] == 0 {
		delete(r.in, r.owner)
	}
	r.in = nil
}
