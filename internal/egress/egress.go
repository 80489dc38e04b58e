// Package egress is the transparent proxy for sandboxes' TCP connections: it finds the
// sandbox, reads the name that the first bytes show, asks the policy, dials an address of
// the name, passes bytes on, and cuts the connection when the rules change.
//
// Nothing a sandbox sends is believed but the name it shows, and that only binds
// it: the proxy resolves the name itself and dials what it found, so a borrowed
// name leads to its real owner. What cannot be read is denied.
package egress

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/share"
)

// Owner is the sandbox behind a source address and the policy in force for it.
type Owner struct {
	Sandbox string
	Policy  *policy.Compiled
}

// Config is what a Proxy needs. Owner, Resolve, Flows and Log are required.
type Config struct {
	// Owner says whose source address it is. It is asked again for every verdict
	// and must answer with the policy in force at that moment.
	Owner func(netip.Addr) (Owner, bool)
	// Resolve returns the addresses of a canonical name, for the proxy's own dial.
	Resolve func(ctx context.Context, sandbox, name string) ([]netip.Addr, error)
	// Key returns the API key that owns a sandbox: what keys share is counted by it.
	// Nil: all sandboxes are one key's.
	Key func(sandbox string) string
	// Pinned returns the names that the sandbox had resolved to an address for one
	// port, by rules with a port, and that still have it; it may ask for them again.
	// If one no longer has the address, expired says so. Nil: none are.
	Pinned func(ctx context.Context, sandbox string, dst netip.AddrPort) (names []string, expired string)
	// DialSelf connects to this service's own ingress, for a name under one of
	// its domains; port is 80 or 443. Nil refuses such names.
	DialSelf func(ctx context.Context, client netip.AddrPort, port uint16) (net.Conn, error)
	Flows    flowlog.Recorder
	Log      *slog.Logger
	Limits   Limits
}

// Limits bound what one sandbox, and all together, can make the proxy hold. A
// zero field means the default in parentheses.
type Limits struct {
	SniffTimeout   time.Duration // to show a name after connecting (5 s)
	DialTimeout    time.Duration // to resolve and connect (10 s)
	IdleTimeout    time.Duration // between two requests of one HTTP connection (2 min)
	Pending        int           // connections of one sandbox that have shown no name yet (1024)
	Conns          int           // connections of one sandbox (4096)
	NewPerSecond   int           // new connections of one sandbox, also the burst (10,000)
	SniffBytes     int64         // buffered beyond 4 KiB a connection, one sandbox (4 MiB)
	TotalConns     int           // connections of all sandboxes (100,000)
	TotalSniffByte int64         // buffered beyond 4 KiB a connection, all sandboxes (256 MiB)
}

func (l Limits) withDefaults() Limits {
	return Limits{
		SniffTimeout:   or(l.SniffTimeout, 5*time.Second),
		DialTimeout:    or(l.DialTimeout, 10*time.Second),
		IdleTimeout:    or(l.IdleTimeout, 2*time.Minute),
		Pending:        or(l.Pending, 1024),
		Conns:          or(l.Conns, 4096),
		NewPerSecond:   or(l.NewPerSecond, 10_000),
		SniffBytes:     or(l.SniffBytes, 4<<20),
		TotalConns:     or(l.TotalConns, 100_000),
		TotalSniffByte: or(l.TotalSniffByte, 256<<20),
	}
}

func or[T int | int64 | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

// Proxy judges and passes on the TCP connections that the kernel hands it.
type Proxy struct {
	cfg   Config
	lim   Limits
	log   *slog.Logger
	dial  dialFunc
	dst   func(*net.TCPConn) (netip.AddrPort, error) // where a connection was going
	pool  buffers
	pipes pipes
	conns sync.WaitGroup // goroutines that serve connections
	admission
}

// New returns a proxy; Run starts it.
func New(cfg Config) (*Proxy, error) {
	if cfg.Owner == nil || cfg.Resolve == nil || cfg.Flows == nil || cfg.Log == nil {
		return nil, errors.New("egress: Owner, Resolve, Flows and Log are required")
	}
	p := &Proxy{cfg: cfg, lim: cfg.Limits.withDefaults(), log: cfg.Log, dial: dialTCP, dst: localDst}
	p.admission.tenants = map[string]*tenant{}
	p.open = share.NewPool(share.ProxyConnections.Of(int64(p.lim.TotalConns), int64(p.lim.Conns)))
	p.memory = share.NewPool(share.SniffMemory.Of(p.lim.TotalSniffByte, p.lim.SniffBytes))
	return p, nil
}

// Run serves the listeners until ctx ends, then closes them, resets every
// connection and returns nil. It returns early with the error of a listener
// that fails for good.
func (p *Proxy) Run(ctx context.Context, listeners ...net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, ln := range listeners {
		g.Go(func() error { return p.accept(ctx, ln) })
	}
	g.Go(func() error { p.sweep(ctx); return nil })
	err := g.Wait()
	p.cut("", ReasonShutdown)
	p.conns.Wait()
	p.pipes.close()
	return err
}

// warnEvery is how often a listener that cannot accept says so.
const warnEvery = 10 * time.Second

// accept hands each connection to its own goroutine, so that no sandbox waits
// for another.
func (p *Proxy) accept(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer ln.Close()
	var warned time.Time
	for {
		c, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		case err != nil:
			// Out of descriptors or memory, or a client gone before it was accepted.
			if time.Since(warned) > warnEvery {
				warned = time.Now()
				p.log.Warn("egress accept", "err", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
			continue
		}
		tc, ok := c.(*net.TCPConn)
		if !ok {
			c.Close()
			return fmt.Errorf("accept on %s: %T is no TCP connection", ln.Addr(), c)
		}
		p.conns.Add(1)
		go p.serve(ctx, tc)
	}
}

// growStack makes a new goroutine's stack as large as a dial needs while next to
// nothing is on it: grown on the way, it would be copied twice, forty calls deep.
// The room need only be in the frame, not used, which would clear it.
//
//go:noinline
func growStack(use bool) (sum byte) {
	if use {
		var room [5 << 10]byte
		for i := range room {
			sum += room[i]
		}
	}
	return sum
}

// serve finds out whose connection it is, admits it, and serves it.
func (p *Proxy) serve(ctx context.Context, c *net.TCPConn) {
	defer p.conns.Done()
	growStack(false)
	src := addrPortOf(c.RemoteAddr())
	owner, known := p.cfg.Owner(src.Addr())
	dst, err := p.dst(c)
	if !known || owner.Policy == nil || err != nil {
		reset(c)
		p.log.Debug("egress connection of nobody", "src", src, "dst", dst, "err", err)
		return
	}
	f := &flow{p: p, sandbox: owner.Sandbox, client: c, src: src, dst: netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port()), proto: "tcp", started: time.Now()}
	f.in = source{conn: c, pool: &p.pool, charge: f.charge}
	if why := p.admit(f); why != "" {
		f.deny(owner.Policy, denial{rule: proxyRule, reason: ReasonBudget, detail: why})
		return
	}
	if ctx.Err() != nil { // after Run has looked for flows to end
		f.kill(ReasonShutdown)
	}
	if handedOver := f.serve(ctx, owner.Policy); !handedOver {
		f.finish()
	}
}

// Revoke judges every live connection of the sandbox anew under the policy that
// Owner now answers with, and resets those it refuses. Call it after a policy
// was put in force; connections judged later see the new policy by themselves.
func (p *Proxy) Revoke(sandbox string) {
	for _, f := range p.flowsOf(sandbox) {
		f.rejudge()
	}
}

// Cut resets every connection of the sandbox. Call it after Owner has stopped
// answering for the sandbox, so that no new one comes.
func (p *Proxy) Cut(sandbox string) {
	if sandbox != "" {
		p.cut(sandbox, ReasonKilled)
		p.forget(sandbox)
	}
}

// cut resets the connections of one sandbox, or of all.
func (p *Proxy) cut(sandbox string, why policy.Reason) {
	for _, f := range p.flowsOf(sandbox) {
		f.kill(why)
	}
}

func addrPortOf(a net.Addr) netip.AddrPort {
	if ta, ok := a.(*net.TCPAddr); ok {
		ap := ta.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
	}
	return netip.AddrPort{}
}

// localDst is where a connection was going: TPROXY leaves that as its local address.
func localDst(c *net.TCPConn) (netip.AddrPort, error) { return addrPortOf(c.LocalAddr()), nil }

// reset ends a connection with RST instead of FIN.
func reset(c net.Conn) {
	if tc, ok := c.(*net.TCPConn); ok {
		_ = tc.SetLinger(0) // fails only on a connection that is gone
	}
	c.Close()
}
