package egress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// maxNames is how many names the requests of one HTTP/2 connection may show. Each is
// judged again when the policy changes.
const maxNames = 16

// streams is a connection of HTTP/2 in clear text with prior knowledge (RFC 9113
// section 3.3), as gRPC without TLS has it. Clients wait for the server's first frame
// before they send a request, so the server is connected before a name is known: the
// pinned address, as with a protocol that shows none. Then each request is judged by its
// :authority before any of it is passed on, and the first that is refused ends the
// connection.
type streams struct {
	f      *flow
	up     net.Conn
	reqs   requestScanner
	answ   answerScanner
	lost   bool        // where the server's frames begin is not known
	timed  bool        // something is pending, and has a deadline
	stop   atomic.Bool // the server's direction is to end between two frames
	halted chan bool   // how it ended: true when it was stopped there
}

// speaksHTTP2 reports whether a preface of HTTP/2 is taken for one: on port 80 it is
// read as a request of HTTP/1, which refuses it.
func (f *flow) speaksHTTP2(kind protocol) bool { return kind == showsHTTP2 && f.dst.Port() != 80 }

// serveHTTP2 serves a client that has sent the first line of the preface.
func (f *flow) serveHTTP2(ctx context.Context) (handedOver bool) {
	f.proto, f.http2 = "http", true
	f.p.sniffed(f)
	r, ok := f.admitPinned(ctx)
	if !ok {
		return false
	}
	up, ok := f.connect(ctx, r)
	if !ok {
		return false
	}
	f.recordAllowed(r, "HTTP/2 in clear text")
	f.pumps.Store(2)
	h := f.newStreams(up)
	f.p.conns.Add(2)
	go h.passRequests()
	go h.passAnswers()
	return true
}

// serveHTTP2Late is serveHTTP2 where the server was connected already and its direction
// is copied by a goroutine that reports to back.
func (f *flow) serveHTTP2Late(up net.Conn, back <-chan error) (handedOver bool) {
	f.proto, f.http2 = "http", true
	_ = up.SetReadDeadline(time.Unix(1, 0))
	alive := errors.Is(<-back, os.ErrDeadlineExceeded)
	h := f.newStreams(up)
	h.lost = f.bytesIn.Load() > 0
	if alive {
		f.p.conns.Add(1)
		go h.passAnswers()
	} else {
		h.halted <- false
	}
	f.p.conns.Add(1)
	go h.passRequests()
	return true
}

func (f *flow) newStreams(up net.Conn) *streams {
	_ = f.client.SetDeadline(time.Time{})
	_ = up.SetDeadline(time.Time{})
	h := &streams{f: f, up: up, halted: make(chan bool, 1)}
	h.reqs.judge = h.judge
	h.reqs.resize = func(n uint32) bool { return f.charge(int64(n)) }
	return h
}

// passRequests is the client's direction.
func (h *streams) passRequests() {
	f := h.f
	defer f.p.conns.Done()
	err := h.requests()
	h.refuse(err)
	if h.reqs.large {
		f.charge(-maxTable)
	}
	f.pumped(h.up, f.client, err)
}

// requests passes on what the client sends until its end.
func (h *streams) requests() error {
	f := h.f
	for {
		n, bad := h.reqs.scan(f.in.pending())
		if n > 0 {
			h.timed = false
			if err := h.pass(n); err != nil {
				return err
			}
		}
		var unread *sniffError
		switch {
		case errors.As(bad, &unread) && unread.reason != ReasonBudget && f.ruled().policy.Mode() == policy.ModeObserve:
			return h.observed(unread)
		case bad != nil:
			return bad
		case h.reqs.rest > smallBuffer: // the rest of a frame is moved unseen
			f.in.rest()
			_ = f.client.SetReadDeadline(time.Time{})
			n, err := f.p.pipes.copyN(h.up, f.client, int64(h.reqs.rest))
			f.bytesOut.Add(n)
			if h.reqs.rest -= int(n); err != nil || h.reqs.rest > 0 {
				return err
			}
		}
		if err := h.fill(); err != nil {
			if errors.Is(err, io.EOF) { // what was held back is cut short
				return nil
			}
			return err
		}
	}
}

// pass passes on n octets of what is pending. The server takes its time, as it does
// with a body.
func (h *streams) pass(n int) error {
	f := h.f
	sent, err := h.up.Write(f.in.pending()[:n])
	f.bytesOut.Add(int64(sent))
	f.in.consume(n)
	return err
}

// fill reads on. Nothing is held while nothing is pending; what is has to become whole
// before the deadline.
func (h *streams) fill() error {
	f := h.f
	if len(f.in.pending()) == 0 {
		f.in.rest()
		if err := awaitBytes(f.client); err != nil {
			return err
		}
		return f.in.fill(smallBuffer)
	}
	if !h.timed {
		h.timed = true
		_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.SniffTimeout))
	}
	if err := f.in.fill(maxBlock + frameHeader); err != nil {
		return sniffFailed(err, io.EOF)
	}
	return nil
}

// observed passes on what cannot be read, and all behind it: observe mode enforces
// nothing above the floor.
func (h *streams) observed(bad *sniffError) error {
	f := h.f
	f.record(flowlog.Observed, event{policy: f.ruled().policy, rule: proxyRule, reason: bad.reason, detail: bad.detail})
	if err := h.pass(len(f.in.pending())); err != nil {
		return err
	}
	f.in.rest()
	_ = f.client.SetReadDeadline(time.Time{})
	n, err := f.p.pipes.copy(h.up, f.client)
	f.bytesOut.Add(n)
	return err
}

// refusedCall says that the policy refuses a request.
type refusedCall struct{ denial }

func (e *refusedCall) Error() string { return string(e.reason) + ": " + e.name }

var errCut = errors.New("the connection was cut")

// judge decides one request, as HTTP/1 requests are.
func (h *streams) judge(c *call) error {
	f := h.f
	name, err := c.name(f.dst.Port())
	if err != nil {
		return err
	}
	if !f.keepRuling() {
		return &sniffError{ReasonBadRequest, fmt.Sprintf("more than %d names on one connection", maxNames)}
	}
	r, ok := f.judge(name)
	if !ok {
		f.kill(ReasonRevoked)
		return errCut
	}
	f.mu.Lock()
	addr := f.upAddr
	f.mu.Unlock()
	d := denial{rule: r.Rule, reason: r.Reason, name: name, detail: c.what()}
	switch v := r.policy.DecideAddr(name, addr); {
	case !r.Allow && name == "":
		d.reason, d.name = denialReason(r.Verdict, ReasonNoHost), c.authority
	case !r.Allow && r.Reason == policy.ReasonNoName: // it did not count: the port is not one of HTTP
		d.reason = ReasonProtocolMismatch
	case !r.Allow:
	case r.route == policy.RouteSelf:
		d.rule, d.reason, d.detail = proxyRule, ReasonProtocolMismatch, "this service's own domains do not take HTTP/2 in clear text here"
	case !v.Allow:
		d.rule, d.reason = v.Rule, v.Reason
	default:
		f.recordAllowed(r, c.what())
		return nil
	}
	return &refusedCall{d}
}

// keepRuling keeps the ruling in force beside the next one, so that rejudge sees all
// names of the connection. It reports false when there are too many.
func (f *flow) keepRuling() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.earlier {
		if r.name == f.ruling.name && r.route == f.ruling.route {
			return true
		}
	}
	f.earlier = append(f.earlier, f.ruling)
	return len(f.earlier) <= maxNames
}

// refuse ends the connection for a request that may not pass; any other err is the
// connection's own.
func (h *streams) refuse(err error) {
	f := h.f
	d := denial{rule: proxyRule, call: &h.reqs.call}
	var bad *sniffError
	var refused *refusedCall
	switch {
	case errors.As(err, &refused):
		d = refused.denial
		d.call = &h.reqs.call
	case errors.As(err, &bad):
		d.reason, d.detail = bad.reason, bad.detail
		if d.reason == ReasonBudget && f.overcharged != "" {
			d.detail = f.overcharged
		}
	default:
		return
	}
	f.wantsJSON, f.headRequest = h.reqs.call.json, h.reqs.call.method == "HEAD"
	h.stop.Store(true)
	_ = f.client.SetWriteDeadline(time.Now().Add(farewell))
	_ = h.up.SetReadDeadline(time.Unix(1, 0))
	stopped := <-h.halted
	reset(h.up) // other requests that go on there
	d.mute = !stopped
	f.deny(f.ruled().policy, d)
	f.kill(d.reason)
	if stopped {
		f.pumped(f.client, h.up, err)
	}
}

// passAnswers is the server's direction. It is copied as it is.
func (h *streams) passAnswers() {
	f := h.f
	defer f.p.conns.Done()
	stopped, err := h.answers()
	h.halted <- stopped
	if !stopped {
		f.pumped(f.client, h.up, err)
	}
}

// answers copies until the server ends, or until it is stopped between two frames.
func (h *streams) answers() (stopped bool, err error) {
	f := h.f
	src := source{conn: h.up, pool: &f.p.pool}
	defer src.release()
	for late := false; ; {
		if h.stop.Load() && (h.lost || h.answ.between()) {
			return !h.lost, errCut
		}
		if !src.full {
			src.idle()
			err = h.awaitAnswer()
		}
		if err == nil {
			err = src.fillWide()
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && h.stop.Load() && !late: // inside a frame
			late, err = true, nil
			_ = h.up.SetReadDeadline(time.Now().Add(farewell))
			continue
		case errors.Is(err, io.EOF):
			return false, nil
		case err != nil:
			return false, err
		}
		b := src.pending()
		if !h.lost {
			b = b[:h.answ.scan(b, h.stop.Load())]
		}
		n, err := f.client.Write(b)
		f.bytesIn.Add(int64(n))
		if err != nil {
			return false, err
		}
		src.consume(len(src.pending()))
	}
}

// awaitAnswer waits for the server, holding nothing.
func (h *streams) awaitAnswer() error {
	if c, ok := h.up.(*net.TCPConn); ok {
		return readable(c)
	}
	return nil
}

// explainHTTP2 is what a denied client of HTTP/2 gets: an answer on the stream of the
// request that was refused, if it was one, and the end of the connection. It uses
// nothing of the server's header compression. gRPC has a status of its own, which its
// clients show with the text; they show none behind another status of HTTP.
func (f *flow) explainHTTP2(d denial) []byte {
	var out, block bytes.Buffer
	fr := http2.NewFramer(&out, nil)
	if f.bytesIn.Load() == 0 { // the first frame has to be this one
		_ = fr.WriteSettings() // a buffer takes everything
	}
	last := uint32(0)
	kind, body := f.whyDenied(d)
	if c := d.call; c != nil && c.shown&showsAuthority != 0 {
		last = c.id
		enc := hpack.NewEncoder(&block)
		enc.SetMaxDynamicTableSizeLimit(0)
		put := func(name, value string) {
			_ = enc.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: true})
		}
		if c.grpc {
			put(":status", "200")
			put("content-type", "application/grpc")
			put("grpc-status", "7") // PERMISSION_DENIED
			put("grpc-message", percentEncoded(strings.Trim(string(body), "# \n")))
			body = nil
		} else {
			put(":status", "403")
			put("content-type", kind)
			put("cache-control", "no-store")
		}
		put("x-cordon-deny", printable(ruleOf(d)))
		if f.headRequest {
			body = nil
		}
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: c.id, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: body == nil})
		if body != nil {
			_ = fr.WriteData(c.id, true, body)
		}
	}
	code := http2.ErrCodeNo
	if d.rule == proxyRule {
		code = http2.ErrCodeProtocol
	}
	_ = fr.WriteGoAway(last, code, []byte(printable(string(d.reason))))
	return out.Bytes()
}

// percentEncoded is s as a grpc-message may hold it.
func percentEncoded(s string) string {
	return strings.ReplaceAll(printable(s), "%", "%25")
}
