package egress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// fromBytes is a source that reads b in steps of n bytes.
func fromBytes(b []byte, n int) *source {
	return &source{conn: &replay{r: &steps{b, max(n, 1)}}, pool: new(buffers), charge: func(int64) bool { return true }}
}

type steps struct {
	b []byte
	n int
}

func (s *steps) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), s.n)], s.b)
	s.b = s.b[n:]
	return n, nil
}

var errRead = errors.New("read")

// replay is a connection that only replays what was recorded.
type replay struct{ r io.Reader }

func (c *replay) Read(p []byte) (int, error)       { return c.r.Read(p) }
func (c *replay) Write(p []byte) (int, error)      { return len(p), nil }
func (c *replay) Close() error                     { return nil }
func (c *replay) LocalAddr() net.Addr              { return nil }
func (c *replay) RemoteAddr() net.Addr             { return nil }
func (c *replay) SetDeadline(time.Time) error      { return nil }
func (c *replay) SetReadDeadline(time.Time) error  { return nil }
func (c *replay) SetWriteDeadline(time.Time) error { return nil }

// FuzzClientHello asks crypto/tls for a second opinion: a hello that two
// implementations read differently is one an upstream may read differently too.
func FuzzClientHello(f *testing.F) {
	a := []byte("a.example")
	f.Add(hello{names: [][]byte{a}}.records(), 1)
	f.Add(hello{names: [][]byte{a, a}}.records(), 7)
	f.Add(hello{noSNI: true}.records(), 100)
	f.Add(reframe(hello{names: [][]byte{a}}.records(), 3), 5)
	f.Add(realHello(f, "www.example.com"), 4096)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		name, _, err := readHello(fromBytes(b, step))
		again, _, errAgain := readHello(fromBytes(b, 1+step/2))
		if name != again || (err == nil) != (errAgain == nil) {
			t.Fatalf("%q, %v in one split and %q, %v in another", name, err, again, errAgain)
		}
		if err != nil {
			return
		}
		if got, ok := policy.CanonicalName(name); name != "" && (!ok || got != name) {
			t.Fatalf("name %q is not canonical", name)
		}
		// What a TLS server reads from the same bytes is what was judged.
		var seen string
		srv := tls.Server(&replay{r: bytes.NewReader(b)}, &tls.Config{GetConfigForClient: func(hi *tls.ClientHelloInfo) (*tls.Config, error) {
			seen = hi.ServerName
			return nil, errRead
		}})
		_ = srv.HandshakeContext(context.Background())
		if canonical, _ := policy.CanonicalName(seen); seen != "" && canonical != name {
			t.Fatalf("judged %q, a server reads %q", name, seen)
		}
	})
}

// realHello is what crypto/tls sends as a client.
func realHello(t testing.TB, name string) []byte {
	t.Helper()
	var sent bytes.Buffer
	c := tls.Client(&recording{&replay{r: strings.NewReader("")}, &sent}, clientConfig(name))
	_ = c.HandshakeContext(context.Background())
	return sent.Bytes()
}

type recording struct {
	*replay
	w io.Writer
}

func (c *recording) Write(p []byte) (int, error) { return c.w.Write(p) }

func FuzzRequestHead(f *testing.F) {
	for _, tt := range badHTTP {
		if len(tt.sent) < 500 {
			f.Add([]byte(tt.sent))
		}
	}
	f.Add([]byte(lines("GET http://a.example:80/x?y HTTP/1.1", "Host:a.example", "Connection: Upgrade", "Upgrade: websocket")))
	f.Add([]byte(lines("POST / HTTP/1.1", "Host: [2606:4700::1]:80", "Content-Length: 10")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var scan headScanner
		n, err := scan.scan(b)
		if err != nil || n == 0 {
			return
		}
		var q request
		if q.parse(b[:n], 80) != nil {
			return
		}
		if name, ok := policy.CanonicalName(q.name); q.name != "" && (!ok || name != q.name) {
			t.Fatalf("name %q is not canonical", q.name)
		}
		// What is written says the same to this parser …
		out := q.appendTo(nil)
		scan = headScanner{}
		if n, err := scan.scan(out); n != len(out) || err != nil {
			t.Fatalf("%q written as %q ends at %d, %v", b, out, n, err)
		}
		var again request
		if err := again.parse(out, 80); err != nil {
			t.Fatalf("%q written as %q: %v", b, out, err)
		}
		if again.name != q.name || again.port != q.port || again.length != q.length || again.chunked != q.chunked || again.upgrade != q.upgrade || again.close != q.close {
			t.Fatalf("%q written as %q says %+v, not %+v", b, out, again, q)
		}
		// … and to net/http, wherever that accepts it.
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(out)))
		if err != nil {
			return
		}
		host, _, err := parseHost(r.Host, 80)
		if q.name != "" && (err != nil || host != q.name) {
			t.Fatalf("judged %q, a server reads %q", q.name, r.Host)
		}
		if want := q.length; !q.chunked && r.ContentLength != want || q.chunked && (len(r.TransferEncoding) != 1 || r.ContentLength != -1) {
			t.Fatalf("judged a body of %d (chunked %v), a server reads %d %v", q.length, q.chunked, r.ContentLength, r.TransferEncoding)
		}
	})
}

func FuzzChunkedBody(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\n"), 3)
	f.Add([]byte("5;x=y\r\nhello\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n"), 1)
	f.Add([]byte("a\r\n0123456789\r\n00\r\n\r\n"), 100)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		var whole, split chunkScanner
		n, done, err := whole.scan(b)
		total, doneSplit := 0, false
		var errSplit error
		for rest := b; len(rest) > 0 && !doneSplit && errSplit == nil; {
			var m int
			piece := rest[:min(len(rest), max(step, 1))]
			m, doneSplit, errSplit = split.scan(piece)
			total += m
			rest = rest[m:]
		}
		if n != total || done != doneSplit || (err == nil) != (errSplit == nil) {
			t.Fatalf("%d %v %v at once, %d %v %v in steps", n, done, err, total, doneSplit, errSplit)
		}
		if !done {
			return
		}
		// net/http must find the same end.
		br := bufio.NewReader(io.MultiReader(strings.NewReader("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), bytes.NewReader(b)))
		r, err := http.ReadRequest(br)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		left, _ := io.ReadAll(br)
		if len(left) != len(b)-n {
			t.Fatalf("%q ends at %d, for a server at %d", b, n, len(b)-len(left))
		}
	})
}

func FuzzResponseHead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"))
	f.Add([]byte("HTTP/1.0 304\r\nTransfer-Encoding: chunked\r\nConnection: close, x\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\nA: b\n c\nContent-Length : 5\n\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\nTransfer-Encoding: chunked\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var scan lineScanner
		n := scan.scan(b)
		if n == 0 {
			return
		}
		var s response
		if s.parse(b[:n]) != nil && s.parseLeniently(b[:n]) != nil {
			return
		}
		out := b[:n]
		if len(s.head) > 0 {
			out = s.head
		}
		// What is passed on has one reading: this parser's strict one …
		var again response
		if err := again.parse(out); err != nil || again.status != s.status || again.length != s.length || again.chunked != s.chunked || again.close != s.close {
			t.Fatalf("%q written as %q is %+v (%v), not %+v", b[:n], out, again, err, s)
		}
		if s.status < 0 || s.status > 999 || s.chunked && s.length >= 0 {
			t.Fatalf("%q read as %+v", b[:n], s)
		}
		// … and that of net/http, wherever it takes it.
		r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(out)), nil)
		if err != nil || s.status < 200 || s.bodyless(false) || s.chunked && s.close {
			return
		}
		if chunked := len(r.TransferEncoding) > 0; chunked != s.chunked || !chunked && r.ContentLength != s.length {
			t.Fatalf("%q: a body of %d (chunked %v), for a client %d %v", out, s.length, s.chunked, r.ContentLength, r.TransferEncoding)
		}
	})
}

func TestParseHostAgreesWithItself(t *testing.T) {
	for _, tt := range []struct {
		in, name string
		port     uint16
		bad      bool
	}{
		{"", "", 80, false}, {"a.example", "a.example", 80, false}, {"A.example.:8080", "a.example", 8080, false}, {"1.2.3.4:80", "", 80, false},
		{"[::1]", "", 80, false}, {"[::1]:81", "", 81, false}, {"::1", "", 0, true}, {"[::1%lo]", "", 0, true}, {"[1.2.3.4]", "", 0, true}, {"[]", "", 0, true}, {"]", "", 0, true}, {"a]", "", 0, true},
		{":", "", 0, true}, {"a:0", "", 0, true}, {"a:65536", "", 0, true}, {"a:00080", "a", 80, false},
	} {
		name, port, err := parseHost(tt.in, 80)
		if name != tt.name || (err != nil) != tt.bad || !tt.bad && port != tt.port {
			t.Errorf("%q: got %q %d %v", tt.in, name, port, err)
		}
	}
}
