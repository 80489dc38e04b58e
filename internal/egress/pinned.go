package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// grace is how long a client on a port of its own is waited for before the server
// is given the first word. Clients that speak first do so within a round trip of
// the link, which is no wire.
const grace = 250 * time.Millisecond

// judgePinned is judge for a flow that shows no name.
func (f *flow) judgePinned(ctx context.Context) (ruling, bool) {
	var names []string
	if f.p.cfg.Pinned != nil {
		names, f.expired = f.p.cfg.Pinned(ctx, f.sandbox, f.dst)
	}
	return f.judgeBy("", names)
}

// serveAnyPort serves a port that says nothing about the protocol, one of a
// "host:port" rule: a name that is shown is judged as on 80 and 443, and without
// one the address has to be pinned.
func (f *flow) serveAnyPort(ctx context.Context) (handedOver bool) {
	_ = f.client.SetReadDeadline(time.Now().Add(grace)) // a dead connection shows at the read
	err := f.in.fill(smallBuffer)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return f.serveSilent(ctx)
	case err != nil:
		return f.noBytes(ctx, err)
	}
	return f.serveShown(ctx)
}

var errProxyPreamble = badRequest("a preamble of the PROXY protocol, which hides what follows")

// serveShown serves a client that has spoken first.
func (f *flow) serveShown(ctx context.Context) bool {
	kind, err := f.classify()
	switch {
	case err != nil:
		return f.unreadable(ctx, err)
	case kind == showsTLS:
		f.proto = "tls"
		return f.serveTLS(ctx)
	case f.speaksHTTP2(kind):
		return f.serveHTTP2(ctx)
	case kind == showsHTTP || kind == showsHTTP2:
		f.proto = "http"
		return f.serveHTTP(ctx)
	case kind == showsProxy:
		return f.unreadable(ctx, errProxyPreamble)
	}
	f.p.sniffed(f)
	r, ok := f.admitPinned(ctx)
	if !ok {
		return false
	}
	return f.pass(ctx, r)
}

// admitPinned judges a flow by the names that are pinned to its address. What they do
// not allow is ended, and ok is false.
func (f *flow) admitPinned(ctx context.Context) (r ruling, ok bool) {
	r, known := f.judgePinned(ctx)
	switch {
	case !known:
		f.kill(ReasonRevoked)
	case !r.Allow:
		f.denyUnpinned(r)
	}
	return r, known && r.Allow
}

// denyUnpinned ends a flow that shows no name, at an address that no name is pinned to.
func (f *flow) denyUnpinned(r ruling) {
	why := denial{rule: r.Rule, reason: denialReason(r.Verdict, ReasonProtocolMismatch), detail: "neither TLS nor HTTP, and the address is not pinned"}
	if f.expired != "" {
		why.reason, why.detail = denialReason(r.Verdict, policy.ReasonPinExpired), f.expired
	}
	f.deny(r.policy, why)
}

// classify reads until the protocol is known; what it read stays pending.
func (f *flow) classify() (protocol, error) {
	_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.SniffTimeout))
	var c classifier
	for {
		if kind := c.look(f.in.pending()); kind != undecided {
			return kind, nil
		}
		err := f.in.fill(maxRequestHead)
		switch {
		case errors.Is(err, io.EOF):
			return c.end(f.in.pending()), nil
		case err != nil:
			return undecided, sniffFailed(err, nil)
		}
	}
}

// serveSilent serves a client that waits for the server to speak first: the server
// is connected, and what the client then says is looked at before any of it passes.
func (f *flow) serveSilent(ctx context.Context) bool {
	r, ok := f.judgePinned(ctx)
	if !ok {
		f.kill(ReasonRevoked)
		return false
	}
	if !r.Allow && f.expired != "" {
		f.denyUnpinned(r)
		return false
	}
	if !r.Allow { // nothing to reach without a name, which may still come
		_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.SniffTimeout - grace))
		if err := f.in.fill(smallBuffer); err != nil {
			return f.noBytes(ctx, err)
		}
		return f.serveShown(ctx)
	}
	up, ok := f.connect(ctx, r)
	if !ok {
		return false
	}
	f.p.sniffed(f)
	f.recordAllowed(r, "")
	return f.serveLate(ctx, up)
}

// serveLate copies from up to the client and waits for what the client says.
func (f *flow) serveLate(ctx context.Context, up net.Conn) bool {
	_ = up.SetDeadline(time.Time{})
	f.pumps.Store(2)
	back := make(chan error, 1)
	f.p.conns.Add(1)
	go f.speakFirst(up, back)

	err := awaitBytes(f.client)
	if err == nil {
		err = f.in.fill(smallBuffer) // what is there
	}
	if err != nil { // an end without a word is passed on like any other
		if errors.Is(err, io.EOF) {
			err = nil
		}
		f.pumped(up, f.client, err)
		return true
	}
	kind, err := f.classify()
	if err == nil && kind == showsNothing {
		return f.forward(up)
	}
	if err == nil && kind == showsTLS {
		if size, ok := f.helloAllowed(); ok {
			return f.forwardHello(up, back, size)
		}
	}
	if err == nil && f.speaksHTTP2(kind) {
		return f.serveHTTP2Late(up, back)
	}
	spoke := f.silence(up, back)
	f.dropUpstream()
	switch {
	case err != nil:
		return f.unreadable(ctx, err)
	case kind == showsTLS:
		f.proto = "tls"
		return f.serveTLS(ctx)
	case kind == showsProxy:
		return f.unreadable(ctx, errProxyPreamble)
	case spoke:
		return f.unreadable(ctx, badRequest("a request after the server spoke"))
	}
	f.proto = "http"
	return f.serveHTTP(ctx)
}

// speakFirst is pump for the server's direction until silence ends it.
func (f *flow) speakFirst(up net.Conn, back chan<- error) {
	defer f.p.conns.Done()
	n, err := f.p.pipes.copy(f.client, up)
	f.bytesIn.Add(n)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		f.pumped(f.client, up, err)
	}
	back <- err
}

// silence ends speakFirst and reports whether the server had said anything.
func (f *flow) silence(up net.Conn, back <-chan error) (spoke bool) {
	past := time.Unix(1, 0)
	_ = up.SetReadDeadline(past)
	_ = f.client.SetWriteDeadline(past)
	err := <-back
	_ = f.client.SetWriteDeadline(time.Time{})
	return f.bytesIn.Load() > 0 || !errors.Is(err, os.ErrDeadlineExceeded)
}

// helloAllowed judges the name of a ClientHello that came after the server was
// connected, and returns the size of the hello. The address was pinned for an allowed
// name, so with another allowed name it may stay.
func (f *flow) helloAllowed() (size int, ok bool) {
	name, size, err := readHello(&f.in)
	if err != nil || name == "" {
		return 0, false
	}
	f.proto = "tls"
	r, ok := f.judge(name)
	if !ok || !r.Allow || r.route == policy.RouteSelf {
		return 0, false
	}
	f.recordAllowed(r, "")
	return size, true
}

// forwardHello sends the hello and lets both directions flow as a guarded flow's; the
// server's was not one so far.
func (f *flow) forwardHello(up net.Conn, back <-chan error, size int) bool {
	_ = up.SetReadDeadline(time.Unix(1, 0))
	alive := errors.Is(<-back, os.ErrDeadlineExceeded)
	_ = up.SetReadDeadline(time.Time{})
	_ = f.client.SetDeadline(time.Time{})
	if err := f.passPending(up, size); err != nil {
		if alive {
			f.pumped(f.client, up, err)
		}
		f.pumped(up, f.client, err)
		return true
	}
	f.in.rest()
	if alive {
		f.p.conns.Add(1)
		go f.pumpAnswer(up)
	}
	f.p.conns.Add(1)
	go f.pumpHellos(up)
	return true
}

// forward sends what was looked at and lets the client's direction flow.
func (f *flow) forward(up net.Conn) bool {
	sent := f.send(up, f.in.pending())
	f.in.release()
	_ = f.client.SetDeadline(time.Time{})
	if !sent {
		f.pumped(up, f.client, io.ErrShortWrite)
		return true
	}
	f.p.conns.Add(1)
	go f.pump(up, f.client, &f.bytesOut)
	return true
}

// awaitBytes waits until there is something to read, or an end, holding nothing.
func awaitBytes(c *net.TCPConn) error {
	_ = c.SetReadDeadline(time.Time{})
	return readable(c)
}

// readable is awaitBytes that leaves the deadline as it is.
func readable(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		var one [1]byte
		_, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
}
