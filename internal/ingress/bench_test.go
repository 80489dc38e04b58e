package ingress

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// benchBody is what the service of the benchmarks answers.
var benchBody = make([]byte, 128)

func benchService(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("Content-Length", strconv.Itoa(len(benchBody)))
	w.Write(benchBody)
}

// BenchmarkRequests compares one small request over kept connections: to the
// service itself, through the ingress (1,000 sandboxes known), and through a
// plain httputil.ReverseProxy behind the same server.
func BenchmarkRequests(b *testing.B) {
	l := newLab(b)
	for i := range 1000 {
		id := fmt.Sprintf("ifill%d", i)
		l.targets[id] = &Target{ID: id, Public: true}
	}
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(benchService))
	service := net.JoinHostPort(a.t.Addr.String(), strconv.Itoa(port))
	u, err := url.Parse("http://" + service)
	if err != nil {
		b.Fatal(err)
	}
	tr := &http.Transport{MaxIdleConnsPerHost: 128}
	defer tr.CloseIdleConnections()
	proxy := &httputil.ReverseProxy{Rewrite: func(pr *httputil.ProxyRequest) { pr.SetURL(u); pr.SetXForwarded() }, Transport: tr}
	silent := slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	plain, secure := &http.Server{Handler: proxy, ErrorLog: silent}, &http.Server{Handler: proxy, ErrorLog: silent, TLSConfig: l.in.cfg.TLS.Clone()}
	pl, sl := listen(b, "127.0.0.1:0"), listen(b, "127.0.0.1:0")
	var g sync.WaitGroup
	g.Go(func() { plain.Serve(pl) })
	g.Go(func() { secure.ServeTLS(sl, "", "") })
	defer g.Wait()
	defer plain.Close()
	defer secure.Close()
	for _, c := range []struct {
		name string
		addr string
		tls  bool
	}{{"service", service, false}, {"ingress", l.http, false}, {"ReverseProxy", pl.Addr().String(), false}, {"ingress TLS", l.https, true}, {"ReverseProxy TLS", sl.Addr().String(), true}} {
		b.Run(c.name, func(b *testing.B) { benchRequests(b, l, c.addr, c.tls, a.host(port)) })
	}
}

// benchRequests sends requests on eight kept connections.
func benchRequests(b *testing.B, l *lab, addr string, secure bool, host string) {
	request := []byte("GET /x?y=z HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	b.ReportAllocs()
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Error(err)
			return
		}
		if secure {
			c = tls.Client(c, &tls.Config{RootCAs: l.roots, ServerName: host, NextProtos: []string{"http/1.1"}})
		}
		defer c.Close()
		br := bufio.NewReader(c)
		for pb.Next() {
			if _, err := c.Write(request); err != nil {
				b.Error(err)
				return
			}
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != 200 {
				b.Error(resp, err)
				return
			}
			io.Copy(io.Discard, resp.Body)
		}
	})
}

// BenchmarkHTTP2Requests is one small request at a time on each of some connections.
func BenchmarkHTTP2Requests(b *testing.B) {
	l := newLab(b)
	a := l.sandbox(idA)
	host := a.host(a.serve(http.HandlerFunc(benchService)))
	b.ReportAllocs()
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		f := l.framed(b)
		for stream := uint32(1); pb.Next(); stream += 2 {
			f.WriteHeaders(http2.HeadersFrameParam{
				StreamID: stream, EndStream: true, EndHeaders: true,
				BlockFragment: f.block(":method", "GET", ":scheme", "https", ":authority", host, ":path", "/x?y=z", "user-agent", "bench"),
			})
			for ended := false; !ended; {
				fr, err := f.ReadFrame()
				if err != nil {
					b.Error(err)
					return
				}
				if d, ok := fr.(*http2.DataFrame); ok {
					if ended = d.StreamEnded(); len(d.Data()) > 0 {
						f.WriteWindowUpdate(0, uint32(len(d.Data())))
					}
				}
			}
		}
	})
}

// BenchmarkAddedLatency reports the median and 99th percentile of one request at
// a time, to the service and through the ingress, in turns.
func BenchmarkAddedLatency(b *testing.B) {
	l := newLab(b)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(benchService))
	request := []byte("GET / HTTP/1.1\r\nHost: " + a.host(port) + "\r\n\r\n")
	type side struct {
		c    net.Conn
		br   *bufio.Reader
		took []time.Duration
	}
	var sides [2]side
	for i, addr := range []string{net.JoinHostPort(a.t.Addr.String(), strconv.Itoa(port)), l.http} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		sides[i] = side{c: c, br: bufio.NewReader(c)}
	}
	for b.Loop() {
		for i := range sides {
			s := &sides[i]
			start := time.Now()
			s.c.Write(request)
			resp, err := http.ReadResponse(s.br, nil)
			if err != nil {
				b.Fatal(err)
			}
			io.Copy(io.Discard, resp.Body)
			s.took = append(s.took, time.Since(start))
		}
	}
	for i := range sides {
		slices.Sort(sides[i].took)
	}
	at := func(i int, q float64) float64 {
		return float64(sides[i].took[int(q*float64(len(sides[i].took)-1))].Microseconds())
	}
	b.ReportMetric(at(1, .5)-at(0, .5), "added-p50-µs")
	b.ReportMetric(at(1, .99)-at(0, .99), "added-p99-µs")
}

// BenchmarkIdleWebSocket reports what an idle tunnel over TLS costs the ingress,
// client and service in this process included.
func BenchmarkIdleWebSocket(b *testing.B) {
	l := newLab(b)
	a := l.sandbox(idA)
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		http.ReadRequest(br)
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
		var one [1]byte
		for {
			if _, err := c.Read(one[:]); err != nil {
				return
			}
		}
	})
	var conns []net.Conn
	runtime.GC()
	before := memory()
	for b.Loop() {
		c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: a.host(port), NextProtos: []string{"http/1.1"}})
		if err != nil {
			b.Fatal(err)
		}
		conns = append(conns, c)
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", a.host(port))
		if _, err := http.ReadResponse(bufio.NewReaderSize(c, 512), nil); err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	b.ReportMetric(float64(memory()-before)/float64(len(conns)), "B/tunnel-all-parties")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, c := range conns {
		c.Close()
	}
	for l.in.underway() > 0 && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
}

func memory() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
