package egress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// pinnedDst is the destination of every flow here: a.example's address, which
// b.example has as well.
const pinnedDst = "93.184.216.1:8080"

// onlyPinned allows a.example on one port.
var onlyPinned = policy.Input{AllowOut: []string{"a.example:8080", "*.sub.example:8080"}, DenyOut: []string{"0.0.0.0/0"}, OnDeny: policy.OnDenyReset}

// pinnedLab is a lab in which a.example was resolved.
func pinnedLab(t testing.TB, tune ...func(*Config)) *lab {
	t.Helper()
	pinned := func(c *Config) {
		c.Pinned = func(_ context.Context, sandbox string, dst netip.AddrPort) (names []string, expired string) {
			if sandbox == "sbx" && dst.String() == pinnedDst {
				return []string{"gone.example", "a.example"}, ""
			}
			return nil, ""
		}
	}
	l := newLab(t, onlyPinned, append([]func(*Config){pinned}, tune...)...)
	l.mu.Lock()
	l.names["b.example"] = []netip.Addr{addrA}
	l.mu.Unlock()
	return l
}

func TestClassify(t *testing.T) {
	for kind := range 256 {
		want := kind >= 20 && kind <= 24 // the record types of RFC 8446 and RFC 6520
		if got := classifyIn(string([]byte{byte(kind), 3, 1, 0, 2}), 1); (got == showsTLS) != want && kind < 0x80 {
			t.Errorf("a record of type %d: got %d", kind, got)
		}
	}
	for _, tt := range []struct {
		name, in string
		want     protocol
	}{
		{"nothing", "", undecided},
		{"TLS", "\x16", showsTLS},
		{"an alert record", "\x15\x03", showsTLS},
		{"an alert of a version that is none", "\x15\x00\x00\x00\x02", showsTLS},
		{"the start of one", "\x15\x00\x00\x00", undecided},
		{"a record of no type", "\x19\x03\x03\x00\x02", showsNothing},
		{"bytes that are no record", "\x14\x00\x00\x01", showsNothing},
		{"no alert", "\x15\x08\x0a\x10\x02", showsNothing},
		{"a hello in SSL 2 form", "\x80\x2e\x01\x03", showsTLS},
		{"the start of one", "\x80\x2e\x01", undecided},
		{"SSL 2", "\x80\x2e\x01\x00", showsNothing},
		{"a method", "GET", undecided},
		{"a method and a target", "GET /index.html", undecided},
		{"a request line", "GET / HTTP/1.1\r\n", showsHTTP},
		{"with a bare LF", "GET / HTTP/1.1\n", showsHTTP},
		{"behind empty lines", "\r\n\n\r\nGET / HTTP/1.1\r\n", showsHTTP},
		{"behind white space", " \tGET / HTTP/1.1\r\n", showsHTTP},
		{"with tabs", "GET\t/\tHTTP/1.1\r\n", showsHTTP},
		{"with what Python splits at", "GET\x85/\x1chttp/1.1\r\n", showsHTTP},
		{"with a control character", "GET /\x01 HTTP/1.1\r\n", showsHTTP},
		{"HTTP/2 with prior knowledge", "PRI * HTTP/2.0\r\n", showsHTTP2},
		{"not quite", "PRI  * HTTP/2.0\r\n", showsHTTP},
		{"behind an empty line", "\r\nPRI * HTTP/2.0\r\n", showsHTTP},
		{"an absolute target without a version", "GET http://b.example/\r\n", showsHTTP},
		{"a method nobody knows", strings.Repeat("X", 100) + " / HTTP/1.1\r\n", showsHTTP},
		{"a path without a version", "GET /\r\n", showsNothing},
		{"SSH", "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", showsNothing},
		{"SMTP", "EHLO a.example\r\n", showsNothing},
		{"Redis", "*1\r\n", showsNothing},
		{"PostgreSQL", "\x00\x00\x00\x08\x04\xd2\x16\x2f", showsNothing},
		{"AMQP", "AMQP\x00\x00\x09\x01", showsNothing},
		{"JSON", `{"jsonrpc":"2.0"}`, showsNothing},
		{"an answer", "HTTP/1.1 200 OK\r\n", showsNothing},
		{"a PROXY preamble", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", showsProxy},
		{"a binary PROXY preamble", proxyV2, showsProxy},
		{"the start of one", proxyV2[:11], undecided},
		{"the word alone", "PROXY\r\n", showsNothing},
	} {
		for step := 1; step <= max(len(tt.in), 1); step++ {
			if got := classifyIn(tt.in, step); got != tt.want {
				t.Errorf("%s, %d bytes at a time: got %d, want %d", tt.name, step, got, tt.want)
			}
		}
	}
}

// classifyIn looks at in as it grows by step bytes.
func classifyIn(in string, step int) protocol {
	var c classifier
	for n := 0; ; n += step {
		n = min(n, len(in))
		if got := c.look([]byte(in[:n])); got != undecided || n == len(in) {
			return got
		}
	}
}

// notHandshake are records that no server takes before a hello, of each type.
var notHandshake = []string{"\x14\x03\x01\x00\x01\x02", string(alertAccessDenied[:]), "\x17\x03\x03\x00\x01\x00", "\x18\x03\x03\x00\x01\x00"}

func FuzzClassify(f *testing.F) {
	f.Add([]byte(lines("GET / HTTP/1.1", "Host: a")), 1)
	f.Add([]byte("\r\n\tGET http://a/\n\n"), 3)
	f.Add(hello{names: [][]byte{[]byte("a.example")}}.records(), 4)
	for _, record := range notHandshake {
		f.Add([]byte(record+helloFor("a.example")), 4)
	}
	f.Add([]byte(proxyV2), 5)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		got := classifyIn(string(b), max(step, 1))
		if whole := classifyIn(string(b), len(b)+1); got != whole {
			t.Fatalf("%q is %d in steps of %d, %d at once", b, got, step, whole)
		}
		if got == undecided {
			var c classifier
			_ = c.look(b)
			got = c.end(b)
		}
		// Whatever a server reads a name from must be looked at for one.
		if r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b))); err == nil && r.Host != "" && got != showsHTTP {
			t.Fatalf("%q is %d, and a request for %q", b, got, r.Host)
		}
		named := false
		srv := tls.Server(&replay{r: bytes.NewReader(b)}, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			named = true
			return nil, errRead
		}})
		if _ = srv.HandshakeContext(context.Background()); named && got != showsTLS {
			t.Fatalf("%q is %d, and a ClientHello", b, got)
		}
	})
}

func TestAPinnedPortIsOpenForItsNameInAnyProtocol(t *testing.T) {
	t.Run("TLS", func(t *testing.T) {
		l := pinnedLab(t)
		l.host(tlsEcho(t), pinnedDst)
		converse(t, l.connect(pinnedDst), clientConfig("a.example"))
		if e := l.await(flowlog.Allowed); e.Reason != policy.ReasonAllowName || e.Name != "a.example" || e.Proto != "tls" {
			t.Errorf("event %+v", e)
		}
	})
	for _, host := range []string{"a.example:8080", "a.example"} {
		t.Run("HTTP, Host: "+host, func(t *testing.T) {
			l := pinnedLab(t)
			l.host(answering("hello"), pinnedDst)
			c := l.connect(pinnedDst)
			send(t, c, lines("GET / HTTP/1.1", "Host: "+host, "Connection: close"))
			if got, _ := everything(c); !strings.HasSuffix(got, "hello") {
				t.Errorf("got %q", got)
			}
			if e := l.await(flowlog.Allowed); e.Reason != policy.ReasonAllowName || e.Name != "a.example" || e.Proto != "http" {
				t.Errorf("event %+v", e)
			}
		})
	}
	for _, first := range []string{"\x00\x00\x00\x08\x04\xd2\x16\x2f", "PING\r\n", "*1\r\n$4\r\nPING\r\n", "EHLO a b\r\n"} {
		t.Run("raw", func(t *testing.T) {
			l := pinnedLab(t)
			l.host(func(c net.Conn) { _, _ = io.Copy(c, c) }, pinnedDst)
			c := l.connect(pinnedDst)
			send(t, c, first)
			c.CloseWrite()
			if got, err := everything(c); got != first || err != nil {
				t.Errorf("got %q and %v", got, err)
			}
			if e := l.await(flowlog.Allowed); e.Reason != ReasonPinned || e.Name != "a.example" || e.Rule.ID != "allow[0]" || e.Upstream.String() != pinnedDst {
				t.Errorf("event %+v", e)
			}
			if e := l.await(flowlog.Closed); e.Reason != ReasonPinned || int(e.BytesOut) != len(first) || int(e.BytesIn) != len(first) {
				t.Errorf("event %+v", e)
			}
		})
	}
	t.Run("a word that the end completes", func(t *testing.T) {
		l := pinnedLab(t)
		l.host(func(c net.Conn) { _, _ = io.Copy(c, c) }, pinnedDst)
		c := l.connect(pinnedDst)
		send(t, c, "PING")
		c.CloseWrite()
		if got, err := everything(c); got != "PING" || err != nil {
			t.Errorf("got %q and %v", got, err)
		}
	})
}

// answering serves one request with a body.
func answering(body string) func(net.Conn) {
	return func(c net.Conn) {
		if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_ = r.Body.Close()
			_, _ = io.WriteString(c, lines("HTTP/1.1 200 OK", "Connection: close")+body)
		}
	}
}

// neighbours are first words that would lead to who shares a.example's address.
var neighbours = []struct {
	name, sent string
	want       policy.Reason
	alert      bool
}{
	{"another server name", helloFor("b.example"), policy.ReasonNameDenied, true},
	{"no server name", string(hello{noSNI: true}.records()), ReasonNoSNI, true},
	{"a hello in SSL 2 form", "\x80\x2e\x01\x03\x01", ReasonBadHello, true},
	{"another Host", lines("GET / HTTP/1.1", "Host: b.example:8080"), policy.ReasonNameDenied, false},
	{"another Host without a port", lines("GET / HTTP/1.1", "Host: b.example"), policy.ReasonNameDenied, false},
	{"another port", lines("GET / HTTP/1.1", "Host: a.example:80"), ReasonPortMismatch, false},
	{"no Host", lines("GET / HTTP/1.0"), ReasonNoHost, false},
	{"an absolute target", lines("GET http://b.example:8080/ HTTP/1.1", "Host: a.example:8080"), ReasonBadRequest, false},
	{"behind an empty line", "\r\n" + lines("GET / HTTP/1.1", "Host: b.example"), ReasonProtocolMismatch, false},
	{"an absolute target without a version", "GET http://b.example/\r\n\r\n", ReasonBadRequest, false},
	{"CONNECT", lines("CONNECT b.example:8080 HTTP/1.1", "Host: b.example:8080"), ReasonBadRequest, false},
	{"a cipher change before the hello", notHandshake[0] + helloFor("b.example"), ReasonBadHello, true},
	{"an alert before the hello", notHandshake[1] + helloFor("b.example"), ReasonBadHello, true},
	{"data before the hello", notHandshake[2] + helloFor("b.example"), ReasonBadHello, true},
	{"a heartbeat before the hello", notHandshake[3] + helloFor("b.example"), ReasonBadHello, true},
	{"a PROXY preamble before the hello", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + helloFor("b.example"), ReasonBadRequest, false},
	{"a binary PROXY preamble before the hello", proxyV2 + "\x20\x00\x00\x00" + helloFor("b.example"), ReasonBadRequest, false},
}

func TestANeighbourOnAPinnedPortIsNotReached(t *testing.T) { // (53)
	for _, tt := range neighbours {
		end := func(t *testing.T, l *lab, c net.Conn) {
			t.Helper()
			if tt.alert {
				wantAlert(t, c)
			} else {
				wantReset(t, c)
			}
			l.awaitDenied(tt.want)
		}
		t.Run(tt.name, func(t *testing.T) {
			l := pinnedLab(t)
			up := l.host(nil, pinnedDst)
			c := l.connect(pinnedDst)
			send(t, c, tt.sent)
			end(t, l, c)
			up.untouched(t)
		})
		t.Run(tt.name+", one byte at a time", func(t *testing.T) {
			l := pinnedLab(t)
			up := l.host(nil, pinnedDst)
			c := l.connect(pinnedDst)
			_ = c.SetNoDelay(true)
			for i := range len(tt.sent) {
				if _, err := c.Write([]byte{tt.sent[i]}); err != nil {
					break // refused before its end
				}
				time.Sleep(50 * time.Microsecond)
			}
			_, _ = everything(c) // how it ended, the write may have learnt already
			l.awaitDenied(tt.want)
			up.untouched(t)
		})
		t.Run(tt.name+", after a silence", func(t *testing.T) {
			l := pinnedLab(t)
			up := l.host(nil, pinnedDst)
			c := l.connect(pinnedDst)
			if e := l.await(flowlog.Allowed); e.Reason != ReasonPinned {
				t.Errorf("event %+v", e)
			}
			send(t, c, tt.sent)
			end(t, l, c)
			if up.bytes.Load() != 0 {
				t.Errorf("the upstream got %q", up.text())
			}
		})
	}
}

// TestOnlyAHandshakeBeginsTLSOnAPinnedPort has a server with certificates for two
// names at one address and a rule for one of them.
func TestOnlyAHandshakeBeginsTLSOnAPinnedPort(t *testing.T) {
	l := pinnedLab(t)
	up := l.host(tlsEcho(t), pinnedDst)
	for _, record := range notHandshake {
		for _, name := range []string{"a.example", "b.example"} {
			c := l.connect(pinnedDst)
			send(t, c, record+helloFor(name))
			wantAlert(t, c)
			l.awaitDenied(ReasonBadHello)
		}
	}
	up.untouched(t)
	converse(t, l.connect(pinnedDst), clientConfig("a.example"))
}

func TestAfterASilenceTheNameMayStillCome(t *testing.T) {
	t.Run("TLS", func(t *testing.T) {
		l := pinnedLab(t)
		l.host(tlsEcho(t), pinnedDst)
		c := l.connect(pinnedDst)
		l.await(flowlog.Allowed)
		converse(t, c, clientConfig("a.example"))
		if e := l.await(flowlog.Allowed); e.Name != "a.example" || e.Proto != "tls" {
			t.Errorf("event %+v", e)
		}
	})
	t.Run("HTTP", func(t *testing.T) {
		l := pinnedLab(t)
		l.host(answering("hello"), pinnedDst)
		c := l.connect(pinnedDst)
		l.await(flowlog.Allowed)
		send(t, c, lines("GET / HTTP/1.1", "Host: a.example:8080", "Connection: close"))
		if got, _ := everything(c); !strings.HasSuffix(got, "hello") {
			t.Errorf("got %q", got)
		}
	})
}

func TestAServerMaySpeakFirstOnAPinnedPort(t *testing.T) {
	banner := func(c net.Conn) {
		_, _ = io.WriteString(c, "220 hello\r\n")
		_, _ = io.Copy(c, c)
	}
	greeted := func(t *testing.T) (*lab, *upstream, *net.TCPConn) {
		t.Helper()
		l := pinnedLab(t)
		up := l.host(banner, pinnedDst)
		c := l.connect(pinnedDst)
		got := make([]byte, 11)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "220 hello\r\n" {
			t.Fatalf("got %q and %v", got, err)
		}
		return l, up, c
	}
	t.Run("and the client answers", func(t *testing.T) {
		l, _, c := greeted(t)
		send(t, c, "EHLO x\r\n")
		c.CloseWrite()
		if got, err := everything(c); got != "EHLO x\r\n" || err != nil {
			t.Errorf("got %q and %v", got, err)
		}
		if e := l.await(flowlog.Closed); e.Reason != ReasonPinned || e.BytesIn != 19 || e.BytesOut != 8 {
			t.Errorf("event %+v", e)
		}
	})
	t.Run("and the client only leaves", func(t *testing.T) {
		l, _, c := greeted(t)
		c.CloseWrite()
		if got, err := everything(c); got != "" || err != nil {
			t.Errorf("got %q and %v", got, err)
		}
		l.await(flowlog.Closed)
	})
	t.Run("and the client shows a neighbour's name", func(t *testing.T) {
		for _, sent := range []string{helloFor("b.example"), lines("GET / HTTP/1.1", "Host: b.example"), lines("GET / HTTP/1.1", "Host: a.example:8080")} {
			l, up, c := greeted(t)
			send(t, c, sent)
			_, _ = everything(c)
			l.await(flowlog.Denied)
			if up.bytes.Load() != 0 {
				t.Errorf("the upstream got %q", up.text())
			}
		}
	})
	t.Run("and what cannot be told apart is held, then denied", func(t *testing.T) {
		l := pinnedLab(t, func(c *Config) { c.Limits.SniffTimeout = 300 * time.Millisecond })
		up := l.host(banner, pinnedDst)
		c := l.connect(pinnedDst)
		l.await(flowlog.Allowed)
		send(t, c, "GET /")
		_, _ = everything(c)
		l.awaitDenied(ReasonSniffTimeout)
		if up.bytes.Load() != 0 {
			t.Errorf("the upstream got %q", up.text())
		}
	})
	t.Run("and a policy update cuts it", func(t *testing.T) {
		l, _, c := greeted(t)
		l.apply(onlyPinned)
		send(t, c, "NOOP\r\n")
		if _, err := io.ReadFull(c, make([]byte, 6)); err != nil {
			t.Fatalf("a flow that stays allowed was cut: %v", err)
		}
		l.apply(onlyA)
		if _, err := everything(c); !isReset(err) {
			t.Errorf("it ended with %v", err)
		}
		l.awaitDenied(ReasonRevoked)
	})
}

func TestWithoutAPinOnlyANameOpensAPort(t *testing.T) {
	l := newLab(t, onlyPinned, func(c *Config) { c.Limits.SniffTimeout = 400 * time.Millisecond })
	l.host(tlsEcho(t), pinnedDst)
	for _, sent := range []string{"", "PING\r\n"} {
		c := l.connect(pinnedDst)
		send(t, c, sent)
		wantReset(t, c)
		l.await(flowlog.Denied)
	}
	l.mu.Lock()
	if len(l.dialled) != 0 {
		t.Errorf("%v were dialled", l.dialled)
	}
	l.mu.Unlock()
	converse(t, l.connect(pinnedDst), clientConfig("a.example"))
}

func TestARefusalNamesTheExpiredPin(t *testing.T) {
	const why = "the pin of a.example expired: it no longer has this address"
	l := newLab(t, onlyPinned, func(c *Config) {
		c.Pinned = func(context.Context, string, netip.AddrPort) ([]string, string) { return nil, why }
	})
	l.host(tlsEcho(t), pinnedDst)
	for _, sent := range []string{"", "PING\r\n"} { // a client that waits for the server, and one that does not
		c := l.connect(pinnedDst)
		send(t, c, sent)
		wantReset(t, c)
		if e := l.await(flowlog.Denied); e.Reason != policy.ReasonPinExpired || e.Detail != why {
			t.Errorf("logged %s, %q", e.Reason, e.Detail)
		}
	}
}

func TestASilentClientThatIsKilledLeavesNothing(t *testing.T) {
	l := pinnedLab(t)
	l.host(nil, pinnedDst)
	c := l.connect(pinnedDst)
	l.await(flowlog.Allowed)
	l.p.Cut("sbx")
	if _, err := everything(c); !isReset(err) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("it ended with %v", err)
	}
	l.await(flowlog.Closed)
}

// TestARuleWithPort443IsAboutEveryProtocol: a server that speaks first works on 443 of a
// name listed with that port, and is refused, with the rule to write, where the name
// is listed alone. Each verdict is the one that explain gives.
func TestARuleWithPort443IsAboutEveryProtocol(t *testing.T) {
	const dst = "93.184.216.1:443"
	start := func(t *testing.T, entry string) (*lab, *net.TCPConn) {
		in := policy.Input{AllowOut: []string{entry}, DenyOut: []string{"0.0.0.0/0"}}
		l := newLab(t, in, func(c *Config) {
			c.Limits.SniffTimeout = 500 * time.Millisecond
			c.Pinned = func(context.Context, string, netip.AddrPort) ([]string, string) { return []string{"a.example"}, "" }
		})
		l.host(func(c net.Conn) { _, _ = io.WriteString(c, "220 git\r\n"); _, _ = io.Copy(c, c) }, dst)
		return l, l.connect(dst)
	}
	agrees := func(t *testing.T, l *lab, wire policy.Wire, name string, allow bool) {
		t.Helper()
		o, _ := l.owner(self4)
		if j := o.Policy.Judge(netip.MustParseAddrPort(dst), name, wire, []string{"a.example"}); j.Allow != allow {
			t.Errorf("explain says %+v", j)
		}
	}
	t.Run("with the port", func(t *testing.T) {
		l, c := start(t, "a.example:443")
		got := make([]byte, 9)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "220 git\r\n" {
			t.Fatalf("got %q and %v", got, err)
		}
		send(t, c, "want\n")
		if _, err := io.ReadFull(c, got[:5]); err != nil {
			t.Fatal(err)
		}
		if e := l.await(flowlog.Allowed); e.Reason != ReasonPinned || e.Name != "a.example" {
			t.Errorf("event %+v", e)
		}
		agrees(t, l, policy.WireOther, "", true)
	})
	t.Run("with the port, another's name", func(t *testing.T) {
		for _, sent := range []string{helloFor("b.example"), lines("GET / HTTP/1.1", "Host: b.example")} {
			l, c := start(t, "a.example:443")
			send(t, c, sent)
			_, _ = everything(c)
			if sent[0] == recordHandshake {
				l.awaitDenied(policy.ReasonNameDenied)
			} else {
				l.awaitDenied(ReasonProtocolMismatch) // a name without the port would not count there
			}
		}
	})
	t.Run("without", func(t *testing.T) {
		l, c := start(t, "a.example")
		wantReset(t, c)
		if e := l.awaitDenied(ReasonSniffTimeout); !strings.Contains(e.Detail, "a rule a.example:443 lets any protocol pass") {
			t.Errorf("detail %q", e.Detail)
		}
		agrees(t, l, policy.WireOther, "", false)
		c = l.connect(dst)
		send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
		wantReset(t, c)
		if e := l.awaitDenied(ReasonProtocolMismatch); !strings.Contains(e.Detail, "a rule a.example:443 lets any protocol pass") {
			t.Errorf("detail %q", e.Detail)
		}
		agrees(t, l, policy.WireHTTP, "a.example", false)
	})
	t.Run("another rule with the port changes nothing for a name without", func(t *testing.T) {
		in := policy.Input{AllowOut: []string{"a.example", "other.example:443"}, DenyOut: []string{"0.0.0.0/0"}}
		l := newLab(t, in)
		up := l.host(nil, dst)
		c := l.connect(dst)
		send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
		_, _ = everything(c)
		l.awaitDenied(ReasonProtocolMismatch)
		up.untouched(t)
	})
}
