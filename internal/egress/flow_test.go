package egress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

func helloFor(name string) string { return string(hello{names: [][]byte{[]byte(name)}}.records()) }

func TestNewSaysWhatIsMissing(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a proxy without anything was made")
	}
}

func TestAConnectionOfNobodyIsReset(t *testing.T) {
	l := newLab(t, policy.Input{})
	up := l.host(nil, "93.184.216.1:443")
	l.mu.Lock()
	l.owners = nil
	l.mu.Unlock()
	l.wantRefused("93.184.216.1:443")
	up.untouched(t)
}

func TestTheFloorHoldsWhateverTheNameSays(t *testing.T) { // (43)
	l := newLab(t, policy.Input{AllowOut: []string{"a.example", "10.0.0.0/8"}, DenyOut: []string{"0.0.0.0/0"}})
	up := l.host(nil, "10.0.0.1:443", "93.184.216.1:443")
	c := l.connect("10.0.0.1:443")
	send(t, c, helloFor("a.example"))
	wantAlert(t, c)
	l.awaitDenied(policy.ReasonFloor)
	up.untouched(t)
}

func TestANameThatLeadsIntoTheFloorIsDenied(t *testing.T) { // (51)
	for _, addr := range []string{"127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"} {
		t.Run(addr, func(t *testing.T) {
			l := newLab(t, onlyA)
			a := netip.MustParseAddr(addr)
			l.names["a.example"] = []netip.Addr{a}
			up := l.host(nil, netip.AddrPortFrom(a.Unmap(), 443).String(), netip.AddrPortFrom(a.Unmap(), 80).String())
			c := l.connect("93.184.216.1:443")
			send(t, c, helloFor("a.example"))
			wantAlert(t, c)
			l.awaitDenied(policy.ReasonFloor)
			c = l.connect("93.184.216.1:80")
			send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
			wantReset(t, c)
			l.awaitDenied(policy.ReasonFloor)
			up.untouched(t)
		})
	}
	t.Run("one address of two", func(t *testing.T) {
		l := newLab(t, onlyA)
		l.names["a.example"] = []netip.Addr{netip.MustParseAddr("127.0.0.1"), addrA}
		l.host(tlsEcho(t), "93.184.216.1:443")
		converse(t, l.connect("93.184.216.1:443"), clientConfig("a.example"))
	})
}

func TestTheDialerChecksTheSocketsAddress(t *testing.T) {
	asked := netip.AddrPort{}
	refuse := errors.New("refused by the check")
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, err = dialTCP(t.Context(), addrPortOf(ln.Addr()), func(a netip.AddrPort) error { asked = a; return refuse })
	if !errors.Is(err, refuse) || asked != addrPortOf(ln.Addr()) {
		t.Errorf("got %v after asking about %v", err, asked)
	}
}

func TestAnUnreachableUpstreamIsAFailureNotADenial(t *testing.T) {
	l := newLab(t, policy.Input{AllowOut: []string{"*.sub.example", "gone.example"}, DenyOut: []string{"0.0.0.0/0"}})
	l.names["empty.sub.example"] = nil
	for _, tt := range []struct {
		name string
		want policy.Reason
	}{{"dead.sub.example", ReasonUpstream}, {"gone.example", ReasonResolve}, {"empty.sub.example", ReasonResolve}} {
		c := l.connect("93.184.216.1:443")
		send(t, c, helloFor(tt.name))
		wantReset(t, c)
		if e := l.await(flowlog.Failed); e.Reason != tt.want || e.Detail == "" || e.Name != tt.name {
			t.Errorf("%s: event %+v", tt.name, e)
		}
		c = l.connect("93.184.216.1:80")
		send(t, c, lines("GET / HTTP/1.1", "Host: "+tt.name))
		wantReset(t, c)
		if e := l.await(flowlog.Failed); e.Reason != tt.want {
			t.Errorf("%s: event %+v", tt.name, e)
		}
	}
}

func TestANameBeyondTheBudgetIsADenial(t *testing.T) {
	const limit = "100 different names below *.sub.example in a minute"
	l := newLab(t, policy.Input{AllowOut: []string{"*.sub.example"}, DenyOut: []string{"0.0.0.0/0"}}, func(c *Config) {
		c.Resolve = func(context.Context, string, string) ([]netip.Addr, error) {
			return nil, fmt.Errorf("resolve: %w", errs.New(errs.Exhausted, limit))
		}
	})
	for _, c := range []struct{ dst, sent string }{
		{"93.184.216.1:443", helloFor("x.sub.example")}, {"93.184.216.1:80", lines("GET / HTTP/1.1", "Host: x.sub.example")},
	} {
		client := l.connect(c.dst)
		send(t, client, c.sent)
		wantReset(t, client)
		if e := l.await(flowlog.Denied); e.Reason != ReasonBudget || !strings.Contains(e.Detail, limit) || e.Name != "x.sub.example" {
			t.Errorf("%s: event %+v", c.dst, e)
		}
	}
}

func TestOurOwnNamesGoToTheIngress(t *testing.T) {
	dials := make(chan string, 10)
	var l *lab
	self := func(c *Config) {
		c.DialSelf = func(ctx context.Context, client netip.AddrPort, port uint16) (net.Conn, error) {
			dials <- fmt.Sprintf("%s %d", client.Addr(), port)
			l.mu.Lock()
			real := l.hosts[netip.AddrPortFrom(netip.MustParseAddr("192.0.0.8"), port)]
			l.mu.Unlock()
			return (&net.Dialer{}).DialContext(ctx, "tcp", real)
		}
	}
	for _, tt := range []struct {
		name string
		in   policy.Input
	}{
		{"by default", policy.Input{}},
		{"by name", policy.Input{AllowOut: []string{"*.cordon.localhost"}, DenyOut: []string{"0.0.0.0/0"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l = newLab(t, tt.in, self)
			l.host(tlsEcho(t), "192.0.0.8:443")
			l.httpOn(echo, "192.0.0.8:80")
			converse(t, l.connect("192.0.0.8:443"), clientConfig("3000-x.cordon.localhost"))
			c := l.connect("192.0.0.8:80")
			br := bufio.NewReader(c)
			for range 2 {
				if _, body := ask(t, c, br, lines("GET / HTTP/1.1", "Host: 3000-x.cordon.localhost")); body != `GET 3000-x.cordon.localhost / ""` {
					t.Errorf("got %q", body)
				}
			}
			if got := <-dials + ", " + <-dials; got != "127.0.0.1 443, 127.0.0.1 80" {
				t.Errorf("dialled %s", got)
			}
		})
	}
	t.Run("another name at the service address is the floor", func(t *testing.T) {
		l = newLab(t, policy.Input{}, self)
		for _, name := range []string{"a.example", "notcordon.localhost"} {
			c := l.connect("192.0.0.8:443")
			send(t, c, helloFor(name))
			wantAlert(t, c)
			l.awaitDenied(policy.ReasonFloor)
		}
	})
	t.Run("nothing serves them", func(t *testing.T) {
		l = newLab(t, policy.Input{})
		c := l.connect("192.0.0.8:443")
		send(t, c, helloFor("3000-x.cordon.localhost"))
		wantReset(t, c)
		l.await(flowlog.Failed)
	})
}

func TestObserveModePassesAndRecords(t *testing.T) {
	in := onlyA
	in.Mode = policy.ModeObserve
	l := newLab(t, in)
	l.host(tlsEcho(t), "93.184.216.66:443", "93.184.216.1:443")
	x := l.httpOn(echo, "93.184.216.66:80")

	converse(t, l.connect("93.184.216.66:443"), clientConfig("b.example"))
	if e := l.await(flowlog.Observed); e.Reason != policy.ReasonNameDenied || e.Upstream.String() != "93.184.216.66:443" || e.Name != "b.example" {
		t.Errorf("event %+v", e)
	}
	converse(t, l.connect("93.184.216.66:443"), clientConfig("a.example"))
	if e := l.await(flowlog.Allowed); e.Upstream.String() != "93.184.216.1:443" {
		t.Errorf("a listed name went to %s", e.Upstream)
	}
	c := l.connect("93.184.216.66:80")
	if code, _ := ask(t, c, bufio.NewReader(c), lines("GET / HTTP/1.1", "Host: b.example")); code != 200 {
		t.Errorf("got %d", code)
	}
	l.await(flowlog.Observed)

	bad := lines("GET / HTTP/1.1", "Host: a.example", "Host: a.example")
	c = l.connect("93.184.216.66:80")
	send(t, c, bad)
	c.CloseWrite()
	if _, err := everything(c); err != nil {
		t.Error(err)
	}
	if e := l.await(flowlog.Observed); e.Reason != ReasonBadRequest {
		t.Errorf("event %+v", e)
	}
	if got := x.text(); got[len(got)-len(bad):] != bad {
		t.Errorf("the upstream got %q", got)
	}
	c = l.connect("10.0.0.1:443")
	send(t, c, helloFor("b.example"))
	wantAlert(t, c)
	l.awaitDenied(policy.ReasonFloor)
}

func TestTighteningCutsLiveFlows(t *testing.T) { // (59)
	onlyB := policy.Input{AllowOut: []string{"b.example"}, DenyOut: []string{"0.0.0.0/0"}}
	closed := policy.Input{DenyOut: []string{"0.0.0.0/0"}}
	tests := []struct {
		name          string
		before, after policy.Input
		shown         string
		cut           bool
	}{
		{"a name taken away", onlyA, onlyB, "a.example", true},
		{"everything taken away", policy.Input{}, closed, "a.example", true},
		{"an address flow whose name alone stays allowed", policy.Input{}, onlyA, "a.example", true},
		{"loosened", onlyA, policy.Input{}, "a.example", false},
		{"the same again", onlyA, onlyA, "a.example", false},
		{"observe becomes enforce", policy.Input{Mode: policy.ModeObserve, DenyOut: closed.DenyOut}, closed, "b.example", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, tt.before)
			l.host(func(c net.Conn) { _, _ = io.Copy(c, c) }, "93.184.216.1:443", "93.184.216.66:443")
			c := l.connect("93.184.216.66:443")
			h := helloFor(tt.shown)
			send(t, c, h)
			if _, err := io.ReadFull(c, make([]byte, len(h))); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			l.apply(tt.after)
			if !tt.cut {
				send(t, c, "still there")
				if _, err := io.ReadFull(c, make([]byte, len("still there"))); err != nil {
					t.Error(err)
				}
				return
			}
			if _, err := c.Read(make([]byte, 1)); !isReset(err) {
				t.Errorf("got %v, want a reset", err)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("cut after %v", took)
			}
			l.awaitDenied(ReasonRevoked)
			if e := l.await(flowlog.Closed); e.Reason != ReasonRevoked || e.BytesOut != int64(len(h)) {
				t.Errorf("closed with %+v", e)
			}
		})
	}
	t.Run("an idle HTTP connection", func(t *testing.T) {
		l := newLab(t, onlyA)
		l.httpOn(echo, "93.184.216.1:80")
		c := l.connect("93.184.216.1:80")
		br := bufio.NewReader(c)
		ask(t, c, br, lines("GET / HTTP/1.1", "Host: a.example"))
		l.apply(onlyB)
		if _, err := br.ReadByte(); !isReset(err) {
			t.Errorf("got %v, want a reset", err)
		}
	})
	t.Run("a flow that has shown no name yet meets the new policy", func(t *testing.T) {
		l := newLab(t, onlyB, func(c *Config) { c.Limits.SniffTimeout = 5 * time.Second })
		l.host(tlsEcho(t), "93.184.216.1:443")
		c := l.connect("93.184.216.1:443")
		l.awaitFlows(1)
		l.apply(onlyA)
		converse(t, c, clientConfig("a.example"))
	})
	t.Run("a flow that is being dialled", func(t *testing.T) {
		l := newLab(t, onlyA)
		dialling := make(chan struct{})
		l.p.dial = func(ctx context.Context, _ netip.AddrPort, _ func(netip.AddrPort) error) (net.Conn, error) {
			close(dialling)
			<-ctx.Done()
			return nil, ctx.Err()
		}
		c := l.connect("93.184.216.1:443")
		send(t, c, helloFor("a.example"))
		<-dialling
		start := time.Now()
		l.apply(onlyB)
		wantReset(t, c)
		if took := time.Since(start); took > time.Second {
			t.Errorf("cut after %v", took)
		}
	})
}

// awaitFlows waits until the proxy has admitted n flows.
func (l *lab) awaitFlows(n int) {
	l.t.Helper()
	for end := time.Now().Add(5 * time.Second); len(l.p.flowsOf("")) != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("%d flows, want %d", len(l.p.flowsOf("")), n)
		}
	}
}

func TestKillingASandboxCutsItsFlowsAndOnlyThose(t *testing.T) {
	l := newLab(t, policy.Input{})
	other := netip.MustParseAddr("127.0.0.2")
	l.mu.Lock()
	l.owners[other] = Owner{"other", l.owners[self4].Policy}
	ln := l.lns[netip.MustParseAddrPort("93.184.216.1:443")]
	l.mu.Unlock()
	l.host(func(c net.Conn) { _, _ = io.Copy(c, c) }, "93.184.216.1:443")
	start := func(c net.Conn) {
		send(t, c, "\x01")
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	mine, sniffing := l.connect("93.184.216.1:443"), l.connect("93.184.216.1:443")
	start(mine)
	theirs, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: other.AsSlice()}}).Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	start(theirs)
	l.awaitFlows(3)
	l.mu.Lock()
	delete(l.owners, self4)
	l.mu.Unlock()
	l.p.Cut("sbx")
	for _, c := range []net.Conn{mine, sniffing} {
		if _, err := c.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("got %v, want a reset", err)
		}
	}
	if e := l.await(flowlog.Closed); e.Reason != ReasonKilled {
		t.Errorf("closed with %+v", e)
	}
	l.awaitFlows(1)
	start(theirs)
}

func TestLimitsAreOfOneSandbox(t *testing.T) {
	tests := []struct {
		name   string
		limits Limits
		hold   string // what each connection sends
	}{
		{"pending", Limits{Pending: 3}, "\x16"},
		{"connections", Limits{Conns: 3}, "\x01"},
		{"new per second", Limits{NewPerSecond: 3}, "\x01"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, policy.Input{}, func(c *Config) { c.Limits = tt.limits; c.Limits.SniffTimeout = 5 * time.Second })
			other := netip.MustParseAddr("127.0.0.2")
			l.mu.Lock()
			l.owners[other] = Owner{"other", l.owners[self4].Policy}
			ln := l.lns[netip.MustParseAddrPort("93.184.216.1:443")]
			l.mu.Unlock()
			l.host(nil, "93.184.216.1:443")
			for range 3 {
				send(t, l.connect("93.184.216.1:443"), tt.hold)
			}
			l.awaitFlows(3)
			l.wantRefused("93.184.216.1:443")
			if e := l.awaitDenied(ReasonBudget); e.Detail == "" {
				t.Error("the limit is not named")
			}
			c2, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: other.AsSlice()}}).Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c2.Close()
			l.awaitFlows(4)
		})
	}
	t.Run("memory of unfinished names", func(t *testing.T) {
		l := newLab(t, onlyA, func(c *Config) { c.Limits = Limits{SniffBytes: 20 << 10, SniffTimeout: 5 * time.Second} })
		big := func() net.Conn {
			c := l.connect("93.184.216.1:80")
			return c
		}
		head := "GET / HTTP/1.1\r\nHost: a.example\r\nX: " + fmt.Sprintf("%010000d", 1)
		send(t, big(), head)
		l.awaitFlows(1)
		for end := time.Now().Add(5 * time.Second); l.p.memory.Used() == 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		wantResetAfter(t, big(), head)
		l.awaitDenied(ReasonBudget)
		l.p.cut("", ReasonKilled)
		l.awaitFlows(0)
		if n := l.p.memory.Used(); n != 0 {
			t.Errorf("%d bytes are still charged", n)
		}
	})
	t.Run("one key cannot take what another needs", func(t *testing.T) {
		l := newLab(t, policy.Input{}, func(c *Config) {
			c.Limits = Limits{TotalConns: 8, SniffTimeout: 5 * time.Second}
			c.Key = func(sandbox string) string { return "key of " + sandbox[:1] }
		})
		dial := func(addr, sandbox string) (net.Conn, error) {
			a := netip.MustParseAddr(addr)
			l.mu.Lock()
			l.owners[a] = Owner{sandbox, l.owners[self4].Policy}
			ln := l.lns[netip.MustParseAddrPort("93.184.216.1:443")]
			l.mu.Unlock()
			return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: a.AsSlice()}}).Dial("tcp", ln.Addr().String())
		}
		from := func(addr, sandbox string) {
			c, err := dial(addr, sandbox)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}
		for i := range 4 { // a key that is alone gets half, in however many sandboxes
			from("127.0.0."+strconv.Itoa(10+i), "a"+strconv.Itoa(i))
			l.awaitFlows(i + 1)
		}
		l.wantRefusal(dial("127.0.0.20", "a-last"))
		if e := l.await(flowlog.Denied); e.Reason != ReasonBudget || e.Detail != "connections through the egress proxy: this API key holds its share of 4" {
			t.Errorf("event %+v", e)
		}
		from("127.0.0.30", "b")
		from("127.0.0.31", "b")
		l.awaitFlows(6)
		if n := l.p.Pools()[0].Held("key of b"); n != 2 {
			t.Errorf("the other key holds %d, want 2", n)
		}
		l.p.cut("", ReasonKilled)
		l.awaitFlows(0)
		if n := l.p.open.Used(); n != 0 {
			t.Errorf("%d connections are still counted", n)
		}
	})
	t.Run("all sandboxes together", func(t *testing.T) {
		l := newLab(t, policy.Input{}, func(c *Config) { c.Limits.TotalConns = 1; c.Limits.SniffTimeout = 5 * time.Second })
		l.connect("93.184.216.1:443")
		l.awaitFlows(1)
		l.wantRefused("93.184.216.1:443")
		l.awaitDenied(ReasonBudget)
	})
}

// wantRefused asserts that a connection is reset before it says anything, which
// may be before connect returns.
func (l *lab) wantRefused(dst string) {
	l.t.Helper()
	l.mu.Lock()
	ln := l.lns[netip.MustParseAddrPort(dst)]
	l.mu.Unlock()
	l.wantRefusal(net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second))
}

// wantRefusal asserts the same of a connection that was dialed already.
func (l *lab) wantRefusal(c net.Conn, err error) {
	l.t.Helper()
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if !isReset(err) {
		l.t.Errorf("got %v, want a reset", err)
	}
}

func TestAFloodOfOneSandboxDoesNotDelayAnother(t *testing.T) {
	l := newLab(t, onlyA, func(c *Config) { c.Limits.Pending = 50; c.Limits.SniffTimeout = 5 * time.Second })
	other := netip.MustParseAddr("127.0.0.2")
	l.mu.Lock()
	l.owners[other] = Owner{"other", l.owners[self4].Policy}
	ln := l.lns[netip.MustParseAddrPort("93.184.216.1:443")]
	l.mu.Unlock()
	l.host(tlsEcho(t), "93.184.216.1:443")
	for range 200 {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: other.AsSlice()}}).Dial("tcp", ln.Addr().String())
		if isReset(err) {
			continue // refused before connect returned
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = io.WriteString(c, "\x16")
	}
	start := time.Now()
	converse(t, l.connect("93.184.216.1:443"), clientConfig("a.example"))
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %v", took)
	}
}

func TestTheLimiterOfAnIdleSandboxIsForgotten(t *testing.T) {
	p, err := New(Config{
		Owner: func(netip.Addr) (Owner, bool) { return Owner{}, false }, Resolve: func(context.Context, string, string) ([]netip.Addr, error) { return nil, nil },
		Flows: &lab{}, Log: discard,
	})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		go p.sweep(ctx)
		f := &flow{p: p, sandbox: "sbx"}
		if why := p.admit(f); why != "" {
			t.Fatal(why)
		}
		time.Sleep(3 * tenantIdle)
		synctest.Wait()
		if len(p.tenants) != 1 {
			t.Error("forgotten while it had a flow")
		}
		p.leave(f)
		p.leave(f) // twice counts once
		time.Sleep(3 * tenantIdle)
		synctest.Wait()
		if len(p.tenants) != 0 || p.open.Used() != 0 {
			t.Errorf("%d tenants and %d flows are left", len(p.tenants), int(p.open.Used()))
		}
		stop()
		synctest.Wait()
	})
}

func TestRaceTakesTheFirstAddressThatAnswers(t *testing.T) {
	v6, v4 := netip.MustParseAddr("2606:4700::1"), addrA
	tests := []struct {
		name  string
		delay map[netip.Addr]time.Duration // negative: fails after that long
		want  netip.Addr
		took  time.Duration
	}{
		{"the first at once", map[netip.Addr]time.Duration{v4: 0, v6: 0}, v4, 0},
		{"the first is slow but within its head start", map[netip.Addr]time.Duration{v4: 200 * time.Millisecond, v6: 0}, v4, 200 * time.Millisecond},
		{"the first hangs", map[netip.Addr]time.Duration{v4: time.Hour, v6: 10 * time.Millisecond}, v6, 260 * time.Millisecond},
		{"the first fails at once", map[netip.Addr]time.Duration{v4: -1, v6: 0}, v6, 1},
		{"all fail", map[netip.Addr]time.Duration{v4: -1, v6: -1}, netip.Addr{}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var open atomic.Int32
				p := &Proxy{dial: func(ctx context.Context, dst netip.AddrPort, _ func(netip.AddrPort) error) (net.Conn, error) {
					d := tt.delay[dst.Addr()]
					select {
					case <-time.After(max(d, -d)):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if d < 0 {
						return nil, errors.New("unreachable")
					}
					open.Add(1)
					c, _ := net.Pipe()
					return &onClose{c, func() { open.Add(-1) }}, nil
				}}
				start := time.Now()
				var addrs []netip.AddrPort
				for _, a := range byFamily([]netip.Addr{v6, v4}, true) {
					addrs = append(addrs, netip.AddrPortFrom(a, 443))
				}
				c, addr, err := p.race(t.Context(), addrs, nil)
				if addr.Addr() != tt.want || (err == nil) != tt.want.IsValid() || time.Since(start) != tt.took {
					t.Errorf("got %v, %v after %v; want %v after %v", addr, err, time.Since(start), tt.want, tt.took)
				}
				if c != nil {
					c.Close()
				}
				synctest.Wait()
				if n := open.Load(); n != 0 {
					t.Errorf("%d connections of losers are open", n)
				}
			})
		})
	}
}

type onClose struct {
	net.Conn
	f func()
}

func (c *onClose) Close() error { c.f(); return c.Conn.Close() }

func TestByFamilyLetsFamiliesTakeTurns(t *testing.T) {
	var in []netip.Addr
	for _, s := range []string{"::ffff:1.0.0.1", "2001:db8::1", "2001:db8::2", "2001:db8::3", "1.0.0.2"} {
		in = append(in, netip.MustParseAddr(s))
	}
	if got, want := fmt.Sprint(byFamily(in, true)), "[1.0.0.1 2001:db8::1 1.0.0.2 2001:db8::2 2001:db8::3]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(byFamily(in, false)), "[2001:db8::1 1.0.0.1 2001:db8::2 1.0.0.2 2001:db8::3]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestRunEndsWithItsContextAndResetsWhatLives(t *testing.T) {
	l := newLab(t, policy.Input{})
	l.host(func(c net.Conn) { _, _ = io.Copy(c, c) }, "93.184.216.1:443")
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.dsts[addrPortOf(ln.Addr())] = netip.MustParseAddrPort("93.184.216.1:443")
	l.mu.Unlock()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- l.p.Run(ctx, ln) }()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	send(t, c, "\x01")
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := c.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("got %v, want a reset", err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Run does not end")
	}
}

func TestRunReturnsTheErrorOfAListenerThatWasClosed(t *testing.T) {
	l := newLab(t, policy.Input{})
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := l.p.Run(t.Context(), ln); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}
