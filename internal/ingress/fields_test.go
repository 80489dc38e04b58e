package ingress

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// scribe is a service that keeps what it reads off its connection, line by line, and
// answers what it is told to.
type scribe struct {
	port int
	seen chan []string // each request's head; and its trailer, behind an empty line
	say  chan string
}

func (s *sandbox) scribe() *scribe {
	w := &scribe{seen: make(chan []string, 8), say: make(chan string, 8)}
	w.port = s.raw(func(c net.Conn, br *bufio.Reader) {
		for {
			head, err := message(br)
			if err != nil {
				return
			}
			w.seen <- head
			for said := ""; ; {
				select {
				case said = <-w.say:
				case <-time.After(10 * time.Second):
					return
				}
				io.WriteString(c, said)
				if !strings.HasPrefix(said, "HTTP/1.1 103") {
					break
				}
			}
		}
	})
	return w
}

// message reads a head and a body, and adds the trailer behind an empty line.
func message(br *bufio.Reader) (lines []string, err error) {
	if lines, err = paragraph(br); err != nil {
		return nil, err
	}
	for _, l := range lines {
		name, value, _ := strings.Cut(l, ": ")
		switch strings.ToLower(name) {
		case "content-length":
			n, err := strconv.ParseInt(value, 10, 64)
			if err == nil {
				_, err = io.CopyN(io.Discard, br, n)
			}
			return lines, err
		case "transfer-encoding":
			trailer, err := chunks(br)
			return append(append(lines, ""), trailer...), err
		}
	}
	return lines, nil
}

func paragraph(br *bufio.Reader) (lines []string, err error) {
	for {
		line, err := br.ReadString('\n')
		if err != nil {
			return nil, err
		}
		if line = strings.TrimSuffix(line, "\r\n"); line == "" {
			return lines, nil
		}
		lines = append(lines, line)
	}
}

// chunks skips a body and returns its trailer.
func chunks(br *bufio.Reader) ([]string, error) {
	for {
		size, err := br.ReadString('\n')
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(size) == "0" {
			return paragraph(br)
		}
		if _, err := br.ReadString('\n'); err != nil { // no test's body has a line break
			return nil, err
		}
	}
}

// wire is a client's connection over TLS.
type wire struct {
	*tls.Conn
	br *bufio.Reader
}

func (l *lab) wire(t *testing.T, host string) *wire {
	t.Helper()
	c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: host, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(15 * time.Second))
	return &wire{c, bufio.NewReader(c)}
}

func (w *wire) answer(t *testing.T) []string {
	t.Helper()
	lines, err := message(w.br)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func (w *scribe) saw(t *testing.T) []string {
	t.Helper()
	select {
	case lines := <-w.seen:
		return lines
	case <-time.After(10 * time.Second):
		t.Fatal("the service got no request")
		return nil
	}
}

func text(lines []string) string { return strings.Join(lines, "\r\n") + "\r\n\r\n" }

// same compares heads, with trailers behind an empty line: want may spell and order
// names as it likes, got has them canonical; fields of one name are in their order.
func same(t *testing.T, what string, got, want []string) {
	t.Helper()
	if d := cmp.Diff(byName(want, http.CanonicalHeaderKey), byName(got, func(name string) string { return name })); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func byName(lines []string, spell func(string) string) []string {
	out := append([]string(nil), lines[0])
	for rest := lines[1:]; len(rest) > 0; {
		end := slices.Index(rest, "")
		if end < 0 {
			end = len(rest)
		}
		var fields []string
		for _, line := range rest[:end] {
			name, value, _ := strings.Cut(line, ": ")
			fields = append(fields, spell(name)+": "+value)
		}
		slices.SortStableFunc(fields, func(a, b string) int {
			na, _, _ := strings.Cut(a, ":")
			nb, _, _ := strings.Cut(b, ":")
			return strings.Compare(na, nb)
		})
		out = append(out, fields...)
		if rest = rest[end:]; len(rest) > 0 {
			out, rest = append(out, ""), rest[1:]
		}
	}
	return out
}

// passage is a request and its answer, HOST standing for the host.
type passage struct {
	name            string
	request, answer []string
	arrives         []string // of the request; nil: all of it, and ours at the end
	returns         []string // of the answer; nil: all of it
	body, back      string   // of request and answer
}

// TestFieldsArriveAsSent compares octets at both ends of connections of HTTP/1.1 over
// TLS: names become canonical; duplicates and values are the same but for the few
// fields that docs/ingress.md lists.
func TestFieldsArriveAsSent(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	w := a.scribe()
	host := a.host(w.port)
	c := l.wire(t, host)
	for _, p := range passages() {
		t.Run(p.name, func(t *testing.T) {
			p.check(t, c, w, host)
		})
	}
}

func passages() []passage {
	const date = "DATE: Sun, 06 Nov 1994 08:49:37 GMT"
	return []passage{
		{
			name: "odd spelling, mixed order and duplicates",
			request: []string{
				"GET /a?b HTTP/1.1", "accept: */*", "hOsT: HOST", "x-CuStOm: 1", "X-custom: 2", "cookie: a=1", "X-a: b", "COOKIE: c=2; d", "x-A: a", "X-CUSTOM: 3",
				"x_under: 1", "empty:", "x-LATIN: \xe9",
			},
			arrives: []string{
				"GET /a?b HTTP/1.1", "accept: */*", "hOsT: HOST", "x-CuStOm: 1", "X-custom: 2", "cookie: a=1", "X-a: b", "COOKIE: c=2; d", "x-A: a", "X-CUSTOM: 3",
				"x_under: 1", "empty: ", "x-LATIN: \xe9", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https",
			},
			answer: []string{
				"HTTP/1.1 200 OK", "server: odd", "x-CuStOm: 1", date, "SET-cookie: b=1", "X-custom: 2", "set-Cookie: a=2", "content-LENGTH: 3", "ETAG: \"x\"", "x-LATIN: \xe9",
			},
			back: "abc",
		},
		{
			name:    "another order on the same connection",
			request: []string{"DELETE /2 HTTP/1.1", "X-CUSTOM: 3", "x-b: 1", "HOST: HOST", "x-CuStOm: 1"},
			answer:  []string{"HTTP/1.1 404 Not Found", date, "content-length: 0", "X-B: 2", "x-b: 1"},
		},
		{
			name:    "a body of known length",
			request: []string{"PUT / HTTP/1.1", "Host: HOST", "CONTENT-length: 2", "content-TYPE: x"},
			body:    "hi",
			answer:  []string{"HTTP/1.1 204 No Content", "allow: GET", date},
		},
		{
			name:    "chunks and trailers",
			request: []string{"POST / HTTP/1.1", "te: trailers", "Host: HOST", "transfer-ENCODING: chunked", "TRAILER: x-SUM, X-other", "x-b: 1"},
			body:    "3\r\nabc\r\n0\r\nx-SUM: 1\r\nX-other: 2\r\nx-sum: 3\r\n\r\n",
			arrives: []string{
				"POST / HTTP/1.1", "te: trailers", "Host: HOST", "transfer-ENCODING: chunked", "TRAILER: X-Other", "TRAILER: X-Sum", "x-b: 1",
				"X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "", "x-SUM: 1", "X-other: 2", "x-sum: 3",
			},
			answer: []string{"HTTP/1.1 200 OK", date, "trailer: X-sum,x-OTHER", "Transfer-Encoding: chunked", "x-b: 1"},
			back:   "3\r\nabc\r\n0\r\nX-sum: 1\r\nx-OTHER: 2\r\nX-SUM: 3\r\n\r\n",
			returns: []string{
				"HTTP/1.1 200 OK", date, "trailer: X-Other", "trailer: X-Sum", "x-b: 1", "Transfer-Encoding: chunked", "", "X-sum: 1", "x-OTHER: 2", "X-SUM: 3",
			},
		},
		{
			name:    "trailers that nobody announced",
			request: []string{"POST / HTTP/1.1", "Host: HOST", "Transfer-Encoding: chunked"},
			body:    "0\r\nx-Late: 1\r\n\r\n",
			arrives: []string{"POST / HTTP/1.1", "Host: HOST", "Transfer-Encoding: chunked", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "", "x-Late: 1"},
			answer:  []string{"HTTP/1.1 200 OK", date, "Transfer-Encoding: chunked"},
			back:    "2\r\nok\r\n0\r\nx-LATE: 1\r\n\r\n",
			returns: []string{"HTTP/1.1 200 OK", date, "Transfer-Encoding: chunked", "", "x-LATE: 1"},
		},
		{
			name: "what concerns one connection, and what only we may say, comes from us or not at all",
			request: []string{
				"GET / HTTP/1.1", "x-forwarded-FOR: 192.0.2.1", "Host: HOST", "connection: keep-alive, x-HOP", "x-hop: 1", "keep-alive: 5", "x-real-ip: 1", "E2B-traffic-access-TOKEN: t",
				"x_forwarded_for: 2", "x-Z: 1", "x-forwarded-for: 192.0.2.2",
			},
			arrives: []string{"GET / HTTP/1.1", "x-forwarded-FOR: 127.0.0.1", "Host: HOST", "x-Z: 1", "X-Forwarded-Proto: https"},
			answer:  []string{"HTTP/1.1 200 OK", "connection: keep-alive, x-HOP", "x-hop: 1", "KEEP-alive: timeout=5", "content-length: 0", date, "x-Z: 1"},
			returns: []string{"HTTP/1.1 200 OK", "content-length: 0", date, "x-Z: 1"},
		},
	}
}

// check sends the passage and looks at both ends of it.
func (p passage) check(t *testing.T, c *wire, w *scribe, host string) {
	t.Helper()
	put := strings.NewReplacer("HOST", host).Replace
	named := func(lines []string) []string {
		var out []string
		for _, line := range lines {
			name, value, _ := strings.Cut(line, ": ")
			if strings.EqualFold(name, "host") {
				line = name + ": " + put(value)
			}
			out = append(out, line)
		}
		return out
	}
	if p.arrives == nil {
		p.arrives = append(slices.Clip(p.request), "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https")
	}
	if p.returns == nil {
		p.returns = p.answer
	}
	w.say <- text(p.answer) + p.back
	io.WriteString(c, text(named(p.request))+p.body)
	same(t, "the request arrives", w.saw(t), named(p.arrives))
	same(t, "the answer arrives", c.answer(t), p.returns)
}

func TestPipelinedRequestsKeepTheirFields(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	w := a.scribe()
	host := a.host(w.port)
	c := l.wire(t, host)
	const date = "date: Sun, 06 Nov 1994 08:49:37 GMT"
	first, second := []string{"GET /1 HTTP/1.1", "host: " + host, "x-A: 1"}, []string{"GET /2 HTTP/1.1", "X-a: 2", "HOST: " + host}
	ours := []string{"X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https"}
	one, two := []string{"HTTP/1.1 200 OK", date, "x-One: 1", "Content-Length: 0"}, []string{"HTTP/1.1 200 OK", "X-TWO: 2", "content-length: 0", date}
	w.say <- text(one)
	w.say <- text(two)
	io.WriteString(c, text(first)+text(second))
	same(t, "the first arrives", w.saw(t), append(first, ours...))
	same(t, "the second arrives", w.saw(t), append(second, ours...))
	same(t, "the first answer", c.answer(t), one)
	same(t, "the second answer", c.answer(t), two)
}

func TestUpgradesKeepTheirFields(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	heads := make(chan []string, 1)
	answer := []string{"HTTP/1.1 101 Switching Protocols", "upgrade: WebSocket", "x-CuStOm: 1", "X-custom: 2", "sec-WEBSOCKET-accept: x", "CONNECTION: Upgrade"}
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		head, err := paragraph(br)
		if err != nil {
			return
		}
		heads <- head
		io.WriteString(c, text(answer)+"early")
		io.Copy(c, br)
	})
	c := l.wire(t, a.host(port))
	io.WriteString(c, text([]string{
		"GET /ws HTTP/1.1", "sec-WebSocket-KEY: x", "uPGRADE: WebSocket", "hOST: " + a.host(port), "x-A: 1", "CONNECTION: keep-alive, Upgrade", "X-a: 2", "sec-websocket-version: 13",
	})+"eager")
	same(t, "the request arrives", <-heads, []string{
		"GET /ws HTTP/1.1", "sec-WebSocket-KEY: x", "uPGRADE: WebSocket", "hOST: " + a.host(port), "x-A: 1", "CONNECTION: Upgrade", "X-a: 2", "sec-websocket-version: 13",
		"X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https",
	})
	lines, err := paragraph(c.br)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "the answer arrives", lines, answer)
	io.WriteString(c, " and later")
	got := make([]byte, len("earlyeager and later"))
	if _, err := io.ReadFull(c.br, got); err != nil || string(got) != "earlyeager and later" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestInterimAnswersKeepTheirFields(t *testing.T) {
	l := newLab(t, func(c *Config) { c.HSTS = time.Hour })
	a := l.sandbox(idA)
	w := a.scribe()
	c := l.wire(t, a.host(w.port))
	hints := [][]string{
		{"HTTP/1.1 103 Early Hints", "link: </a>; rel=preload", "LINK: </b>; rel=preload", "x-A: 1"},
		{"HTTP/1.1 103 Early Hints", "X-a: 2", "Link: </c>"},
	}
	final := []string{"HTTP/1.1 200 OK", "content-length: 0", "date: Sun, 06 Nov 1994 08:49:37 GMT", "x-A: 3"}
	for _, lines := range append(hints, final) {
		w.say <- text(lines)
	}
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: "+a.host(w.port)+"\r\n\r\n")
	for _, want := range append(hints, append(final, "Strict-Transport-Security: max-age=3600")) {
		lines, err := paragraph(c.br)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "the answer arrives", lines, want)
	}
}

// TestWhatIsReplacedComesOnce: the host by maskRequestHost, a cookie that carried our token.
func TestWhatIsReplacedComesOnce(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(t *Target) { t.Public, t.TrafficToken, t.MaskHost = false, "tok", "localhost:${PORT}" })
	w := a.scribe()
	host := a.host(w.port)
	c := l.wire(t, host)
	p := passage{
		request: []string{"GET / HTTP/1.1", "x-A: 1", "COOKIE: a=1; " + tokenCookie + "=x; b", "hosT: " + host, "cookie: c", "x-b: 1", "e2b-TRAFFIC-access-token: tok"},
		arrives: []string{
			"GET / HTTP/1.1", "x-A: 1", "COOKIE: a=1; b; c", "hosT: localhost:" + strconv.Itoa(w.port), "x-b: 1",
			"X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: " + host,
		},
		answer:  []string{"HTTP/1.1 200 OK", "SET-COOKIE: a=1; domain=x.test", "content-length: 0", "set-cookie: " + tokenCookie + "=x", "date: x", "Set-cookie: b=1"},
		returns: []string{"HTTP/1.1 200 OK", "SET-COOKIE: a=1", "content-length: 0", "set-cookie: b=1", "date: x"},
	}
	p.check(t, c, w, host)
}

// TestOwnAnswersFollowTheirRequests: on one connection, ours and a service's take turns.
func TestOwnAnswersFollowTheirRequests(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	w := a.scribe()
	c := l.wire(t, domain)
	io.WriteString(c, "GET /x HTTP/1.1\r\nhOsT: api."+domain+"\r\n\r\n")
	if lines := c.answer(t); lines[0] != "HTTP/1.1 200 OK" {
		t.Errorf("the API answers %q", lines)
	}
	w.say <- "HTTP/1.1 200 OK\r\nx-A: 1\r\ncontent-length: 0\r\ndate: x\r\n\r\n"
	io.WriteString(c, "GET /x HTTP/1.1\r\nhOsT: "+a.host(w.port)+"\r\n\r\n")
	w.saw(t)
	same(t, "the service's answer", c.answer(t), []string{"HTTP/1.1 200 OK", "x-A: 1", "content-length: 0", "date: x"})
	io.WriteString(c, "GET /x HTTP/1.1\r\nhOsT: "+a.host(1)+"\r\n\r\n")
	if lines := c.answer(t); lines[0] != "HTTP/1.1 502 Bad Gateway" {
		t.Errorf("a closed port is answered by %q", lines)
	}
}
