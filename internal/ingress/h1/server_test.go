package h1

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/google/go-cmp/cmp"
)

// pipe serves one end of a pipe and returns the other, and what ServeConn returns.
func pipe(t *testing.T, s *Server) (net.Conn, <-chan bool) {
	t.Helper()
	client, server := net.Pipe()
	over := make(chan bool, 1)
	go func() { over <- s.ServeConn(context.Background(), server, nil) }()
	t.Cleanup(func() { client.Close() })
	return client, over
}

// wire removes what changes from run to run.
func wire(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, "Date: ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func TestFieldsAsTheyCameAndWent(t *testing.T) {
	const sent = "POST /a HTTP/1.1\r\nx-CuStOm: 1\r\nhOsT: h\r\nX-custom: 2\r\nX-a: 3\r\nCOOKIE: c\r\nx-A: 4\r\ntransfer-Encoding: Chunked\r\nX-a: 5\r\ntrailer: x-sum\r\n\r\n" +
		"3\r\nabc\r\n0\r\nx-SUM: 6\r\nX-sum: 7\r\nOther: 8\r\n\r\n"
	var fields, before, after []Field
	h := func(w http.ResponseWriter, r *http.Request) {
		fields, before = Fields(r.WithContext(context.WithoutCancel(r.Context()))), Trailers(r)
		io.Copy(io.Discard, r.Body)
		after = Trailers(r)
		fw := w.(FieldWriter)
		fw.WriteTrailers([]Field{{"lost", "overwritten below"}})
		fw.WriteFields(103, []Field{{"lINK", "</a>"}, {"Content-Length", "9"}})
		fw.WriteFields(200, []Field{{"z-First", "1"}, {"SET-cookie", "a"}, {"date", "then"}, {"Z-first", "2"}, {"set-COOKIE", "b"}, {"transfer-encoding", "gzip"}, {"trailer", "x-end"}, {"bad name", "x"}, {"a", "b\r\nInjected: x"}})
		fw.WriteFields(500, nil) // too late
		io.WriteString(w, "<html>")
		fw.WriteTrailers([]Field{{"x-END", "1"}, {"X-end", "2"}, {"Content-Length", "3"}})
	}
	c := listen(t, &Server{Handler: handle(h)})()
	got := converse(t, c, sent)
	want := "HTTP/1.1 103 Early Hints\r\nlINK: </a>\r\n\r\n" +
		"HTTP/1.1 200 OK\r\nz-First: 1\r\nSET-cookie: a\r\ndate: then\r\nZ-first: 2\r\nset-COOKIE: b\r\ntrailer: x-end\r\na: b  Injected: x\r\nTransfer-Encoding: chunked\r\n\r\n" +
		"6\r\n<html>\r\n0\r\nx-END: 1\r\nX-end: 2\r\n\r\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Field{{"x-CuStOm", "1"}, {"hOsT", "h"}, {"X-custom", "2"}, {"X-a", "3"}, {"COOKIE", "c"}, {"x-A", "4"}, {"transfer-Encoding", "Chunked"}, {"X-a", "5"}, {"trailer", "x-sum"}}, fields); diff != "" {
		t.Error(diff)
	}
	if before != nil {
		t.Errorf("a trailer before the end: %v", before)
	}
	if diff := cmp.Diff([]Field{{"x-SUM", "6"}, {"X-sum", "7"}, {"Other", "8"}}, after); diff != "" {
		t.Error(diff)
	}
	if r, _ := http.NewRequest("GET", "/", nil); Fields(r) != nil || Trailers(r) != nil {
		t.Error("a request from elsewhere has fields")
	}
}

func TestWriteFieldsFraming(t *testing.T) {
	for name, c := range map[string]struct {
		method, body string
		status       int
		fields       []Field
		trailers     []Field
		want         string
	}{
		"a length in its place":             {"GET", "abc", 200, []Field{{"A", "1"}, {"content-length", "3"}, {"B", "2"}}, nil, "HTTP/1.1 200 OK\r\nA: 1\r\ncontent-length: 3\r\nB: 2\r\n\r\nabc"},
		"no length":                         {"GET", "abc", 200, []Field{{"a", "1"}}, nil, "HTTP/1.1 200 OK\r\na: 1\r\nContent-Length: 3\r\n\r\nabc"},
		"two lengths":                       {"GET", "abc", 200, []Field{{"Content-Length", "3"}, {"Content-Length", "3"}}, nil, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"},
		"a trailer nobody announced":        {"GET", "abc", 200, nil, []Field{{"x-T", "1"}}, "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-T: 1\r\n\r\n"},
		"a trailer of a body with a length": {"GET", "abc", 200, []Field{{"Content-Length", "3"}}, []Field{{"x-T", "1"}}, "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"},
		"a HEAD's length":                   {"HEAD", "", 200, []Field{{"Content-Length", "3"}}, nil, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"},
		"not modified, as it was sent":      {"GET", "", 304, []Field{{"content-TYPE", "t"}, {"Content-Length", "3"}}, nil, "HTTP/1.1 304 Not Modified\r\ncontent-TYPE: t\r\nContent-Length: 3\r\n\r\n"},
		"no content has no length":          {"GET", "", 204, []Field{{"Content-Length", "3"}}, nil, "HTTP/1.1 204 No Content\r\n\r\n"},
		"close":                             {"GET", "", 204, []Field{{"connection", "Close"}}, nil, "HTTP/1.1 204 No Content\r\nConnection: Close\r\n\r\n"},
		"a switch of protocols":             {"GET", "", 101, []Field{{"upgrade", "x"}, {"CONNECTION", "upgrade"}}, nil, "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nCONNECTION: upgrade\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			connect := listen(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
				fw := w.(FieldWriter)
				if c.trailers != nil {
					fw.WriteTrailers(c.trailers)
					fw.WriteFields(103, nil) // changes nothing about the answer to come
				}
				fw.WriteFields(c.status, c.fields)
				io.WriteString(w, c.body)
			})})
			got := wire(converse(t, connect(), c.method+" / HTTP/1.1\r\n"+host+"\r\n"))
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPipelinedRequestsAreServedInOrder(t *testing.T) {
	var raw, want strings.Builder
	for i := range 200 {
		body := strings.Repeat("x", i*7)
		fmt.Fprintf(&raw, "POST /%d HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s", i, host, len(body), body)
		answer := fmt.Sprintf("/%d %d", i, len(body))
		fmt.Fprintf(&want, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n%s", len(answer), answer)
	}
	connect := listen(t, &Server{Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if strings.HasSuffix(r.URL.Path, "9") {
			time.Sleep(3 * watchDelay / 2) // somebody looks after the client, and must not lose what it says
		}
		fmt.Fprintf(w, "%s %d", r.URL, len(b))
	})})
	for name, size := range map[string]int{"at once": 1 << 20, "in pieces of 97": 97} {
		t.Run(name, func(t *testing.T) {
			c := connect()
			go func() {
				for b := []byte(raw.String()); len(b) > 0; b = b[min(size, len(b)):] {
					c.Write(b[:min(size, len(b))])
				}
				c.CloseWrite()
			}()
			out, err := io.ReadAll(c)
			if err != nil {
				t.Fatal(err)
			}
			if got := wire(string(out)); got != want.String() {
				t.Errorf("got %d octets, want %d: %.300q", len(got), want.Len(), got)
			}
		})
	}
}

func TestOctetsOneByOne(t *testing.T) {
	raw := "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\nA: b\r\n\r\nGET /b HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"
	c, over := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %v %v", r.URL, b, err, r.Trailer)
	})})
	go func() {
		for i := range len(raw) {
			io.WriteString(c, raw[i:i+1])
		}
	}()
	out, err := io.ReadAll(c)
	if got := string(out); err != nil || !strings.Contains(got, "/a abcd <nil> map[A:[b]]") || !strings.HasSuffix(got, "/b  <nil> map[]") {
		t.Errorf("%q, %v", got, err)
	}
	if within(t, over) {
		t.Error("taken over")
	}
}

func TestContinueIsSaidWhenTheBodyIsRead(t *testing.T) {
	read := make(chan bool, 1)
	c, _ := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(103)
		if <-read {
			b, _ := io.ReadAll(r.Body)
			w.Write(b)
		}
	})})
	br := bufio.NewReader(c)
	ask := "PUT / HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
	line := func() string {
		s, err := br.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		br.ReadString('\n')
		return s
	}
	io.WriteString(c, ask)
	if got := line(); got != "HTTP/1.1 103 Early Hints\r\n" {
		t.Errorf("got %q", got)
	}
	read <- true
	if got := line(); got != "HTTP/1.1 100 Continue\r\n" {
		t.Errorf("got %q", got)
	}
	io.WriteString(c, "a") // read alone, and then no second time to continue
	io.WriteString(c, "bc")
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(resp.Body); string(b) != "abc" || resp.Close {
		t.Errorf("%q, close %v", b, resp.Close)
	}
	io.WriteString(c, ask)
	line()
	read <- false
	resp, err = http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 200 || !resp.Close {
		t.Errorf("unread: %+v, %v", resp, err)
	}
}

func TestSlowClients(t *testing.T) {
	for name, c := range map[string]struct {
		first string // sent at once
		part  string // sent 7 s later
		want  string // the first line of the last answer
		after time.Duration
	}{
		"who says nothing":                     {"", "", "", 10 * time.Second},
		"who stops in the first head":          {"GET / HTTP/1.1\r\nHo", "", "HTTP/1.1 408 Request Timeout", 10 * time.Second},
		"who trickles it":                      {"GET / HTTP/1.1\r\nHo", "st: a", "HTTP/1.1 408 Request Timeout", 10 * time.Second},
		"who is slow but in time":              {"GET / HTTP/1.1\r\nHo", "st: a\r\n\r\n", "HTTP/1.1 200 OK", 7*time.Second + 60*time.Second},
		"who says nothing again":               {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "", "HTTP/1.1 200 OK", 60 * time.Second},
		"who stops in the second head":         {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HT", "HTTP/1.1 408 Request Timeout", 17 * time.Second},
		"who ends a POST with a line too many": {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na\r\n", "", "HTTP/1.1 200 OK", 60 * time.Second},
		"who stops in a head that came early":  {"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT", "", "HTTP/1.1 408 Request Timeout", 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn, over := pipe(t, &Server{HeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, Log: quiet(t), Handler: handle(func(http.ResponseWriter, *http.Request) {})})
				start := time.Now()
				var out bytes.Buffer
				go func() {
					for _, part := range []string{c.first, c.part} {
						if part != "" { // or the pipe's reader would read nothing
							io.WriteString(conn, part)
						}
						time.Sleep(7 * time.Second)
					}
				}()
				io.Copy(&out, conn)
				<-over
				if took := time.Since(start); took < c.after || took > c.after+c.after/16 {
					t.Errorf("it took %v, want %v", took, c.after)
				}
				lines := strings.Split(out.String(), "\r\n")
				last := ""
				for _, l := range lines {
					if strings.HasPrefix(l, "HTTP/") {
						last = l
					}
				}
				if last != c.want {
					t.Errorf("got %q, want %q", out.String(), c.want)
				}
				time.Sleep(time.Minute) // the sender's end
			})
		})
	}
}

// A body may take as long as the handler likes; only the head has a deadline.
func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := pipe(t, &Server{HeaderTimeout: time.Second, IdleTimeout: time.Second, Handler: handle(func(w http.ResponseWriter, r *http.Request) {
			b, err := io.ReadAll(r.Body)
			time.Sleep(time.Hour)
			fmt.Fprintf(w, "%s %v %v", b, err, r.Context().Err())
		})})
		go func() {
			io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Content-Length: 2\r\nConnection: close\r\n\r\na")
			time.Sleep(time.Hour)
			io.WriteString(c, "b")
		}()
		out, _ := io.ReadAll(c)
		if got := string(out); !strings.HasSuffix(got, "ab <nil> <nil>") {
			t.Errorf("%q", got)
		}
	})
}

// The deadline of the head, or of the time between requests, is over then.
func TestSlowHandlerKeepsItsClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, over := pipe(t, &Server{HeaderTimeout: time.Second, IdleTimeout: time.Second, Handler: handle(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Hour)
			fmt.Fprint(w, r.Context().Err())
		})})
		br := bufio.NewReader(c)
		for range 2 {
			io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n")
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := io.ReadAll(resp.Body); string(b) != "<nil>" || resp.Close {
				t.Errorf("%q, close %v", b, resp.Close)
			}
		}
		c.Close()
		<-over
	})
}

func TestOtherProtocolsAreToldAtOnce(t *testing.T) {
	for name, raw := range map[string]string{"TLS": "\x16\x03\x01\x02\x00\x01", "SSH": "SSH-2.0-x\r\n", "an empty line": "\r\n", "half of HTTP/2": "PRI * HTTP/2.0\r\n"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, over := pipe(t, &Server{Handler: handle(nil)})
				start := time.Now()
				go io.WriteString(c, raw)
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil || !resp.Close || resp.StatusCode != 400 && resp.StatusCode != 505 {
					t.Errorf("%+v, %v", resp, err)
				}
				if took := time.Since(start); took > 0 {
					t.Errorf("after %v", took)
				}
				c.Close()
				<-over
			})
		})
	}
}

func TestIdleConnectionsHoldNoBuffers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "x") })}
		c, over := pipe(t, s)
		check := func(when string) {
			t.Helper()
			synctest.Wait()
			for conn := range s.conns {
				if conn.bufs != nil {
					t.Errorf("buffers %s", when)
				}
			}
			if len(s.conns) != 1 {
				t.Errorf("%d connections", len(s.conns))
			}
		}
		check("before a request")
		go io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		check("after a request")
		c.Close()
		<-over
		if len(s.conns) != 0 {
			t.Error("it is not forgotten")
		}
	})
}

func TestIdleConnectionsHoldNoRequest(t *testing.T) {
	var last weak.Pointer[http.Request]
	connect := listen(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		last = weak.Make(r)
	})})
	c := connect()
	io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Content-Length: 1\r\n\r\na")
	if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); last.Value() != nil; runtime.GC() {
		if time.Now().After(deadline) {
			t.Fatal("the request is held")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestHijackHandsOverWhatCameEarly(t *testing.T) {
	for name, wait := range map[string]time.Duration{"at once": 0, "when somebody already looks after the client": 3 * watchDelay} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { hijackAfter(t, wait) }) })
	}
}

func hijackAfter(t *testing.T, wait time.Duration) {
	s := &Server{HeaderTimeout: time.Second, Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(wait)
		nc, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		if _, _, err := w.(http.Hijacker).Hijack(); !errors.Is(err, http.ErrHijacked) {
			t.Errorf("a second time: %v", err)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, http.ErrHijacked) {
			t.Errorf("Write: %v", err)
		}
		w.WriteHeader(500)
		w.(http.Flusher).Flush()
		go func() {
			defer nc.Close()
			rw.WriteString("HTTP/1.1 101 Switching Protocols\r\n\r\n")
			rw.Flush()
			io.Copy(nc, rw)
		}()
	})}
	c, over := pipe(t, s)
	early := strings.Repeat("early ", 100)
	go func() {
		io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n"+early)
		time.Sleep(time.Hour) // no deadline of the server's is left
		io.WriteString(c, "late")
	}()
	if !within(t, over) {
		t.Error("not taken over")
	}
	if err := s.Shutdown(t.Context()); err != nil { // it is not the server's any more
		t.Error(err)
	}
	want := "HTTP/1.1 101 Switching Protocols\r\n\r\n" + early + "late"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
}

func TestClientGone(t *testing.T) {
	for name, raw := range map[string]string{
		"after a request without a body": "GET / HTTP/1.1\r\n" + host + "\r\n",
		"after a body":                   "POST / HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\na",
		"after chunks":                   "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
		"in a body":                      "POST / HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\na",
	} {
		t.Run(name, func(t *testing.T) {
			gone := make(chan error, 1)
			c, over := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				select {
				case <-r.Context().Done():
					gone <- nil
				case <-time.After(10 * time.Second):
					gone <- errors.New("the handler is not told")
				}
			})})
			io.WriteString(c, raw)
			c.Close()
			if err := within(t, gone); err != nil {
				t.Error(err)
			}
			within(t, over)
		})
	}
}

func TestClientGoneWhileItIsWrittenTo(t *testing.T) {
	c, over := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			w.Write(make([]byte, 10000))
		}
	})})
	go io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
	io.ReadFull(c, make([]byte, 100))
	c.Close()
	within(t, over)
}

// What a client sends while its request is served is the next request, not the
// end of this one.
func TestClientThatPipelinesLateIsNotGone(t *testing.T) {
	entered := make(chan bool)
	c, _ := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/1" {
			entered <- true
			<-entered
		}
		fmt.Fprintf(w, "%s %v", r.URL, r.Context().Err())
	})})
	io.WriteString(c, "GET /1 HTTP/1.1\r\n"+host+"\r\n")
	<-entered
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		io.WriteString(c, "GET /2 HTTP/1.1\r\n"+host+"Connection: close\r\n\r\n")
	}()
	time.Sleep(3 * watchDelay)
	entered <- true
	out, _ := io.ReadAll(c)
	<-sent
	if got := string(out); !strings.Contains(got, "/1 <nil>") || !strings.HasSuffix(got, "/2 <nil>") {
		t.Errorf("%q", got)
	}
}

func TestShutdown(t *testing.T) { synctest.Test(t, shutdown) }

func shutdown(t *testing.T) {
	entered, leave := make(chan bool), make(chan bool)
	s := &Server{Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			entered <- true
			<-leave
		case "/said": // too early to say that the connection will be closed
			w.Header().Set("Content-Length", "4")
			io.WriteString(w, "done")
			w.(http.Flusher).Flush()
			entered <- true
			<-leave
			return
		}
		io.WriteString(w, "done")
	})}
	fresh, freshOver := pipe(t, s)
	kept, keptOver := pipe(t, s)
	busy, busyOver := pipe(t, s)
	said, saidOver := pipe(t, s)
	go io.WriteString(kept, "GET / HTTP/1.1\r\n"+host+"\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(kept), nil)
	if err != nil || resp.Close {
		t.Fatalf("%+v, %v", resp, err)
	}
	io.Copy(io.Discard, resp.Body)
	io.WriteString(busy, "GET /slow HTTP/1.1\r\n"+host+"\r\n")
	<-entered
	go io.WriteString(said, "GET /said HTTP/1.1\r\n"+host+"\r\n")
	if resp, err = http.ReadResponse(bufio.NewReader(said), nil); err != nil || resp.Close {
		t.Fatalf("%+v, %v", resp, err)
	}
	<-entered
	synctest.Wait() // until those that are idle wait for a request
	start := time.Now()

	hasty, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(hasty); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a request under way: %v", err)
	}
	for _, c := range []net.Conn{fresh, kept} {
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("an idle connection reads %d, %v", n, err)
		}
	}
	within(t, freshOver)
	within(t, keptOver)
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(t.Context()) }()
	synctest.Wait() // until it has seen that both are busy
	leave <- true
	leave <- true
	resp, err = http.ReadResponse(bufio.NewReader(busy), nil)
	if err != nil || !resp.Close {
		t.Errorf("%+v, %v", resp, err)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != "done" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	within(t, busyOver)
	within(t, saidOver)
	if took := time.Since(start); took > 20*time.Millisecond {
		t.Errorf("after %v", took)
	}
	if err := within(t, down); err != nil {
		t.Error(err)
	}
	late, lateOver := pipe(t, s)
	if _, err := late.Read(make([]byte, 1)); err == nil || within(t, lateOver) {
		t.Error("a connection is served after Shutdown")
	}
}

// However a connection goes from idle to busy and back while the server is shut
// down, it ends; and no answer is cut.
func TestShutdownBetweenRequests(t *testing.T) {
	for range 20 {
		s := &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "whole") })}
		connect := listen(t, s)
		var clients sync.WaitGroup
		for range 20 {
			c := connect()
			clients.Go(func() {
				br := bufio.NewReader(c)
				for {
					io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n")
					resp, err := http.ReadResponse(br, nil)
					if err != nil {
						return
					}
					if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "whole" {
						t.Errorf("%q, %v", b, err)
					}
				}
			})
		}
		time.Sleep(2 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := s.Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		clients.Wait()
	}
}

func TestCloseEndsRequests(t *testing.T) {
	entered := make(chan bool)
	s := &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		entered <- true
		<-r.Context().Done()
	})}
	c, over := pipe(t, s)
	io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n")
	<-entered
	s.Close()
	within(t, over)
}

func TestPanics(t *testing.T) {
	var log bytes.Buffer
	s := &Server{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelInfo}))}
	for path, c := range map[string]struct {
		value any
		want  string
	}{"/abort": {http.ErrAbortHandler, ""}, "/panic": {"eek", "TestPanics"}} {
		s.Handler = handle(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "x")
			panic(c.value)
		})
		conn, over := pipe(t, s)
		go io.WriteString(conn, "POST "+path+" HTTP/1.1\r\n"+host+"Content-Length: 9\r\n\r\na")
		if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
			t.Errorf("%s: %q, %v", path, b, err)
		}
		within(t, over)
		if got := log.String(); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s logged %q", path, got)
		}
		log.Reset()
	}
}

// testing.T.FailNow does it.
func TestHandlerThatEndsItsGoroutine(t *testing.T) {
	c, _ := pipe(t, &Server{Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "x")
		runtime.Goexit()
	})})
	go io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n")
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
}

// Reading a record of TLS is broken off and taken up again.
func TestOverTLS(t *testing.T) {
	served := make(chan bool, 1)
	gone := make(chan error, 1)
	s := &Server{Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || r.TLS.ServerName != "name" {
			t.Errorf("TLS state %+v", r.TLS)
		}
		switch r.URL.Path {
		case "/slow":
			time.Sleep(3 * watchDelay)
		case "/gone":
			served <- true
			<-r.Context().Done()
			gone <- r.Context().Err()
		}
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %v", r.URL, b, err)
	})}
	client, server := net.Pipe()
	over := make(chan bool, 1)
	go func() {
		c := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{certificate(t)}})
		if err := c.Handshake(); err != nil {
			t.Error(err)
		}
		state := c.ConnectionState()
		over <- s.ServeConn(context.Background(), c, &state)
	}()
	c := tls.Client(client, &tls.Config{InsecureSkipVerify: true, ServerName: "name"})
	br := bufio.NewReader(c)
	for _, path := range []string{"/slow", "/", "/slow", "/slow"} {
		io.WriteString(c, "POST "+path+" HTTP/1.1\r\n"+host+"Content-Length: 3\r\n\r\nabc")
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(resp.Body); string(b) != path+" abc <nil>" || resp.Close {
			t.Errorf("%q, close %v", b, resp.Close)
		}
	}
	io.WriteString(c, "GET /gone HTTP/1.1\r\n"+host+"\r\n")
	<-served
	go io.Copy(io.Discard, br)
	c.Close()
	if err := within(t, gone); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	within(t, over)
}

func TestHeaderLimit(t *testing.T) {
	connect := listen(t, &Server{HeaderBytes: 10_000, Handler: handle(func(w http.ResponseWriter, r *http.Request) {})})
	head := func(n int) string {
		frame := "GET / HTTP/1.1\r\n" + host + "A: \r\nConnection: close\r\n\r\n"
		return strings.Replace(frame, "A: ", "A: "+strings.Repeat("x", n-len(frame)), 1)
	}
	for n, want := range map[int]int{100: 200, 9_999: 200, 10_000: 200, 10_001: 431, 200_000: 431} {
		list := answers(converse(t, connect(), head(n)), nil)
		if len(list) != 1 || list[0].Status != want || !list[0].Close {
			t.Errorf("%d octets: %+v, want %d", n, list, want)
		}
	}
	if list := answers(converse(t, connect(), "GET /"+strings.Repeat("x", 20_000)), nil); len(list) != 1 || list[0].Status != 431 {
		t.Errorf("a long target: %+v", list)
	}
}

// A client that still sends must see the answer, not a reset.
func TestAnswerIsSeenThoughTheBodyIsNotRead(t *testing.T) {
	connect := listen(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "too much", http.StatusRequestEntityTooLarge)
	})})
	c := connect()
	go func() {
		io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Content-Length: 900000\r\n\r\n")
		for range 9 {
			c.Write(make([]byte, 100_000))
			time.Sleep(5 * time.Millisecond)
		}
	}()
	time.Sleep(20 * time.Millisecond)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusRequestEntityTooLarge || !resp.Close {
		t.Fatalf("%+v, %v", resp, err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "too much\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// A handler that does not read a body which never comes gets its answer out.
func TestStalledBodyIsNotWaitedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, over := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "no") })})
		go io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Content-Length: 9\r\n\r\na")
		start := time.Now()
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || !resp.Close || time.Since(start) > drainTime {
			t.Errorf("%+v, %v after %v", resp, err, time.Since(start))
		}
		io.Copy(io.Discard, resp.Body)
		<-over
		if took := time.Since(start); took > drainTime+lingerTime {
			t.Errorf("closed after %v", took)
		}
	})
}

func TestDeadlinesOfTheHandler(t *testing.T) {
	var errs atomic.Pointer[[2]error]
	connect := listen(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		var got [2]error
		if r.URL.Path == "/read" {
			rc.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			_, got[0] = r.Body.Read(make([]byte, 1))
			rc.SetReadDeadline(time.Time{})
			_, got[1] = io.ReadFull(r.Body, make([]byte, 1)) // there is more time now
		} else {
			rc.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
			for got[0] == nil {
				_, got[0] = w.Write(make([]byte, 1<<20))
			}
		}
		errs.Store(&got)
	})})
	c := connect()
	io.WriteString(c, "POST /read HTTP/1.1\r\n"+host+"Content-Length: 1\r\n\r\n")
	time.Sleep(50 * time.Millisecond)
	io.WriteString(c, "a")
	if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
		t.Error(err)
	}
	if got := *errs.Load(); !errors.Is(got[0], os.ErrDeadlineExceeded) || got[1] != nil {
		t.Errorf("reading: %v", got)
	}
	c = connect()
	io.WriteString(c, "GET /write HTTP/1.1\r\n"+host+"\r\n")
	for deadline := time.Now().Add(10 * time.Second); errs.Load()[0] == nil || errs.Load()[1] != nil || time.Now().After(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if got := *errs.Load(); !errors.Is(got[0], os.ErrDeadlineExceeded) {
		t.Errorf("writing: %v", got)
	}
}

func TestWriteDeadlineIsOfOneRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, over := pipe(t, &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/1" {
				http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Second))
			}
			io.WriteString(w, "x")
		})})
		br := bufio.NewReader(c)
		for _, path := range []string{"/1", "/2"} {
			io.WriteString(c, "GET "+path+" HTTP/1.1\r\n"+host+"\r\n")
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, resp.Body)
			time.Sleep(2 * time.Second)
		}
		c.Close()
		<-over
	})
}

// A client that asks and does not read is let go, however short the answer and
// wherever it stops; one that reads slowly is not.
func TestClientsThatDoNotRead(t *testing.T) {
	for name, c := range map[string]struct {
		size    int
		request string
		reads   bool
	}{
		"a short answer":           {1, "GET / HTTP/1.1\r\n" + host + "\r\n", false},
		"a long one":               {1 << 20, "GET / HTTP/1.1\r\n" + host + "\r\n", false},
		"a long one that is taken": {1 << 20, "GET / HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n", true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, over := pipe(t, &Server{StallTimeout: time.Minute, Handler: handle(func(w http.ResponseWriter, r *http.Request) {
					w.Write(make([]byte, c.size))
				})})
				began := time.Now()
				io.WriteString(client, c.request)
				if c.reads {
					got := 0
					for b := make([]byte, 64<<10); ; time.Sleep(20 * time.Second) {
						n, err := client.Read(b)
						if got += n; err != nil {
							break
						}
					}
					if got < c.size {
						t.Errorf("got %d octets", got)
					}
				}
				select {
				case <-over:
				case <-time.After(time.Hour):
					t.Error("the connection is still served")
				}
				if took := time.Since(began); !c.reads && took < time.Minute {
					t.Errorf("let go after %s", took)
				}
			})
		})
	}
}

// A goroutine that outlives its handler gets errors, not the next client's answer.
func TestWriterAfterTheHandler(t *testing.T) {
	var w0 http.ResponseWriter
	var r0 *http.Request
	connect := listen(t, &Server{Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/1" {
			w0, r0 = w, r
			return
		}
		rc := http.NewResponseController(w0)
		_, werr := w0.Write([]byte("late"))
		_, rerr := r0.Body.Read(make([]byte, 1))
		_, _, herr := rc.Hijack()
		w0.WriteHeader(500)
		w0.(FieldWriter).WriteTrailers([]Field{{"A", "b"}})
		for i, err := range []error{werr, rerr, herr, rc.Flush(), rc.SetReadDeadline(time.Now()), rc.SetWriteDeadline(time.Now()), r0.Context().Err()} {
			if err == nil {
				t.Errorf("%d: no error", i)
			}
		}
	})})
	list := answers(converse(t, connect(), "POST /1 HTTP/1.1\r\n"+host+"Content-Length: 1\r\n\r\naGET /2 HTTP/1.1\r\n"+host+"\r\n"), nil)
	if len(list) != 2 || list[1].Status != 200 || list[1].Body != "" {
		t.Errorf("%+v", list)
	}
}

func TestReaderThatOutlivesItsHandler(t *testing.T) {
	reading, ended := make(chan bool), make(chan error, 1)
	c, over := pipe(t, &Server{Log: quiet(t), Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		go func() {
			reading <- true
			_, err := io.ReadAll(r.Body)
			ended <- err
		}()
		<-reading
		time.Sleep(5 * time.Millisecond) // it is in Read by now, or else this tests less
		io.WriteString(w, "answered")
	})})
	io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Content-Length: 9\r\n\r\na")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || !resp.Close {
		t.Fatalf("%+v, %v", resp, err)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != "answered" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := within(t, ended); err == nil {
		t.Error("it read to an end that did not come")
	}
	within(t, over)
}

func TestRequestKnowsItsConnection(t *testing.T) {
	type key struct{}
	client, server := net.Pipe()
	defer client.Close()
	s := &Server{Handler: handle(func(w http.ResponseWriter, r *http.Request) {
		if r.Context().Value(key{}) != "mine" || r.Context().Value(http.LocalAddrContextKey) != server.LocalAddr() || r.RemoteAddr != "pipe" {
			t.Errorf("%v %v %q", r.Context().Value(key{}), r.Context().Value(http.LocalAddrContextKey), r.RemoteAddr)
		}
	})}
	done := make(chan bool)
	go func() { done <- s.ServeConn(context.WithValue(t.Context(), key{}, "mine"), server, nil) }()
	io.WriteString(client, "GET / HTTP/1.0\r\n\r\n")
	io.ReadAll(client)
	<-done
}
