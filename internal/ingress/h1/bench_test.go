package h1

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// processorTime reports what was used of the processors, which other programs
// that run at the same time do not change.
func processorTime(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

// request is what a browser sends, more or less.
const request = "GET /path/to/it?query=1 HTTP/1.1\r\nHost: 3000-abcdefghij.example.com\r\nuser-agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36\r\n" +
	"accept: text/html,application/xhtml+xml,application/xml;q=0.9\r\naccept-encoding: gzip, deflate, br\r\naccept-language: en\r\ncookie: a=b\r\nx-request-id: 0123456789\r\n\r\n"

func hello(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, "hello, world\n")
}

func certificate(t testing.TB) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// endless is a connection on which a request follows each answer, without a
// kernel or another goroutine in between.
type endless struct {
	net.Conn
	left  int
	rest  string        // of the request
	ready chan struct{} // an answer was written
	wake  chan struct{} // who reads is to stop it
	over  chan struct{} // closed
}

func newEndless(n int) *endless {
	e := &endless{left: n, ready: make(chan struct{}, 1), wake: make(chan struct{}, 1), over: make(chan struct{})}
	e.ready <- struct{}{}
	return e
}

func (e *endless) Read(p []byte) (int, error) {
	if e.rest == "" {
		select {
		case <-e.ready:
		case <-e.wake:
			return 0, os.ErrDeadlineExceeded
		}
		if e.left == 0 {
			e.Write(nil) // whoever reads next is told, too
			return 0, io.EOF
		}
		e.left--
		e.rest = request
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

func (e *endless) Write(p []byte) (int, error) {
	select {
	case e.ready <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (e *endless) SetReadDeadline(t time.Time) error {
	select {
	case <-e.wake:
	default:
	}
	if !t.IsZero() && t.Before(time.Unix(1000, 0)) {
		e.wake <- struct{}{}
	}
	return nil
}
func (e *endless) Close() error                     { close(e.over); return nil }
func (e *endless) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (e *endless) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (e *endless) SetDeadline(time.Time) error      { return nil }
func (e *endless) SetWriteDeadline(time.Time) error { return nil }

// one is a listener with one connection.
type one struct{ conns chan net.Conn }

func (o one) Accept() (net.Conn, error) {
	if c, ok := <-o.conns; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (o one) Close() error   { return nil }
func (o one) Addr() net.Addr { return &net.TCPAddr{} }

// BenchmarkServerAlone is without client, kernel and TLS.
func BenchmarkServerAlone(b *testing.B) {
	b.Run("h1", func(b *testing.B) {
		b.ReportAllocs()
		s := &Server{Handler: http.HandlerFunc(hello)}
		defer processorTime(b)()
		s.ServeConn(context.Background(), newEndless(b.N), nil)
	})
	b.Run("nethttp", func(b *testing.B) {
		b.ReportAllocs()
		s := &http.Server{Handler: http.HandlerFunc(hello), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
		ln := one{make(chan net.Conn, 1)}
		c := newEndless(b.N)
		defer processorTime(b)()
		ln.conns <- c
		close(ln.conns)
		s.Serve(ln)
		<-c.over
	})
}

// BenchmarkReadResponse compares the readers of answers.
func BenchmarkReadResponse(b *testing.B) {
	const answer = "HTTP/1.1 200 OK\r\nserver: nginx\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\ncontent-type: text/html; charset=utf-8\r\ncontent-length: 0\r\netag: \"abc\"\r\n" +
		"cache-control: no-store\r\nx-powered-by: Express\r\nvary: Accept-Encoding\r\n\r\n"
	for name, read := range map[string]func(*bufio.Reader) error{
		"h1":      func(br *bufio.Reader) error { _, _, err := ReadResponse(br, nil); return err },
		"nethttp": func(br *bufio.Reader) error { _, err := http.ReadResponse(br, nil); return err },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			src := strings.NewReader("")
			br := bufio.NewReader(src)
			for range b.N {
				src.Reset(answer)
				br.Reset(src)
				if err := read(br); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRequests compares the servers, one connection for each processor,
// requests one after the other. Half of the work is the client's and TLS's.
func BenchmarkRequests(b *testing.B) {
	conf := &tls.Config{Certificates: []tls.Certificate{certificate(b)}, NextProtos: []string{"http/1.1"}}
	for _, secure := range []bool{false, true} {
		for _, which := range []string{"h1", "nethttp"} {
			name := which + "/tcp"
			if secure {
				name = which + "/tls"
			}
			b.Run(name, func(b *testing.B) { benchRequests(b, which == "h1", secure, conf) })
		}
	}
}

func benchRequests(b *testing.B, ours, secure bool, conf *tls.Config) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	if secure {
		ln = tls.NewListener(ln, conf)
	}
	if ours {
		s := &Server{Handler: http.HandlerFunc(hello)}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go s.ServeConn(context.Background(), c, nil)
			}
		}()
		defer s.Close()
	} else {
		s := &http.Server{Handler: http.HandlerFunc(hello), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
		go s.Serve(ln)
		defer s.Close()
	}
	defer ln.Close()
	b.ReportAllocs()
	defer processorTime(b)()
	b.RunParallel(func(pb *testing.PB) {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		if secure {
			c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
		}
		br := bufio.NewReader(c)
		for pb.Next() {
			io.WriteString(c, request)
			size := 0
			for {
				line, err := br.ReadSlice('\n')
				if err != nil {
					b.Error(err)
					return
				}
				if len(line) > 16 && string(line[:16]) == "Content-Length: " {
					size = int(line[16]-'0')*10 + int(line[17]-'0')
				}
				if len(line) == 2 {
					break
				}
			}
			br.Discard(size)
		}
	})
}
