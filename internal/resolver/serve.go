package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

const (
	maxQuery    = 4096             // octets of a query; real ones have under 300
	idleTimeout = 10 * time.Second // of a TCP connection, also within a message
	maxPerConn  = 100              // queries of one TCP connection
)

// Datagrams is a UDP socket that knows where each datagram was going, and that
// answers from there. ListenTransparentUDP returns one.
type Datagrams interface {
	// ReadQuery reads a datagram: who sent it and which server it addressed.
	ReadQuery(buf []byte) (n int, src, dst netip.AddrPort, err error)
	// Reply sends msg to a sandbox as the server it had addressed.
	Reply(msg []byte, from, to netip.AddrPort) error
	// Closer ends ReadQuery.
	io.Closer
}

// ServeUDP answers queries until ctx ends, then closes d and waits for the
// queries under way.
func (r *Resolver) ServeUDP(ctx context.Context, d Datagrams) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { d.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	buf := make([]byte, maxQuery+1)
	for {
		n, src, dst, err := d.ReadQuery(buf)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("read dns queries: %w", err)
		}
		if err != nil || n > maxQuery {
			r.cfg.Log.Debug("dns query not read", "src", src, "err", err)
			continue
		}
		// How many there are is bounded by the share of each key; what is beyond it
		// is answered without waiting.
		wire := append([]byte(nil), buf[:n]...)
		wg.Go(func() { r.handleUDP(ctx, d, transport{proto: policy.UDP, src: src, dst: dst}, wire) })
	}
}

func (r *Resolver) handleUDP(ctx context.Context, d Datagrams, t transport, wire []byte) {
	reply := r.answer(ctx, t, wire)
	if reply == nil {
		return
	}
	if err := d.Reply(reply, t.dst, t.src); err != nil {
		r.cfg.Log.Debug("dns reply not sent", "src", t.src, "dst", t.dst, "err", err)
	}
}

// warnEvery is how often a listener that cannot accept says so.
const warnEvery = 10 * time.Second

// ServeTCP answers queries on the connections of l, whose local address is the
// server that the sandbox addressed, until ctx ends; then it closes l and all
// connections and waits for them.
func (r *Resolver) ServeTCP(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var warned time.Time
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept dns connections: %w", err)
		}
		if err != nil { // out of descriptors: do not spin
			if time.Since(warned) > warnEvery {
				warned = time.Now()
				r.cfg.Log.Warn("dns connection not accepted", "err", err)
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		wg.Go(func() { r.handleTCP(ctx, c) })
	}
}

// handleTCP answers the queries of one connection, one after the other.
func (r *Resolver) handleTCP(ctx context.Context, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	t := transport{proto: policy.TCP, src: addrPort(c.RemoteAddr()), dst: addrPort(c.LocalAddr())}
	sandbox, p, ok := r.cfg.Owner(t.src.Addr())
	if !ok {
		return
	}
	b := r.budgets.of(sandbox)
	if err := r.budgets.conns.Take(b.key, sandbox, 1); err != nil {
		q := &query{transport: t, sandbox: sandbox, policy: p, began: time.Now()}
		r.finish(q, b, r.refuseBudget(q, b, policy.Rule{ID: "dns", Text: "budget"}, asRefusal(ReasonConcurrency, err)))
		return
	}
	defer r.budgets.conns.Give(b.key, sandbox, 1)
	for range maxPerConn {
		wire, err := readTCP(c)
		if err != nil {
			return
		}
		reply := r.answer(ctx, t, wire)
		if reply == nil {
			return // what gets no reply is no DNS either
		}
		framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)
		if c.SetWriteDeadline(time.Now().Add(idleTimeout)) != nil {
			return
		}
		if _, err := c.Write(framed); err != nil {
			return
		}
	}
}

// readTCP reads one message behind its length (RFC 1035, section 4.2.2).
func readTCP(c net.Conn) ([]byte, error) {
	if err := c.SetReadDeadline(time.Now().Add(idleTimeout)); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > maxQuery {
		return nil, fmt.Errorf("query of %d octets, the most is %d", n, maxQuery)
	}
	wire := make([]byte, n)
	_, err := io.ReadFull(c, wire)
	return wire, err
}

// addrPort reads an address of a connection, unmapped.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
