package egress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// explained is onlyPinned where a denied client is told why.
var explained = policy.Input{AllowOut: []string{"a.example:8080", "*.sub.example:8080"}, DenyOut: []string{"0.0.0.0/0"}}

// service answers as one of gRPC: it echoes what it gets, as it comes, and ends with
// trailers. It notes which names reached it.
type service struct{ reached chan string }

func (s service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.reached <- r.Host
	w.Header().Set("Trailer", "Grpc-Status")
	w.Header().Set("Content-Type", "application/grpc")
	w.WriteHeader(200)
	rc := http.NewResponseController(w)
	_ = rc.Flush()
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Body.Read(buf)
		_, _ = w.Write(buf[:n])
		_ = rc.Flush()
		if err != nil {
			break
		}
	}
	w.Header().Set("Grpc-Status", r.Trailer.Get("X-Sum")+"0")
}

func newService() service { return service{make(chan string, 100)} }

func (s service) serve(c net.Conn) {
	one := &listenOnce{Conn: c, next: make(chan net.Conn, 1)}
	one.next <- c
	srv := &http.Server{Handler: s, Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute, ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			close(one.next)
		}
	}}
	srv.Protocols.SetUnencryptedHTTP2(true)
	_ = srv.Serve(one)
}

// listenOnce accepts one connection, and ends when it does.
type listenOnce struct {
	net.Conn
	next chan net.Conn
}

func (l *listenOnce) Accept() (net.Conn, error) {
	if c, ok := <-l.next; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}

func (l *listenOnce) Addr() net.Addr { return l.LocalAddr() }

// clientOf speaks HTTP/2 in clear text on c, whatever name a request has.
func clientOf(t *testing.T, c net.Conn) *http.ClientConn {
	t.Helper()
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	tr.Protocols.SetUnencryptedHTTP2(true)
	cc, err := tr.NewClientConn(t.Context(), "http", "a.example:8080")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

// echoed asserts that body comes back, with the trailer.
func echoed(t *testing.T, res *http.Response, err error, body string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if res.StatusCode != 200 || string(got) != body || err != nil || res.Trailer.Get("Grpc-Status") != "0" {
		t.Errorf("got %d with %d octets, trailers %v and %v, want %d octets", res.StatusCode, len(got), res.Trailer, err, len(body))
	}
}

func TestHTTP2InClearTextOnAPinnedPort(t *testing.T) {
	l := pinnedLab(t)
	l.apply(explained)
	s := newService()
	up := l.host(s.serve, pinnedDst)
	cc := clientOf(t, l.connect(pinnedDst))
	res, err := cc.RoundTrip(callTo(t, "a.example:8080", strings.NewReader("hello")))
	echoed(t, res, err, "hello")
	if e := l.await(flowlog.Allowed); e.Reason != ReasonPinned || e.Proto != "http" {
		t.Errorf("event %+v", e)
	}
	if e := l.await(flowlog.Allowed); e.Name != "a.example" || e.Reason != policy.ReasonAllowName || e.Detail != "POST /pkg.Service/Method" || e.Upstream.String() != pinnedDst {
		t.Errorf("event %+v", e)
	}
	big := strings.Repeat("0123456789", 200_000)
	res, err = cc.RoundTrip(callTo(t, "A.example", strings.NewReader(big)))
	echoed(t, res, err, big)

	r, w := io.Pipe() // both ways in turns
	res, err = cc.RoundTrip(callTo(t, "x.sub.example:8080", r))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		msg := fmt.Sprintf("message %d", i)
		_, _ = io.WriteString(w, msg)
		got := make([]byte, len(msg))
		if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != msg {
			t.Fatalf("got %q and %v, want %q", got, err, msg)
		}
	}
	w.Close()
	echoed(t, res, nil, "")
	for _, want := range []string{"a.example:8080", "A.example", "x.sub.example:8080"} {
		if got := <-s.reached; got != want {
			t.Errorf("%q reached the server, want %q", got, want)
		}
	}
	if n := up.conns.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// TestEachStreamOfHTTP2IsJudged: the first request for another name is refused with what
// its client understands, nothing of it reaches the server, and the connection ends.
func TestEachStreamOfHTTP2IsJudged(t *testing.T) {
	l := pinnedLab(t)
	l.apply(explained)
	s := newService()
	up := l.host(s.serve, pinnedDst)
	cc := clientOf(t, l.connect(pinnedDst))
	res, err := cc.RoundTrip(callTo(t, "a.example:8080", strings.NewReader("hello")))
	echoed(t, res, err, "hello")

	r, w := io.Pipe()
	defer w.Close()
	open, err := cc.RoundTrip(callTo(t, "a.example:8080", r)) // goes on meanwhile
	if err != nil {
		t.Fatal(err)
	}
	defer open.Body.Close()
	denied, err := cc.RoundTrip(callTo(t, "b.example:8080", strings.NewReader("canary")))
	if err != nil {
		t.Fatal(err)
	}
	defer denied.Body.Close()
	_, _ = io.Copy(io.Discard, denied.Body)
	if h := denied.Header; h.Get("Grpc-Status") != "7" || !strings.HasPrefix(h.Get("Grpc-Message"), "denied by egress policy: b.example (") || h.Get("X-Cordon-Deny") == "" {
		t.Errorf("got %v", h)
	}
	if e := l.awaitDenied(policy.ReasonNameDenied); e.Name != "b.example" || e.Detail != "POST /pkg.Service/Method" {
		t.Errorf("event %+v", e)
	}
	if _, err := io.ReadAll(open.Body); err == nil {
		t.Error("the connection goes on")
	}
	l.await(flowlog.Closed)
	close(s.reached)
	for name := range s.reached {
		if name != "a.example:8080" {
			t.Errorf("%s reached the server", name)
		}
	}
	if strings.Contains(up.text(), "canary") {
		t.Error("the body reached the server")
	}
}

func callTo(t *testing.T, authority string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+authority+"/pkg.Service/Method?secret", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("TE", "trailers")
	return r
}

// h2 writes frames as a client.
type h2 struct {
	bytes.Buffer
	fr  *http2.Framer
	enc *hpack.Encoder
	blk bytes.Buffer
}

func newH2() *h2 {
	h := &h2{}
	h.fr = http2.NewFramer(h, nil)
	h.fr.AllowIllegalWrites = true
	h.enc = hpack.NewEncoder(&h.blk)
	h.WriteString(http2.ClientPreface)
	_ = h.fr.WriteSettings()
	return h
}

// block encodes fields in pairs.
func (h *h2) block(fields ...string) []byte {
	h.blk.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = h.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(h.blk.Bytes())
}

func (h *h2) headers(id uint32, block []byte) *h2 {
	_ = h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true, EndStream: true})
	return h
}

// get is the fields of a request.
func get(authority string, more ...string) []string {
	return append([]string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", authority}, more...)
}

// badStreams is what ends a connection of HTTP/2 for which a.example is allowed.
var badStreams = []struct {
	name string
	make func(*h2)
	want policy.Reason
}{
	{"another name", func(h *h2) { h.headers(1, h.block(get("b.example:8080")...)) }, policy.ReasonNameDenied},
	{"another name without a port", func(h *h2) { h.headers(1, h.block(get("b.example")...)) }, policy.ReasonNameDenied},
	{"an address", func(h *h2) { h.headers(1, h.block(get("93.184.216.1:8080")...)) }, ReasonNoHost},
	{"another port", func(h *h2) { h.headers(1, h.block(get("a.example:80")...)) }, ReasonPortMismatch},
	{"no domain name", func(h *h2) { h.headers(1, h.block(get("a.example@b.example")...)) }, ReasonBadName},
	{"another script", func(h *h2) { h.headers(1, h.block(get("ä.example")...)) }, ReasonBadName},
	{"no authority", func(h *h2) {
		h.headers(1, h.block(":method", "GET", ":scheme", "http", ":path", "/", "host", "a.example"))
	}, ReasonBadRequest},
	{"two authorities", func(h *h2) { h.headers(1, h.block(get("a.example", ":authority", "a.example")...)) }, ReasonBadRequest},
	{"another Host", func(h *h2) { h.headers(1, h.block(get("a.example", "host", "b.example")...)) }, ReasonBadRequest},
	{"two Hosts", func(h *h2) { h.headers(1, h.block(get("a.example", "host", "a.example", "host", "a.example")...)) }, ReasonBadRequest},
	{"an upper-case name", func(h *h2) { h.headers(1, h.block(get("a.example", "Host", "b.example")...)) }, ReasonBadRequest},
	{"a pseudo-header field behind others", func(h *h2) {
		h.headers(1, h.block(":method", "GET", ":scheme", "http", ":path", "/", "a", "b", ":authority", "a.example"))
	}, ReasonBadRequest},
	{"an unknown pseudo-header field", func(h *h2) { h.headers(1, h.block(get("a.example", ":host", "b.example")...)) }, ReasonBadRequest},
	{"an absolute URL", func(h *h2) {
		h.headers(1, h.block(":method", "GET", ":scheme", "http", ":path", "http://b.example/", ":authority", "a.example"))
	}, ReasonBadRequest},
	{"a line end in a value", func(h *h2) { h.headers(1, h.block(get("a.example", "a", "b\r\nhost: b.example")...)) }, ReasonBadRequest},
	{"a blank in the path", func(h *h2) {
		h.headers(1, h.block(":method", "GET", ":scheme", "http", ":path", "/ HTTP/1.1", ":authority", "a.example"))
	}, ReasonBadRequest},
	{"chunked", func(h *h2) { h.headers(1, h.block(get("a.example", "transfer-encoding", "chunked")...)) }, ReasonBadRequest},
	{"CONNECT", func(h *h2) { h.headers(1, h.block(":method", "CONNECT", ":authority", "a.example:8080")) }, ReasonBadRequest},
	{"extended CONNECT", func(h *h2) {
		h.headers(1, h.block(":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/", ":authority", "a.example"))
	}, ReasonBadRequest},
	{"trailers that are a request", func(h *h2) {
		h.headers(3, h.block(get("a.example")...)).headers(1, h.block(get("b.example")...))
	}, ReasonBadRequest},
	{"trailers with Host", func(h *h2) {
		h.headers(1, h.block(get("a.example")...)).headers(1, h.block("host", "b.example"))
	}, ReasonBadRequest},
	{"an even stream", func(h *h2) { h.headers(2, h.block(get("a.example")...)) }, ReasonBadRequest},
	{"stream 0", func(h *h2) { h.headers(0, h.block(get("a.example")...)) }, ReasonBadRequest},
	{"the reserved bit", func(h *h2) { h.headers(1<<31+1, h.block(get("a.example")...)) }, ReasonBadRequest},
	{"a frame inside a header block", func(h *h2) {
		b := h.block(get("a.example")...)
		_ = h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:3]})
		_ = h.fr.WritePing(false, [8]byte{})
	}, ReasonBadRequest},
	{"a header block continued on another stream", func(h *h2) {
		b := h.block(get("a.example")...)
		_ = h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:3]})
		_ = h.fr.WriteContinuation(3, true, b[3:])
	}, ReasonBadRequest},
	{"a continuation of nothing", func(h *h2) { _ = h.fr.WriteContinuation(1, true, h.block(get("b.example")...)) }, ReasonBadRequest},
	{"a promise", func(h *h2) {
		_ = h.fr.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: h.block(get("b.example")...), EndHeaders: true})
	}, ReasonBadRequest},
	{"a header block that is too large", func(h *h2) {
		_ = h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, maxBlock)})
	}, ReasonSniffTooBig},
	{"too many continuations", func(h *h2) {
		_ = h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
		for range maxContinuations + 1 {
			_ = h.fr.WriteContinuation(1, false, nil)
		}
	}, ReasonSniffTooBig},
	{"more fields than octets let guess", func(h *h2) {
		fields := get("a.example")
		for range 100 {
			fields = append(fields, "a", strings.Repeat("b", 2000))
		}
		h.headers(1, h.block(fields...))
	}, ReasonBadRequest},
	{"a table beyond the cap", func(h *h2) { h.headers(1, []byte{0x3f, 0xe1, 0xff, 0x07, 0x82}) }, ReasonBadRequest},
	{"an index of nothing", func(h *h2) { h.headers(1, []byte{0xff, 0x80, 0x01}) }, ReasonBadRequest},
	{"more padding than there is", func(h *h2) {
		h.Write([]byte{0, 0, 2, byte(http2.FrameHeaders), byte(http2.FlagHeadersEndHeaders | http2.FlagHeadersPadded), 0, 0, 0, 1, 9, 0x82})
	}, ReasonBadRequest},
	{"a preface that goes on otherwise", func(h *h2) {
		h.Reset()
		h.WriteString("PRI * HTTP/2.0\r\nHost: a.example\r\n\r\n")
	}, ReasonBadRequest},
}

func TestStreamsThatAreRefused(t *testing.T) {
	for _, tt := range badStreams {
		h := newH2()
		tt.make(h)
		sent := h.Bytes()
		t.Run(tt.name, func(t *testing.T) {
			l := pinnedLab(t)
			up := l.host(nil, pinnedDst)
			c := l.connect(pinnedDst)
			send(t, c, string(sent))
			wantReset(t, c)
			l.awaitDenied(tt.want)
			if reached := requestsIn(t, []byte(up.text())); len(reached) > 0 && (reached[0].authority != "a.example" || len(reached) > 1) {
				t.Errorf("the server got %+v", reached)
			}
		})
		t.Run(tt.name+", one octet at a time", func(t *testing.T) {
			if len(sent) > 2000 {
				t.Skip("in one piece only")
			}
			s := requestScanner{judge: func(*call) error { return nil }, resize: func(uint32) bool { return true }}
			whole := s
			n, err := whole.scan(sent)
			passed, end := steppedScan(&s, sent, 1)
			if len(passed) != n || fmt.Sprint(end) != fmt.Sprint(err) {
				t.Errorf("%d octets and %v, in one piece %d and %v", len(passed), end, n, err)
			}
		})
	}
}

// steppedScan shows s what grows by step octets, and returns what passed.
func steppedScan(s *requestScanner, b []byte, step int) (passed []byte, err error) {
	for at, end := 0, 0; end < len(b); {
		end = min(len(b), end+step)
		n, err := s.scan(b[at:end])
		passed = append(passed, b[at:at+n]...)
		at += n
		if err != nil {
			return passed, err
		}
	}
	return passed, nil
}

// requestsIn reads requests as x/net does.
func requestsIn(t testing.TB, b []byte) (out []call) {
	t.Helper()
	b, ok := bytes.CutPrefix(b, []byte(http2.ClientPreface))
	if !ok {
		return nil
	}
	fr := http2.NewFramer(io.Discard, bytes.NewReader(b))
	fr.SetMaxReadFrameSize(1<<24 - 1)
	fr.MaxHeaderListSize = 16 << 20
	fr.ReadMetaHeaders = hpack.NewDecoder(defaultTable, nil)
	fr.ReadMetaHeaders.SetAllowedMaxDynamicTableSize(maxTable)
	top := uint32(0)
	for {
		f, err := fr.ReadFrame()
		var stream http2.StreamError
		switch {
		case errors.As(err, &stream):
			continue
		case err != nil:
			return out
		}
		if m, ok := f.(*http2.MetaHeadersFrame); ok && m.StreamID > top {
			top = m.StreamID
			out = append(out, call{id: top, method: m.PseudoValue("method"), path: m.PseudoValue("path"), authority: m.PseudoValue("authority")})
		}
	}
}

// TestADenialStandsBetweenFrames: a frame of the server that has begun when a request is
// refused is completed before the answer.
func TestADenialStandsBetweenFrames(t *testing.T) {
	l := pinnedLab(t)
	l.apply(explained)
	cut, more := make(chan bool), make(chan bool)
	l.host(func(c net.Conn) {
		fr := http2.NewFramer(c, nil)
		_ = fr.WriteSettings()
		_, _ = c.Write([]byte{0, 0, 8, byte(http2.FramePing), 0, 0, 0, 0, 0, 1, 2})
		close(cut)
		<-more
		_, _ = c.Write([]byte{3, 4, 5, 6, 7, 8})
		_, _ = io.Copy(io.Discard, c)
	}, pinnedDst)
	c := l.connect(pinnedDst)
	h := newH2()
	send(t, c, h.String())
	<-cut
	half := make([]byte, frameHeader+frameHeader+2)
	if _, err := io.ReadFull(c, half); err != nil {
		t.Fatal(err)
	}
	h.Reset()
	send(t, c, h.headers(1, h.block(get("b.example", "accept", "application/json")...)).String())
	close(more)
	fr := http2.NewFramer(io.Discard, io.MultiReader(bytes.NewReader(half), c))
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var got []string
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			break
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			got = append(got, "HEADERS "+f.PseudoValue("status"))
		case *http2.DataFrame:
			got = append(got, "DATA "+string(f.Data()[:10]))
		default:
			got = append(got, f.Header().Type.String())
		}
	}
	if want := []string{"SETTINGS", "PING", "HEADERS 403", `DATA {"error":"`, "GOAWAY"}; strings.Join(got, ",") != strings.Join(want, ",") {
		t.Errorf("got %q, want %q", got, want)
	}
	l.awaitDenied(policy.ReasonNameDenied)
}

func TestHTTP2AfterASilence(t *testing.T) {
	for _, name := range []string{"a.example", "b.example"} {
		t.Run(name, func(t *testing.T) {
			l := pinnedLab(t)
			s := newService()
			l.host(s.serve, pinnedDst)
			c := l.connect(pinnedDst)
			if e := l.await(flowlog.Allowed); e.Reason != ReasonPinned {
				t.Errorf("event %+v", e)
			}
			res, err := clientOf(t, c).RoundTrip(callTo(t, name, strings.NewReader("hello")))
			if name == "a.example" {
				echoed(t, res, err, "hello")
				return
			}
			if err == nil {
				res.Body.Close()
				t.Errorf("got %d", res.StatusCode)
			}
			l.awaitDenied(policy.ReasonNameDenied)
			if len(s.reached) > 0 {
				t.Error("it reached the server")
			}
		})
	}
}

// TestANewPolicyCutsHTTP2: every name of the connection has to stay allowed.
func TestANewPolicyCutsHTTP2(t *testing.T) {
	for _, gone := range []string{"a.example:8080", "*.sub.example:8080"} {
		l := pinnedLab(t)
		s := newService()
		l.host(s.serve, pinnedDst)
		cc := clientOf(t, l.connect(pinnedDst))
		for _, name := range []string{"x.sub.example", "a.example", "x.sub.example", "a.example"} {
			res, err := cc.RoundTrip(callTo(t, name, strings.NewReader("hello")))
			echoed(t, res, err, "hello")
		}
		in := onlyPinned
		in.AllowOut = append(in.AllowOut[:2:2], "c.example:8080")
		l.apply(in)
		res, err := cc.RoundTrip(callTo(t, "a.example", strings.NewReader("hello")))
		echoed(t, res, err, "hello")
		in.AllowOut = nil
		for _, e := range onlyPinned.AllowOut {
			if e != gone {
				in.AllowOut = append(in.AllowOut, e)
			}
		}
		l.apply(in)
		l.awaitDenied(ReasonRevoked)
		if e := l.await(flowlog.Closed); e.Reason != ReasonRevoked {
			t.Errorf("event %+v", e)
		}
	}
}

func TestManyNamesOnOneConnectionOfHTTP2(t *testing.T) {
	l := pinnedLab(t)
	s := newService()
	l.host(s.serve, pinnedDst)
	cc := clientOf(t, l.connect(pinnedDst))
	served := 0
	for i := range 2 * maxNames {
		res, err := cc.RoundTrip(callTo(t, fmt.Sprintf("n%d.sub.example", i), strings.NewReader("hello")))
		if err != nil {
			break
		}
		echoed(t, res, err, "hello")
		served++
	}
	if served != maxNames {
		t.Errorf("%d names were served, want %d", served, maxNames)
	}
	l.awaitDenied(ReasonBadRequest)
}

func TestHTTP2InClearTextStaysRefused(t *testing.T) {
	h := newH2()
	h.headers(1, h.block(get("a.example")...))
	for _, tt := range []struct {
		name, dst string
		rule      string
		want      policy.Reason
	}{
		{"on port 80", "93.184.216.1:80", "a.example", ReasonBadRequest},
		{"on port 80 by a rule for it", "93.184.216.1:80", "a.example:80", ReasonBadRequest},
		{"on port 443", "93.184.216.1:443", "a.example", ReasonProtocolMismatch},
		{"where no rule names the port", pinnedDst, "a.example", ReasonProtocolMismatch},
		{"at an address that no name is pinned to", "93.184.216.1:443", "a.example:443", ReasonProtocolMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := pinnedLab(t)
			l.apply(policy.Input{AllowOut: []string{tt.rule}, DenyOut: []string{"0.0.0.0/0"}, OnDeny: policy.OnDenyReset})
			up := l.host(nil, tt.dst)
			wantResetAfter(t, l.connect(tt.dst), h.String())
			l.awaitDenied(tt.want)
			up.untouched(t)
		})
	}
}

// TestObservedHTTP2: observe mode passes what it would refuse, and says so.
func TestObservedHTTP2(t *testing.T) {
	l := pinnedLab(t)
	in := onlyPinned
	in.Mode = policy.ModeObserve
	l.apply(in)
	up := l.host(nil, pinnedDst)
	h := newH2()
	h.headers(1, h.block(get("b.example")...))
	_ = h.fr.WriteContinuation(1, true, nil)
	c := l.connect(pinnedDst)
	send(t, c, h.String())
	if e := l.await(flowlog.Observed); e.Name != "b.example" || e.Reason != policy.ReasonNameDenied {
		t.Errorf("event %+v", e)
	}
	if e := l.await(flowlog.Observed); e.Reason != ReasonBadRequest {
		t.Errorf("event %+v", e)
	}
	c.Close()
	l.await(flowlog.Closed)
	if up.text() != h.String() {
		t.Errorf("the server got %q", up.text())
	}
}

// TestTheTableOfHTTP2IsPaidFor: a table larger than the usual one is memory that the
// sandbox has a limit of, and gives back.
func TestTheTableOfHTTP2IsPaidFor(t *testing.T) {
	h := newH2()
	h.enc.SetMaxDynamicTableSizeLimit(maxTable)
	h.enc.SetMaxDynamicTableSize(maxTable)
	h.headers(1, h.block(get("a.example")...))
	for _, limit := range []int64{maxTable - 1, maxTable} {
		l := pinnedLab(t, func(c *Config) { c.Limits.SniffBytes = limit })
		l.host(nil, pinnedDst)
		for range 2 {
			c := l.connect(pinnedDst)
			send(t, c, h.String())
			if limit < maxTable {
				l.awaitDenied(ReasonBudget)
				continue
			}
			l.await(flowlog.Allowed)
			if e := l.await(flowlog.Allowed); e.Name != "a.example" {
				t.Errorf("event %+v", e)
			}
			c.Close()
			l.await(flowlog.Closed)
		}
	}
}

// FuzzHTTP2Requests asks x/net for a second opinion: the requests it reads in what was
// passed on are those that were judged.
func FuzzHTTP2Requests(f *testing.F) {
	for _, tt := range badStreams {
		h := newH2()
		tt.make(h)
		if h.Len() < 4096 {
			f.Add(h.Bytes(), 5)
		}
	}
	h := newH2()
	b := h.block(get("a.example", "te", "trailers")...)
	_ = h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:4], PadLength: 3, Priority: http2.PriorityParam{Weight: 3}})
	_ = h.fr.WriteContinuation(1, true, b[4:])
	_ = h.fr.WriteData(1, false, []byte("body"))
	h.headers(1, h.block("x-trailer", "a"))
	h.enc.SetMaxDynamicTableSize(100)
	h.headers(3, h.block(get("x.example")...)).headers(7, h.block(get("a.example")...))
	f.Add(h.Bytes(), 1)
	f.Add(h.Bytes(), 4096)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		var judged []call
		s := requestScanner{resize: func(uint32) bool { return true }, judge: func(c *call) error {
			judged = append(judged, call{id: c.id, method: c.method, path: c.path, authority: c.authority})
			if name, err := c.name(8080); err != nil || name == "b.example" {
				return errCut
			}
			return nil
		}}
		passed, err := steppedScan(&s, b, max(step, 1))
		if !bytes.HasPrefix(b, passed) {
			t.Fatal("what is passed on is not what was sent")
		}
		if errors.Is(err, errCut) {
			judged = judged[:len(judged)-1]
		}
		read := requestsIn(t, passed)
		for i, r := range read {
			if i >= len(judged) || fmt.Sprint(r) != fmt.Sprint(judged[i]) {
				t.Fatalf("x/net reads %+v, judged were %+v", read, judged)
			}
		}
		once := requestScanner{resize: s.resize, judge: func(c *call) error {
			if name, err := c.name(8080); err != nil || name == "b.example" {
				return errCut
			}
			return nil
		}}
		if n, end := once.scan(b); n != len(passed) || fmt.Sprint(end) != fmt.Sprint(err) {
			t.Fatalf("in one piece %d and %v, in steps of %d %d and %v", n, end, step, len(passed), err)
		}
	})
}
