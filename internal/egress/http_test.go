package egress

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// httpOn serves handler on an upstream.
func (l *lab) httpOn(handler http.HandlerFunc, addrs ...string) *upstream {
	l.t.Helper()
	conns := make(chan net.Conn)
	srv := &http.Server{Handler: handler}
	ln := &chanListener{conns: conns, done: make(chan struct{})}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(ln) }()
	l.t.Cleanup(func() { srv.Close(); <-served })
	return l.host(func(c net.Conn) {
		gone := make(chan struct{})
		select {
		case conns <- &untilClosed{Conn: c, closed: gone}:
			select {
			case <-gone:
			case <-l.ctx.Done():
			}
		case <-l.ctx.Done():
		}
	}, addrs...)
}

type chanListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *chanListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *chanListener) Close() error   { close(l.done); return nil }
func (l *chanListener) Addr() net.Addr { return &net.TCPAddr{} }

type untilClosed struct {
	net.Conn
	closed chan struct{}
}

func (c *untilClosed) Close() error {
	select {
	case <-c.closed:
	default:
		close(c.closed)
	}
	return c.Conn.Close()
}

// echo answers with what it was asked.
func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	fmt.Fprintf(w, "%s %s %s %q", r.Method, r.Host, r.URL, body)
}

// ask sends one raw request and reads one answer.
func ask(t testing.TB, c net.Conn, br *bufio.Reader, raw string) (int, string) {
	t.Helper()
	send(t, c, raw)
	method, _, _ := strings.Cut(raw, " ")
	resp, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%q: %v", raw, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%q: %v", raw, err)
	}
	return resp.StatusCode, string(body)
}

func TestAllowedHTTPReachesTheRealOwnerOfTheName(t *testing.T) {
	pad := "X-Pad: " + strings.Repeat("p", 1000)
	tests := []struct{ name, sent, want string }{
		{"plain", lines("GET /x?y=1 HTTP/1.1", "Host: a.example"), `GET a.example /x?y=1 ""`},
		{"(22) HOST", lines("GET / HTTP/1.1", "HOST: a.example"), `GET a.example / ""`},
		{"(33) case", lines("GET / HTTP/1.1", "Host: A.ExAmPle"), `GET A.ExAmPle / ""`},
		{"(32) a trailing dot", lines("GET / HTTP/1.1", "Host: a.example."), `GET a.example. / ""`},
		{"(37) the port of the connection", lines("GET / HTTP/1.1", "Host: a.example:80"), `GET a.example:80 / ""`},
		{"no space after the colon", lines("GET / HTTP/1.1", "Host:a.example"), `GET a.example / ""`},
		{"much space around the value", lines("GET / HTTP/1.1", "Host:  \t a.example \t "), `GET a.example / ""`},
		{"absolute form that agrees", lines("GET http://A.example:80/x?y HTTP/1.1", "Host: a.example"), `GET a.example /x?y ""`},
		{"absolute form without a path", lines("GET http://a.example HTTP/1.1", "Host: a.example"), `GET a.example / ""`},
		{"absolute form with only a query", lines("GET http://a.example?q HTTP/1.1", "Host: a.example"), `GET a.example /?q ""`},
		{"OPTIONS *", lines("OPTIONS * HTTP/1.1", "Host: a.example"), ``},
		{"(21) Host beyond 4 KiB", lines("GET / HTTP/1.1", pad, pad, pad, pad, pad, pad, "Host: a.example"), `GET a.example / ""`},
		{"HTTP/1.0 with Host", lines("GET / HTTP/1.0", "Host: a.example"), `GET a.example / ""`},
		{"a body by length", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 5") + "hello", `POST a.example / "hello"`},
		{"a chunked body", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: CHUNKED") + "5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n", `POST a.example / "hello world"`},
		{"another method", lines("PURGE /x HTTP/1.1", "Host: a.example"), `PURGE a.example /x ""`},
		{"Expect is answered by the upstream", lines("POST / HTTP/1.1", "Host: a.example", "Expect: 100-continue", "Content-Length: 2") + "ok", `POST a.example / "ok"`},
		{"UTF-8 in the path", lines("GET /ü HTTP/1.1", "Host: a.example"), `GET a.example /%C3%BC ""`},
	}
	for _, tt := range tests {
		for _, slow := range []bool{false, true} {
			name := tt.name
			if slow {
				if len(tt.sent) > 4000 {
					continue
				}
				name += ", one byte per segment"
			}
			t.Run(name, func(t *testing.T) {
				l := newLab(t, onlyA)
				l.httpOn(echo, "93.184.216.1:80")
				x := l.host(nil, "93.184.216.66:80")
				c := l.connect("93.184.216.66:80")
				if slow {
					if err := byteByByte(c, []byte(tt.sent)); err != nil {
						t.Fatal(err)
					}
				} else {
					send(t, c, tt.sent)
				}
				br := bufio.NewReader(c)
				for {
					resp, err := http.ReadResponse(br, nil)
					if err != nil {
						t.Fatal(err)
					}
					body, err := io.ReadAll(resp.Body)
					if resp.StatusCode == 100 {
						continue
					}
					if got := string(body); got != tt.want || err != nil || resp.StatusCode != 200 {
						t.Fatalf("got %d %q and %v, want %q", resp.StatusCode, got, err, tt.want)
					}
					break
				}
				c.Close()
				x.untouched(t)
				e := l.await(flowlog.Allowed)
				if e.Upstream.String() != "93.184.216.1:80" || e.Proto != "http" || e.Name != "a.example" || strings.Contains(e.Detail, "?") {
					t.Errorf("event %+v", e)
				}
				if e := l.await(flowlog.Closed); e.BytesOut == 0 || e.BytesIn == 0 {
					t.Errorf("closed with %+v", e)
				}
			})
		}
	}
}

// badHTTP are requests that never reach anyone, first or later on a connection.
var badHTTP = []struct {
	name, sent string
	want       policy.Reason
}{
	{"another name", lines("GET / HTTP/1.1", "Host: b.example"), policy.ReasonNameDenied},
	{"(35) the name as a suffix of another", lines("GET / HTTP/1.1", "Host: nota.example"), policy.ReasonNameDenied},
	{"(35) the name as a prefix of another", lines("GET / HTTP/1.1", "Host: a.example.b.example"), policy.ReasonNameDenied},
	{"(3) CONNECT", lines("CONNECT a.example:443 HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"(17) two Hosts", lines("GET / HTTP/1.1", "Host: a.example", "Host: b.example"), ReasonBadRequest},
	{"(17) two equal Hosts", lines("GET / HTTP/1.1", "Host: a.example", "hOst: a.example"), ReasonBadRequest},
	{"(17) two names in one Host", lines("GET / HTTP/1.1", "Host: a.example, b.example"), ReasonBadName},
	{"(18) absolute form of another name", lines("GET http://b.example/ HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"(18) absolute form of the name, Host of another", lines("GET http://a.example/ HTTP/1.1", "Host: b.example"), ReasonBadRequest},
	{"(18) absolute form with another port", lines("GET http://a.example:81/ HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"(18) absolute form with userinfo", lines("GET http://a.example@b.example/ HTTP/1.1", "Host: a.example"), ReasonBadName},
	{"(18) absolute form of https", lines("GET https://a.example/ HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"(18) authority form", lines("GET a.example HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"(18) a backslash in the authority", lines(`GET http://a.example\@b.example/ HTTP/1.1`, "Host: a.example"), ReasonBadName},
	{"(19) obs-fold", lines("GET / HTTP/1.1", "Host: a.example", "X: 1", " 2"), ReasonBadRequest},
	{"(19) a folded Host", lines("GET / HTTP/1.1", "Host:", " a.example"), ReasonBadRequest},
	{"(19) a leading space before the first field", lines("GET / HTTP/1.1", " Host: b.example", "Host: a.example"), ReasonBadRequest},
	{"(19) a space before the colon", lines("GET / HTTP/1.1", "Host : a.example"), ReasonBadRequest},
	{"(19) a tab before the colon", lines("GET / HTTP/1.1", "Host\t: a.example"), ReasonBadRequest},
	{"(19) bare LF", "GET / HTTP/1.1\nHost: a.example\n\n", ReasonBadRequest},
	{"(19) one bare LF", "GET / HTTP/1.1\r\nHost: a.example\nX: 1\r\n\r\n", ReasonBadRequest},
	{"(19) bare CR", "GET / HTTP/1.1\r\nHost: a.example\rX: 1\r\n\r\n", ReasonBadRequest},
	{"(19) NUL in a value", lines("GET / HTTP/1.1", "Host: a.example", "X: a\x00b"), ReasonBadRequest},
	{"(36) NUL in Host", lines("GET / HTTP/1.1", "Host: a.example\x00.b.example"), ReasonBadRequest},
	{"(36) a backslash in Host", lines("GET / HTTP/1.1", `Host: a.example\.b.example`), ReasonBadName},
	{"(36) a slash in Host", lines("GET / HTTP/1.1", "Host: a.example/.b.example"), ReasonBadName},
	{"(20) CL and TE", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 4", "Transfer-Encoding: chunked") + "0\r\n\r\n", ReasonBadRequest},
	{"(20) two CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 4", "Content-Length: 5") + "hello", ReasonBadRequest},
	{"(20) two equal CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 5", "Content-Length: 5") + "hello", ReasonBadRequest},
	{"(20) a list of CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 5, 5") + "hello", ReasonBadRequest},
	{"(20) a signed CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: +5") + "hello", ReasonBadRequest},
	{"(20) a hex CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 0x5") + "hello", ReasonBadRequest},
	{"(20) an empty CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length:"), ReasonBadRequest},
	{"(20) an enormous CL", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 99999999999999999999"), ReasonBadRequest},
	{"(20) two TE", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), ReasonBadRequest},
	{"(20) another coding", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: gzip, chunked"), ReasonBadRequest},
	{"(20) an almost chunked coding", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: xchunked"), ReasonBadRequest},
	{"(20) identity", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: identity"), ReasonBadRequest},
	{"(20) TE with a control character", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: \x0bchunked"), ReasonBadRequest},
	{"(20) TE with a space before the colon", lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding : chunked", "Content-Length: 5"), ReasonBadRequest},
	{"(20) TE in HTTP/1.0", lines("POST / HTTP/1.0", "Host: a.example", "Transfer-Encoding: chunked"), ReasonBadRequest},
	{"(20) Connection drops Content-Length", lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 5", "Connection: content-length") + "hello", ReasonBadRequest},
	{"Connection drops Host", lines("GET / HTTP/1.1", "Host: a.example", "Connection: keep-alive, Host"), ReasonBadRequest},
	{"(22) HTTP/1.1 without Host", lines("GET / HTTP/1.1", "X: y"), ReasonBadRequest},
	{"(22) HTTP/1.0 without Host", lines("GET / HTTP/1.0", "X: y"), ReasonNoHost},
	{"(22) HTTP/1.0 with the name only in the target", lines("GET http://a.example/ HTTP/1.0", "X: y"), ReasonNoHost},
	{"an empty Host", lines("GET / HTTP/1.1", "Host:"), ReasonNoHost},
	{"(25) PRI", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ReasonBadRequest},
	{"(25) PRI in HTTP/1.1", lines("PRI * HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"HTTP/0.9", "GET /\r\n\r\n", ReasonBadRequest},
	{"HTTP/1.2", lines("GET / HTTP/1.2", "Host: a.example"), ReasonBadRequest},
	{"two spaces", lines("GET  / HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"a tab in the request line", lines("GET /\tHTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"a space in the target", lines("GET / / HTTP/1.1", "Host: a.example"), ReasonBadRequest},
	{"(34) full-width dots", lines("GET / HTTP/1.1", "Host: a．example"), ReasonBadName},
	{"(34) full-width letters", lines("GET / HTTP/1.1", "Host: ａ.example"), ReasonBadName},
	{"(34) Latin-1", lines("GET / HTTP/1.1", "Host: b\xfccher.example"), policy.ReasonNameDenied},
	{"(34) a homoglyph", lines("GET / HTTP/1.1", "Host: а.example"), policy.ReasonNameDenied},
	{"(37) userinfo", lines("GET / HTTP/1.1", "Host: a.example@b.example"), ReasonBadName},
	{"(37) brackets", lines("GET / HTTP/1.1", "Host: [a.example]"), ReasonBadName},
	{"(37) another port", lines("GET / HTTP/1.1", "Host: a.example:8080"), ReasonPortMismatch},
	{"(37) two ports", lines("GET / HTTP/1.1", "Host: a.example:80:80"), ReasonBadName},
	{"(37) an empty port", lines("GET / HTTP/1.1", "Host: a.example:"), ReasonBadName},
	{"(37) a signed port", lines("GET / HTTP/1.1", "Host: a.example:+80"), ReasonBadName},
	{"(37) only a port", lines("GET / HTTP/1.1", "Host: :80"), ReasonBadName},
	{"(40) an IPv4 address", lines("GET / HTTP/1.1", "Host: 93.184.216.1"), ReasonNoHost},
	{"(40) an IPv6 address", lines("GET / HTTP/1.1", "Host: [2606:4700::1]:80"), ReasonNoHost},
	{"(41) a decimal address", lines("GET / HTTP/1.1", "Host: 1572395009"), ReasonBadName},
	{"(41) an octal address", lines("GET / HTTP/1.1", "Host: 0135.0270.0330.01"), ReasonBadName},
	{"(41) a hex address", lines("GET / HTTP/1.1", "Host: 0x5d.0xb8.0xd8.0x1"), ReasonBadName},
	{"(41) a short address", lines("GET / HTTP/1.1", "Host: 93.12113921"), ReasonBadName},
	{"(39) a label of 64", lines("GET / HTTP/1.1", "Host: "+strings.Repeat("a", 64)+".sub.example"), ReasonBadName},
	{"(32) two trailing dots", lines("GET / HTTP/1.1", "Host: a.example.."), ReasonBadName},
	{"an unknown expectation", lines("GET / HTTP/1.1", "Host: a.example", "Expect: x"), ReasonBadRequest},
	{"(62) our own name, not listed", lines("GET / HTTP/1.1", "Host: 3000-x.cordon.localhost"), policy.ReasonNameDenied},
	{"(21) a head over the cap", lines("GET / HTTP/1.1", "Host: a.example", "X: "+strings.Repeat("x", 33<<10)), ReasonSniffTooBig},
	{"257 fields", lines("GET / HTTP/1.1", "Host: a.example", strings.TrimSuffix(strings.Repeat("A: b\r\n", 256), "\r\n")), ReasonBadRequest},
}

// TestADeniedRequestHoldsNothing: a client that has sent its whole request is answered
// and let go, whether it closes its own direction or not; one that still has something
// to send is waited for, as its answer would be lost in a reset.
func TestADeniedRequestHoldsNothing(t *testing.T) {
	l := newLab(t, policy.Input{AllowOut: []string{"a.example"}, DenyOut: []string{"0.0.0.0/0"}})
	for _, tt := range []struct {
		name, sent string
		held       int64 // connections, right after the answer
	}{
		{"whole", lines("GET / HTTP/1.1", "Host: b.example"), 0},
		{"with a body to come", lines("POST / HTTP/1.1", "Host: b.example", "Content-Length: 5"), 1},
		{"with another behind it", lines("GET / HTTP/1.1", "Host: b.example") + lines("GET / HTTP/1.1", "Host: b.example"), 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := l.connect("93.184.216.1:80")
			send(t, c, tt.sent)
			if got, err := everything(c); !strings.HasPrefix(got, "HTTP/1.1 403 ") || err != nil {
				t.Fatalf("got %q, %v", got, err)
			}
			held := l.p.open.Used()
			for end := time.Now().Add(farewell / 2); held != tt.held && time.Now().Before(end); held = l.p.open.Used() {
				time.Sleep(time.Millisecond)
			}
			if held != tt.held {
				t.Errorf("%d connections are held, want %d", held, tt.held)
			}
			c.Close()
			for l.p.open.Used() != 0 { // or the next one counts it
				time.Sleep(time.Millisecond)
			}
		})
	}
}

func TestWhatARuleSaysFitsAHeader(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "allow[0] *.a.example": "allow[0] *.a.example", `say "a"`: `say "a"`, `a\b`: `a\\b`, `a\"b`: `a\\"b`,
		"a\r\nB: c": `a\r\nB: c`, "b\u00fccher": `b\u00fccher`, "\x7f": `\x7f`, "\xff": `\xff`,
	} {
		if got := printable(in); got != want {
			t.Errorf("%q is written %q, want %q", in, got, want)
		}
	}
}

// wantForbidden sends s and asserts that a 403 comes, and the end.
func wantForbidden(t testing.TB, c net.Conn, s string) {
	t.Helper()
	_, _ = io.WriteString(c, s) // the answer may come before all is sent
	got, err := everything(c)
	if !strings.HasPrefix(got, "HTTP/1.1 403 Denied by egress policy\r\n") || strings.Count(got, "HTTP/1.1 403") != 1 || !strings.HasSuffix(got, "; sandbox sbx)\n") || err != nil {
		t.Errorf("got %q and %v, want one 403 and an orderly end", got, err)
	}
}

func TestDeniedHTTPIsAnsweredAndNothingLeaves(t *testing.T) {
	for _, tt := range badHTTP {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, policy.Input{AllowOut: onlyA.AllowOut, DenyOut: onlyA.DenyOut})
			up := l.host(nil, "93.184.216.1:80", "93.184.216.2:80", "93.184.216.66:80")
			c := l.connect("93.184.216.66:80")
			if tt.want == ReasonProtocolMismatch { // no HTTP
				wantResetAfter(t, c, tt.sent)
			} else {
				wantForbidden(t, c, tt.sent)
			}
			l.awaitDenied(tt.want)
			up.untouched(t)
		})
	}
}

func TestDeniedHTTPIsResetAndNothingLeaves(t *testing.T) {
	for _, tt := range badHTTP {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, onlyA)
			up := l.host(nil, "93.184.216.1:80", "93.184.216.2:80", "93.184.216.66:80")
			c := l.connect("93.184.216.66:80")
			start := time.Now()
			wantResetAfter(t, c, tt.sent)
			if took := time.Since(start); took > 3*time.Second { // the deadline to show a name is five
				t.Errorf("denied after %v, want at once", took)
			}
			l.awaitDenied(tt.want)
			up.untouched(t)
		})
	}
}

// TestEveryRequestOfAConnectionIsJudged sends what is denied as a second
// request, after the first answer (15) and in one piece with the first (16).
func TestEveryRequestOfAConnectionIsJudged(t *testing.T) {
	for _, tt := range badHTTP {
		for _, how := range []string{"kept-alive", "pipelined"} {
			t.Run(how+": "+tt.name, func(t *testing.T) {
				t.Parallel()
				l := newLab(t, onlyA)
				a := l.httpOn(echo, "93.184.216.1:80")
				b := l.host(nil, "93.184.216.2:80", "93.184.216.66:80")
				c := l.connect("93.184.216.66:80")
				br := bufio.NewReader(c)
				first := lines("GET /first HTTP/1.1", "Host: a.example")
				if how == "pipelined" {
					first += tt.sent
				}
				if code, body := ask(t, c, br, first); code != 200 || body != `GET a.example /first ""` {
					t.Errorf("got %d %q", code, body)
				}
				var wrote error
				if how == "kept-alive" {
					_, wrote = io.WriteString(c, tt.sent)
				}
				if rest, err := io.ReadAll(br); len(rest) > 0 || !isReset(err) && wrote == nil {
					t.Errorf("got %q and %v, want a reset", rest, err)
				}
				l.awaitDenied(tt.want)
				b.untouched(t)
				if got := strings.Count(a.text(), "HTTP/"); got != 1 {
					t.Errorf("the upstream got %d requests: %q", got, a.text())
				}
			})
		}
	}
}

func TestRequestsOfOneConnectionMayGoToDifferentNames(t *testing.T) {
	l := newLab(t, policy.Input{AllowOut: []string{"a.example", "b.example"}, DenyOut: []string{"0.0.0.0/0"}})
	a := l.httpOn(echo, "93.184.216.1:80")
	b := l.httpOn(echo, "93.184.216.2:80")
	c := l.connect("93.184.216.66:80")
	br := bufio.NewReader(c)
	for i, name := range []string{"a.example", "a.example", "b.example", "a.example"} {
		if _, body := ask(t, c, br, lines("GET / HTTP/1.1", "Host: "+name)); body != "GET "+name+` / ""` {
			t.Errorf("request %d got %q", i, body)
		}
	}
	if a.conns.Load() != 2 || b.conns.Load() != 1 {
		t.Errorf("%d connections to a, %d to b; want 2 and 1", a.conns.Load(), b.conns.Load())
	}
	if strings.Contains(a.text(), "b.example") || strings.Contains(b.text(), "a.example") {
		t.Error("a request reached the wrong upstream")
	}
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	l := newLab(t, onlyA)
	l.httpOn(echo, "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	send(t, c, lines("POST /1 HTTP/1.1", "Host: a.example", "Content-Length: 3")+"one"+lines("POST /2 HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked")+"3\r\ntwo\r\n0\r\n\r\n"+
		lines("GET /3 HTTP/1.1", "Host: a.example", "Connection: close"))
	br := bufio.NewReader(c)
	for _, want := range []string{`POST a.example /1 "one"`, `POST a.example /2 "two"`, `GET a.example /3 ""`} {
		if _, body := ask(t, c, br, ""); body != want {
			t.Errorf("got %q, want %q", body, want)
		}
	}
	if rest, err := io.ReadAll(br); len(rest) > 0 || err != nil {
		t.Errorf("then %q and %v, want the end", rest, err)
	}
}

func TestARequestIsWrittenAnew(t *testing.T) {
	l := newLab(t, onlyA)
	a := l.httpOn(echo, "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	ask(t, c, bufio.NewReader(c), "GET http://a.example/p HTTP/1.1\r\nhOsT:a.example\r\nX-Odd:   v  \r\nAccept: */*\r\n\r\n")
	if got, want := a.text(), "GET /p HTTP/1.1\r\nhOsT: a.example\r\nX-Odd: v\r\nAccept: */*\r\n\r\n"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestHostsAsClientsWriteThem reach their owner, who reads the name that was judged.
func TestHostsAsClientsWriteThem(t *testing.T) {
	in := policy.Input{AllowOut: []string{"bücher.example", "пример.example", "data_set.s3.example", "x-.example"}, DenyOut: []string{"0.0.0.0/0"}}
	for host, seen := range map[string]string{
		"b\xfccher.example": "xn--bcher-kva.example", "B\u00dccher.example.:80": "xn--bcher-kva.example:80", "XN--bcher-kva.example": "XN--bcher-kva.example",
		"пример.example":      "xn--e1afmkfd.example", // as long in octets as its A-labels
		"data_set.s3.example": "data_set.s3.example", "DATA_set.s3.example.:80": "DATA_set.s3.example.:80", "x-.example": "x-.example",
	} {
		l := newLab(t, in)
		l.mu.Lock()
		for _, name := range []string{"xn--bcher-kva.example", "xn--e1afmkfd.example", "data_set.s3.example", "x-.example"} {
			l.names[name] = []netip.Addr{addrA}
		}
		l.mu.Unlock()
		a := l.httpOn(echo, "93.184.216.1:80")
		c := l.connect("93.184.216.66:80")
		if code, body := ask(t, c, bufio.NewReader(c), lines("GET / HTTP/1.1", "Host: "+host)); code != 200 || !strings.Contains(a.text(), "\r\nHost: "+seen+"\r\n") {
			t.Errorf("Host %q: got %d %q; the server read %q", host, code, body, a.text())
		}
		if e := l.await(flowlog.Allowed); e.Name != strings.ToLower(strings.TrimSuffix(strings.TrimSuffix(seen, ":80"), ".")) && e.Name != "data_set.s3.example" {
			t.Errorf("event %+v", e)
		}
	}
}

func TestExplainAnswersHTTPWithTheRule(t *testing.T) {
	in := policy.Input{AllowOut: onlyA.AllowOut, DenyOut: onlyA.DenyOut, AllowInternetAccess: new(bool)} // it is the default
	const byRule = "deny[0] 0.0.0.0/0"
	npm := "Accept: application/vnd.npm.install-v1+JSON; q=1.0, */*"
	for _, tt := range []struct{ name, sent, host, rule, why string }{
		{"a name", lines("GET / HTTP/1.1", "Host: b.example"), "b.example", byRule, "name-denied"},
		{"a malformed request", lines("GET / HTTP/1.1", "Host: a.example", "Host: b.example"), "93.184.216.66:80", "proxy what the proxy cannot judge", "bad-request, more than one Host"},
		{"an address with a line in it", "GET / HTTP/1.1\r\nHost: [::1\nrm]\r\n\r\n", "93.184.216.66:80", "proxy what the proxy cannot judge", "bad-request, a line ends without CR"},
		{"with a body on its way", lines("POST / HTTP/1.1", "Host: b.example", "Content-Length: 100000") + strings.Repeat("x", 100000), "b.example", byRule, "name-denied"},
		{"to npm", lines("GET / HTTP/1.1", "Host: b.example", npm), "b.example", byRule, "name-denied"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, in)
			c := l.connect("93.184.216.66:80")
			send(t, c, tt.sent)
			br := bufio.NewReader(c)
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.Status != "403 Denied by egress policy" || resp.Header.Get("X-Cordon-Deny") != tt.rule || resp.Header.Get("Cache-Control") != "no-store" || !resp.Close {
				t.Errorf("got %s %v", resp.Status, resp.Header)
			}
			want, kind := "# denied by egress policy: "+tt.host+" ("+tt.why+"; rule "+tt.rule+"; sandbox sbx)\n", "text/plain; charset=utf-8"
			if strings.Contains(tt.sent, npm) {
				want, kind = `{"error":"denied by egress policy: b.example","host":"b.example","rule":"deny[0] 0.0.0.0/0","reason":"name-denied","sandbox":"sbx"}`, "application/json"
			}
			if string(body) != want || resp.Header.Get("Content-Type") != kind {
				t.Errorf("%s %q, want %s %q", resp.Header.Get("Content-Type"), body, kind, want)
			}
			if rest, err := io.ReadAll(br); len(rest) > 0 || err != nil {
				t.Errorf("then %q and %v, want the end", rest, err)
			}
		})
	}
	t.Run("a HEAD request has no body", func(t *testing.T) {
		l := newLab(t, in)
		c := l.connect("93.184.216.66:80")
		send(t, c, lines("HEAD / HTTP/1.1", "Host: b.example"))
		if got, err := everything(c); !strings.HasPrefix(got, "HTTP/1.1 403") || !strings.HasSuffix(got, "\r\n\r\n") || err != nil {
			t.Errorf("got %q and %v", got, err)
		}
	})
	t.Run("TLS still gets the alert", func(t *testing.T) {
		l := newLab(t, in)
		c := l.connect("93.184.216.66:443")
		send(t, c, string(hello{names: [][]byte{[]byte("b.example")}}.records()))
		wantAlert(t, c)
	})
}

// raw answers each request head with a fixed text.
func raw(answer string, thenClose bool) func(net.Conn) {
	return func(c net.Conn) {
		br := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			if _, err := io.WriteString(c, answer); err != nil || thenClose {
				return
			}
		}
	}
}

func TestAnswersKeepTheirFraming(t *testing.T) {
	big := strings.Repeat("0123456789", 30_000)
	chunked := func(size int) string {
		var b strings.Builder
		for s := big; s != ""; {
			n := min(size, len(s))
			fmt.Fprintf(&b, "%x\r\n%s\r\n", n, s[:n])
			s = s[n:]
		}
		return b.String() + "0\r\nX-Trailer: yes\r\n\r\n"
	}
	tests := []struct {
		name, method, answer string
		close                bool // the upstream closes after it
		again                bool // the connection can be used again
	}{
		{"a length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", false, true},
		{"a length of nothing", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false, true},
		{"no reason phrase", "GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", false, true},
		{"a big body", "GET", fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(big), big), false, true},
		{"small chunks and a trailer", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(7), false, true},
		{"large chunks and a trailer", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(100_000), false, true},
		{"padded chunk sizes", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5  \r\nhello\r\n0\r\n\r\n", false, true},
		{"until the end", "GET", "HTTP/1.1 200 OK\r\n\r\n" + big, true, false},
		{"HTTP/1.0 until the end", "GET", "HTTP/1.0 200 OK\r\n\r\nhello", true, false},
		{"HTTP/1.0 kept alive", "GET", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", false, true},
		{"Connection: close", "GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", true, false},
		{"204", "GET", "HTTP/1.1 204 No Content\r\n\r\n", false, true},
		{"304 with a length", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", false, true},
		{"HEAD with a length", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", false, true},
		{"HEAD of a chunked body", "HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", false, true},
		{"interim answers", "GET", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", false, true},
		{"a redirect to B is only an answer (26)", "GET", "HTTP/1.1 302 Found\r\nLocation: http://b.example/\r\nContent-Length: 0\r\n\r\n", false, true},
		{"a head of 40 KiB", "GET", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 40<<10) + "\r\nContent-Length: 2\r\n\r\nok", false, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, onlyA)
			a := l.host(raw(tt.answer, tt.close), "93.184.216.1:80")
			c := l.connect("93.184.216.1:80")
			rounds := 1
			if tt.again {
				rounds = 3
			}
			for range rounds {
				send(t, c, lines(tt.method+" / HTTP/1.1", "Host: a.example"))
				got := make([]byte, len(tt.answer))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != tt.answer {
					t.Fatalf("got %d bytes and %v, want the answer as it was", len(got), err)
				}
			}
			if !tt.again {
				if rest, err := everything(c); rest != "" || err != nil {
					t.Errorf("then %q and %v, want the end", rest, err)
				}
			}
			if a.conns.Load() != 1 {
				t.Errorf("%d upstream connections, want 1", a.conns.Load())
			}
		})
	}
}

func TestBrokenAnswersAreNotPassedOn(t *testing.T) {
	tests := []struct {
		name, answer string
		want         policy.Reason
		why          string
	}{
		{"no answer", "", ReasonUpstream, ""},
		{"half a head", "HTTP/1.1 200 OK\r\nX: ", ReasonUpstream, ""},
		{"no HTTP", "220 smtp ready\r\n\r\n", ReasonBadResponse, "the status line is malformed"},
		{"HTTP/2", "HTTP/2.0 200 OK\r\n\r\n", ReasonBadResponse, "the status line is malformed"},
		{"two different CL", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", ReasonBadResponse, "two different lengths"},
		{"two different CL in one", "HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello", ReasonBadResponse, "two different lengths"},
		{"a length that is none", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", ReasonBadResponse, "Content-Length is no number, or there twice"},
		{"a NUL", "HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n", ReasonBadResponse, "a header line has a control character"},
		{"a bare CR", "HTTP/1.1 200 OK\r\nX: y\rContent-Length: 5\r\n\r\n", ReasonBadResponse, "a header line has a control character"},
		{"a fold of nothing", "HTTP/1.1 200 OK\r\n X: y\r\n\r\n", ReasonBadResponse, "the first header line is folded"},
		{"another coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", ReasonBadResponse, "Transfer-Encoding is not exactly chunked"},
		{"an upgrade nobody asked for", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", ReasonBadResponse, "an upgrade that was not asked for"},
		{"a head without end", "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 12<<10), ReasonBadResponse, "its head is too long"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, onlyA)
			l.host(raw(tt.answer, true), "93.184.216.1:80")
			c := l.connect("93.184.216.1:80")
			send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
			if tt.want == ReasonBadResponse {
				got, err := everything(c)
				if !strings.HasPrefix(got, "HTTP/1.1 502 Bad answer of the server\r\n") || !strings.Contains(got, "\r\n\r\n# cordon: a.example: ") || !strings.HasSuffix(got, tt.why+"\n") || err != nil {
					t.Errorf("got %q and %v, want a 502 that says %q", got, err, tt.why)
				}
			} else {
				wantReset(t, c)
			}
			if e := l.await(flowlog.Failed); e.Reason != tt.want {
				t.Errorf("failed for %s (%s), want %s", e.Reason, e.Detail, tt.want)
			}
		})
	}
	t.Run("a body cut short", func(t *testing.T) {
		l := newLab(t, onlyA)
		l.host(raw("HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", true), "93.184.216.1:80")
		c := l.connect("93.184.216.1:80")
		send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
		if got, err := everything(c); !strings.HasSuffix(got, "hello") || !isReset(err) {
			t.Errorf("got %q and %v, want what came and a reset", got, err)
		}
	})
}

func TestServerSentEventsArriveAsTheyAreSent(t *testing.T) {
	l := newLab(t, onlyA)
	next := make(chan struct{})
	l.httpOn(func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			<-next
		}
	}, "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for i := range 3 {
		buf := make([]byte, 100)
		n, err := resp.Body.Read(buf)
		if got, want := string(buf[:n]), fmt.Sprintf("data: %d\n\n", i); got != want || err != nil {
			t.Fatalf("got %q and %v, want %q", got, err, want)
		}
		next <- struct{}{}
	}
}

func TestExpectContinueWaitsForTheUpstream(t *testing.T) {
	head := lines("POST / HTTP/1.1", "Host: a.example", "Expect: 100-continue", "Content-Length: 5")
	t.Run("continued", func(t *testing.T) {
		l := newLab(t, onlyA)
		l.httpOn(echo, "93.184.216.1:80")
		c := l.connect("93.184.216.1:80")
		br := bufio.NewReader(c)
		for range 2 { // the connection stays usable
			send(t, c, head)
			if line, err := br.ReadString('\n'); line != "HTTP/1.1 100 Continue\r\n" || err != nil {
				t.Fatalf("got %q and %v", line, err)
			}
			_, _ = br.ReadString('\n')
			if code, body := ask(t, c, br, "hello"); code != 200 || body != `POST a.example / "hello"` {
				t.Errorf("got %d %q", code, body)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		l := newLab(t, onlyA)
		l.httpOn(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", 417) }, "93.184.216.1:80")
		c := l.connect("93.184.216.1:80")
		br := bufio.NewReader(c)
		if code, _ := ask(t, c, br, head); code != 417 {
			t.Errorf("got %d", code)
		}
		if rest, err := io.ReadAll(br); len(rest) > 0 || err != nil {
			t.Errorf("then %q and %v, want the end: the next bytes could be a body or a request", rest, err)
		}
	})
}

func TestAnAnswerBeforeTheBodyIsDelivered(t *testing.T) {
	l := newLab(t, onlyA)
	l.httpOn(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		http.Error(w, "too large", 413)
	}, "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	send(t, c, lines("POST / HTTP/1.1", "Host: a.example", "Content-Length: 10000000")+strings.Repeat("x", 100_000))
	if code, body := ask(t, c, bufio.NewReader(c), ""); code != 413 || body != "too large\n" {
		t.Errorf("got %d %q", code, body)
	}
}

func TestLargeBodiesPassBothWays(t *testing.T) {
	l := newLab(t, onlyA)
	l.httpOn(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	}, "93.184.216.1:80")
	for _, framing := range []string{"Content-Length: 3000000", "Transfer-Encoding: chunked"} {
		c := l.connect("93.184.216.1:80")
		body := bytes.Repeat([]byte("abc"), 1_000_000)
		go func() {
			_, _ = io.WriteString(c, lines("POST / HTTP/1.1", "Host: a.example", framing))
			if strings.HasPrefix(framing, "C") {
				_, _ = c.Write(body)
				return
			}
			for b := body; len(b) > 0; b = b[min(50_000, len(b)):] {
				_, _ = fmt.Fprintf(c, "%x\r\n%s\r\n", min(50_000, len(b)), b[:min(50_000, len(b))])
			}
			_, _ = io.WriteString(c, "0\r\n\r\n")
		}()
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("%s: got %d bytes and %v", framing, len(got), err)
		}
	}
}

func TestMalformedChunksReachNobodyAsARequest(t *testing.T) { // (20)
	for _, body := range []string{
		"5\nhello\r\n0\r\n\r\n", "5\r\nhello0\r\n\r\n", "5 \r\nhello\r\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n", "-5\r\n", "\r\n", ";x\r\n", "5;a\nb\r\nhello\r\n0\r\n\r\n",
		"fffffffffffffffff\r\n", "0\r\nHost: b.example\r\n\r\n", "0\r\nTransfer-Encoding: chunked\r\n\r\n", "0\r\n folded\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\r\nhello\r\n0\r\n\n",
	} {
		t.Run(fmt.Sprintf("%q", body), func(t *testing.T) {
			l := newLab(t, onlyA)
			a := l.httpOn(echo, "93.184.216.1:80")
			c := l.connect("93.184.216.1:80")
			wantResetAfter(t, c, lines("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked")+body+lines("GET /smuggled HTTP/1.1", "Host: a.example"))
			l.awaitDenied(ReasonBadRequest)
			if strings.Contains(a.text(), "smuggled") {
				t.Errorf("the upstream got %q", a.text())
			}
		})
	}
}

func TestWebSocketPinsTheConnection(t *testing.T) { // (24)
	l := newLab(t, onlyA)
	l.host(func(c net.Conn) {
		br := bufio.NewReader(c)
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nfirst")
		_, _ = io.Copy(c, br)
	}, "93.184.216.1:80")
	b := l.host(nil, "93.184.216.2:80")
	c := l.connect("93.184.216.66:80")
	send(t, c, lines("GET /ws HTTP/1.1", "Host: a.example", "Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Key: x")+"early")
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("got %v and %v", resp, err)
	}
	// From here on all bytes are the upstream's, whatever they look like.
	frames := "early" + lines("GET / HTTP/1.1", "Host: b.example") + "\x00\xff"
	send(t, c, frames[len("early"):])
	c.CloseWrite()
	if got, err := io.ReadAll(br); string(got) != "first"+frames || err != nil {
		t.Errorf("got %q and %v", got, err)
	}
	b.untouched(t)
}

func TestAnUpgradeThatIsDeclinedLeavesHTTP(t *testing.T) {
	l := newLab(t, onlyA)
	l.httpOn(echo, "93.184.216.1:80")
	b := l.host(nil, "93.184.216.2:80")
	c := l.connect("93.184.216.1:80")
	br := bufio.NewReader(c)
	if code, _ := ask(t, c, br, lines("GET /ws HTTP/1.1", "Host: a.example", "Connection: Upgrade", "Upgrade: websocket")); code != 200 {
		t.Errorf("got %d", code)
	}
	send(t, c, lines("GET / HTTP/1.1", "Host: b.example"))
	if rest, err := io.ReadAll(br); len(rest) > 0 || !isReset(err) {
		t.Errorf("got %q and %v, want a reset", rest, err)
	}
	l.awaitDenied(policy.ReasonNameDenied)
	b.untouched(t)
}

func TestAnUpstreamThatClosedBetweenRequestsIsDialledAgain(t *testing.T) {
	l := newLab(t, onlyA)
	a := l.host(raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true), "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	br := bufio.NewReader(c)
	for i := range 3 {
		if code, body := ask(t, c, br, lines("GET / HTTP/1.1", "Host: a.example")); code != 200 || body != "ok" {
			t.Errorf("request %d got %d %q", i, code, body)
		}
		time.Sleep(10 * time.Millisecond) // the FIN travels
	}
	if a.conns.Load() != 3 {
		t.Errorf("%d upstream connections, want 3", a.conns.Load())
	}
}

func TestUnsolicitedBytesOfAnUpstreamAreNoAnswer(t *testing.T) {
	l := newLab(t, onlyA)
	ok := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	a := l.host(raw(ok+strings.Replace(ok, "ok", "no", 1), false), "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	br := bufio.NewReader(c)
	for range 2 {
		if code, body := ask(t, c, br, lines("GET / HTTP/1.1", "Host: a.example")); code != 200 || body != "ok" {
			t.Errorf("got %d %q", code, body)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if a.conns.Load() != 2 {
		t.Errorf("%d upstream connections, want 2", a.conns.Load())
	}
}

func TestASlowHeadIsEndedAtTheDeadline(t *testing.T) {
	l := newLab(t, onlyA, func(c *Config) { c.Limits.SniffTimeout = 150 * time.Millisecond })
	up := l.host(nil, "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	head := lines("GET / HTTP/1.1", "Host: a.example", "X: "+strings.Repeat("y", 1000))
	var err error
	for i := 0; i < len(head) && err == nil; i++ { // ten times as slow as the deadline
		_, err = c.Write([]byte{head[i]})
		time.Sleep(2 * time.Millisecond)
	}
	if !isReset(err) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("got %v, want a reset", err)
	}
	l.awaitDenied(ReasonSniffTimeout)
	up.untouched(t)
}

func TestAnIdleConnectionIsClosed(t *testing.T) {
	l := newLab(t, onlyA, func(c *Config) { c.Limits.IdleTimeout = 50 * time.Millisecond })
	l.httpOn(echo, "93.184.216.1:80")
	c := l.connect("93.184.216.1:80")
	br := bufio.NewReader(c)
	ask(t, c, br, lines("GET / HTTP/1.1", "Host: a.example"))
	if rest, err := io.ReadAll(br); len(rest) > 0 || err != nil {
		t.Errorf("got %q and %v, want an orderly end", rest, err)
	}
}

// TestAnswersAreReadAsClientsReadThem has answers that a strict reader refuses: they
// arrive as they are meant, in a form in which every reader finds the same end.
func TestAnswersAreReadAsClientsReadThem(t *testing.T) {
	for _, tt := range []struct{ name, answer, want string }{
		{"a length beside chunked", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
		{"chunked beside a length", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\nA: b\r\n\r\n2\r\nok\r\n0\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
		{"a blank before a colon", "HTTP/1.1 200 OK\r\nContent-Length \t: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		{"bare LF", "HTTP/1.1 200 OK\nA: b\nContent-Length: 2\n\nok", "HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 2\r\n\r\nok"},
		{"bare LF after the status line alone", "HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		{"a folded field", "HTTP/1.1 200 OK\r\nA: b\r\n\t c\r\nContent-Length:\r\n 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nA: b c\r\nContent-Length: 2\r\n\r\nok"},
		{"one length twice", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\ncontent-length: 2, 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		{"identity", "HTTP/1.1 200\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok"},
		{"an interim answer", "HTTP/1.1 103 Early Hints\nA: b\n\nHTTP/1.1 204 No Content\n\n", "HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, onlyA)
			l.host(raw(tt.answer, false), "93.184.216.1:80")
			c := l.connect("93.184.216.1:80")
			for range 2 { // the end is found, and the connection kept
				send(t, c, lines("GET / HTTP/1.1", "Host: a.example"))
				got := make([]byte, len(tt.want))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != tt.want {
					t.Fatalf("got %q and %v, want %q", got, err, tt.want)
				}
			}
		})
	}
}

// TestOffersOfOtherProtocolsAreDropped where what comes then would not be read.
func TestOffersOfOtherProtocolsAreDropped(t *testing.T) {
	for name, offer := range map[string][]string{
		"h2c, as curl and Java have it": {"Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"},
		"h2c, over two lines":           {"Connection: keep-alive", "Connection: HTTP2-Settings", "Connection: Upgrade", "Upgrade: H2C", "HTTP2-Settings: AAMAAABk"},
		"only its settings":             {"Connection: HTTP2-Settings", "HTTP2-Settings: AAMAAABk"},
		"HTTP/2 by its other name":      {"Connection: upgrade", "Upgrade: HTTP/2.0"},
		"TLS":                           {"Connection: Upgrade", "Upgrade: TLS/1.2"},
		"a choice":                      {"Connection: Upgrade", "Upgrade: websocket, tcp"},
		"two":                           {"Connection: Upgrade", "Upgrade: websocket", "Upgrade: tcp"},
		"in HTTP/1.0":                   {"Connection: Upgrade", "Upgrade: websocket"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, body := range []string{"", "hello"} {
				l := newLab(t, onlyA)
				a := l.httpOn(echo, "93.184.216.1:80")
				c := l.connect("93.184.216.1:80")
				first := "POST /x HTTP/1.1"
				if name == "in HTTP/1.0" {
					first = "POST /x HTTP/1.0"
				}
				code, got := ask(t, c, bufio.NewReader(c), lines(append([]string{first, "Host: a.example", "Content-Length: " + strconv.Itoa(len(body))}, offer...)...)+body)
				if code != 200 || got != `POST a.example /x "`+body+`"` {
					t.Errorf("got %d %q", code, got)
				}
				if seen := strings.ToLower(a.text()); strings.Contains(seen, "upgrade") || strings.Contains(seen, "http2-settings") {
					t.Errorf("the server read %q", a.text())
				}
			}
		})
	}
	t.Run("and an answer that takes one up is refused", func(t *testing.T) {
		l := newLab(t, onlyA)
		up := l.host(raw("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", false), "93.184.216.1:80")
		c := l.connect("93.184.216.1:80")
		send(t, c, lines("GET / HTTP/1.1", "Host: a.example", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")+"PRI * HTTP/2.0\r\n\r\n")
		if got, _ := everything(c); !strings.HasPrefix(got, "HTTP/1.1 502 ") {
			t.Errorf("got %q", got)
		}
		if strings.Contains(up.text(), "PRI") {
			t.Errorf("the upstream got %q", up.text())
		}
	})
	t.Run("one that is dropped leaves another", func(t *testing.T) {
		var q request
		if err := q.parse([]byte(lines("GET / HTTP/1.1", "Host: a.example", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c, websocket", "HTTP2-Settings: x")), 80); err != nil {
			t.Fatal(err)
		}
		if got, want := string(q.appendTo(nil)), lines("GET / HTTP/1.1", "Host: a.example", "Connection: Upgrade", "Upgrade: websocket"); got != want || !q.upgrade {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// TestAnUpgradeWithABodyPinsTheConnection: what comes after it goes to where the
// request went, whatever it says.
func TestAnUpgradeWithABodyPinsTheConnection(t *testing.T) {
	for _, size := range []int{5, 100_000} {
		for _, chunked := range []bool{false, true} {
			l := newLab(t, onlyA)
			other := l.host(nil, "93.184.216.2:80")
			l.host(func(c net.Conn) {
				br := bufio.NewReader(c)
				r, err := http.ReadRequest(br)
				if err != nil || r.Header.Get("Upgrade") != "tcp" {
					t.Errorf("got %+v and %v", r, err)
					return
				}
				n, _ := io.Copy(io.Discard, r.Body)
				fmt.Fprintf(c, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n%d\n", n)
				_, _ = io.Copy(c, br)
			}, "93.184.216.1:80")
			c := l.connect("93.184.216.1:80")
			body, framing := strings.Repeat("x", size), "Content-Length: "+strconv.Itoa(size)
			if chunked {
				body, framing = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", size, body), "Transfer-Encoding: chunked"
			}
			then := lines("GET / HTTP/1.1", "Host: b.example")
			send(t, c, lines("POST /exec HTTP/1.1", "Host: a.example", "Connection: Upgrade", "Upgrade: tcp", framing)+body)
			want := lines("HTTP/1.1 101 UPGRADED", "Connection: Upgrade", "Upgrade: tcp") + strconv.Itoa(size) + "\n"
			got := make([]byte, len(want))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
				t.Fatalf("%s: got %q and %v", framing, got, err)
			}
			send(t, c, then)
			c.CloseWrite()
			if got, err := everything(c); got != then || err != nil {
				t.Errorf("%s: got %q and %v", framing, got, err)
			}
			other.untouched(t)
		}
	}
}
