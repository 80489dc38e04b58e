package relay

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service is a dialer whose other end answers every request with the same bytes.
func service(answer []byte) func(context.Context, uint16) (net.Conn, error) {
	return func(context.Context, uint16) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer theirs.Close()
			if _, err := http.ReadRequest(bufio.NewReader(theirs)); err == nil {
				theirs.Write(answer)
			}
		}()
		return ours, nil
	}
}

// FuzzAnswer feeds what a service might send. It must end in an answer or an
// error, in time, and nothing of the connection may be taken over.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.0 200\r\n\r\nrest", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", "HTTP/1.1 304 Not Modified\r\nConnection: a, b\r\nKeep-Alive: timeout=9999999999\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		p := NewPool(Config{Dial: service(answer), Limits: Limits{HeadBytes: 4 << 10, HeadTimeout: 100 * time.Millisecond, StallTimeout: time.Second}})
		defer p.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		w := httptest.NewRecorder()
		done := 0
		r := httptest.NewRequest("GET", "http://x/", nil).WithContext(ctx)
		res := p.Forward(w, r, &Out{Port: 1, Target: "/", Host: "x", Done: func(*Octets) { done++ }})
		if ctx.Err() != nil {
			t.Error("it took over five seconds")
		}
		if done != 1 {
			t.Errorf("Done was called %d times", done)
		}
		if res.Err == nil && (res.Status < 200 || res.Status == http.StatusSwitchingProtocols) {
			t.Errorf("status %d", res.Status)
		}
		for name := range w.Header() {
			if HopByHop(name) && name != "Content-Length" && name != "Trailer" && name != "Host" && name != "Proxy-Authorization" && name != "Http2-Settings" {
				t.Errorf("%s passed", name)
			}
		}
	})
}

func TestClosedPoolRefuses(t *testing.T) {
	p := NewPool(Config{Dial: service(nil)})
	p.Close()
	p.Close()
	if res := p.Forward(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil), &Out{Target: "/"}); !errors.Is(res.Err, ErrReset) {
		t.Errorf("got %v", res.Err)
	}
	if _, err := p.Dial(t.Context(), 1); !errors.Is(err, ErrReset) {
		t.Errorf("got %v", err)
	}
	if _, err := p.Enter(func() {}); !errors.Is(err, ErrReset) {
		t.Errorf("got %v", err)
	}
}

func TestKeptConnectionsAreBounded(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })}
	go srv.Serve(ln)
	defer srv.Close()
	p := NewPool(Config{
		Dial: func(ctx context.Context, _ uint16) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", ln.Addr().String())
		},
		Limits: Limits{IdlePerPort: 2, IdleTotal: 3, IdleTimeout: time.Second},
	})
	defer p.Close()
	for port := range uint16(5) {
		for range 3 {
			c, err := p.get(t.Context(), port, true)
			if err != nil {
				t.Fatal(err)
			}
			p.put(c, time.Hour)
		}
		w := httptest.NewRecorder()
		if res := p.Forward(w, httptest.NewRequest("GET", "/", nil), &Out{Port: port, Target: "/", Host: "x"}); res.Err != nil || w.Body.String() != "ok" {
			t.Fatalf("%+v %s", res, w.Body)
		}
	}
	idles := func() int { p.mu.Lock(); defer p.mu.Unlock(); return p.idles }
	if n := idles(); n != 3 {
		t.Errorf("%d kept", n)
	}
	deadline := time.Now().Add(5 * time.Second)
	for idles() > 0 {
		if time.Now().After(deadline) {
			t.Fatal("they are kept for ever")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestKeepHint(t *testing.T) {
	for in, want := range map[string]time.Duration{"": 0, "timeout=5": 4 * time.Second, "max=1, timeout=2": time.Second, "timeout=1": time.Millisecond, "timeout=-1": 0, "timeout=x": 0} {
		if got := keepHint(http.Header{"Keep-Alive": {in}}); got != want {
			t.Errorf("%q: got %v, want %v", in, got, want)
		}
	}
}

func TestConnectionListed(t *testing.T) {
	got := ConnectionListed(http.Header{"Connection": {"close, x-a", "Upgrade,X-B ,,"}})
	if len(got) != 2 || !got["X-A"] || !got["X-B"] {
		t.Errorf("%v", got)
	}
	if got := ConnectionListed(http.Header{"Connection": {strings.Repeat("keep-alive,", 3)}}); got != nil {
		t.Errorf("%v", got)
	}
}
