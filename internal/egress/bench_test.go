package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"testing"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

func BenchmarkReadHello(b *testing.B) {
	records := realHello(b, "www.example.com")
	pool := new(buffers)
	b.SetBytes(int64(len(records)))
	b.ReportAllocs()
	for b.Loop() {
		s := source{conn: &replay{r: bytes.NewReader(records)}, pool: pool}
		if name, _, err := readHello(&s); err != nil || name != "www.example.com" {
			b.Fatal(name, err)
		}
		s.release()
	}
}

func BenchmarkParseHelloAlone(b *testing.B) {
	msg := realHello(b, "www.example.com")[5+4:]
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseHello(msg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseRequest(b *testing.B) {
	head := []byte(lines("GET /some/path?with=query HTTP/1.1", "Host: www.example.com", "User-Agent: curl/8.0", "Accept: */*", "Accept-Encoding: gzip", "Connection: keep-alive"))
	var q request
	var out []byte
	b.ReportAllocs()
	for b.Loop() {
		var scan headScanner
		n, _ := scan.scan(head)
		if err := q.parse(head[:n], 80); err != nil {
			b.Fatal(err)
		}
		out = q.appendTo(out[:0])
	}
}

// quiet makes a lab whose events are dropped.
func quiet(b *testing.B, in policy.Input) *lab {
	l := newLab(b, in)
	l.p.cfg.Flows = nothing{}
	l.p.lim.NewPerSecond = 1 << 30
	return l
}

type nothing struct{}

func (nothing) Record(flowlog.Event) {}

// BenchmarkSplice moves one stream from an upstream: directly, through the proxy,
// and through a forwarder that does nothing but io.Copy.
func BenchmarkSplice(b *testing.B) {
	for _, how := range []string{"direct", "proxied", "io.Copy"} {
		b.Run(how, func(b *testing.B) {
			l := quiet(b, policy.Input{})
			block := make([]byte, 256<<10)
			u := l.host(nil, "93.184.216.1:443")
			u.Listener.Close()
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := ln.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = c.Read(make([]byte, 1))
				for {
					if _, err := c.Write(block); err != nil {
						return
					}
				}
			}()
			l.mu.Lock()
			l.hosts[netip.MustParseAddrPort("93.184.216.1:443")] = ln.Addr().String()
			addr := l.lns[netip.MustParseAddrPort("93.184.216.1:443")].Addr().String()
			l.mu.Unlock()
			switch how {
			case "direct":
				addr = ln.Addr().String()
			case "io.Copy":
				addr = forward(b, ln.Addr().String())
			}
			c, err := net.Dial("tcp", addr)
			if err != nil {
				b.Fatal(err)
			}
			send(b, c, "\x01")
			buf := make([]byte, 256<<10)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
			reset(c)
			ln.Close()
			<-done
		})
	}
}

// forward passes one connection on to addr and returns where.
func forward(b *testing.B, addr string) string {
	b.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var running sync.WaitGroup
	b.Cleanup(func() { ln.Close(); running.Wait() })
	running.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		up, err := net.Dial("tcp", addr)
		if err != nil {
			return
		}
		defer up.Close()
		running.Go(func() { ; _, _ = io.Copy(up, c) })
		_, _ = io.Copy(c, up)
	})
	return ln.Addr().String()
}

// BenchmarkShortHTTP opens a connection, asks once and closes.
func BenchmarkShortHTTP(b *testing.B) {
	for _, how := range []string{"direct", "proxied"} {
		b.Run(how, func(b *testing.B) {
			l := quiet(b, onlyA)
			l.host(raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", true), "93.184.216.1:80")
			l.mu.Lock()
			addr := l.lns[netip.MustParseAddrPort("93.184.216.1:80")].Addr().String()
			if how == "direct" {
				addr = l.hosts[netip.MustParseAddrPort("93.184.216.1:80")]
			}
			l.mu.Unlock()
			req := []byte(lines("GET / HTTP/1.1", "Host: a.example"))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					c, err := net.Dial("tcp", addr)
					if err != nil {
						b.Error(err)
						return
					}
					_, _ = c.Write(req)
					if got, err := io.ReadAll(c); err != nil || len(got) == 0 {
						b.Errorf("%q, %v", got, err)
					}
					c.Close()
				}
			})
		})
	}
}

// BenchmarkKeptHTTP asks over and over on one connection.
func BenchmarkKeptHTTP(b *testing.B) {
	l := quiet(b, onlyA)
	l.host(raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", false), "93.184.216.1:80")
	c, err := net.Dial("tcp", l.lns[netip.MustParseAddrPort("93.184.216.1:80")].Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	br := bufio.NewReader(c)
	req := []byte(lines("GET / HTTP/1.1", "Host: a.example"))
	b.ReportAllocs()
	for b.Loop() {
		_, _ = c.Write(req)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
	}
}

// BenchmarkTLSHandshake completes a handshake and closes.
func BenchmarkTLSHandshake(b *testing.B) {
	for _, how := range []string{"direct", "proxied"} {
		b.Run(how, func(b *testing.B) {
			l := quiet(b, onlyA)
			l.host(tlsEcho(b), "93.184.216.1:443")
			l.mu.Lock()
			addr := l.lns[netip.MustParseAddrPort("93.184.216.1:443")].Addr().String()
			if how == "direct" {
				addr = l.hosts[netip.MustParseAddrPort("93.184.216.1:443")]
			}
			l.mu.Unlock()
			for b.Loop() {
				c, err := tls.Dial("tcp", addr, clientConfig("a.example"))
				if err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
	}
}

// BenchmarkIdleFlow reports what an idle proxied flow holds of the heap and of
// goroutine stacks; sockets and pipes in the kernel are not in it.
func BenchmarkIdleFlow(b *testing.B) {
	l := quiet(b, onlyA)
	l.p.lim.Conns, l.p.lim.Pending = 1<<20, 1<<20
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	held := make(chan net.Conn, 1000)
	go func() {
		defer close(held)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			held <- c
		}
	}()
	l.hosts[netip.MustParseAddrPort("93.184.216.1:443")] = ln.Addr().String()
	addr := l.lns[netip.MustParseAddrPort("93.184.216.1:443")].Addr().String()
	records := realHello(b, "a.example")
	const n = 500
	for b.Loop() {
		before := inUse()
		var conns []net.Conn
		for range n {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				b.Fatal(err)
			}
			_, _ = c.Write(records)
			conns = append(conns, c, <-held)
		}
		l.awaitFlows(n)
		// The test's own two ends of each flow are in it: two descriptors of a few hundred bytes.
		b.ReportMetric(float64(inUse()-before)/n, "B/flow")
		for _, c := range conns {
			reset(c)
		}
		l.awaitFlows(0)
	}
	ln.Close()
}

func inUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}
