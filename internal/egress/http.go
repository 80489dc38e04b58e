package egress

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// httpConn serves the requests of one client connection, one after the other.
// Each is judged for itself; the upstream connection is kept while requests go
// to the same place.
type httpConn struct {
	f    *flow
	req  request
	resp response
	head []byte // the request head as it is sent on
	size int    // of the request head as it came

	sent   int64  // to the client before the answer that is due
	whole  bool   // nothing of the request is left to be sent
	up     source // reads from conn
	conn   net.Conn
	connTo ruling // what conn was dialled for
}

var (
	errNotHTTP    = errors.New("the first bytes are no HTTP request")
	errIdle       = errors.New("no further request")
	errClientGone = errors.New("the client reset the connection")
	errExchange   = errors.New("the connection cannot go on")
)

// serveHTTP serves requests until either side is done. It reports true when
// copying goroutines have taken the flow over.
func (f *flow) serveHTTP(ctx context.Context) (handedOver bool) {
	h, ok := f.p.pool.heads.Get().(*httpConn)
	if !ok {
		h = &httpConn{req: request{fields: make([]field, 0, 16)}, resp: response{fields: make([]field, 0, 16)}, head: make([]byte, 0, 1024)}
	}
	h.f = f
	defer h.release()
	for first := true; ; first = false {
		err := h.readRequest(first)
		switch {
		case errors.Is(err, errIdle):
			return false
		case errors.Is(err, errNotHTTP) && first:
			return f.serveNameless(ctx, ReasonProtocolMismatch, "neither TLS nor HTTP as the port demands")
		case errors.Is(err, errNotHTTP):
			err = badRequest("the request line is malformed")
		}
		if err != nil {
			h.drop()
			return f.unreadable(ctx, err)
		}
		f.p.sniffed(f)
		switch h.serve(ctx) {
		case ended:
			return false
		case upgraded:
			return true
		}
	}
}

// release gives back what the next connection can use.
func (h *httpConn) release() {
	h.up.release()
	pool := &h.f.p.pool
	clear(h.req.fields[:cap(h.req.fields)]) // they point into buffers
	clear(h.resp.fields[:cap(h.resp.fields)])
	if cap(h.resp.head) > smallBuffer {
		h.resp.head = nil
	}
	*h = httpConn{req: request{fields: h.req.fields[:0]}, resp: response{fields: h.resp.fields[:0], head: h.resp.head[:0]}, head: h.head[:0]}
	pool.heads.Put(h)
}

// outcome is how a request left the connection.
type outcome uint8

const (
	ended    outcome = iota // nothing more can come
	goingOn                 // the next request may come
	upgraded                // it is a byte stream now, in other hands
)

// readRequest reads and parses the next head; its bytes stay pending. Between
// requests the client may be idle; a head once begun has the sniff deadline.
func (h *httpConn) readRequest(first bool) error {
	f := h.f
	if !first {
		if err := h.awaitRequest(); err != nil {
			return err
		}
	}
	var scan headScanner
	for {
		pending := f.in.pending()
		if !looksLikeHTTP(pending) {
			return errNotHTTP
		}
		n, err := scan.scan(pending)
		if err != nil {
			return err
		}
		if n > 0 {
			return h.parse(pending[:n])
		}
		if err := f.in.fill(maxRequestHead); err != nil {
			return sniffFailed(err, badRequest("the connection ended inside the request head"))
		}
	}
}

// awaitRequest waits for the first byte of a further request.
func (h *httpConn) awaitRequest() error {
	f := h.f
	if len(f.in.pending()) == 0 {
		h.up.rest()
		_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.IdleTimeout))
		if err := f.in.fill(smallBuffer); err != nil {
			return errIdle // idle too long, closed, or gone: the same to us
		}
	}
	_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.SniffTimeout))
	return nil
}

// parse reads the head into h.req and h.head.
func (h *httpConn) parse(head []byte) error {
	h.f.headRequest, h.f.wantsJSON = bytes.HasPrefix(head, []byte("HEAD ")), false
	if err := h.req.parse(head, h.f.dst.Port()); err != nil {
		return err
	}
	h.f.wantsJSON = h.req.json
	if h.req.host != "" && h.req.port != h.f.dst.Port() {
		return &sniffError{ReasonPortMismatch, "Host names another port than the one connected to"}
	}
	h.head, h.size = h.req.appendTo(h.head[:0]), len(head)
	return nil
}

// serve judges the request that was read and, if it is allowed, passes it on
// with its answer.
func (h *httpConn) serve(ctx context.Context) outcome {
	f, q := h.f, &h.req
	r, ok := f.judge(q.name)
	if !ok {
		f.kill(ReasonRevoked)
		return ended
	}
	what := q.what()
	if !r.Allow {
		h.drop()
		d := denial{rule: r.Rule, reason: r.Reason, name: q.name, detail: what, whole: !q.hasBody() && len(f.in.pending()) == h.size}
		if q.name != "" && r.Reason == policy.ReasonNoName { // it did not count: the port is not one of HTTP
			d.reason = ReasonProtocolMismatch
		}
		if q.name == "" {
			d.reason, d.name = denialReason(r.Verdict, ReasonNoHost), q.host
		}
		f.deny(r.policy, d)
		return ended
	}
	if !h.reusable(r) {
		h.drop()
		conn, ok := f.connect(ctx, r)
		if !ok {
			return ended
		}
		h.conn, h.connTo = conn, r
		h.up = source{conn: conn, pool: &f.p.pool, alive: func() bool { return !gone(f.client) }}
	}
	f.recordAllowed(r, what)
	f.in.consume(h.size)
	f.in.shrink()
	out, err := h.exchange()
	if err != nil {
		h.failed(r, err)
		return ended
	}
	if out == ended {
		h.drop()
		if len(f.in.pending()) > 0 {
			lingerClose(f.client)
		}
	}
	return out
}

// reusable reports whether the kept upstream connection may carry a request
// under ruling r: same place, still allowed there, and still silent.
func (h *httpConn) reusable(r ruling) bool {
	if h.conn == nil || h.connTo.route != r.route || r.route != policy.RouteDirect && h.connTo.name != r.name {
		return false
	}
	h.f.mu.Lock()
	addr := h.f.upAddr
	h.f.mu.Unlock()
	if addr.IsValid() && !r.policy.DecideAddr(r.name, addr).Allow {
		return false
	}
	return len(h.up.pending()) == 0 && silent(h.conn)
}

// drop closes the upstream connection, if there is one.
func (h *httpConn) drop() {
	if h.conn != nil {
		h.f.dropUpstream()
		h.up.release()
		h.conn = nil
	}
}

// exchange sends the request and relays the answer.
func (h *httpConn) exchange() (outcome, error) {
	f, q := h.f, &h.req
	h.sent = f.bytesIn.Load()
	_ = f.client.SetReadDeadline(time.Time{})
	var body *bodySender
	switch have := int64(len(f.in.pending())); {
	case q.hasBody() && !q.chunked && q.length <= have:
		h.head = append(h.head, f.in.pending()[:q.length]...)
		f.in.consume(int(q.length))
	case q.hasBody():
		body = &bodySender{f: f, ruling: h.connTo, to: h.conn, length: q.length, chunked: q.chunked, done: make(chan error, 1)}
	}
	n, err := h.conn.Write(h.head)
	f.bytesOut.Add(int64(n))
	if err != nil {
		return ended, &upstreamError{err}
	}
	if cap(h.head) > smallBuffer {
		h.head = nil // not kept for the life of the connection
	}
	if body != nil {
		f.p.conns.Add(1)
		go body.run()
	}
	h.whole = body == nil
	out, err := h.relay()
	if body != nil {
		out = body.settle(out, err == nil && !q.expect)
	}
	if err == nil && body != nil && body.cut {
		lingerClose(f.client) // or the answer is lost with what was not read
	}
	if err == nil && out == upgraded {
		return h.upgrade()
	}
	if err == nil && (q.close || q.minor == 0) {
		out = ended
	}
	return out, err
}

// upgrade turns the connection into a byte stream to where the request went.
func (h *httpConn) upgrade() (outcome, error) {
	f := h.f
	if !f.send(h.conn, f.in.pending()) || !h.toClient(h.up.pending()) {
		return ended, errExchange
	}
	f.in.release()
	h.up.release()
	f.splice(h.conn)
	return upgraded, nil
}

// relay passes the answer on, interim answers first (RFC 9110 section 15.2).
func (h *httpConn) relay() (outcome, error) {
	for {
		n, err := h.readResponse()
		if err != nil {
			return ended, err
		}
		switch s := &h.resp; {
		case s.status == 101 && !h.req.upgrade:
			return ended, badResponse("an upgrade that was not asked for")
		case s.status < 200:
			if n, err = h.rewritten(n); err != nil {
				return ended, err
			}
			if !h.toClient(h.up.pending()[:n]) {
				return ended, errClientGone
			}
			h.up.consume(n)
			if s.status == 101 {
				return upgraded, nil
			}
			h.sent = h.f.bytesIn.Load()
		default:
			return h.relayBody(n)
		}
	}
}

// readResponse reads and parses the next response head and returns its length;
// its bytes stay pending.
func (h *httpConn) readResponse() (int, error) {
	var scan lineScanner
	for {
		if n := scan.scan(h.up.pending()); n > 0 {
			head := h.up.pending()[:n]
			if h.resp.parse(head) == nil {
				return n, nil
			}
			return n, h.resp.parseLeniently(head)
		}
		if err := h.up.fill(maxResponseHead); err != nil {
			switch {
			case errors.Is(err, errClientGone):
				return 0, err
			case errors.Is(err, errTooBig):
				return 0, badResponse("its head is too long")
			}
			return 0, &upstreamError{err}
		}
	}
}

// relayBody passes on a final head of n bytes and the body behind it.
func (h *httpConn) relayBody(n int) (outcome, error) {
	s := &h.resp
	n, err := h.rewritten(n)
	if err != nil {
		return ended, err
	}
	switch {
	case s.bodyless(h.f.headRequest):
		return h.relayCounted(n, 0)
	case s.chunked:
		return h.relayChunked(n)
	case s.length >= 0:
		return h.relayCounted(n, s.length)
	}
	// Until the upstream closes; so does the client's connection then.
	if !h.toClient(h.up.pending()) {
		return ended, errClientGone
	}
	h.up.release()
	_ = h.conn.SetReadDeadline(time.Time{})
	copied, err := h.f.p.pipes.copy(h.f.client, h.conn)
	h.f.bytesIn.Add(copied)
	if err != nil {
		return ended, errExchange // not a FIN: the body is cut short and the client must see that
	}
	return ended, nil
}

// rewritten passes on the head that was written anew in place of one of n bytes, if
// one was, and returns how many bytes of a head are still to be passed on.
func (h *httpConn) rewritten(n int) (int, error) {
	if len(h.resp.head) == 0 {
		return n, nil
	}
	if !h.toClient(h.resp.head) {
		return 0, errClientGone
	}
	h.up.consume(n)
	return 0, nil
}

// relayCounted passes on a head of n bytes and a body of length bytes.
func (h *httpConn) relayCounted(n int, length int64) (outcome, error) {
	have := min(int64(len(h.up.pending())-n), length)
	send := h.toClient
	if have == length && h.whole && (h.resp.close || h.req.close || h.req.minor == 0) {
		send = h.lastToClient
	}
	if !send(h.up.pending()[:n+int(have)]) {
		return ended, errClientGone
	}
	h.up.consume(n + int(have))
	if rest := length - have; rest > 0 {
		_ = h.conn.SetReadDeadline(time.Time{})
		copied, err := h.f.p.pipes.copyN(h.f.client, h.conn, rest)
		h.f.bytesIn.Add(copied)
		if err != nil || copied < rest {
			return ended, errExchange
		}
	}
	return h.after(), nil
}

// relayChunked passes on a head of n bytes and a chunked body, each piece as
// soon as it is there.
func (h *httpConn) relayChunked(n int) (outcome, error) {
	scan := chunkScanner{padded: true}
	for {
		m, done, err := scan.scan(h.up.pending()[n:])
		if err != nil {
			return ended, errBadResponse
		}
		if !h.toClient(h.up.pending()[:n+m]) {
			return ended, errClientGone
		}
		h.up.consume(n + m)
		n = 0
		if done {
			return h.after(), nil
		}
		if err := h.up.fillWide(); err != nil {
			return ended, errExchange
		}
	}
}

// after says whether the connection may be used again once an answer is through.
func (h *httpConn) after() outcome {
	if h.resp.close {
		return ended
	}
	return goingOn
}

func (h *httpConn) toClient(b []byte) bool {
	if len(b) == 0 {
		return true
	}
	n, err := h.f.client.Write(b)
	h.f.bytesIn.Add(int64(n))
	return err == nil
}

// lastToClient is toClient for what the connection is closed after.
func (h *httpConn) lastToClient(b []byte) bool {
	n, err := writeLast(h.f.client, b)
	h.f.bytesIn.Add(int64(n))
	return err == nil
}

// upstreamError says that the upstream broke the connection off.
type upstreamError struct{ err error }

func (e *upstreamError) Error() string {
	if errors.Is(e.err, io.EOF) {
		return "the upstream closed without an answer"
	}
	return e.err.Error()
}

func (e *upstreamError) Unwrap() error { return e.err }

// failed ends the flow after an exchange that could not be completed. The client gets a
// 502 with the reason where nothing of an answer was passed on that cannot be read,
// else a reset, so that it takes no half answer for a whole one.
func (h *httpConn) failed(r ruling, err error) {
	f := h.f
	e := event{policy: r.policy, name: r.name, rule: r.Rule, detail: err.Error()}
	var broken *upstreamError
	switch {
	case f.killedOr("") != "":
		return
	case errors.Is(err, errBadResponse):
		e.reason = ReasonBadResponse
	case errors.As(err, &broken):
		e.reason = ReasonUpstream
	}
	if e.reason != "" {
		f.record(flowlog.Failed, e)
	}
	if e.reason == ReasonBadResponse && f.bytesIn.Load() == h.sent {
		f.answer(f.badGateway(cmp.Or(r.name, h.req.host), err), false)
	} else {
		f.drain()
	}
	f.kill(e.reason)
}

// badGateway says why an answer of a server is not passed on.
func (f *flow) badGateway(host string, why error) []byte {
	body := fmt.Sprintf("# cordon: %s: %s\n", printable(host), printable(why.Error()))
	head := fmt.Sprintf("HTTP/1.1 502 Bad answer of the server\r\nContent-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", len(body))
	if f.headRequest {
		body = ""
	}
	return []byte(head + body)
}

// bodySender sends a request body that was not yet complete when the head was.
type bodySender struct {
	f       *flow
	ruling  ruling
	to      net.Conn
	length  int64
	chunked bool
	done    chan error
	cut     bool // the client still had, or has, something to send
}

var errBodyAborted = errors.New("the request body was not completed")

// run owns the client's read side until it sends on done.
func (b *bodySender) run() {
	defer b.f.p.conns.Done()
	var err error
	if b.chunked {
		err = b.sendChunked()
	} else {
		err = b.sendCounted()
	}
	var bad *sniffError
	switch {
	case err == nil, errors.Is(err, os.ErrDeadlineExceeded): // settle ends it
	case errors.As(err, &bad):
		b.f.record(flowlog.Denied, event{policy: b.ruling.policy, name: b.ruling.name, rule: proxyRule, reason: bad.reason, detail: bad.detail})
		b.f.kill(bad.reason)
	default:
		// The upstream must not take what it has for the whole body. Its answer, if
		// it gave one before it stopped reading, is still to be relayed.
		closeWrite(b.to)
	}
	b.done <- err
}

func (b *bodySender) sendCounted() error {
	in := &b.f.in
	have := min(int64(len(in.pending())), b.length)
	if err := b.write(in.pending()[:have]); err != nil {
		return err
	}
	in.consume(int(have))
	in.rest()
	rest := b.length - have
	n, err := b.f.p.pipes.copyN(b.to, b.f.client, rest)
	b.f.bytesOut.Add(n)
	if err == nil && n < rest {
		return errBodyAborted
	}
	return err
}

func (b *bodySender) sendChunked() error {
	in := &b.f.in
	var scan chunkScanner
	for {
		n, done, err := scan.scan(in.pending())
		if err != nil {
			return err
		}
		if err := b.write(in.pending()[:n]); err != nil || done {
			in.consume(n)
			return err
		}
		in.consume(n)
		if err := in.fill(smallBuffer); err != nil {
			return errors.Join(errBodyAborted, err)
		}
	}
}

func (b *bodySender) write(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	n, err := b.to.Write(p)
	b.f.bytesOut.Add(int64(n))
	return err
}

// settle waits until the body is through and returns out, or ended when it did
// not get through. With patient unset the body is waited for no longer: the
// exchange failed, or the answer came instead of the 100 the client waits for.
func (b *bodySender) settle(out outcome, patient bool) outcome {
	if patient && out != ended {
		if sent := <-b.done; sent != nil {
			return ended
		}
		return out
	}
	_ = b.f.client.SetReadDeadline(time.Now()) // wakes run
	if tc, ok := b.to.(*net.TCPConn); ok {
		_ = tc.SetWriteDeadline(time.Now())
	}
	if sent := <-b.done; sent != nil {
		b.cut = true
		return ended
	}
	_ = b.to.SetWriteDeadline(time.Time{})
	return out
}
