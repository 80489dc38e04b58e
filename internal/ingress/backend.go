package ingress

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// backend is what the ingress holds of one life of a sandbox: from its first
// request until it is killed or paused.
type backend struct {
	in       *Ingress
	target   *Target // as it was first seen; only what cannot change within a life is used
	pool     *relay.Pool
	inflight atomic.Int64 // requests and tunnels
	h2c      *http.Transport
	guests   guests // who uses them

	started  atomic.Int64 // when the latest command was started, in Unix ns
	awaiting atomic.Int64 // requests that wait for a port to open

	speeches sync.Map     // *speech by port
	spoken   atomic.Int64 // how many they are, about

	mu       sync.Mutex          // guards loopback
	loopback map[uint16]struct{} // ports last reached through the agent
}

// loopbackPorts bounds what is remembered of a sandbox's ports.
const loopbackPorts = 1024

// backend returns the connections of the sandbox's present life, nil when that is over.
func (in *Ingress) backend(t *Target) *backend {
	in.mu.RLock()
	b := in.backends[t.ID]
	in.mu.RUnlock()
	if b != nil && b.serves(t) {
		return b
	}
	select {
	case <-t.Done:
		return nil
	default:
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	b = in.backends[t.ID]
	if b != nil && b.serves(t) || in.closed {
		return b
	}
	if b != nil {
		b.pool.Close() // its watcher ends with its Done, or with us
	}
	b = &backend{in: in, target: t, loopback: map[uint16]struct{}{}}
	b.pool = relay.NewPool(relay.Config{Dial: b.dial, TLS: func(port uint16) *tls.Config { return b.tlsFor(port, "http/1.1") }, Limits: in.cfg.Limits.Relay})
	b.h2c = b.newH2C()
	in.backends[t.ID] = b
	in.wg.Add(1)
	go b.watch()
	return b
}

// serves reports whether b belongs to the same life of the sandbox as t.
func (b *backend) serves(t *Target) bool {
	return b.target.Done == t.Done && b.target.Addr == t.Addr && !b.pool.Closed()
}

// watch ends everything when the sandbox does.
func (b *backend) watch() {
	defer b.in.wg.Done()
	select {
	case <-b.target.Done:
	case <-b.in.base.Done():
	}
	b.pool.Close()
	b.h2c.CloseIdleConnections()
	b.in.mu.Lock()
	if b.in.backends[b.target.ID] == b {
		delete(b.in.backends, b.target.ID)
	}
	b.in.mu.Unlock()
	b.pool.Wait()
}

// gone reports whether the sandbox has ended, also when watch has not run yet.
func (b *backend) gone() bool {
	select {
	case <-b.target.Done:
		return true
	default:
		return b.pool.Closed()
	}
}

// dial reaches a port of the sandbox, and waits for it a moment when a command was
// just started there; see await.
func (b *backend) dial(ctx context.Context, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, b.in.cfg.Limits.DialTimeout)
	defer cancel()
	if port == b.target.agentPort() {
		return b.direct(ctx, port)
	}
	return b.await(ctx, port, b.reach)
}

// reach tries a port once: at the sandbox's address first, where a closed port
// refuses within a millisecond, then on its loopback through the agent. Whichever
// answered last is tried first. The error is that of the address.
func (b *backend) reach(ctx context.Context, port uint16) (net.Conn, error) {
	inside := b.target.DialLoopback
	if inside == nil {
		return b.direct(ctx, port)
	}
	wasInside := b.isInside(port)
	if wasInside {
		if c, err := inside(ctx, port); err == nil {
			return c, nil
		}
	}
	c, err := b.direct(ctx, port)
	switch {
	case err == nil:
		b.setInside(port, false)
		return c, nil
	case wasInside:
		return nil, err
	}
	c, insideErr := inside(ctx, port)
	if insideErr != nil {
		return nil, err
	}
	b.setInside(port, true)
	return c, nil
}

func (b *backend) direct(ctx context.Context, port uint16) (net.Conn, error) {
	// Not DialTCP: with a zero local address it binds first, and the port is then
	// taken for all destinations at once.
	var d net.Dialer
	return d.DialContext(ctx, "tcp", netip.AddrPortFrom(b.target.Addr, port).String())
}

func (b *backend) isInside(port uint16) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.loopback[port]
	return ok
}

func (b *backend) setInside(port uint16, inside bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !inside {
		delete(b.loopback, port)
		return
	}
	if len(b.loopback) >= loopbackPorts {
		clear(b.loopback)
	}
	b.loopback[port] = struct{}{}
}

// Close resets what is left of every sandbox's connections and waits for it.
func (in *Ingress) Close() {
	in.mu.Lock()
	in.closed = true
	in.mu.Unlock()
	in.wakes.mu.Lock()
	in.stop()
	in.wakes.mu.Unlock()
	in.wg.Wait()
}
