package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a proxy between loopback clients and loopback upstreams that stand for
// public addresses. Where a connection was going is told by the listener it came
// to; which upstream an address means is told by hosts.
type lab struct {
	t   testing.TB
	p   *Proxy
	ctx context.Context

	mu      sync.Mutex // guards the rest
	lns     map[netip.AddrPort]net.Listener
	dsts    map[netip.AddrPort]netip.AddrPort
	hosts   map[netip.AddrPort]string // public address → loopback address
	names   map[string][]netip.Addr
	owners  map[netip.Addr]Owner
	dialled []netip.AddrPort
	events  []flowlog.Event
	news    chan struct{}
	gen     uint64
}

var (
	addrA = netip.MustParseAddr("93.184.216.1")
	addrB = netip.MustParseAddr("93.184.216.2")
	addrX = netip.MustParseAddr("93.184.216.66") // an attacker's
	self4 = netip.MustParseAddr("127.0.0.1")
)

// onlyA allows a.example and nothing else.
var onlyA = policy.Input{AllowOut: []string{"a.example", "*.sub.example"}, DenyOut: []string{"0.0.0.0/0"}, OnDeny: policy.OnDenyReset}

var discard = slog.New(slog.DiscardHandler)

var operator = &policy.Operator{SelfDomains: []string{"cordon.localhost"}}

func newLab(t testing.TB, in policy.Input, tune ...func(*Config)) *lab {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	l := &lab{
		t: t, ctx: ctx, lns: map[netip.AddrPort]net.Listener{}, dsts: map[netip.AddrPort]netip.AddrPort{}, hosts: map[netip.AddrPort]string{},
		names:  map[string][]netip.Addr{"a.example": {addrA}, "b.example": {addrB}, "x.sub.example": {addrA}, "dead.sub.example": {netip.MustParseAddr("93.184.216.99")}},
		owners: map[netip.Addr]Owner{}, news: make(chan struct{}, 1),
	}
	l.apply(in)
	cfg := Config{
		Owner: l.owner, Resolve: l.resolve, Flows: l,
		Log:    discard,
		Limits: Limits{SniffTimeout: 3 * time.Second, DialTimeout: 3 * time.Second},
	}
	for _, f := range tune {
		f(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.p, p.dial, p.dst = p, l.dial, l.originalDst
	var running sync.WaitGroup
	l.t.Cleanup(func() { stop(); running.Wait(); p.conns.Wait() })
	for _, dst := range []string{"93.184.216.1:443", "93.184.216.1:80", "93.184.216.2:443", "93.184.216.2:80", "93.184.216.66:443", "93.184.216.66:80", "192.0.0.8:443", "192.0.0.8:80", "10.0.0.1:443", "93.184.216.1:8080"} {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.lns[netip.MustParseAddrPort(dst)] = ln
		l.dsts[addrPortOf(ln.Addr())] = netip.MustParseAddrPort(dst)
		running.Go(func() {
			if err := p.Run(ctx, ln); err != nil {
				t.Error(err)
			}
		})
	}
	return l
}

// apply puts a policy in force for the sandbox of 127.0.0.1 and, if the proxy
// runs, has it judge what lives.
func (l *lab) apply(in policy.Input) {
	l.t.Helper()
	l.mu.Lock()
	l.gen++
	c, err := policy.Compile(in, operator, l.gen)
	if err != nil {
		l.t.Fatal(err)
	}
	l.owners[self4] = Owner{"sbx", c}
	l.mu.Unlock()
	if l.p != nil {
		l.p.Revoke("sbx")
	}
}

func (l *lab) owner(a netip.Addr) (Owner, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o, ok := l.owners[a]
	return o, ok
}

func (l *lab) originalDst(c *net.TCPConn) (netip.AddrPort, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dsts[addrPortOf(c.LocalAddr())], nil
}

func (l *lab) resolve(_ context.Context, sandbox, name string) ([]netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sandbox != "sbx" {
		return nil, fmt.Errorf("resolve for %q", sandbox)
	}
	if addrs, ok := l.names[name]; ok {
		return addrs, nil
	}
	return nil, errors.New("no such name")
}

// dial stands for the network: check is asked as the real dialer asks it.
func (l *lab) dial(ctx context.Context, dst netip.AddrPort, check func(netip.AddrPort) error) (net.Conn, error) {
	if err := check(dst); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.dialled = append(l.dialled, dst)
	real, ok := l.hosts[dst]
	l.mu.Unlock()
	if !ok {
		return nil, syscall.ECONNREFUSED
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", real)
}

// Record implements flowlog.Recorder.
func (l *lab) Record(e flowlog.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
	select {
	case l.news <- struct{}{}:
	default:
	}
}

// await waits for an event of the verdict and returns it.
func (l *lab) await(v flowlog.Verdict) flowlog.Event {
	l.t.Helper()
	deadline := time.After(5 * time.Second)
	for {
		l.mu.Lock()
		for i, e := range l.events {
			if e.Verdict == v {
				l.events = append(l.events[:i:i], l.events[i+1:]...)
				l.mu.Unlock()
				return e
			}
		}
		seen := fmt.Sprintf("%+v", l.events)
		l.mu.Unlock()
		select {
		case <-l.news:
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			l.t.Fatalf("no %s event; seen %s", v, seen)
		}
	}
}

// awaitDenied waits for a denial with the reason.
func (l *lab) awaitDenied(want policy.Reason) flowlog.Event {
	l.t.Helper()
	e := l.await(flowlog.Denied)
	if e.Reason != want {
		l.t.Errorf("denied for %q (%s), want %q", e.Reason, e.Detail, want)
	}
	if e.Sandbox != "sbx" || e.Generation == 0 || e.Rule.ID == "" || e.Layer != flowlog.LayerProxy || !e.Dst.IsValid() || e.Time.IsZero() {
		l.t.Errorf("incomplete event %+v", e)
	}
	return e
}

// connect is a sandbox's connection to dst.
func (l *lab) connect(dst string) *net.TCPConn {
	l.t.Helper()
	l.mu.Lock()
	ln, ok := l.lns[netip.MustParseAddrPort(dst)]
	l.mu.Unlock()
	if !ok {
		l.t.Fatalf("no listener for %s", dst)
	}
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(8 * time.Second))
	return c.(*net.TCPConn)
}

// upstream is a listener that stands for a public address and remembers what
// reached it.
type upstream struct {
	net.Listener
	conns atomic.Int64
	bytes atomic.Int64
	mu    sync.Mutex // guards seen
	seen  []byte
}

// host starts an upstream for the public addresses; handle serves one
// connection, or nil just records.
func (l *lab) host(handle func(net.Conn), addrs ...string) *upstream {
	l.t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		l.t.Fatal(err)
	}
	u := &upstream{Listener: ln}
	if handle == nil {
		handle = func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := u.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				stop := context.AfterFunc(l.ctx, func() { c.Close() })
				defer stop()
				defer c.Close()
				handle(c)
			})
		}
	})
	l.t.Cleanup(func() { ln.Close(); l.p.cut("", ReasonShutdown); running.Wait() })
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range addrs {
		l.hosts[netip.MustParseAddrPort(a)] = ln.Addr().String()
	}
	return u
}

// Accept counts connections and wraps them to count bytes.
func (u *upstream) Accept() (net.Conn, error) {
	c, err := u.Listener.Accept()
	if err != nil {
		return nil, err
	}
	u.conns.Add(1)
	return &counted{Conn: c, u: u}, nil
}

type counted struct {
	net.Conn
	u *upstream
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.u.bytes.Add(int64(n))
	c.u.mu.Lock()
	c.u.seen = append(c.u.seen, p[:n]...)
	c.u.mu.Unlock()
	return n, err
}

func (c *counted) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }

func (u *upstream) text() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return string(u.seen)
}

// untouched asserts that not even a connection reached u.
func (u *upstream) untouched(t testing.TB) {
	t.Helper()
	if n, b := u.conns.Load(), u.bytes.Load(); n != 0 || b != 0 {
		t.Errorf("the upstream got %d connections and %d bytes %q, want none", n, b, u.text())
	}
}

// everything reads to the end and says how it ended.
func everything(c net.Conn) (got string, end error) {
	b, err := io.ReadAll(c)
	return string(b), err
}

func isReset(err error) bool { return errors.Is(err, syscall.ECONNRESET) }

// wantReset asserts that the connection is reset without a byte.
func wantReset(t testing.TB, c net.Conn) {
	t.Helper()
	got, err := everything(c)
	if got != "" || !isReset(err) {
		t.Errorf("got %q and %v, want a reset and nothing", got, err)
	}
}

// wantResetAfter sends s and asserts that the connection is reset without a
// byte: whichever of write and read comes first after the reset learns of it.
func wantResetAfter(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		if got, _ := everything(c); got != "" || !isReset(err) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("got %q and %v, want a reset and nothing", got, err)
		}
		return
	}
	wantReset(t, c)
}

// wantAlert asserts that the connection ends with the TLS alert access_denied.
func wantAlert(t testing.TB, c net.Conn) {
	t.Helper()
	got, err := everything(c)
	if got != string(alertAccessDenied[:]) || err != nil {
		t.Errorf("got %q and %v, want the alert and an orderly end", got, err)
	}
}

func send(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func lines(s ...string) string { return strings.Join(s, "\r\n") + "\r\n\r\n" }
