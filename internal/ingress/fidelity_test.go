package ingress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// framed is a client that writes HTTP/2 frames by hand.
type framed struct {
	*http2.Framer
	conn net.Conn
	head bytes.Buffer
	enc  *hpack.Encoder
}

func (l *lab) framed(t testing.TB) *framed {
	t.Helper()
	c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: domain, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	f := &framed{Framer: http2.NewFramer(c, c), conn: c}
	f.enc = hpack.NewEncoder(&f.head)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	io.WriteString(c, http2.ClientPreface)
	f.WriteSettings()
	return f
}

// block encodes a header; the names are as they are on the wire.
func (f *framed) block(fields ...string) []byte {
	f.head.Reset()
	for i := 0; i < len(fields); i += 2 {
		f.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return f.head.Bytes()
}

// status reads frames up to the answer's head on the stream.
func (f *framed) status(t testing.TB, stream uint32) string {
	t.Helper()
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch fr := fr.(type) {
		case *http2.MetaHeadersFrame:
			if fr.StreamID == stream {
				return fr.PseudoValue("status")
			}
		case *http2.RSTStreamFrame:
			t.Fatalf("stream reset: %v", fr.ErrCode)
		}
	}
}

// TestRequestsArriveAsSent compares what a service reads off its connection with
// what clients of both protocols sent. Names arrive in canonical case, and fields of
// one name in their order.
func TestRequestsArriveAsSent(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	heads := make(chan []string, 1)
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		for {
			var head []string
			for {
				line, err := br.ReadString('\n')
				if err != nil {
					return
				}
				if line = strings.TrimSuffix(line, "\r\n"); line == "" {
					break
				}
				head = append(head, line)
			}
			heads <- head
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	})
	secure := func() *tls.Conn {
		c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: a.host(port), NextProtos: []string{"http/1.1"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	h1, h2, stream := secure(), l.framed(t), uint32(1)
	for name, target := range map[string]string{
		"semicolons in a query":            "/?a=1;b=2&c;d",
		"escapes that are none in a query": "/?100%&%zz=%&%",
		"escapes of every kind":            "/a%2Fb%2fc/%7E~%E2%82%AC?x=%2B+%20",
		"empty pairs":                      "/?&&=&a==b&?",
		"unusual bytes in a query":         "/?q=\"<>[]{}|^`\\'\xff\xe2\x82\xac",
		"unusual bytes in a path":          "//a//../.;x=1/[b]|^`{}'\"\xff",
		"our parameter of a public port":   "/?cordon_token=x&y",
	} {
		t.Run(name, func(t *testing.T) {
			for proto, send := range map[string]func(){
				"h1": func() {
					fmt.Fprintf(h1, "GET %s HTTP/1.1\r\nHost: %s\r\nx-lower: 1\r\nX-Many: b\r\nx-many: a\r\nX-Many: c, d\r\nX-Empty:\r\nX-Latin: \xe9\r\n\r\n", target, a.host(port))
					h1.SetReadDeadline(time.Now().Add(5 * time.Second))
					if resp, err := http.ReadResponse(bufio.NewReader(h1), nil); err != nil || resp.StatusCode != 204 {
						t.Fatal(resp, err)
					}
				},
				"h2": func() {
					h2.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, EndStream: true, EndHeaders: true, BlockFragment: h2.block(
						":method", "GET", ":scheme", "https", ":authority", a.host(port), ":path", target,
						"x-lower", "1", "x-many", "b", "x-many", "a", "x-many", "c, d", "x-empty", "", "x-latin", "\xe9")})
					if s := h2.status(t, stream); s != "204" {
						t.Fatal(s)
					}
					stream += 2
				},
			} {
				send()
				got := <-heads
				if got[0] != "GET "+target+" HTTP/1.1" {
					t.Errorf("%s: the request line is %q", proto, got[0])
				}
				want := []string{"X-Empty: ", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Latin: \xe9", "X-Lower: 1", "X-Many: b", "X-Many: a", "X-Many: c, d"}
				got = byName(got, func(name string) string { return name })
				got = slices.DeleteFunc(got, func(line string) bool { return !strings.HasPrefix(line, "X-") })
				if !slices.Equal(got, want) {
					t.Errorf("%s: the header is %q, want %q", proto, got, want)
				}
			}
		})
	}
}

// TestAnswersArriveAsSent: what is peculiar about an answer reaches clients of both protocols.
func TestAnswersArriveAsSent(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	answer := func(text string) int {
		return a.raw(func(c net.Conn, br *bufio.Reader) {
			for {
				if _, err := http.ReadRequest(br); err != nil {
					return
				}
				io.WriteString(c, text)
			}
		})
	}
	for name, c := range map[string]struct {
		method, text string
		check        func(r *http.Response, body string) bool
	}{
		"HEAD keeps the length of what is not sent": {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n",
			func(r *http.Response, body string) bool { return r.ContentLength == 12345 && body == "" }},
		"304 has no body and keeps its validators": {"GET", "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 7\r\n\r\n",
			func(r *http.Response, body string) bool {
				return r.StatusCode == 304 && r.Header.Get("ETag") == `"x"` && body == ""
			}},
		"204 has no body": {"DELETE", "HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
			func(r *http.Response, body string) bool {
				return r.StatusCode == 204 && r.Header.Get("X-A") == "1" && body == ""
			}},
		"fields of one name stay apart and in order": {"GET", "HTTP/1.1 200 OK\r\nset-cookie: b=1\r\nSet-Cookie: a=2\r\nContent-Length: 0\r\n\r\n",
			func(r *http.Response, _ string) bool {
				return slices.Equal(r.Header["Set-Cookie"], []string{"b=1", "a=2"})
			}},
		"no type is guessed": {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
			func(r *http.Response, body string) bool { return r.Header["Content-Type"] == nil && body == "<html>" }},
		"an encoding is left alone": {"GET", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x00\x00",
			func(r *http.Response, body string) bool {
				return r.Header.Get("Content-Encoding") == "gzip" && body == "\x1f\x8b\x00\x00"
			}},
		"an unknown status passes": {"GET", "HTTP/1.1 799 Whatever\r\nContent-Length: 0\r\n\r\n",
			func(r *http.Response, _ string) bool { return r.StatusCode == 799 }},
		"chunks and their extensions are a body": {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\n\r\n",
			func(_ *http.Response, body string) bool { return body == "abc" }},
	} {
		t.Run(name, func(t *testing.T) {
			port := answer(c.text)
			l.both(t, func(t *testing.T, client *http.Client) {
				req, _ := http.NewRequest(c.method, "https://"+a.host(port)+"/", nil)
				if resp, body := do(t, client, req); !c.check(resp, body) {
					t.Errorf("got %d %v %q", resp.StatusCode, resp.Header, body)
				}
			})
		})
	}
}

// TestHTTP2Floods: a client that abuses the protocol loses its connection, or at
// least gains nothing by it, while others are served.
func TestHTTP2Floods(t *testing.T) {
	var busy, most atomic.Int64
	l := newLab(t, func(c *Config) { c.Limits.StreamsPerConn = 20 })
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			n := busy.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			defer busy.Add(-1)
			time.Sleep(50 * time.Millisecond)
		}
	}))
	served := func(t *testing.T) {
		t.Helper()
		if resp, _ := get(t, l.client(true), "https://"+a.host(port)+"/"); resp.StatusCode != 200 {
			t.Errorf("others get %d", resp.StatusCode)
		}
	}
	request := []string{":method", "GET", ":scheme", "https", ":authority", a.host(port), ":path", "/slow"}
	t.Run("streams reset as soon as they are opened", func(t *testing.T) {
		f := l.framed(t)
		go func() { // what the server says is not of interest, but must not block it
			io.Copy(io.Discard, f.conn)
		}()
		for i := range uint32(5000) {
			err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, EndStream: true, EndHeaders: true, BlockFragment: f.block(request...)})
			if err == nil {
				err = f.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
			}
			if err != nil {
				break // the server had enough
			}
		}
		served(t)
		eventually(t, "the requests to end", func() bool { return l.in.underway() == 0 })
		if n := most.Load(); n > 60 {
			t.Errorf("%d requests reached the service at a time", n)
		}
	})
	t.Run("a header that never ends", func(t *testing.T) {
		f := l.framed(t)
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.block(request...)})
		piece := f.block("x-"+strings.Repeat("y", 1000), strings.Repeat("z", 14<<10))
		piece = slices.Clone(piece)
		sent := 0
		for ; sent < 64<<20; sent += len(piece) {
			if err := f.WriteContinuation(1, false, piece); err != nil {
				break
			}
		}
		if sent >= 64<<20 {
			t.Error("64 MiB of header were taken")
		}
		served(t)
	})
	t.Run("more streams than allowed are refused", func(t *testing.T) {
		f := l.framed(t)
		for i := range uint32(40) {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, EndStream: true, EndHeaders: true, BlockFragment: f.block(request...)})
		}
		for {
			fr, err := f.ReadFrame()
			if err != nil {
				t.Fatalf("no stream was refused: %v", err)
			}
			if r, ok := fr.(*http2.RSTStreamFrame); ok && r.ErrCode == http2.ErrCodeRefusedStream {
				break
			}
			if _, ok := fr.(*http2.GoAwayFrame); ok {
				break
			}
		}
		served(t)
	})
}
