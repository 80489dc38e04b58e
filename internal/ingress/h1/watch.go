package h1

import (
	"sync"
	"sync/atomic"
	"time"
)

// watchDelay is how long a handler may take before somebody looks whether its
// client is still there. Most answer sooner, and need nobody to.
const watchDelay = 5 * time.Millisecond

// watch notices that the client went away while a handler runs. Nothing else
// reads from the connection then, for the request's body is read; the octet
// that a pipelining client may have sent is kept.
type watch struct {
	current atomic.Pointer[exchange] // what is being answered

	mu      sync.Mutex // guards the fields below
	cond    sync.Cond  // reading became false
	timer   *time.Timer
	x       *exchange // whose client is watched; nil: nobody's
	reading bool      // look is; who wants to read must call disarm first
	aborted bool      // by disarm
}

// arm has x's client watched from now on.
func (c *conn) arm(x *exchange) {
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	if x.over.Load() {
		return // its body is being drained
	}
	w.x = x
	if w.timer == nil {
		w.timer = time.AfterFunc(watchDelay, c.look)
		return
	}
	w.timer.Reset(watchDelay)
}

// look waits for the client to say something or to go away.
func (c *conn) look() {
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	x := w.x
	if x == nil || w.reading || len(c.early) > 0 {
		return
	}
	w.reading = true
	c.setReadDeadline(time.Time{})
	w.mu.Unlock()
	n, err := c.rwc.Read(c.small[:1])
	w.mu.Lock()
	if n == 1 {
		c.early = c.small[:1]
	} else if err != nil && !(w.aborted && isTimeout(err)) {
		x.cancel()
	}
	w.reading, w.aborted = false, false
	w.cond.Broadcast()
}

// disarm ends the watch; afterwards nobody reads from the connection but the caller.
func (c *conn) disarm() {
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	w.x = nil
	if w.timer != nil {
		w.timer.Stop() // look sees that nobody is watched if it is too late
	}
	if !w.reading {
		return
	}
	w.aborted = true
	c.setReadDeadline(time.Unix(1, 0))
	for w.reading {
		w.cond.Wait()
	}
}
