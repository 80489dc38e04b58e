package ingress

import (
	"context"
	"errors"
	"net"
	"net/http"
	"syscall"
	"time"
)

// Whoever starts a service by a command and asks for its URL at once is faster than
// the service. A refused connection is therefore tried again, but only while there
// is reason to expect that the port opens: a command that was started through here a
// moment ago, runs, and has opened no port that somebody waited for. In any other case
// the first refusal is the answer. A sandbox that was paused needs no waiting: its
// services listen when it is back.
const (
	startPatience = time.Second           // from the start of the command
	pollFirst     = 20 * time.Millisecond // then twice as long each time,
	pollLast      = 80 * time.Millisecond // up to this
	awaitMax      = 64                    // requests of one sandbox that wait; more are refused at once
)

// startsCommand reports whether a request asks the agent to start a command. Its
// answer goes on for as long as the command runs and somebody listens.
func startsCommand(r *http.Request, path string) bool {
	return r.Method == http.MethodPost && path == "/process.Process/Start"
}

// await dials port by reach, again and again while that is refused and a command is
// starting.
func (b *backend) await(ctx context.Context, port uint16, reach func(context.Context, uint16) (net.Conn, error)) (net.Conn, error) {
	c, err := reach(ctx, port)
	if !errors.Is(err, syscall.ECONNREFUSED) || !b.starting(port) {
		return c, err
	}
	defer b.awaiting.Add(-1)
	if b.awaiting.Add(1) > awaitMax {
		return nil, err
	}
	for pause := pollFirst; b.starting(port); pause = min(2*pause, pollLast) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		case <-b.target.Done:
			return nil, err
		}
		if c, err = reach(ctx, port); err == nil {
			b.opened(port)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return c, err
		}
	}
	return nil, err
}

// starting reports whether a command that was just started may yet open port.
func (b *backend) starting(port uint16) bool {
	since := time.Now().Add(-startPatience)
	if b.started.Load() <= since.UnixNano() {
		return false // without a look at every guest
	}
	b.guests.mu.Lock()
	defer b.guests.mu.Unlock()
	for g := b.guests.head; g != nil; g = g.next {
		if g.started.After(since) && (g.opened == 0 || g.opened == port) {
			return true
		}
	}
	return false
}

// opened takes port for that of the oldest command without one: nothing else is
// waited for on its account.
func (b *backend) opened(port uint16) {
	since := time.Now().Add(-startPatience)
	b.guests.mu.Lock()
	defer b.guests.mu.Unlock()
	var oldest *guest
	for g := b.guests.head; g != nil; g = g.next {
		switch {
		case !g.started.After(since):
		case g.opened == port:
			return // others waited for it as well
		case g.opened == 0:
			oldest = g
		}
	}
	if oldest != nil {
		oldest.opened = port
	}
}
