package egress

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// tlsRetries serves TLS as tlsEcho does, with a key share that no client offers at
// first, so that each is asked for a second hello.
func tlsRetries(t testing.TB, shape func(net.Conn) net.Conn) func(net.Conn) {
	t.Helper()
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.StartTLS()
	cfg := &tls.Config{Certificates: s.TLS.Certificates, CurvePreferences: []tls.CurveID{tls.CurveP384}, MinVersion: tls.VersionTLS13}
	s.Close()
	return func(c net.Conn) {
		if shape != nil {
			c = shape(c)
		}
		tc := tls.Server(c, cfg)
		buf := make([]byte, 4096)
		for {
			n, err := tc.Read(buf)
			if err != nil {
				return
			}
			if _, err := io.WriteString(tc, "echo: "+string(buf[:n])); err != nil {
				return
			}
		}
	}
}

// slowWriter writes each byte in a segment of its own.
type slowWriter struct{ net.Conn }

func (c slowWriter) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
		if i < 100 {
			time.Sleep(200 * time.Microsecond)
		}
	}
	return len(p), nil
}

// renaming is a client that shows another name, as long, in its second hello.
type renaming struct {
	net.Conn
	hellos int
	slowly bool
}

func (c *renaming) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("a.example")) {
		if c.hellos++; c.hellos == 2 {
			p = bytes.Replace(p, []byte("a.example"), []byte("b.example"), 1)
		}
	}
	if c.slowly {
		return slowWriter{c.Conn}.Write(p)
	}
	return c.Conn.Write(p)
}

// places is where a hello is judged: on 443, and where a rule names the port.
var places = []struct {
	name, dst string
	lab       func(testing.TB) *lab
	late      time.Duration
}{
	{"on 443", "93.184.216.1:443", func(t testing.TB) *lab { return newLab(t, onlyA) }, 0},
	{"on a pinned port", pinnedDst, func(t testing.TB) *lab { return pinnedLab(t) }, 0},
	{"on a pinned port, after a silence", pinnedDst, func(t testing.TB) *lab { return pinnedLab(t) }, 2 * grace},
}

func TestAHandshakeWithARetryRequestWorks(t *testing.T) {
	for _, at := range places {
		for name, shape := range map[string]func(net.Conn) net.Conn{"": nil, ", byte by byte": func(c net.Conn) net.Conn { return slowWriter{c} }} {
			t.Run(at.name+name, func(t *testing.T) {
				l := at.lab(t)
				l.host(tlsRetries(t, shape), at.dst)
				c := l.connect(at.dst)
				time.Sleep(at.late)
				converse(t, c, clientConfig("a.example"))
			})
		}
	}
}

func TestTheSecondHelloMustShowTheSameName(t *testing.T) {
	for _, at := range places {
		for _, slowly := range []bool{false, true} {
			t.Run(at.name, func(t *testing.T) {
				l := at.lab(t)
				up := l.host(tlsRetries(t, nil), at.dst)
				c := l.connect(at.dst)
				time.Sleep(at.late)
				show := &renaming{Conn: c, slowly: slowly}
				if err := tls.Client(show, clientConfig("a.example")).Handshake(); err == nil || show.hellos != 2 {
					t.Fatalf("%d hellos ended with %v", show.hellos, err)
				}
				if e := l.awaitDenied(ReasonBadHello); e.Name != "b.example" {
					t.Errorf("event %+v", e)
				}
				l.await(flowlog.Closed)
				if bytes.Contains([]byte(up.text()), []byte("b.example")) {
					t.Error("the upstream got the second hello")
				}
			})
		}
	}
}

// TestASecondHelloIsReadBeforeTheAnswer has a client that does not wait for the retry
// request it counts on.
func TestASecondHelloIsReadBeforeTheAnswer(t *testing.T) {
	first, early := helloFor("a.example"), "\x14\x03\x03\x00\x01\x01\x17\x03\x03\x00\x04data"
	for _, at := range places {
		t.Run(at.name, func(t *testing.T) {
			for _, between := range []string{"", early} {
				for _, name := range []string{"a.example", "b.example"} {
					l := at.lab(t)
					up := l.host(nil, at.dst)
					c := l.connect(at.dst)
					time.Sleep(at.late)
					send(t, c, first+between+helloFor(name))
					if name == "a.example" {
						awaitText(t, up, first+between+helloFor(name))
						continue
					}
					wantAlert(t, c)
					l.awaitDenied(ReasonBadHello)
					if got := up.text(); bytes.Contains([]byte(got), []byte(name)) {
						t.Errorf("the upstream got %q", got)
					}
				}
			}
		})
	}
}

func awaitText(t testing.TB, up *upstream, want string) {
	t.Helper()
	for range 500 {
		if up.text() == want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("the upstream got %q, want %q", up.text(), want)
}

// TestEarlyDataDoesNotWait has records behind the hello arrive before the server said
// anything, in whatever pieces.
func TestEarlyDataDoesNotWait(t *testing.T) {
	large := "\x17\x03\x03\x40\x00" + string(make([]byte, 0x4000))
	sent := helloFor("a.example") + "\x14\x03\x03\x00\x01\x01" + large + "\x17\x03\x03\x00\x04data"
	for _, step := range []int{len(sent), 1000, 7} {
		l := newLab(t, onlyA)
		up := l.host(nil, "93.184.216.1:443")
		c := l.connect("93.184.216.1:443")
		for rest := sent; rest != ""; {
			n := min(step, len(rest))
			send(t, c, rest[:n])
			rest = rest[n:]
		}
		awaitText(t, up, sent)
		c.CloseWrite()
		l.await(flowlog.Closed)
	}
}

// TestWhatFollowsAHelloMustBeTLS until the server has answered.
func TestWhatFollowsAHelloMustBeTLS(t *testing.T) {
	for name, next := range map[string]string{
		"no record": "GET / HTTP/1.1\r\nHost: b.example\r\n\r\n", "an empty handshake record": "\x16\x03\x03\x00\x00", "too long a record": "\x17\x03\x03\xff\xff",
		"SSL 2": "\x80\x2e\x01\x03\x01", "another version": "\x17\x04\x03\x00\x01x",
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, onlyA)
			up := l.host(nil, "93.184.216.1:443")
			c := l.connect("93.184.216.1:443")
			send(t, c, helloFor("a.example")+next)
			wantAlert(t, c)
			l.awaitDenied(ReasonBadHello)
			if got := up.text(); got != "" && got != helloFor("a.example") {
				t.Errorf("the upstream got %q", got)
			}
		})
	}
}

func TestASecondHelloThatNeverEndsIsDenied(t *testing.T) {
	l := newLab(t, onlyA, func(c *Config) { c.Limits.SniffTimeout = 300 * time.Millisecond })
	l.host(nil, "93.184.216.1:443")
	c := l.connect("93.184.216.1:443")
	send(t, c, helloFor("a.example")+helloFor("a.example")[:40])
	wantAlert(t, c)
	l.awaitDenied(ReasonSniffTimeout)
}

func TestObserveLetsASecondNamePass(t *testing.T) {
	in := onlyA
	in.Mode = policy.ModeObserve
	l := newLab(t, in)
	up := l.host(nil, "93.184.216.1:443")
	c := l.connect("93.184.216.1:443")
	send(t, c, helloFor("a.example")+helloFor("b.example"))
	awaitText(t, up, helloFor("a.example")+helloFor("b.example"))
	if e := l.await(flowlog.Observed); e.Reason != ReasonBadHello {
		t.Errorf("event %+v", e)
	}
}

// FuzzServerAnswer splits what a server sends first in every way: no split ends the
// guard before a retry request, and none keeps it after another ServerHello.
func FuzzServerAnswer(f *testing.F) {
	sent := func(random []byte) []byte {
		return append(append([]byte("\x16\x03\x03\x00\x2a\x02\x00\x00\x26\x03\x03"), random...), 0, 0, 0, 0)
	}
	f.Add(sent(retryRandom[:]), 1)
	f.Add(sent(make([]byte, 32)), 7)
	f.Add(append([]byte("\x15\x03\x03\x00\x02\x01\x70"), sent(make([]byte, 32))...), 3)
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n"), 2)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		over := func(step int) bool {
			var a answer
			settled := false
			for rest, more := b, true; len(rest) > 0 && more; {
				n := min(step, len(rest))
				a.n += copy(a.b[a.n:], rest[:n])
				settled, more = a.settled()
				rest = rest[n:]
			}
			return settled
		}
		if one, all := over(max(step, 1)), over(len(b)+1); one != all {
			t.Fatalf("%q ends the guard: %v in steps of %d, %v at once", b, one, step, all)
		}
		if len(b) >= serverHelloHead && b[0] == recordHandshake && b[recordHeader] == msgServerHello && over(len(b)) == bytes.Equal(b[11:43], retryRandom[:]) {
			t.Fatalf("%q ends the guard: %v", b, over(len(b)))
		}
	})
}
