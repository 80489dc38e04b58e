package ingress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/net/http2"
)

// streamWS is a WebSocket on an HTTP/2 stream, as a browser opens one (RFC 8441).
type streamWS struct {
	up   *io.PipeWriter
	down io.ReadCloser
	resp *http.Response
}

// h2 returns a connection that sends pseudo-headers, which net/http's refuses to.
func (l *lab) h2(t *testing.T) http.RoundTripper {
	c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: domain, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	h2, err := new(http2.Transport).NewClientConn(c) //nolint:staticcheck // see above
	if err != nil {
		t.Fatal(err)
	}
	return h2
}

func dialStream(t *testing.T, tr http.RoundTripper, url, protocol string, header ...string) *streamWS {
	t.Helper()
	pr, pw := io.Pipe()
	t.Cleanup(func() { pw.Close() })
	req, err := http.NewRequestWithContext(t.Context(), http.MethodConnect, url, pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header[":protocol"] = []string{protocol}
	req.Header.Set("Sec-WebSocket-Version", "13")
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return &streamWS{pw, resp.Body, resp}
}

// frame is a masked frame with a key of zeros, which leaves the text readable.
func frame(op byte, text string) []byte {
	return append([]byte{0x80 | op, 0x80 | byte(len(text)), 0, 0, 0, 0}, text...)
}

func (s *streamWS) say(t *testing.T, op byte, text string) string {
	t.Helper()
	if _, err := s.up.Write(frame(op, text)); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 2)
	if _, err := io.ReadFull(s.down, head); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, head[1])
	if _, err := io.ReadFull(s.down, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A service that closes an upgrade without a word refuses it: the answer says that it
// was the service, and why such services do that.
func TestAnUpgradeThatIsNotAnsweredIsTheServicesRefusal(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	silent := a.raw(func(_ net.Conn, br *bufio.Reader) { http.ReadRequest(br) })
	reset := a.raw(func(c net.Conn, br *bufio.Reader) {
		http.ReadRequest(br)
		c.(*net.TCPConn).SetLinger(0)
	})
	other := a.raw(func(c net.Conn, br *bufio.Reader) {
		http.ReadRequest(br)
		io.WriteString(c, "SSH-2.0-x\r\n\r\n")
	})
	const closed, origin = "closed the connection without an answer", "for an Origin they do not allow"
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	for name, port := range map[string]int{"closed": silent, "reset": reset} {
		t.Run(name, func(t *testing.T) {
			resp, body := get(t, l.client(false), "https://"+a.host(port)+"/", upgrade...)
			if resp.StatusCode != 502 || !strings.Contains(body, closed) || !strings.Contains(body, origin) || !json.Valid([]byte(body)) {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
			s := dialStream(t, l.h2(t), "https://"+a.host(port)+"/", "websocket", "Accept", "text/html")
			if page, _ := io.ReadAll(s.down); s.resp.StatusCode != 502 || !strings.Contains(string(page), "<h1>") || strings.Count(string(page), closed) != 2 || strings.Count(string(page), origin) != 2 {
				t.Errorf("got %d %s", s.resp.StatusCode, page)
			}
			resp, body = get(t, l.client(false), "https://"+a.host(port)+"/")
			if resp.StatusCode != 502 || !strings.Contains(body, closed) || strings.Contains(body, "Origin") {
				t.Errorf("without an upgrade: got %d %s", resp.StatusCode, body)
			}
		})
	}
	t.Run("another protocol", func(t *testing.T) {
		resp, body := get(t, l.client(false), "https://"+a.host(other)+"/", upgrade...)
		if resp.StatusCode != 502 || strings.Contains(body, closed) || !strings.Contains(body, "did not answer in HTTP") {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	})
}

func TestWebSocketOverHTTP2(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(t *Target) { t.Public = false; t.TrafficToken = "tok" })
	seen := make(chan http.Header, 8)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header.Clone()
		wsEcho(w, r)
	}))
	url := "https://" + a.host(port) + "/ws?a=%2F;b"
	tr := l.h2(t)
	t.Run("without a token it is refused like any request", func(t *testing.T) {
		if s := dialStream(t, tr, url, "websocket"); s.resp.StatusCode != 403 {
			t.Errorf("got %d", s.resp.StatusCode)
		}
	})
	t.Run("another protocol is not served", func(t *testing.T) {
		if s := dialStream(t, tr, url, "connect-udp", "E2b-Traffic-Access-Token", "tok"); s.resp.StatusCode != 501 {
			t.Errorf("got %d", s.resp.StatusCode)
		}
	})
	t.Run("a service that switches to nothing answers for itself", func(t *testing.T) {
		port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no socket here", 418) }))
		s := dialStream(t, tr, "https://"+a.host(port)+"/", "websocket", "E2b-Traffic-Access-Token", "tok")
		if b, _ := io.ReadAll(s.down); s.resp.StatusCode != 418 || !strings.Contains(string(b), "no socket") {
			t.Errorf("got %d %s", s.resp.StatusCode, b)
		}
	})
	t.Run("a service that takes any key is not trusted with the stream", func(t *testing.T) {
		port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			c, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(c, "HTTP/1.1 101 Sure\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: AAAA\r\n\r\n")
			c.Close()
		}))
		if s := dialStream(t, tr, "https://"+a.host(port)+"/", "websocket", "E2b-Traffic-Access-Token", "tok"); s.resp.StatusCode != 502 {
			t.Errorf("got %d", s.resp.StatusCode)
		}
	})
	t.Run("messages go both ways until the client closes", func(t *testing.T) {
		s := dialStream(t, tr, url, "websocket", "E2b-Traffic-Access-Token", "tok", "Origin", "https://x.test")
		if s.resp.StatusCode != 200 || s.resp.Header.Get("Sec-Websocket-Accept") != "" || s.resp.Header.Get("Upgrade") != "" {
			t.Fatalf("got %d %v", s.resp.StatusCode, s.resp.Header)
		}
		if h := <-seen; h.Get("Sec-Websocket-Key") == "" || h.Get("Origin") != "https://x.test" || h.Get("E2b-Traffic-Access-Token") != "" {
			t.Errorf("the service saw %v", h)
		}
		for _, text := range []string{"hello", "", strings.Repeat("x", 100)} {
			if got := s.say(t, 1, text); got != text {
				t.Errorf("got %q, want %q", got, text)
			}
		}
		if got := s.say(t, 8, "\x03\xe8"); got != "\x03\xe8" {
			t.Errorf("close answered by %q", got)
		}
		if rest, err := io.ReadAll(s.down); err != nil || len(rest) > 0 {
			t.Errorf("end: %q %v", rest, err)
		}
		eventually(t, "the request to end", func() bool { return l.in.underway() == 0 })
	})
	t.Run("a client that resets its stream is noticed by the service", func(t *testing.T) {
		s := dialStream(t, tr, url, "websocket", "E2b-Traffic-Access-Token", "tok")
		s.say(t, 1, "x")
		s.down.Close()
		eventually(t, "the request to end", func() bool { return l.in.underway() == 0 })
	})
	t.Run("killing the sandbox resets the stream and leaves the connection", func(t *testing.T) {
		b := l.sandbox(idB)
		s := dialStream(t, tr, "https://"+b.host(b.serve(wsEcho))+"/", "websocket")
		s.say(t, 1, "x")
		b.kill()
		if _, err := io.ReadAll(s.down); !strings.Contains(fmt.Sprint(err), "stream error") {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestStreamedWebSocketCarriesBulk checks flow control: more than any window, both ways.
func TestStreamedWebSocketCarriesBulk(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	const size = 4 << 20
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(-1)
		_, b, err := c.Read(r.Context())
		if err == nil {
			c.Write(r.Context(), websocket.MessageBinary, b)
		}
	}))
	s := dialStream(t, l.h2(t), "https://"+a.host(port)+"/", "websocket")
	want := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	go func() {
		s.up.Write([]byte{0x82, 0x80 | 127, 0, 0, 0, 0, 0, size >> 16, 0, 0, 0, 0, 0, 0})
		s.up.Write(want)
	}()
	got := make([]byte, 10+size)
	done := time.AfterFunc(20*time.Second, func() { s.down.Close() })
	defer done.Stop()
	if _, err := io.ReadFull(s.down, got); err != nil || !bytes.Equal(got[10:], want) {
		t.Errorf("echo differs: %v", err)
	}
}
