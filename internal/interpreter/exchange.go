package interpreter

import (
	"encoding/json"
	"strings"
	"sync"
)

// exchange is a request under way and the messages that answer it. A reader that
// has no room for one waits: that is how a slow client slows its kernel.
type exchange struct {
	id       string
	messages chan message
	closed   chan struct{}
	once     sync.Once

	replied, idle bool // of the one goroutine that reads messages
}

// over reports whether the kernel is done: it has replied, and has said that
// nothing more will be published.
func (x *exchange) over() bool { return x.replied && x.idle }

// note reads what a message says about the request's progress.
func (x *exchange) note(m message) {
	switch {
	case strings.HasSuffix(m.kind, "_reply"):
		x.replied = true
	case m.kind == "status":
		var c statusContent
		if json.Unmarshal(m.content, &c) == nil && c.State == "idle" {
			x.idle = true
		}
	}
}

// done lets go of readers; messages that come later are dropped.
func (x *exchange) done() { x.once.Do(func() { close(x.closed) }) }

// handover brings messages from a kernel's readers to the exchange they belong to.
type handover struct {
	mu  sync.Mutex // guards now
	now *exchange
}

// open makes the exchange that gets the messages from now on.
func (h *handover) open(id string) *exchange {
	x := &exchange{id: id, messages: make(chan message, 4), closed: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = x
	return x
}

// give hands over a message, or drops it when nobody waits for it.
func (h *handover) give(m message) {
	h.mu.Lock()
	x := h.now
	h.mu.Unlock()
	if x == nil || m.parent != x.id {
		return
	}
	select {
	case <-x.closed:
	case x.messages <- m:
	}
}
