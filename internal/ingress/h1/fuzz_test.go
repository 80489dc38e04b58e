package h1

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"golang.org/x/net/http/httpguts"
)

// script is a connection on which a client says all it has to say at once.
type script struct {
	net.Conn // nothing else is called
	mu       sync.Mutex
	in       *bytes.Reader
	out      bytes.Buffer
	step     int // octets a read returns at most
}

func (s *script) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.in.Read(p[:min(len(p), s.step)])
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}
func (s *script) Close() error                     { return nil }
func (s *script) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (s *script) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// FuzzServeConn feeds what a stranger might send. The connection comes to an
// end; and each request that was served whole is one that net/http, reading the
// same octets, sees as the same and at the same place: nobody behind this server
// can be made to see another one.
func FuzzServeConn(f *testing.F) {
	for _, raw := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /c HTTP/1.1\nHost: b\nA: b\n\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na", "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length : 5\r\n\r\nabcde", "\x16\x03\x01", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\nabc", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
	} {
		f.Add([]byte(raw), uint16(9999), true)
	}
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n"), uint16(1), false)
	f.Fuzz(func(t *testing.T, raw []byte, step uint16, reads bool) {
		var list []seen
		s := &Server{HeaderBytes: 8 << 10, Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
			if !reads {
				r = r.Clone(r.Context())
				r.Body = http.NoBody
			}
			list = append(list, look(r))
			for _, fl := range append(Fields(r), Trailers(r)...) {
				if !httpguts.ValidHeaderFieldName(fl.Name) || !httpguts.ValidHeaderFieldValue(fl.Value) {
					t.Errorf("field %q", fl)
				}
			}
			io.WriteString(w, "x")
		})}
		c := &script{in: bytes.NewReader(raw), step: max(1, int(step))}
		over := make(chan bool)
		go func() { over <- s.ServeConn(context.Background(), c, nil) }()
		if within(t, over) {
			t.Fatal("taken over")
		}
		for _, a := range answers(c.out.String(), nil) {
			if a.Err != "" {
				t.Fatalf("malformed answers %q", c.out.String())
			}
		}
		br := bufio.NewReader(bytes.NewReader(raw))
		for _, ours := range list {
			r, err := http.ReadRequest(br)
			if err != nil {
				t.Fatalf("net/http refuses it (%v): %+v", err, ours)
			}
			sameRequest(t, r, ours, reads)
			if ours.BodyFailed {
				return
			}
			if r.Method == http.MethodPost {
				for b, err := br.Peek(1); err == nil && (b[0] == '\r' || b[0] == '\n'); b, err = br.Peek(1) {
					br.Discard(1)
				}
			}
		}
	})
}

func sameRequest(t *testing.T, r *http.Request, ours seen, reads bool) {
	t.Helper()
	if len(r.Header["Pragma"]) > 0 && r.Header["Pragma"][0] == "no-cache" {
		delete(r.Header, "Cache-Control") // it may be made up
		delete(ours.Header, "Cache-Control")
	}
	theirs := look(r)
	if theirs.BodyFailed && !ours.BodyFailed && reads {
		t.Fatalf("net/http sees no end of it: %+v", ours)
	}
	if ours.BodyFailed && !theirs.BodyFailed && theirs.Coding == nil {
		t.Fatalf("a body that is all there: %+v", ours)
	}
	if ours.BodyFailed || !reads {
		theirs.Body, ours.Body, theirs.Trailer, ours.Trailer, theirs.BodyFailed, ours.BodyFailed = "", "", nil, nil, false, false
		theirs.NoBody, ours.NoBody = false, false
	}
	if strings.Contains(theirs.Host, "\x00") {
		t.Fatal("a host with a NUL")
	}
	if diff := cmp.Diff(theirs, ours); diff != "" {
		t.Fatalf("seen (-net/http +h1):\n%s", diff)
	}
}
