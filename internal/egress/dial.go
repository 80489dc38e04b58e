package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// headStart is how long one address is tried before the next joins (RFC 8305
// section 5).
const headStart = 250 * time.Millisecond

// keepAlive finds dead peers of idle flows within six minutes, and leaves a
// paused sandbox that long. With upstreams the kernel's own pace is good enough:
// 13 minutes, and two system calls less for each.
var (
	keepAlive         = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 8}
	keepUpstreamAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: -1, Count: -1}
)

// dialFunc connects to one address; check is asked with the socket's actual
// address before connect(2).
type dialFunc func(ctx context.Context, dst netip.AddrPort, check func(netip.AddrPort) error) (net.Conn, error)

func dialTCP(ctx context.Context, dst netip.AddrPort, check func(netip.AddrPort) error) (net.Conn, error) {
	d := net.Dialer{
		KeepAliveConfig: keepUpstreamAlive,
		Control: func(_, address string, _ syscall.RawConn) error {
			actual, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("address %q of the socket: %w", address, err)
			}
			return check(actual)
		},
	}
	// Not DialTCP: with a zero local address it binds the socket, and a port that
	// is bound before the destination is known serves one connection of the whole
	// host at a time; one that connect(2) chooses serves one for each destination.
	return d.DialContext(ctx, "tcp", dst.String())
}

// refusedError says that the policy refuses an address the name resolves to.
type refusedError struct {
	policy.Verdict
	addr netip.AddrPort
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("%s is refused: %s", e.addr, e.Rule.Text)
}

// connect reaches the upstream of an allowed flow and makes it the flow's own.
// When it cannot it tells the client and the flow log, and reports false.
func (f *flow) connect(ctx context.Context, r ruling) (net.Conn, bool) {
	// What ends all flows ends each by its cancel. As children of one context they
	// would queue for its lock, twice for each connection.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.p.lim.DialTimeout)
	defer cancel()
	f.mu.Lock()
	f.cancel = cancel
	killed := f.killed != ""
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.cancel = nil
		f.mu.Unlock()
	}()
	if killed {
		return nil, false
	}
	up, addr, err := f.dialRoute(ctx, r)
	if err != nil {
		f.unreached(r, err)
		return nil, false
	}
	if !f.setUpstream(up, addr) {
		return nil, false
	}
	return up, true
}

// dialRoute dials what the ruling's route says. The address is invalid for our
// own ingress, which is no address a sandbox could be judged by.
func (f *flow) dialRoute(ctx context.Context, r ruling) (net.Conn, netip.AddrPort, error) {
	var addrs []netip.Addr
	switch r.route {
	case policy.RouteSelf:
		if f.p.cfg.DialSelf == nil {
			return nil, netip.AddrPort{}, errors.New("this service's own domains are not served here")
		}
		c, err := f.p.cfg.DialSelf(ctx, f.src, f.dst.Port())
		return c, netip.AddrPort{}, err
	case policy.RouteName:
		var err error
		if addrs, err = f.p.cfg.Resolve(ctx, f.sandbox, r.name); err != nil {
			return nil, netip.AddrPort{}, &resolveError{err}
		}
	default:
		addrs = []netip.Addr{f.dst.Addr()}
	}
	check := func(a netip.AddrPort) error {
		if v := r.policy.DecideAddr(r.name, a); !v.Allow {
			return &refusedError{v, a}
		}
		return nil
	}
	var usable []netip.AddrPort
	var refused error
	for _, a := range byFamily(addrs, f.dst.Addr().Is4()) {
		dst := netip.AddrPortFrom(a, f.dst.Port())
		if err := check(dst); err != nil {
			refused = err
			continue
		}
		usable = append(usable, dst)
	}
	if len(usable) == 0 && refused == nil {
		return nil, netip.AddrPort{}, &resolveError{errors.New("the name has no address")}
	}
	if len(usable) == 0 {
		return nil, netip.AddrPort{}, refused
	}
	return f.p.race(ctx, usable, check)
}

type resolveError struct{ err error }

func (e *resolveError) Error() string { return "resolve: " + e.err.Error() }
func (e *resolveError) Unwrap() error { return e.err }

// byFamily orders addresses as they are tried: families take turns, beginning
// with the one the sandbox itself used.
func byFamily(addrs []netip.Addr, first4 bool) []netip.Addr {
	var mine, other []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap().WithZone(""); a.Is4() == first4 {
			mine = append(mine, a)
		} else {
			other = append(other, a)
		}
	}
	out := mine[:0:0]
	for i := range max(len(mine), len(other)) {
		if i < len(mine) {
			out = append(out, mine[i])
		}
		if i < len(other) {
			out = append(out, other[i])
		}
	}
	return out
}

// attempt is the end of one dial.
type attempt struct {
	conn net.Conn
	addr netip.AddrPort
	err  error
}

// race dials the addresses in order, each with a head start over the next, and
// returns the first that connects (RFC 8305).
func (p *Proxy) race(ctx context.Context, addrs []netip.AddrPort, check func(netip.AddrPort) error) (net.Conn, netip.AddrPort, error) {
	if len(addrs) == 1 {
		c, err := p.dial(ctx, addrs[0], check)
		return c, addrs[0], err
	}
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan attempt)
	running, next := 0, 0
	start := func() {
		dst := addrs[next]
		next++
		running++
		go func() {
			c, err := p.dial(ctx, dst, check)
			results <- attempt{c, dst, err}
		}()
	}
	defer func() { // losers end at once; nobody is left behind
		cancel()
		for ; running > 0; running-- {
			if a := <-results; a.conn != nil {
				a.conn.Close()
			}
		}
	}()
	timer := time.NewTimer(headStart)
	defer timer.Stop()
	start()
	var errs []error
	for running > 0 {
		select {
		case <-timer.C:
		case a := <-results:
			running--
			if a.err == nil {
				return a.conn, a.addr, nil
			}
			errs = append(errs, a.err)
		}
		if next < len(addrs) {
			start()
			timer.Reset(headStart)
		}
	}
	return nil, netip.AddrPort{}, errors.Join(errs...)
}

// unreached ends an allowed flow whose upstream cannot be had: an address the
// policy refuses is a denial, everything else a failure.
func (f *flow) unreached(r ruling, err error) {
	f.mu.Lock()
	killed := f.killed
	f.mu.Unlock()
	if killed != "" {
		return
	}
	if refused, ok := errors.AsType[*refusedError](err); ok {
		f.deny(r.policy, denial{rule: refused.Rule, reason: refused.Reason, name: r.name, detail: "the name leads to " + refused.addr.String()})
		return
	}
	e := event{policy: r.policy, name: r.name, rule: r.Rule, reason: ReasonUpstream, detail: err.Error()}
	if _, ok := errors.AsType[*resolveError](err); ok {
		e.reason = ReasonResolve
	}
	verdict := flowlog.Failed
	if errs.Is(err, errs.Exhausted) { // names beyond what may be asked for are denied, not out of reach
		verdict, e.reason = flowlog.Denied, ReasonBudget
	}
	f.record(verdict, e)
	reset(f.client)
}
