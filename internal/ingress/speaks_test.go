package ingress

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// only serves h on a port that speaks nothing but HTTP/2, and counts connections.
func (s *sandbox) only2(h http.Handler, secure ...*tls.Config) (port int, conns *atomic.Int32) {
	s.lab.t.Helper()
	ln := listen(s.lab.t, net.JoinHostPort(s.t.Addr.String(), "0"))
	port = ln.Addr().(*net.TCPAddr).Port
	conns = &atomic.Int32{}
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	p.SetHTTP2(true)
	srv := &http.Server{Handler: h, Protocols: &p, ConnState: func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			conns.Add(1)
		}
	}}
	if len(secure) > 0 {
		ln = tls.NewListener(ln, secure[0])
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	s.lab.t.Cleanup(func() { srv.Close(); <-done })
	return port, conns
}

// talk holds a conversation: each message is answered before the next is sent.
func talk(t *testing.T, c *http.Client, url, contentType string) {
	t.Helper()
	pr, pw := io.Pipe()
	defer pw.Close()
	req, err := http.NewRequest("POST", url, pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("got %d %s", resp.StatusCode, b)
	}
	for i := range 3 {
		sent := fmt.Sprintf("message %d", i)
		io.WriteString(pw, sent)
		b := make([]byte, len(sent))
		if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != sent {
			t.Fatalf("got %q, %v, want %q", b, err, sent)
		}
	}
	pw.Close()
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
		t.Errorf("rest %q, %v", rest, err)
	}
	if got := resp.Trailer.Get("Grpc-Status"); got != "0" {
		t.Errorf("trailer %v", resp.Trailer)
	}
}

// conversation is a service that answers each message at once, by HTTP/2 only, as
// Connect's and gRPC's servers do with calls that stream both ways.
var conversation = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor < 2 {
		w.WriteHeader(http.StatusHTTPVersionNotSupported)
		return
	}
	w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
	w.Header().Set("Trailer", "Grpc-Status")
	rc := http.NewResponseController(w)
	rc.Flush()
	b := make([]byte, 1<<10)
	for {
		n, err := r.Body.Read(b)
		w.Write(b[:n])
		rc.Flush()
		if err != nil {
			break
		}
	}
	w.Header().Set("Grpc-Status", "0")
})

func TestConversationsGoByHTTP2WhateverTheyCarry(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	both := a.serve(conversation)
	only, _ := a.only2(conversation)
	for _, contentType := range []string{"application/connect+proto", "application/grpc-web+proto", "application/grpc", "application/octet-stream"} {
		for name, port := range map[string]int{"a service that speaks both": both, "one that speaks HTTP/2 only": only} {
			t.Run(name+" "+contentType, func(t *testing.T) {
				talk(t, l.client(true), "https://"+a.host(port)+"/pkg.Service/Method", contentType)
			})
		}
	}
}

// A service that speaks HTTP/2 alone is reached by every client, and with the whole
// of what it sent.
func TestAServiceThatSpeaksOnlyHTTP2(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(x *Target) { x.MaskHost = "app.test:${PORT}" })
	short, long := "short", strings.Repeat("x", 100<<10)
	for _, first := range []string{"GET", "short", "long", "stream"} {
		port, _ := a.only2(echo)
		l.both(t, func(t *testing.T, c *http.Client) {
			t.Run(first+" first", func(t *testing.T) {
				order := []string{first, "GET", "short", "long", "stream"}
				for _, kind := range order {
					var req *http.Request
					url := "https://" + a.host(port) + "/a%2Fb?x;y=%zz"
					size := 0
					switch kind {
					case "GET":
						req, _ = http.NewRequest("GET", url, nil)
					case "short":
						req, _ = http.NewRequest("POST", url, strings.NewReader(short))
						size = len(short)
					case "long":
						req, _ = http.NewRequest("POST", url, strings.NewReader(long))
						size = len(long)
					case "stream":
						req, _ = http.NewRequest("POST", url, struct{ io.Reader }{strings.NewReader(long)})
						size = len(long)
					}
					req.Header.Set("X-Forwarded-Host", "evil.example")
					resp, body := do(t, c, req)
					if resp.StatusCode != 200 || !strings.Contains(body, " /a%2Fb?x;y=%zz\n") || !strings.Contains(body, fmt.Sprintf("body=%d\n", size)) ||
						!strings.Contains(body, fmt.Sprintf("host=app.test:%d\n", port)) || !strings.Contains(body, "x-forwarded-host="+a.host(port)+"\n") {
						t.Errorf("%s: got %d %s", kind, resp.StatusCode, body)
					}
				}
			})
		})
	}
}

// Services that speak HTTP/1 alone are not asked for HTTP/2 by ordinary requests, and
// get every request once.
func TestAServiceThatSpeaksOnlyHTTP1IsLeftInPeace(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var lines, odd atomic.Int32
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		for {
			first, err := br.Peek(3)
			if err != nil {
				return
			}
			if string(first) == "PRI" {
				odd.Add(1)
				io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
				return
			}
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			lines.Add(1)
			n, _ := io.Copy(io.Discard, req.Body)
			body := fmt.Sprint(n)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		}
	})
	l.both(t, func(t *testing.T, c *http.Client) {
		get(t, c, "https://"+a.host(port)+"/")
		req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/", strings.NewReader("body"))
		if _, body := do(t, c, req); body != "4" {
			t.Errorf("got %s", body)
		}
		req, _ = http.NewRequest("POST", "https://"+a.host(port)+"/", strings.NewReader(strings.Repeat("x", 1<<20)))
		if _, body := do(t, c, req); body != fmt.Sprint(1<<20) {
			t.Errorf("got %s", body)
		}
	})
	if lines.Load() != 6 || odd.Load() != 0 {
		t.Errorf("%d requests, asked for HTTP/2 %d times", lines.Load(), odd.Load())
	}
	for range 3 {
		req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/", struct{ io.Reader }{strings.NewReader("streamed")})
		if _, body := do(t, l.client(true), req); body != "8" {
			t.Errorf("got %s", body)
		}
	}
	if lines.Load() != 9 || odd.Load() != 1 {
		t.Errorf("%d requests, asked for HTTP/2 %d times, want once", lines.Load(), odd.Load())
	}
}

// A service that breaks down under a request is no other one's: the request is not sent
// again, in whatever it speaks.
func TestARequestThatBreaksAServiceIsSentOnce(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var times atomic.Int32
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "OPTIONS" {
			return
		}
		times.Add(1)
		panic(http.ErrAbortHandler)
	}))
	for i, method := range []string{"POST", "GET"} {
		req, _ := http.NewRequest(method, "https://"+a.host(port)+"/", strings.NewReader("body"))
		if resp, body := do(t, l.client(false), req); resp.StatusCode != 502 || int(times.Load()) != i+1 {
			t.Errorf("%s: got %d %s, sent %d times", method, resp.StatusCode, body, times.Load()-int32(i))
		}
	}
}

// Another service may take a port: what was known of the first does not count then.
func TestAPortIsLearnedAnew(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	ln := listen(t, net.JoinHostPort(a.t.Addr.String(), "0"))
	port := ln.Addr().(*net.TCPAddr).Port
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	first := &http.Server{Handler: echo, Protocols: &p}
	done := make(chan struct{})
	go func() { defer close(done); first.Serve(ln) }()
	if resp, _ := get(t, l.client(true), "https://"+a.host(port)+"/"); resp.StatusCode != 200 {
		t.Fatalf("got %d", resp.StatusCode)
	}
	first.Close()
	<-done
	if resp, body := get(t, l.client(true), "https://"+a.host(port)+"/"); resp.StatusCode != 502 {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
	var p1 http.Protocols
	p1.SetHTTP1(true)
	second := &http.Server{Handler: echo, Protocols: &p1}
	ln = listen(t, net.JoinHostPort(a.t.Addr.String(), fmt.Sprint(port)))
	done = make(chan struct{})
	go func() { defer close(done); second.Serve(ln) }()
	defer func() { second.Close(); <-done }()
	if resp, body := get(t, l.client(true), "https://"+a.host(port)+"/"); resp.StatusCode != 200 {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

func TestServicesWithTLSOfTheirOwn(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(x *Target) { x.MaskHost, x.MaskOrigin = "localhost:${PORT}", true })
	cert := selfSigned(t)
	ln := listen(t, net.JoinHostPort(a.t.Addr.String(), "0"))
	port := ln.Addr().(*net.TCPAddr).Port
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			wsEcho(w, r)
			return
		}
		fmt.Fprintf(w, "sni=%s\n", r.TLS.ServerName)
		echo(w, r)
	})}
	var p http.Protocols
	p.SetHTTP1(true)
	srv.Protocols = &p
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}))
	}()
	defer func() { srv.Close(); <-done }()
	only, _ := a.only2(conversation, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})
	clear := a.raw(func(c net.Conn, br *bufio.Reader) {
		br.Peek(1)
		io.WriteString(c, "HTTP/1.0 400 Bad Request\r\n\r\n")
	})
	a.change(func(x *Target) { x.HTTPSPorts = []uint16{uint16(port), uint16(only), uint16(clear)} })
	own := "https://" + a.host(port)
	l.both(t, func(t *testing.T, c *http.Client) {
		for range 3 {
			resp, body := get(t, c, own+"/", "Origin", own)
			if resp.StatusCode != 200 || !strings.Contains(body, "sni=localhost\n") || !strings.Contains(body, fmt.Sprintf("origin=https://localhost:%d\n", port)) {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
		}
		if resp, body := get(t, c, "https://"+a.host(clear)+"/"); resp.StatusCode != 502 || !strings.Contains(body, "TLS handshake") {
			t.Errorf("a service without TLS: got %d %s", resp.StatusCode, body)
		}
	})
	t.Run("WebSocket", func(t *testing.T) {
		ws, _, err := websocket.Dial(t.Context(), "wss://"+a.host(port)+"/", &websocket.DialOptions{HTTPClient: l.client(false)})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		for _, sent := range []string{"a", strings.Repeat("b", 20<<10)} {
			if err := ws.Write(t.Context(), websocket.MessageText, []byte(sent)); err != nil {
				t.Fatal(err)
			}
			if _, got, err := ws.Read(t.Context()); err != nil || string(got) != sent {
				t.Errorf("got %d octets, %v, want %d", len(got), err, len(sent))
			}
		}
	})
	t.Run("HTTP/2 only", func(t *testing.T) {
		talk(t, l.client(true), "https://"+a.host(only)+"/", "application/connect+proto")
	})
	t.Run("a port that is not listed", func(t *testing.T) {
		a.kill()
		b := l.sandbox(idB, func(x *Target) { x.Addr = a.t.Addr })
		if resp, _ := get(t, l.client(false), "https://"+b.host(port)+"/"); resp.StatusCode < 400 {
			t.Errorf("got %d", resp.StatusCode)
		}
	})
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
