package ingress

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// exhausted is a listener that has no descriptors left for a while.
type exhausted struct {
	net.Listener
	errs  chan error
	tries int
}

func (e *exhausted) Accept() (net.Conn, error) {
	e.tries++
	select {
	case err, ok := <-e.errs:
		if !ok {
			return nil, net.ErrClosed
		}
		return nil, err
	default:
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
}

func (*exhausted) Close() error { return nil }

func (*exhausted) Addr() net.Addr { return &net.TCPAddr{} }

func TestAcceptBacksOff(t *testing.T) {
	in := &Ingress{log: slog.New(slog.DiscardHandler)}
	t.Run("a process without descriptors tries again, ever more rarely", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := &exhausted{errs: make(chan error, 1)}
			ctx, cancel := context.WithCancel(t.Context())
			over := make(chan error, 1)
			go func() { over <- (&server{in: in, Listener: Listener{Listener: e}}).accept(ctx) }()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if e.tries < 10 || e.tries > 30 {
				t.Errorf("%d tries in ten seconds", e.tries)
			}
			cancel()
			if err := <-over; err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("a listener that is broken ends the server", func(t *testing.T) {
		e := &exhausted{errs: make(chan error, 1)}
		e.errs <- errors.New("broken")
		if err := (&server{in: in, Listener: Listener{Listener: e}}).accept(t.Context()); err == nil || !strings.Contains(err.Error(), "broken") {
			t.Errorf("got %v", err)
		}
	})
}

// TestRunEndsWithAFailedListener: the others drain, and what is idle does not hold it up.
func TestRunEndsWithAFailedListener(t *testing.T) {
	in, err := New(Config{Domains: []string{domain}, Lookup: func(string) (*Target, bool) { return nil, false }, API: http.NotFoundHandler()})
	if err != nil {
		t.Fatal(err)
	}
	e := &exhausted{errs: make(chan error, 1)}
	ln := listen(t, "127.0.0.1:0")
	over := make(chan error, 1)
	go func() {
		over <- in.Run(t.Context(), Listener{ln, Plain}, Listener{e, Plain})
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: api."+domain+"\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 404 {
		t.Fatal(resp, err)
	}
	e.errs <- errors.New("broken")
	select {
	case err := <-over:
		if err == nil || !strings.Contains(err.Error(), "broken") {
			t.Errorf("got %v", err)
		}
	case <-time.After(8 * time.Second): // the drain timeout is ten
		t.Error("Run does not return")
	}
}

// TestProtocolWithoutTLS: what a connection speaks is told from its first octets,
// however they come.
func TestProtocolWithoutTLS(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.HeaderTimeout = 2 * time.Second })
	speaksH2 := func(t *testing.T, c net.Conn) {
		t.Helper()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		f := http2.NewFramer(c, c)
		f.WriteSettings()
		fr, err := f.ReadFrame()
		if _, ok := fr.(*http2.SettingsFrame); err != nil || !ok {
			t.Errorf("got %v, %v", fr, err)
		}
	}
	t.Run("a preface at once", func(t *testing.T) {
		c := l.dialPlain(t)
		io.WriteString(c, http2.ClientPreface)
		speaksH2(t, c)
	})
	t.Run("a preface octet by octet", func(t *testing.T) {
		c := l.dialPlain(t)
		for i := range len(http2.ClientPreface) {
			io.WriteString(c, http2.ClientPreface[i:i+1])
			time.Sleep(2 * time.Millisecond)
		}
		speaksH2(t, c)
	})
	for name, request := range map[string]string{
		"HTTP/1 octet by octet":                         "GET / HTTP/1.1\r\nHost: api." + domain + "\r\n\r\n",
		"a method that begins like the preface":         "PRIx / HTTP/1.1\r\nHost: api." + domain + "\r\n\r\n",
		"a request that is shorter than the preface is": "P / HTTP/1.0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := l.dialPlain(t)
			for i := range len(request) {
				io.WriteString(c, request[i:i+1])
				if i < 8 {
					time.Sleep(2 * time.Millisecond)
				}
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode >= 500 {
				t.Errorf("got %v, %v", resp, err)
			}
		})
	}
	t.Run("half a preface, or nothing, is not waited for longer than a header", func(t *testing.T) {
		half, nothing := l.dialPlain(t), l.dialPlain(t)
		io.WriteString(half, "PRI * HTTP/2.0\r\n")
		for _, c := range []net.Conn{half, nothing} {
			c.SetDeadline(time.Now().Add(8 * time.Second))
			var timeout net.Error
			if b, err := io.ReadAll(c); errors.As(err, &timeout) && timeout.Timeout() || len(b) > 0 && !strings.HasPrefix(string(b), "HTTP/1.1 4") {
				t.Errorf("got %q, %v", b, err)
			}
		}
	})
}

func TestHTTPToAPortOfTLS(t *testing.T) {
	l := newLab(t)
	c, err := net.Dial("tcp", l.https)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(c, "GET / HTTP/1.1\r\n")
	if b, _ := io.ReadAll(c); !strings.HasPrefix(string(b), "HTTP/1.0 400 ") || !strings.Contains(string(b), "https://") {
		t.Errorf("got %q", b)
	}
}

// TestHandshakesHaveATime: who does not get through the handshake is let go.
func TestHandshakesHaveATime(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.HeaderTimeout = 300 * time.Millisecond })
	c, err := net.Dial("tcp", l.https)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "\x16\x03\x01")
	c.SetDeadline(time.Now().Add(10 * time.Second))
	var timeout net.Error
	if _, err := io.ReadAll(c); errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("it is still open")
	}
	eventually(t, "its count to end", func() bool { return l.in.sources.open() == 0 })
}

// TestDrainSaysSo: idle connections end at once, requests under way are answered, and
// clients of HTTP/2 are told to go away.
func TestDrainSaysSo(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.DrainTimeout = 15 * time.Second })
	a := l.sandbox(idA)
	asked, release := make(chan struct{}, 2), make(chan struct{})
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-release
		io.WriteString(w, "whole")
	}))
	idle := l.wire(t, a.host(port))
	shaking, err := net.Dial("tcp", l.https)
	if err != nil {
		t.Fatal(err)
	}
	defer shaking.Close()
	h1, h2 := l.wire(t, a.host(port)), l.framed(t)
	io.WriteString(h1, "GET / HTTP/1.1\r\nHost: "+a.host(port)+"\r\n\r\n")
	h2.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, EndHeaders: true, BlockFragment: h2.block(
		":method", "GET", ":scheme", "https", ":authority", a.host(port), ":path", "/")})
	<-asked
	<-asked
	l.stop()
	for _, c := range []net.Conn{idle, shaking} {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		var timeout net.Error
		if _, err := io.ReadAll(c); errors.As(err, &timeout) && timeout.Timeout() {
			t.Error("an idle connection is still open")
		}
	}
	goneAway := false
	for !goneAway {
		fr, err := h2.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		_, goneAway = fr.(*http2.GoAwayFrame)
	}
	close(release)
	resp, err := http.ReadResponse(h1.br, nil)
	if err != nil || !resp.Close {
		t.Fatal(resp, err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "whole" {
		t.Errorf("HTTP/1: %q, %v", b, err)
	}
	if s := h2.status(t, 1); s != "200" {
		t.Errorf("HTTP/2: %s", s)
	}
	select {
	case <-l.stopped:
	case <-time.After(10 * time.Second):
		t.Error("Run does not return when all is served")
	}
	if c, err := tls.Dial("tcp", l.https, &tls.Config{InsecureSkipVerify: true}); err == nil {
		c.Close()
		t.Error("connections are still accepted")
	}
}
