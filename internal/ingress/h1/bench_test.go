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
	"testing"
	"time"
)

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
