package ingress

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// whatFails are services that end a request in every way but the right one.
var whatFails = map[string]func(c net.Conn, br *bufio.Reader){
	"closes at once":         func(net.Conn, *bufio.Reader) {},
	"closes after the head":  func(_ net.Conn, br *bufio.Reader) { readLines(br) },
	"speaks no HTTP":         func(c net.Conn, br *bufio.Reader) { readLines(br); io.WriteString(c, "SSH-2.0-x\r\n") },
	"begins HTTP/2 and ends": func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, "\x00\x00\x00\x04\x00\x00\x00\x00\x00") },
	"ends an answer early": func(c net.Conn, br *bufio.Reader) {
		readLines(br)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
	},
	"hints and ends": func(c net.Conn, br *bufio.Reader) {
		readLines(br)
		io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
	},
	"switches and ends": func(c net.Conn, br *bufio.Reader) {
		readLines(br)
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	},
	"switches without being asked": func(c net.Conn, br *bufio.Reader) {
		readLines(br)
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n")
		io.Copy(io.Discard, br)
	},
	"says nothing": func(_ net.Conn, br *bufio.Reader) { io.Copy(io.Discard, br) },
}

func readLines(br *bufio.Reader) {
	for {
		if l, err := br.ReadString('\n'); err != nil || l == "\r\n" {
			return
		}
	}
}

// whatIsAsked are requests that end in every way, some in the middle.
var whatIsAsked = map[string]string{
	"plain":                  "GET / HTTP/1.1\r\n",
	"a body":                 "POST / HTTP/1.1\r\nContent-Length: 3\r\n",
	"a body that breaks off": "POST / HTTP/1.1\r\nContent-Length: 30000\r\n",
	"chunks that break off":  "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",
	"a body to be asked for": "POST / HTTP/1.1\r\nContent-Length: 30000\r\nExpect: 100-continue\r\n",
	"a WebSocket":            "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
	"an upgrade with a body": "POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 3\r\n",
	"an upgrade breaks off":  "POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 300\r\n",
	"an upgrade in chunks":   "POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nTransfer-Encoding: chunked\r\n",
	"gRPC by HTTP/1":         "POST / HTTP/1.1\r\nContent-Type: application/grpc\r\nContent-Length: 3\r\n",
}

// Whatever services and clients do, what they held is given back when it is over.
func TestNoCountIsLeftBehind(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.Relay.TLSTimeout = time.Second })
	a := l.sandbox(idA)
	ports := map[string]int{"nothing listens": 1}
	for name, f := range whatFails {
		ports[name] = a.raw(f)
	}
	secure := a.raw(whatFails["closes after the head"])
	a.change(func(t *Target) { t.HTTPSPorts = []uint16{uint16(secure)} })
	ports["speaks no TLS"] = secure
	for service, port := range ports {
		for asked, head := range whatIsAsked {
			for _, leaves := range []string{"at once", "later", "half"} {
				c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: a.host(port), NextProtos: []string{"http/1.1"}})
				if err != nil {
					t.Fatalf("%s, %s: %v", service, asked, err)
				}
				fmt.Fprintf(c, "%sHost: %s\r\n\r\nabc", head, a.host(port))
				switch leaves {
				case "half":
					c.CloseWrite()
					fallthrough
				case "later":
					c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
					io.Copy(io.Discard, c)
				}
				c.NetConn().Close()
			}
		}
	}
	l.both(t, func(t *testing.T, c *http.Client) {
		c.Timeout = 50 * time.Millisecond
		for _, port := range ports {
			for _, kind := range []string{"text/plain", "application/grpc"} {
				for _, body := range []io.Reader{nil, strings.NewReader("abc"), io.MultiReader(strings.NewReader(strings.Repeat("x", 100<<10)))} {
					if resp, err := c.Post("https://"+a.host(port)+"/", kind, body); err == nil {
						io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
					}
				}
			}
		}
	})
	b := l.in.backend(a.t)
	eventually(t, "all is given back", func() bool {
		b.guests.mu.Lock()
		defer b.guests.mu.Unlock()
		l.in.heads.mu.Lock()
		defer l.in.heads.mu.Unlock()
		return b.guests.head == nil && len(b.guests.sources) == 0 && b.guests.busy.Load() == 0 && b.inflight.Load() == 0 &&
			l.in.heads.used == 0 && len(l.in.heads.source) == 0 && l.in.exchanges.Used() == 0
	})
}

// silentTLS is a service that accepts and never ends the TLS handshake. It counts the
// connections that are open to it.
func silentTLS(a *sandbox) (port int, open *atomic.Int64) {
	open = new(atomic.Int64)
	port = a.listenRaw(func(c net.Conn) {
		open.Add(1)
		defer open.Add(-1)
		io.Copy(io.Discard, c)
	})
	a.change(func(t *Target) { t.HTTPSPorts = []uint16{uint16(port)} })
	return port, open
}

// A handshake that does not end takes nothing longer than its request is there.
func TestATLSHandshakeEndsWithItsRequest(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.Relay.TLSTimeout = time.Second })
	for kind, h2 := range map[string]bool{"text/plain": false, "application/grpc": true} {
		t.Run(kind, func(t *testing.T) {
			a := l.sandbox("i" + strings.Repeat(kind[:1], 20))
			port, open := silentTLS(a)
			c := l.client(h2)
			c.Timeout = 200 * time.Millisecond
			for range 5 {
				if resp, err := c.Post("https://"+a.host(port)+"/", kind, strings.NewReader("abc")); err == nil {
					resp.Body.Close()
					t.Errorf("it was answered with %d", resp.StatusCode)
				}
			}
			eventually(t, "the service to be left", func() bool { return open.Load() == 0 })
		})
	}
}

func TestATLSHandshakeEndsWithTheSandbox(t *testing.T) {
	for kind, h2 := range map[string]bool{"text/plain": false, "application/grpc": true} {
		t.Run(kind, func(t *testing.T) {
			l := newLab(t)
			a := l.sandbox(idA)
			port, open := silentTLS(a)
			got := make(chan error, 1)
			go func() {
				resp, err := l.client(h2).Post("https://"+a.host(port)+"/", kind, strings.NewReader("abc"))
				if err == nil {
					defer resp.Body.Close()
					if raw, _ := io.ReadAll(resp.Body); !strings.Contains(string(raw), "was not found") {
						err = fmt.Errorf("the answer is %d %s", resp.StatusCode, raw)
					}
				}
				got <- err
			}()
			eventually(t, "the handshake to begin", func() bool { return open.Load() > 0 })
			a.kill()
			select {
			case err := <-got:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(5 * time.Second):
				t.Error("the request outlives the sandbox")
			}
		})
	}
}
