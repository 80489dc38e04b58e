package ingress

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// with returns the first line that has all of the words.
func (l *lines) with(words ...string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for line := range strings.Lines(l.b.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		return line
	}
	return ""
}

func TestAccessLog(t *testing.T) {
	for _, on := range []bool{false, true} {
		t.Run(fmt.Sprintf("requests at Info: %v", on), func(t *testing.T) {
			var out lines
			l := newLab(t, func(c *Config) {
				c.Log, c.LogRequests = slog.New(slog.NewTextHandler(&out, nil)), on
			})
			a := l.sandbox(idA, func(t *Target) { t.Public = false; t.TrafficToken = "secret-token" })
			port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if r.URL.Path == "/ws" {
					wsEcho(w, r)
					return
				}
				time.Sleep(20 * time.Millisecond)
				w.Write(make([]byte, 5000))
			}))
			l.both(t, func(t *testing.T, c *http.Client) {
				req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/a%20b?signature=v1_abc&cordon_token=secret-token", strings.NewReader(strings.Repeat("x", 100<<10)))
				if resp, _ := do(t, c, req); resp.StatusCode != 200 {
					t.Fatal(resp.Status)
				}
			})
			conn, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: a.host(port), NextProtos: []string{"http/1.1"}})
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nE2b-Traffic-Access-Token: secret-token\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", a.host(port))
			io.ReadFull(conn, make([]byte, 10))
			conn.Write(frame(1, "hello"))
			conn.Write(frame(8, "\x03\xe8"))
			io.Copy(io.Discard, conn)
			conn.Close()
			eventually(t, "the tunnel to end", func() bool { return l.in.underway() == 0 })
			if !on {
				if line := out.with("msg="); line != "" {
					t.Errorf("logged %s", line)
				}
				return
			}
			id, p := "sandbox="+idA, fmt.Sprintf("port=%d", port)
			eventually(t, "the tunnel's line", func() bool {
				return out.with("level=INFO", `msg="tunnel ended"`, id, p, "in=19", "out=11") != ""
			})
			if out.with(`msg="request served"`, id, p, "in=102400", "out=5000", "method=POST", "path=/a%20b ", "code=200", "upstream=", "src=127.0.0.1") == "" ||
				out.with(`msg="request served"`, "code=101") == "" || out.with("upstream=0s", "code=200") != "" {
				t.Errorf("the log is\n%s", out.b.String())
			}
			for _, secret := range []string{"secret-token", "signature", "v1_abc"} {
				if line := out.with(secret); line != "" {
					t.Errorf("it tells %q: %s", secret, line)
				}
			}
		})
	}
}
