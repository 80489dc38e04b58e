package ingress

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestAmbiguousRequestsAreRefused: what net/http serves, and a proxy in front of us may
// understand differently, is refused with what follows it. The octets come in one
// piece and one by one.
func TestAmbiguousRequestsAreRefused(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var mu sync.Mutex
	var seen []string
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		mu.Lock()
		seen = append(seen, r.URL.Path)
		mu.Unlock()
	}))
	h := "Host: " + a.host(port) + "\r\n"
	next := "GET /next HTTP/1.1\r\n" + h + "Connection: close\r\n\r\n"
	for name, c := range map[string]struct {
		request, answer string // its beginning
		arrives         string // at the service
	}{
		"a coding and a length":           {"POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", "HTTP/1.1 400 ", ""},
		"the same length twice":           {"POST /a HTTP/1.1\r\n" + h + "Content-Length: 3\r\nCONTENT-LENGTH: 3\r\n\r\nabc", "HTTP/1.1 400 ", ""},
		"a coding in HTTP/1.0":            {"POST /a HTTP/1.0\r\n" + h + "Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + "0\r\n\r\n", "HTTP/1.0 400 ", ""},
		"a folded field":                  {"GET /a HTTP/1.1\r\n" + h + "A: b\r\n c\r\n\r\n", "HTTP/1.1 400 ", ""},
		"a fold that hides a length":      {"POST /a HTTP/1.1\r\n" + h + "A: b\r\n Content-Length: 5\r\n\r\n", "HTTP/1.1 400 ", ""},
		"HTTP/1.2":                        {"GET /a HTTP/1.2\r\n" + h + "\r\n", "HTTP/1.1 505 ", ""},
		"the preface of HTTP/2, too late": {"GET /a HTTP/1.1\r\n" + h + "\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1 200 ", "/a"},
		"a field too many":                {"GET /a HTTP/1.1\r\n" + h + strings.Repeat("a:\r\n", fieldsMost+1) + "\r\n", "HTTP/1.1 400 ", ""},
		"fields that do not end":          {"GET /a HTTP/1.1\r\n" + h + strings.Repeat("a:\n", 10_000), "HTTP/1.1 400 ", ""},
		"a trailer's line with LF":        {"POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\nC: d\r\n\r\n", "HTTP/1.1 200 ", "/a"},
		"a fold in the second request":    {"GET /a HTTP/1.1\r\n" + h + "\r\nGET /b HTTP/1.1\r\n" + h + "A: b\r\n c\r\n\r\n", "HTTP/1.1 200 ", "/a"},
		"behind an upgrade that is none":  {"GET /a HTTP/1.1\r\n" + h + "Connection: Upgrade\r\nUpgrade: x\r\n\r\nGET /b HTTP/1.1\r\n" + h + "A: b\r\n c\r\n\r\n", "HTTP/1.1 200 ", "/a"},
	} {
		for _, step := range []int{1 << 20, 1} {
			if step == 1 && len(c.request) > 500 {
				continue
			}
			t.Run(name, func(t *testing.T) {
				mu.Lock()
				seen = nil
				mu.Unlock()
				conn := l.dialPlain(t)
				conn.SetDeadline(time.Now().Add(10 * time.Second))
				go func() {
					for b := []byte(c.request + next); len(b) > 0; b = b[min(step, len(b)):] {
						if _, err := conn.Write(b[:min(step, len(b))]); err != nil {
							return
						}
					}
				}()
				got, _ := io.ReadAll(conn)
				if !strings.HasPrefix(string(got), c.answer) {
					t.Errorf("got %q, want %q", got, c.answer)
				}
				mu.Lock()
				defer mu.Unlock()
				if arrived := strings.Join(seen, " "); arrived != c.arrives {
					t.Errorf("%q arrived, want %q", arrived, c.arrives)
				}
			})
		}
	}
	t.Run("what is clear keeps its connection", func(t *testing.T) {
		mu.Lock()
		seen = nil
		mu.Unlock()
		got := l.plain(t, "GET /0 HTTP/1.1\r\n"+h+strings.Repeat("a:\r\n", fieldsMost-1)+"\r\nPOST /1 HTTP/1.1\r\n"+h+"Content-Length: 3\r\n\r\nabcPOST /2 HTTP/1.1\r\n"+h+"Transfer-Encoding: chunked\r\nTrailer: A\r\n\r\n3;x=\" y\"\r\nabc\r\n0\r\nA: b\r\n\r\n"+
			"GET /3 HTTP/1.1\nHost: "+a.host(port)+"\n\nGET /4 HTTP/1.1\r\n"+h+"Connection: Upgrade\r\nUpgrade: x\r\n\r\n"+next)
		mu.Lock()
		defer mu.Unlock()
		if arrived := strings.Join(seen, " "); arrived != "/0 /1 /2 /3 /4 /next" || strings.Count(got, "HTTP/1.1 200 ") != 6 {
			t.Errorf("%q arrived; got %q", arrived, got)
		}
	})
}

// counted tells how much of its octets was taken.
type counted struct {
	r    bytes.Reader
	size int
}

func (c *counted) Read(b []byte) (int, error) { return c.r.Read(b) }
func (c *counted) taken(br *bufio.Reader) int { return c.size - c.r.Len() - br.Buffered() }

// FuzzFraming: whatever a stranger sends, the watch on a connection and net/http agree
// where each request ends, or the watch has what follows refused; and it makes no
// difference how the octets are cut, nor how far net/http reads ahead.
func FuzzFraming(f *testing.F) {
	const host = "Host: a\r\n"
	for _, raw := range []string{
		"GET / HTTP/1.1\r\n" + host + "\r\n", "GET /a HTTP/1.1\r\n" + host + "\r\nGET /b HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /c HTTP/1.1\nHost: b\nA: b\n\n",
		"POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\n\r\nabc\r\nGET / HTTP/1.1\r\n" + host + "\r\n",
		"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTrailer: A\r\n\r\n3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n" + host + "\r\n",
		"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n" + host + "\r\n",
		"POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "GET / HTTP/1.1\r\n" + host + "A: b\r\n c\r\n\r\n",
		"GET / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nContent-Length : 5\r\n\r\nabcde", "GET / HTTP/1.1\r\n" + host + "Upgrade: x\r\n\r\nGET / HTTP/1.1\r\n" + host + "\r\n",
		"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\nabc", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
		"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", "\r\nGET / HTTP/1.1\r\n" + host + "\r\n", "GET / HTTP/1.1\r\n" + host + "\r\r\n\r\n",
		"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding:\r\n\r\n0\r\n\r\n", "POST / HTTP/1.1\r\n" + host + "Content-Length:\t3\t\r\n\r\nabcGET / HTTP/1.1\r\n" + host + "\r\n",
	} {
		f.Add([]byte(raw), uint16(1))
	}
	f.Fuzz(func(t *testing.T, raw []byte, step uint16) {
		if len(raw) > lateMost {
			return
		}
		var ahead, cut, late framing
		ahead.feed(raw)
		for b := raw; len(b) > 0; b = b[min(int(step)+1, len(b)):] {
			cut.feed(b[:min(int(step)+1, len(b))])
		}
		in := &counted{size: len(raw)}
		in.r.Reset(raw)
		br := bufio.NewReader(in)
		for fed, n := 0, 1; ; n++ {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			late.feed(raw[fed:in.taken(br)])
			fed = in.taken(br)
			why := late.next()
			if a, c := ahead.next(), cut.next(); (a == "") != (why == "") || (c == "") != (why == "") {
				t.Fatalf("request %d: %q; read ahead %q, cut %q", n, why, a, c)
			}
			if why != "" {
				return
			}
			if len(r.Header["Content-Length"]) > 1 {
				t.Fatal("two lengths pass")
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
			late.feed(raw[fed:in.taken(br)])
			fed = in.taken(br)
			if late.at == lost {
				continue // the next request, if there is one, is refused
			}
			if late.heads != n || late.at != inHead && late.at != inDoubt || late.head.lines > 0 || len(late.line) > 0 || len(late.late) > 0 {
				t.Fatalf("request %d ends at %d, which is not seen: %+v", n, fed, late)
			}
		}
	})
}

// pipes is a listener of connections in memory.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}

func (p pipes) Close() (err error) {
	defer func() { _ = recover() }() // it was closed before
	close(p)
	return nil
}

func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// piped runs an ingress with the API's handler, and returns a client's connection to it.
// It ends with the test's bubble.
func piped(t *testing.T, h http.HandlerFunc, change ...func(*Config)) net.Conn {
	cfg := Config{Domains: []string{domain}, Lookup: func(string) (*Target, bool) { return nil, false }, API: h}
	for _, c := range change {
		c(&cfg)
	}
	in, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l := make(pipes)
	ctx, stop := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- in.Run(ctx, Listener{l, Plain}) }()
	ours, theirs := net.Pipe()
	l <- theirs
	t.Cleanup(func() {
		ours.Close()
		stop()
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
	return ours
}

const toAPI = "Host: api." + domain + "\r\n"

func TestSlowClients(t *testing.T) {
	for name, c := range map[string]struct {
		first, part string // sent at once, and 7 s later
		answers     int
		after       time.Duration
	}{
		"who says nothing":             {"", "", 0, 10 * time.Second},
		"who stops in the first head":  {"GET / HTTP/1.1\r\nHo", "", 0, 10 * time.Second},
		"who trickles it":              {"GET / HTTP/1.1\r\nHo", "st: a", 0, 10 * time.Second},
		"who is slow but in time":      {"GET / HTTP/1.1\r\nHo", "st: api." + domain + "\r\n\r\n", 1, 67 * time.Second},
		"who says nothing again":       {"GET / HTTP/1.1\r\n" + toAPI + "\r\n", "", 1, 60 * time.Second},
		"who stops in the second head": {"GET / HTTP/1.1\r\n" + toAPI + "\r\n", "GET / HT", 1, 17 * time.Second},
		"whose body nobody reads":      {"POST / HTTP/1.1\r\n" + toAPI + "Content-Length: 9\r\n\r\na", "", 1, 5 * time.Second},
		"whose chunks nobody reads":    {"POST / HTTP/1.1\r\n" + toAPI + "Transfer-Encoding: chunked\r\n\r\n5\r\na", "", 1, 5 * time.Second},
		"whose refused body stops":     {"POST / HTTP/1.1\r\nHost: x y\r\nContent-Length: 9\r\n\r\na", "", 1, 0},
		"whose foreign body stops":     {"POST / HTTP/1.1\r\nHost: 1-x." + domain + "\r\nContent-Length: 9\r\n\r\na", "", 1, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := piped(t, func(http.ResponseWriter, *http.Request) {}, func(c *Config) { c.Limits.HeaderTimeout, c.Limits.IdleTimeout = 10*time.Second, time.Minute })
				start := time.Now()
				go func() {
					for _, part := range []string{c.first, c.part} {
						if part != "" { // or the pipe's reader would read nothing
							io.WriteString(conn, part)
						}
						time.Sleep(7 * time.Second)
					}
				}()
				out, _ := io.ReadAll(conn)
				// net/http lets a client see an answer for half a second before it closes.
				if took := time.Since(start); took < c.after || took > c.after+c.after/16+time.Second {
					t.Errorf("it took %v, want %v; %q", took, c.after, out)
				}
				// One that stops in its head may be told so.
				if n := strings.Count(string(out), "HTTP/1.1 ") - strings.Count(string(out), "400 Bad Request\r\nContent-Type: text/plain"); n != c.answers {
					t.Errorf("got %q", out)
				}
				time.Sleep(time.Minute) // the sender's end
			})
		})
	}
}

// Only the head has a deadline, and a body that nothing reads.
func TestABodyTakesAsLongAsItsHandlerLikes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := piped(t, func(w http.ResponseWriter, r *http.Request) {
			b, err := io.ReadAll(r.Body)
			time.Sleep(time.Hour)
			w.Write(b)
			if err != nil || r.Context().Err() != nil {
				t.Error(err, r.Context().Err())
			}
			w.(http.Flusher).Flush()
			time.Sleep(time.Hour)
			if r.Context().Err() != nil {
				t.Error("the client counts as gone")
			}
		}, func(c *Config) { c.Limits.HeaderTimeout, c.Limits.IdleTimeout = time.Second, time.Second })
		go func() {
			io.WriteString(c, "POST / HTTP/1.1\r\n"+toAPI+"Content-Length: 2\r\nConnection: close\r\n\r\na")
			time.Sleep(time.Hour)
			io.WriteString(c, "b")
		}()
		out, _ := io.ReadAll(c)
		if !strings.Contains(string(out), "ab\r\n") {
			t.Errorf("%q", out)
		}
	})
}

// A client that asks and does not read is let go, however short the answer and
// wherever it stops; one that reads slowly is not.
func TestClientsThatDoNotRead(t *testing.T) {
	for name, c := range map[string]struct {
		size  int
		reads bool
	}{"a short answer": {1, false}, "a long one": {1 << 20, false}, "a long one that is taken": {1 << 20, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := piped(t, func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, c.size)) }, func(c *Config) { c.Limits.Relay.StallTimeout = time.Minute })
				began := time.Now()
				io.WriteString(client, "GET / HTTP/1.1\r\n"+toAPI+"Connection: close\r\n\r\n")
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
					return
				}
				time.Sleep(2 * time.Minute)
				if _, err := client.Write([]byte("x")); err == nil {
					t.Errorf("still served after %v", time.Since(began))
				}
			})
		})
	}
}

// A handler's panic breaks the connection off and is an error of ours, whatever the
// client speaks.
func TestPanics(t *testing.T) {
	var mu sync.Mutex
	var log bytes.Buffer
	l := newLab(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(writer(func(b []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return log.Write(b)
		}), nil))
		c.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { panic("of " + r.Proto) })
	})
	l.both(t, func(t *testing.T, c *http.Client) {
		if resp, err := c.Get("https://api." + domain + "/"); err == nil {
			resp.Body.Close()
			t.Error("an answer")
		}
	})
	mu.Lock()
	defer mu.Unlock()
	for _, want := range []string{"level=ERROR", `err="of HTTP/1.1"`, `err="of HTTP/2.0"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log has no %s: %s", want, log.String())
		}
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }
