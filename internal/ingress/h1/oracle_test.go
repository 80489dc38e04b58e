package h1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// seen is what a handler saw of a request.
type seen struct {
	Method, Target, URL, Proto, Host string
	Header, Trailer                  http.Header
	Length                           int64
	Coding                           []string
	Close, NoBody, BodyFailed        bool
	Body                             string
}

func look(r *http.Request) seen {
	s := seen{
		Method: r.Method, Target: r.RequestURI, URL: fmt.Sprintf("%#v", *r.URL), Proto: r.Proto, Host: r.Host,
		Header: r.Header.Clone(), Length: r.ContentLength, Coding: r.TransferEncoding, Close: r.Close, NoBody: r.Body == http.NoBody,
	}
	b, err := io.ReadAll(r.Body)
	s.Body, s.BodyFailed = string(b), err != nil
	s.Trailer = r.Trailer
	return s
}

// got is what a client got.
type got struct {
	Status  int
	Proto   string
	Header  http.Header
	Length  int64
	Coding  []string
	Close   bool
	Body    string
	Trailer http.Header
	Err     string
}

// answers parses what a server sent; refusals come without their text.
func answers(raw string, methods []string) (list []got) {
	br := bufio.NewReader(strings.NewReader(raw))
	for i := 0; ; i++ {
		if _, err := br.Peek(1); err != nil {
			return list
		}
		method := "GET"
		if i < len(methods) {
			method = methods[i]
		}
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		if err != nil {
			return append(list, got{Err: "head"})
		}
		if resp.StatusCode < 200 && resp.StatusCode != 101 {
			i--
		}
		b, err := io.ReadAll(resp.Body)
		g := got{Status: resp.StatusCode, Proto: resp.Proto, Header: resp.Header, Length: resp.ContentLength, Coding: resp.TransferEncoding, Close: resp.Close, Body: string(b), Trailer: resp.Trailer}
		if g.Header.Get("Date") != "" {
			g.Header.Set("Date", "now")
		}
		if err != nil {
			g.Err = "body"
		}
		if g.Status >= 400 && g.Header.Get("X-Own") == "" { // a refusal: the words and how long they are differ
			g.Header, g.Body, g.Length = nil, "", 0
		}
		list = append(list, g)
	}
}

// both runs a handler behind this server and behind net/http's.
type both struct {
	mu         sync.Mutex
	seen       [2][]seen
	h1         func() *net.TCPConn
	stdlib     string
	stdlibDone func()
}

func newBoth(t *testing.T, h http.HandlerFunc) *both {
	b := &both{}
	record := func(i int) http.Handler {
		return handle(func(w http.ResponseWriter, r *http.Request) {
			if h != nil {
				h(w, r)
				return
			}
			s := look(r)
			b.mu.Lock()
			b.seen[i] = append(b.seen[i], s)
			b.mu.Unlock()
			w.Header().Set("X-Own", "1")
			fmt.Fprintf(w, "%s %s %s", r.Method, s.Target, s.Body)
		})
	}
	b.h1 = listen(t, &Server{Handler: record(0), Log: quiet(t)})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: record(1), DisableGeneralOptionsHandler: true, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
	b.stdlib = ln.Addr().String()
	return b
}

// probe shows whether a connection was kept.
const probe = "GET /probe HTTP/1.1\r\nHost: probe\r\n\r\n"

func (b *both) compare(t *testing.T, raw string, methods ...string) {
	t.Helper()
	b.seen = [2][]seen{}
	ours := converse(t, b.h1(), raw)
	theirs := converse(t, connect(t, b.stdlib), raw)
	if diff := cmp.Diff(answers(theirs, methods), answers(ours, methods)); diff != "" {
		t.Errorf("answers (-net/http +h1):\n%s\n%q\n%q", diff, theirs, ours)
	}
	if diff := cmp.Diff(b.seen[1], b.seen[0]); diff != "" {
		t.Errorf("seen by the handler (-net/http +h1):\n%s", diff)
	}
}

const host = "Host: a\r\n"

// TestRequestsAreReadAsByNetHTTP sends the same octets to both servers.
func TestRequestsAreReadAsByNetHTTP(t *testing.T) {
	long := strings.Repeat("x", 9000)
	for name, raw := range map[string]string{
		"a plain request":                   "GET /a%2Fb?c=d;e HTTP/1.1\r\n" + host + "\r\n",
		"odd spelling":                      "GET / HTTP/1.1\r\nhOST: a\r\nx-a: 1\r\nX-A: 2\r\nx-CuStOm:  v \t\r\n\r\n",
		"lines that end with LF":            "GET / HTTP/1.1\nHost: a\nA: b\n\n",
		"an empty value":                    "GET / HTTP/1.1\r\n" + host + "A:\r\nB:   \r\n\r\n",
		"octets above ASCII in a value":     "GET / HTTP/1.1\r\n" + host + "A: \xe4\xff\r\n\r\n",
		"an absolute target":                "GET http://other:1/p HTTP/1.1\r\n" + host + "\r\n",
		"an asterisk":                       "OPTIONS * HTTP/1.1\r\n" + host + "\r\n",
		"CONNECT to an authority":           "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
		"CONNECT to a path":                 "CONNECT /rpc HTTP/1.1\r\n" + host + "\r\n",
		"an unknown method":                 "BREW /pot HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\nab",
		"a target with two slashes":         "GET //x//y HTTP/1.1\r\n" + host + "\r\n",
		"HTTP/1.0":                          "GET / HTTP/1.0\r\n\r\n",
		"HTTP/1.0 with a host":              "GET / HTTP/1.0\r\n" + host + "\r\n",
		"HTTP/1.0 to be kept":               "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
		"HTTP/1.0 with a body":              "POST / HTTP/1.0\r\nConnection: Keep-Alive\r\nContent-Length: 3\r\n\r\nabc",
		"close":                             "GET / HTTP/1.1\r\n" + host + "Connection: x, Close\r\n\r\n",
		"close in a second field":           "GET / HTTP/1.1\r\n" + host + "Connection: x\r\nConnection: close\r\n\r\n",
		"an empty host":                     "GET / HTTP/1.1\r\nHost:\r\n\r\n",
		"a body":                            "POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\n\r\nabc",
		"a body of nothing":                 "POST / HTTP/1.1\r\n" + host + "Content-Length: 0\r\n\r\n",
		"a body of a GET":                   "GET / HTTP/1.1\r\n" + host + "Content-Length: 3\r\n\r\nabc",
		"a longer body than a buffer":       "POST / HTTP/1.1\r\n" + host + "Content-Length: 9000\r\n\r\n" + long,
		"a longer header than a buffer":     "GET / HTTP/1.1\r\n" + host + "A: " + long + "\r\nB: " + long + "\r\n\r\n",
		"a header just as long as a buffer": "GET / HTTP/1.1\r\n" + host + "A: " + long[:4096-len("GET / HTTP/1.1\r\n"+host+"A: \r\n\r\n")] + "\r\n\r\n",
		"a header of a buffer and an octet": "GET / HTTP/1.1\r\n" + host + "A: " + long[:4097-len("GET / HTTP/1.1\r\n"+host+"A: \r\n\r\n")] + "\r\n\r\n",
		"chunks":                            "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;ext=1\r\n0123456789\r\n0\r\n\r\n",
		"chunks, oddly spelt":               "POST / HTTP/1.1\r\n" + host + "tRANSFER-eNCODING: cHUNKED\r\n\r\n0003 \r\nabc\r\n000\r\n\r\n",
		"a trailer that was announced":      "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTrailer: x-sum, b\r\n\r\n1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n",
		"a trailer that was not":            "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n",
		"a trailer of a body with a length": "POST / HTTP/1.1\r\n" + host + "Content-Length: 1\r\nTrailer: x-sum\r\n\r\na",
		"a length for a trailer":            "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTrailer: content-length\r\n\r\n0\r\n\r\n",
		"a cut body":                        "POST / HTTP/1.1\r\n" + host + "Content-Length: 30\r\n\r\nabc",
		"a cut chunk":                       "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n30\r\nabc",
		"a chunk without its end":           "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
		"a chunk's size that is too large":  "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
		"a chunk's size with a sign":        "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
		"a chunk's size with 0x":            "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
		"a chunk's line that ends with LF":  "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
		"chunks that end with the input":    "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
		"a line end too many after a POST":  "POST / HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\na\r\n",
		"an empty line first":               "\r\nGET / HTTP/1.1\r\n" + host + "\r\n",
		"nothing":                           "",
		"half a request line":               "GET / HT",
		"half a header":                     "GET / HTTP/1.1\r\nHo",
		"no target":                         "GET HTTP/1.1\r\n" + host + "\r\n",
		"two spaces":                        "GET  / HTTP/1.1\r\n" + host + "\r\n",
		"a space at the end":                "GET / HTTP/1.1 \r\n" + host + "\r\n",
		"a malformed method":                "G(T / HTTP/1.1\r\n" + host + "\r\n",
		"a malformed target":                "GET %zz HTTP/1.1\r\n" + host + "\r\n",
		"a control character in the target": "GET /\x01 HTTP/1.1\r\n" + host + "\r\n",
		"a relative target":                 "GET a/b HTTP/1.1\r\n" + host + "\r\n",
		"HTTP/0.9":                          "GET /\r\n",
		"HTTP/2.0":                          "GET / HTTP/2.0\r\n" + host + "\r\n",
		"a malformed version":               "GET / HTTP/1.10\r\n" + host + "\r\n",
		"another protocol":                  "SSH-2.0-OpenSSH_9.2\r\n",
		"no host":                           "GET / HTTP/1.1\r\n\r\n",
		"two hosts":                         "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
		"a malformed host":                  "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
		"a name with a space before colon":  "GET / HTTP/1.1\r\n" + host + "A : b\r\n\r\n",
		"a field without a name":            "GET / HTTP/1.1\r\n" + host + ": b\r\n\r\n",
		"a field without a colon":           "GET / HTTP/1.1\r\n" + host + "A\r\n\r\n",
		"a name with a bracket":             "GET / HTTP/1.1\r\n" + host + "A(: b\r\n\r\n",
		"a name above ASCII":                "GET / HTTP/1.1\r\n" + host + "\xe4: b\r\n\r\n",
		"a control character in a value":    "GET / HTTP/1.1\r\n" + host + "A: a\x00b\r\n\r\n",
		"a bare CR in a value":              "GET / HTTP/1.1\r\n" + host + "A: a\rB: b\r\n\r\n",
		"a first line that is folded":       "GET / HTTP/1.1\r\n Host: a\r\n\r\n",
		"a length that is negative":         "POST / HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\nabc",
		"a length with a sign":              "POST / HTTP/1.1\r\n" + host + "Content-Length: +3\r\n\r\nabc",
		"a length that is no number":        "POST / HTTP/1.1\r\n" + host + "Content-Length: 3a\r\n\r\nabc",
		"a length that is empty":            "POST / HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\nabc",
		"a length that is too large":        "POST / HTTP/1.1\r\n" + host + "Content-Length: 9999999999999999999\r\n\r\nabc",
		"two lengths":                       "POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
		"an unknown coding":                 "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip\r\n\r\nabc",
		"two codings":                       "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\nabc",
		"chunked twice":                     "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"a coding with a Kelvin sign":       "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chun\u212aed\r\n\r\n0\r\n\r\n",
		"a long s in close":                 "GET / HTTP/1.1\r\n" + host + "Connection: clo\u017fe\r\n\r\n",
		"an unknown expectation":            "POST / HTTP/1.1\r\n" + host + "Expect: wonder\r\nContent-Length: 1\r\n\r\na",
		"100-continue":                      "POST / HTTP/1.1\r\n" + host + "Expect: 100-Continue\r\nContent-Length: 1\r\n\r\na",
		"100-continue without a body":       "GET / HTTP/1.1\r\n" + host + "Expect: 100-continue\r\n\r\n",
		"100-continue in HTTP/1.0":          "POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			method, _, _ := strings.Cut(raw, " ")
			newBoth(t, nil).compare(t, raw+probe, strings.TrimSpace(method))
		})
	}
}

// TestStricterThanNetHTTP is the list of requests that net/http serves and this
// server does not.
func TestStricterThanNetHTTP(t *testing.T) {
	for name, c := range map[string]struct {
		raw    string
		status int
	}{
		"a coding and a length":          {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400},
		"the same length twice":          {"POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400},
		"a coding in HTTP/1.0":           {"POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"a folded field":                 {"GET / HTTP/1.1\r\n" + host + "A: b\r\n c\r\n\r\n", 400},
		"CONNECT without a host":         {"CONNECT a:1 HTTP/1.1\r\n\r\n", 400},
		"HTTP/1.2":                       {"GET / HTTP/1.2\r\n" + host + "\r\n", 505},
		"the preface of HTTP/2":          {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
		"a second expectation":           {"GET / HTTP/1.1\r\n" + host + "Expect:\r\nExpect: x\r\n\r\n", 417},
		"a line of a trailer with LF":    {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\nC: d\r\n\r\n", 200}, // the handler's read fails
		"a field too many":               {"GET / HTTP/1.1\r\n" + host + strings.Repeat("a:\r\n", maxFields) + "\r\n", 431},
		"a header over the limit by one": {"GET / HTTP/1.1\r\n" + host + "A: " + strings.Repeat("x", 1<<16-len("GET / HTTP/1.1\r\n"+host+"A: \r\n\r\n")+1) + "\r\n\r\n", 431},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBoth(t, nil)
			ours := answers(converse(t, b.h1(), c.raw+probe), []string{strings.Fields(c.raw)[0]})
			if len(ours) != 1 || ours[0].Status != c.status || ours[0].Err != "" {
				t.Errorf("got %+v, want one answer of %d", ours, c.status)
			}
			for _, s := range b.seen[0] {
				if !s.BodyFailed {
					t.Errorf("the handler saw all of it: %+v", s)
				}
			}
			theirs := converse(t, connect(t, b.stdlib), c.raw+probe)
			if list := answers(theirs, nil); len(list) == 1 && list[0].Status == c.status && len(b.seen[1]) == len(b.seen[0]) && c.status != 200 {
				t.Error("net/http does the same: it belongs in the other test")
			}
		})
	}
}

// TestAnswersAreWrittenAsByNetHTTP runs the same handlers behind both servers.
func TestAnswersAreWrittenAsByNetHTTP(t *testing.T) {
	handlers := map[string]http.HandlerFunc{
		"nothing":       func(w http.ResponseWriter, r *http.Request) {},
		"a status":      func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(201) },
		"an odd status": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(799) },
		"no content": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "0")
			w.WriteHeader(204)
		},
		"not modified": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "a/b")
			w.Header().Set("Content-Length", "9")
			w.WriteHeader(304)
		},
		"reset content": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(205) },
		"a body of 304": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(304)
			_, err := io.WriteString(w, "x")
			check(w, errors.Is(err, http.ErrBodyNotAllowed))
		},
		"a short body":    func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>short") },
		"many pieces":     func(w http.ResponseWriter, r *http.Request) { pieces(w, 10, 100) },
		"too many pieces": func(w http.ResponseWriter, r *http.Request) { pieces(w, 100, 100) },
		"a piece of 2048": func(w http.ResponseWriter, r *http.Request) { pieces(w, 1, 2048) },
		"a piece of 2049": func(w http.ResponseWriter, r *http.Request) { pieces(w, 1, 2049) },
		"a long body":     func(w http.ResponseWriter, r *http.Request) { pieces(w, 3, 100_000) },
		"a length": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "5")
			io.WriteString(w, "12345")
		},
		"a long length": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100000")
			pieces(w, 1, 100_000)
		},
		"a length, typed": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "5")
			w.Header().Set("Content-Type", "a/b")
			io.WriteString(w, "12345")
		},
		"too short": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "9")
			io.WriteString(w, "12345")
		},
		"too long": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "3")
			_, err := io.WriteString(w, "12345")
			check(w, errors.Is(err, http.ErrContentLength))
		},
		"a bad length": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "-3")
			io.WriteString(w, "12345")
		},
		"a flush": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			io.WriteString(w, "b")
		},
		"only a flush": func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush() },
		"a type": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "a/b")
			io.WriteString(w, "<html>")
		},
		"no type": func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Content-Type"] = nil
			io.WriteString(w, "<html>")
		},
		"no date": func(w http.ResponseWriter, r *http.Request) { w.Header()["Date"] = nil },
		"a date":  func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Date", "x") },
		"coded": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			io.WriteString(w, "<html>")
		},
		"close": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			io.WriteString(w, "x")
		},
		"keep-alive": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "keep-alive")
			io.WriteString(w, "x")
		},
		"identity": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Transfer-Encoding", "identity")
			io.WriteString(w, "x")
		},
		"chunked": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Transfer-Encoding", "chunked")
			io.WriteString(w, "x")
		},
		"chunked, length": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Transfer-Encoding", "chunked")
			w.Header().Set("Content-Length", "1")
			io.WriteString(w, "x")
		},
		"too late": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(201)
			w.Header().Set("A", "b")
			w.WriteHeader(202)
			io.WriteString(w, "x")
		},
		"fields": func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h["B"] = []string{"1", "2"}
			h["a-lower"] = []string{" 3\t"}
			h["A"] = []string{"x\r\ny", ""}
			h["(bad"] = []string{"x"}
			h["C"] = nil
		},
		"a control character": func(w http.ResponseWriter, r *http.Request) { w.Header().Set("A", "\x01b") },
		"a trailer": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "x-a, B, Content-Length")
			io.WriteString(w, "x")
			w.Header().Set("X-A", "1")
			w.Header()["B"] = []string{"2", "3"}
			w.Header().Set("Content-Length", "7")
		},
		"a late trailer": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			w.Header().Set(http.TrailerPrefix+"X-A", "1")
		},
		"lost trailer": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "x")
			w.Header().Set(http.TrailerPrefix+"X-A", "1")
		},
		"early hints": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</a>")
			w.WriteHeader(103)
			w.WriteHeader(102)
			w.Header().Set("A", "b")
			io.WriteString(w, "x")
		},
		"reads it": func(w http.ResponseWriter, r *http.Request) {
			b, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%d %v", len(b), err)
		},
		"reads a little": func(w http.ResponseWriter, r *http.Request) {
			n, err := io.ReadFull(r.Body, make([]byte, 1))
			fmt.Fprintf(w, "%d %v", n, err)
		},
		"closes it": func(w http.ResponseWriter, r *http.Request) {
			r.Body.Close()
			n, err := r.Body.Read(make([]byte, 1))
			fmt.Fprintf(w, "%d %v", n, err == nil)
		},
		"full duplex": func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).EnableFullDuplex()
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			b, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%d %v", len(b), err)
		},
		"reads after": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			n, _ := r.Body.Read(make([]byte, 1))
			fmt.Fprintf(w, "%d", n)
		},
		"a panic": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "a"); panic(http.ErrAbortHandler) },
		"a flushed panic": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
		"its own error": func(w http.ResponseWriter, r *http.Request) { w.Header().Set("X-Own", "1"); http.Error(w, "no", 403) },
		"a limited reader": func(w http.ResponseWriter, r *http.Request) {
			b, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, 2))
			fmt.Fprintf(w, "%d %v", len(b), err)
		},
	}
	requests := map[string]string{
		"GET":                  "GET / HTTP/1.1\r\n" + host + "\r\n",
		"HEAD":                 "HEAD / HTTP/1.1\r\n" + host + "\r\n",
		"GET close":            "GET / HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n",
		"HTTP/1.0":             "GET / HTTP/1.0\r\n\r\n",
		"HTTP/1.0 keep":        "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
		"HEAD HTTP/1.0 keep":   "HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
		"POST":                 "POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nabcde",
		"POST chunks":          "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\nA: b\r\n\r\n",
		"POST bad chunks":      "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n0\r\n\r\n",
		"POST expecting":       "POST / HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nContent-Length: 5\r\n\r\nabcde",
		"POST 200 KiB":         "POST / HTTP/1.1\r\n" + host + "Content-Length: 204800\r\n\r\n" + strings.Repeat("x", 204800),
		"POST 300 KiB":         "POST / HTTP/1.1\r\n" + host + "Content-Length: 307200\r\n\r\n" + strings.Repeat("x", 307200),
		"POST 300 KiB, chunks": "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n4b000\r\n" + strings.Repeat("x", 307200) + "\r\n0\r\n\r\n",
	}
	for hname, h := range handlers {
		b := newBoth(t, h)
		for rname, raw := range requests {
			t.Run(hname+"/"+rname, func(t *testing.T) {
				t.Parallel()
				ours, theirs := "", ""
				done := make(chan struct{})
				go func() { defer close(done); theirs = converse(t, connect(t, b.stdlib), raw+probe) }()
				ours = converse(t, b.h1(), raw+probe)
				<-done
				methods := []string{strings.Fields(raw)[0]}
				diff := cmp.Diff(answers(theirs, methods), answers(ours, methods))
				why := deliberate[hname] + deliberate[hname+"/"+rname]
				if diff != "" && why == "" {
					t.Errorf("answers (-net/http +h1):\n%s", diff)
				} else if diff == "" && why != "" {
					t.Errorf("%q is no difference any more", why)
				}
			})
		}
	}
}

const interim10 = "HTTP/1.0 has no interim answers"

// deliberate says why some answers are not net/http's.
var deliberate = map[string]string{
	"a bad length":                   "a length that is none counts as not given; net/http writes it or goes by its place in the header",
	"a control character":            "no control character gets into a header",
	"chunked, length/HTTP/1.0 keep":  "a body that ends with the connection does not promise to keep it",
	"early hints/HTTP/1.0":           interim10,
	"early hints/HTTP/1.0 keep":      interim10,
	"early hints/HEAD HTTP/1.0 keep": interim10,
	"full duplex/POST bad chunks":    "what follows a malformed chunk is not taken for a request",
}

func pieces(w io.Writer, n, size int) {
	for range n {
		w.Write(bytes.Repeat([]byte("y"), size))
	}
}

func check(w http.ResponseWriter, ok bool) {
	if !ok {
		panic(http.ErrAbortHandler)
	}
}
