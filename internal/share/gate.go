package share

import (
	"context"
	"time"
)

// Gate bounds how many operations run at once. What finds no room waits; keys are
// served in turn, whatever the length of their queues, so a key that asks for a
// hundred operations delays another key's first one by no more than one of them.
type Gate struct {
	pool *Pool
	// Queue is how many operations of one key may wait.
	queue int
	// wait is how long each may wait; 0: as long as its context allows.
	wait time.Duration

	// Guarded by pool.mu.
	queues map[string][]*waiter
	turn   []string // keys with a queue, the next one first
}

// waiter is an operation that waits.
type waiter struct {
	key, sandbox string
	ready        chan struct{} // closed when it may run; it then holds one of the pool
}

// NewGate returns a gate of a resource that has a size. Of one key, queue operations
// may wait, each for wait; 0 is as long as its context allows.
func NewGate(r Resource, queue int, wait time.Duration) *Gate {
	return &Gate{pool: NewPool(r), queue: queue, wait: wait, queues: map[string][]*waiter{}}
}

// Pool returns the count behind the gate, for metrics.
func (g *Gate) Pool() *Pool { return g.pool }

// Enter waits for room for one operation and returns the function that ends it,
// which must be called exactly once. The error is a [*Full] when the key's queue is full
// or the time to wait is over, else the context's.
func (g *Gate) Enter(ctx context.Context, key, sandbox string) (leave func(), err error) {
	p := g.pool
	p.mu.Lock()
	// Those of the key that wait have no room: leave lets in who has some at once.
	if p.take(key, sandbox, 1) == nil {
		p.mu.Unlock()
		return func() { g.leave(key, sandbox) }, nil
	}
	if len(g.queues[key]) >= g.queue {
		full := g.full(key)
		p.mu.Unlock()
		p.refuse(full.Scope)
		return nil, full
	}
	w := &waiter{key: key, sandbox: sandbox, ready: make(chan struct{})}
	if len(g.queues[key]) == 0 {
		g.turn = append(g.turn, key)
	}
	g.queues[key] = append(g.queues[key], w)
	p.mu.Unlock()

	var over <-chan time.Time
	if g.wait > 0 {
		t := time.NewTimer(g.wait)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-w.ready:
		return func() { g.leave(key, sandbox) }, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-over:
	}
	p.mu.Lock()
	if !g.remove(w) { // it was let in at the same moment
		p.mu.Unlock()
		if err == nil {
			return func() { g.leave(key, sandbox) }, nil
		}
		g.leave(key, sandbox)
		return nil, err
	}
	full := g.full(key)
	p.mu.Unlock()
	if err == nil {
		p.refuse(full.Scope)
		return nil, full
	}
	return nil, err
}

// full says which limit keeps the next operation of key out. It needs pool.mu.
func (g *Gate) full(key string) *Full {
	p := g.pool
	if p.used >= p.r.Whole {
		return &Full{p.r, Server, p.r.Whole}
	}
	return &Full{p.r, Key, max(p.keys[key], p.r.Most(p.keys[key], p.used))}
}

// leave ends one operation and lets in what has room now.
func (g *Gate) leave(key, sandbox string) {
	p := g.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.give(key, sandbox, 1)
	for range len(g.turn) {
		next := g.turn[0]
		g.turn = append(g.turn[1:], next) // the others' turn, whatever comes of this one
		// The first that has room: one that waits for its own sandbox holds up no other.
		for _, w := range g.queues[next] {
			full := p.take(w.key, w.sandbox, 1)
			if full == nil {
				g.remove(w)
				close(w.ready)
			}
			if full == nil || full.Scope != Sandbox {
				break
			}
		}
		if p.used >= p.r.Whole || len(g.turn) == 0 {
			return
		}
	}
}

// remove takes w out of its queue and reports whether it was there. It needs pool.mu.
func (g *Gate) remove(w *waiter) bool {
	q := g.queues[w.key]
	for i := range q {
		if q[i] != w {
			continue
		}
		q = append(q[:i:i], q[i+1:]...)
		if len(q) > 0 {
			g.queues[w.key] = q
			return true
		}
		delete(g.queues, w.key)
		for j, k := range g.turn {
			if k == w.key {
				g.turn = append(g.turn[:j:j], g.turn[j+1:]...)
				break
			}
		}
		return true
	}
	return false
}
