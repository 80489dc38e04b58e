package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Out says how a request is sent to the service. The rest of it (method, body,
// remaining header) is taken from the client's request as it came.
type Out struct {
	Port   uint16
	Target string // the request target, byte for byte: "/a%2Fb?x;y" or "*"
	Host   string
	// Drop reports header names, in canonical form, that are not sent. The
	// hop-by-hop ones of RFC 9110, section 7.6.1 never are.
	Drop func(name string) bool
	// Set are header fields sent besides the client's.
	Set []Field
	// Upgrade is the protocol to switch to, empty for none.
	Upgrade string
	// Stream is what the client sends after the switch when it asked for it on an
	// HTTP/2 stream (RFC 8441); what it gets is the answer's body. Nil elsewhere.
	Stream io.ReadCloser
	// Answer, when not nil, may change the answer's header before it is sent on.
	Answer func(status int, h http.Header)
	// Client is the client's connection when it speaks HTTP/1, so that it can be
	// reset; nil for HTTP/2, where the stream is.
	Client net.Conn
	// Done is called once, when the exchange and the tunnel that may follow have
	// ended; it gets the tunnel's octets, nil when there was none.
	Done func(tunnel *Octets)
}

// Field is one header field.
type Field struct{ Name, Value string }

// Octets counts bodies, or what a tunnel carried; heads are not in it.
type Octets struct{ In, Out int64 } // from the client, to the client

// Result is what became of an exchange.
type Result struct {
	Octets
	Wait    time.Duration // until the service's answer began; 0 when it did not
	Status  int           // sent to the client; 0 when none was
	Err     error         // ErrReset, ErrClient, ErrBody, ErrAnswer or a *DialError, in its chain
	Started bool          // a part of the answer is sent: the client's connection must be broken off
}

// interim is how many 1xx answers a service may send before the real one.
const interim = 8

// inline is the size up to which a request's body is sent before its answer is
// awaited; it fits the socket's buffer, so that this cannot block on the service.
const inline = 16 << 10

// continueWait is how long a client that asked to be told to continue waits for
// a service that does not (RFC 9110, section 10.1.1 lets the client choose).
const continueWait = time.Second

// linger is how long a client may go on sending a body nobody reads, so that it
// sees the answer rather than a reset.
const linger = 200 * time.Millisecond

var longAgo = time.Unix(1, 0)

// exchange is one request and its answer.
type exchange struct {
	pool    *Pool
	w       http.ResponseWriter
	r       *http.Request
	out     *Out
	rc      *http.ResponseController
	conn    *conn
	status  int
	started atomic.Bool // the answer's head is being sent to the client

	upload   chan error // result of sendBody; nil when the body is not sent beside the answer
	goAhead  chan bool  // whether the service wants the body; nil when it need not be asked
	uploaded bool       // the whole body is sent
	detached bool       // a tunnel took over
	octets   Octets     // In is the upload's until it has ended
	answered time.Time  // when the head of the answer was there
	timed    bool       // writes to the client have a deadline
}

// Forward sends the client's request to the service and the answer to the
// client. It returns when the answer is complete, or with the switch to a
// tunnel, which then lives until either side closes it.
func (p *Pool) Forward(w http.ResponseWriter, r *http.Request, out *Out) Result {
	x := &exchange{pool: p, w: w, r: r, out: out, rc: http.NewResponseController(w)}
	began := time.Now()
	err := x.try(false)
	if errors.Is(err, errStale) {
		err = x.try(true)
	}
	if !x.detached && out.Done != nil {
		out.Done(nil)
	}
	if err != nil && p.closed.Load() {
		err = fmt.Errorf("%w: %w", ErrReset, err)
	} else if err != nil && r.Context().Err() != nil {
		err = fmt.Errorf("%w: %w", ErrClient, err)
	}
	var wait time.Duration
	if !x.answered.IsZero() {
		wait = x.answered.Sub(began)
	}
	return Result{Octets: x.octets, Wait: wait, Status: x.status, Err: err, Started: x.started.Load()}
}

// errStale: a kept connection was closed by the service before it took the
// request, which may be sent again.
var errStale = errors.New("stale connection")

func (x *exchange) try(fresh bool) error {
	c, err := x.pool.get(x.r.Context(), x.out.Port, fresh)
	if err != nil {
		return err
	}
	x.conn = c
	if err := x.pool.enter(x); err != nil {
		abort(c.Conn)
		return err
	}
	// When the client goes away, the service sees its connection close.
	stop := context.AfterFunc(x.r.Context(), func() { hangUp(c) })
	keep, reuse, err := x.run()
	untouched := stop()
	if x.detached {
		return nil
	}
	if uploadErr := x.finishUpload(err == nil); err != nil && errors.Is(uploadErr, ErrBody) {
		err = uploadErr
	}
	x.pool.leave(x)
	if err != nil || !reuse || !x.uploaded || !untouched {
		hangUp(c)
		return err
	}
	x.pool.put(c, keep)
	return nil
}

// reset is called by Pool.Close. Before the answer has begun only the service's
// side is closed, so that the client still gets a proper error.
func (x *exchange) reset() {
	abort(x.conn.Conn)
	switch {
	case !x.started.Load():
		if x.r.ContentLength != 0 && x.out.Stream == nil {
			x.rc.SetReadDeadline(longAgo) //nolint:errcheck // only to wake a blocked read
		}
	case x.out.Client != nil:
		abort(x.out.Client)
	default:
		x.rc.SetWriteDeadline(longAgo) //nolint:errcheck // resets the HTTP/2 stream; nothing to do where it is gone
	}
}

func (x *exchange) run() (keep time.Duration, reuse bool, err error) {
	sendErr := x.send()
	if errors.Is(sendErr, ErrClient) || errors.Is(sendErr, ErrBody) {
		return 0, false, sendErr
	}
	resp, err := x.receive() //nolint:bodyclose // read to its end by deliver, or its connection is closed; Close would wait for the rest
	if err != nil {
		if sendErr != nil {
			err = fmt.Errorf("%w (%w)", err, sendErr)
		}
		return 0, false, err
	}
	x.answered = time.Now()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if x.out.Stream != nil {
			return 0, false, x.stream(resp)
		}
		return 0, false, x.tunnel(resp)
	}
	if err := x.deliver(resp); err != nil {
		return 0, false, err
	}
	return keepHint(resp.Header), !resp.Close && sendErr == nil, nil
}

// send writes the request, and its body when that cannot block for long.
func (x *exchange) send() error {
	bw, r := x.conn.bw, x.r
	size := r.ContentLength
	if r.Body == nil || r.Body == http.NoBody {
		size = 0
	}
	expect := size != 0 && strings.EqualFold(r.Header.Get("Expect"), "100-continue")
	if _, err := bw.Write(x.appendHead(bw.AvailableBuffer(), size, expect)); err != nil {
		return fmt.Errorf("send head: %w", err)
	}
	x.uploaded = true
	switch {
	case size == 0:
	case size > 0 && size <= inline && !expect:
		x.uploaded = false
		if err := x.copyBody(); err != nil {
			return err
		}
		x.uploaded = true
	default:
		x.uploaded = false
		if r.ProtoMajor == 1 {
			// Without it the server reads the rest of the body itself before it
			// sends the answer's head, under our feet.
			if err := x.rc.EnableFullDuplex(); err != nil {
				return fmt.Errorf("%w: full duplex: %w", ErrClient, err)
			}
		}
		if expect {
			x.goAhead = make(chan bool, 1)
		}
		if err := bw.Flush(); err != nil {
			return fmt.Errorf("send head: %w", err)
		}
		x.upload = make(chan error, 1)
		go x.sendBody()
		return nil
	}
	if err := bw.Flush(); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	return nil
}

// HopByHop reports the fields that belong to one connection (RFC 9110, section
// 7.6.1) and those that are written from what the server parsed.
func HopByHop(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
		"Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length", "Host", "Http2-Settings":
		return true
	}
	return false
}

// connectionListed returns the fields that the Connection header declares to be
// hop-by-hop, beside the usual ones.
func connectionListed(h http.Header) map[string]bool {
	var listed map[string]bool
	for _, v := range h["Connection"] {
		for token := range strings.SplitSeq(v, ",") {
			token = strings.TrimSpace(token)
			if token == "" || strings.EqualFold(token, "keep-alive") || strings.EqualFold(token, "close") || strings.EqualFold(token, "upgrade") {
				continue
			}
			if listed == nil {
				listed = map[string]bool{}
			}
			listed[http.CanonicalHeaderKey(token)] = true
		}
	}
	return listed
}

func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, "\r\n"...)
}

// appendHead appends the request's head. Method, names and values are free of
// line breaks: the server checked them.
func (x *exchange) appendHead(b []byte, size int64, expect bool) []byte {
	r := x.r
	b = append(b, r.Method...)
	b = append(b, ' ')
	b = append(b, x.out.Target...)
	b = append(b, " HTTP/1.1\r\n"...)
	b = appendField(b, "Host", x.out.Host)
	listed := connectionListed(r.Header)
	for name, values := range r.Header {
		if HopByHop(name) || listed[name] || name == "Expect" && !expect || x.out.Drop != nil && x.out.Drop(name) {
			continue
		}
		for _, v := range values {
			b = appendField(b, name, v)
		}
	}
	for _, f := range x.out.Set {
		b = appendField(b, f.Name, f.Value)
	}
	for _, v := range r.Header["Te"] {
		if strings.EqualFold(strings.TrimSpace(v), "trailers") {
			b = appendField(b, "Te", "trailers")
		}
	}
	if x.out.Upgrade != "" {
		b = appendField(b, "Connection", "Upgrade")
		b = appendField(b, "Upgrade", x.out.Upgrade)
	}
	switch {
	case size > 0:
		b = appendField(b, "Content-Length", strconv.FormatInt(size, 10))
	case size < 0:
		b = appendField(b, "Transfer-Encoding", "chunked")
		for name := range r.Trailer {
			if !forbiddenTrailer(name, x.out) {
				b = appendField(b, "Trailer", name)
			}
		}
	case r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch:
		b = appendField(b, "Content-Length", "0")
	}
	return append(b, "\r\n"...)
}

// forbiddenTrailer reports trailer fields that a service might merge into the
// header and then trust.
func forbiddenTrailer(name string, out *Out) bool {
	if HopByHop(name) || out.Drop != nil && out.Drop(name) {
		return true
	}
	for _, f := range out.Set {
		if strings.EqualFold(f.Name, name) {
			return true
		}
	}
	switch name {
	case "Authorization", "Cookie", "Expect", "Content-Type", "Content-Encoding", "Content-Range", "Range":
		return true
	}
	return false
}

// errUnwanted: the service answered instead of asking for the body.
var errUnwanted = errors.New("the body was not asked for")

// sendBody runs beside the answer.
func (x *exchange) sendBody() {
	if x.goAhead != nil {
		t := time.NewTimer(continueWait)
		defer t.Stop()
		select {
		case wanted := <-x.goAhead:
			if !wanted {
				x.upload <- errUnwanted
				return
			}
		case <-t.C:
		}
	}
	err := x.copyBody()
	if errors.Is(err, ErrBody) {
		hangUp(x.conn) // the service would wait for the rest, and we for its answer
	}
	x.upload <- err
}

// copyBody sends the request's body and, when it is chunked, its trailers.
func (x *exchange) copyBody() error {
	bw, r := x.conn.bw, x.r
	chunked := r.ContentLength < 0
	timed := !chunked && r.ProtoMajor == 1
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	for {
		if timed {
			x.rc.SetReadDeadline(time.Now().Add(x.pool.cfg.StallTimeout)) //nolint:errcheck // where it is not supported the connection's own limits hold
		}
		n, err := r.Body.Read(buf[:])
		x.octets.In += int64(n)
		if n > 0 {
			if werr := x.writeBody(buf[:n], chunked); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrBody, err)
		}
	}
	if timed {
		x.rc.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	}
	var err error
	if chunked {
		_, err = bw.Write(x.appendTrailers(bw.AvailableBuffer()))
	}
	if err = errors.Join(err, bw.Flush()); err != nil {
		return fmt.Errorf("send body: %w", err)
	}
	return nil
}

// appendTrailers appends the last chunk and the trailers, which are known now.
func (x *exchange) appendTrailers(b []byte) []byte {
	b = append(b, "0\r\n"...)
	for name, values := range x.r.Trailer {
		for _, v := range values {
			if !forbiddenTrailer(name, x.out) && !strings.ContainsAny(v, "\r\n\x00") {
				b = appendField(b, name, v)
			}
		}
	}
	return append(b, "\r\n"...)
}

func (x *exchange) writeBody(b []byte, chunked bool) error {
	bw := x.conn.bw
	var err error
	if chunked {
		_, err = bw.Write(append(strconv.AppendInt(bw.AvailableBuffer(), int64(len(b)), 16), '\r', '\n'))
	}
	if err == nil {
		_, err = bw.Write(b)
	}
	if chunked && err == nil {
		_, err = bw.WriteString("\r\n")
	}
	if (chunked || len(b) > inline) && err == nil {
		err = bw.Flush() // a stream's reader is waiting for it
	}
	if err != nil {
		return fmt.Errorf("send body: %w", err)
	}
	return nil
}

// finishUpload waits for sendBody. A service that answers without reading the
// whole body gets its connection closed; the client may send on for a moment
// before its own is, so that it sees the answer and not a reset.
func (x *exchange) finishUpload(complete bool) (err error) {
	if x.upload == nil {
		return nil
	}
	select {
	case err = <-x.upload:
	default:
		hangUp(x.conn)
		deadline := longAgo
		if complete && x.r.ProtoMajor == 1 {
			x.flush()
			deadline = time.Now().Add(linger)
		}
		x.rc.SetReadDeadline(deadline) //nolint:errcheck // ends the wait below
		x.proceed(false)
		err = <-x.upload
		if complete && x.r.ProtoMajor == 1 && !errors.Is(err, ErrBody) && !errors.Is(err, errUnwanted) {
			io.CopyN(io.Discard, x.r.Body, 256<<10) //nolint:errcheck // best effort within the deadline
		}
	}
	x.upload = nil
	x.uploaded = err == nil
	return err
}

// proceed tells sendBody whether to go on; the first word counts.
func (x *exchange) proceed(wanted bool) {
	select {
	case x.goAhead <- wanted: // never, when goAhead is nil
	default:
	}
}

// receive reads the head of the answer and passes interim ones on.
func (x *exchange) receive() (*http.Response, error) {
	for range interim {
		resp, err := x.readHead()
		if err != nil {
			return nil, err
		}
		switch code := resp.StatusCode; {
		case code == http.StatusSwitchingProtocols:
			if x.out.Upgrade == "" || !strings.EqualFold(resp.Header.Get("Upgrade"), x.out.Upgrade) {
				return nil, fmt.Errorf("%w: it switched to a protocol nobody asked for", ErrAnswer)
			}
			return resp, nil
		case code >= 200:
			return resp, nil
		case code == http.StatusContinue:
			x.proceed(true) // reading the body tells the client
		case code < 100:
			return nil, fmt.Errorf("%w: status %d", ErrAnswer, code)
		case x.r.ProtoAtLeast(1, 1):
			h := x.w.Header()
			copyHeader(h, resp.Header)
			x.w.WriteHeader(code)
			clear(h)
		}
	}
	return nil, fmt.Errorf("%w: over %d interim answers", ErrAnswer, interim)
}

func (x *exchange) readHead() (*http.Response, error) {
	c := x.conn
	c.head.left = x.pool.cfg.HeadBytes
	_, err := c.br.Peek(1)
	if err != nil {
		if c.reused && x.replayable() && x.r.Context().Err() == nil && !x.pool.closed.Load() {
			return nil, errStale
		}
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	c.reused = false // it speaks: no second try
	slow := false
	if b, _ := c.br.Peek(c.br.Buffered()); !bytes.Contains(b, []byte("\r\n\r\n")) {
		slow = true
		c.SetReadDeadline(time.Now().Add(x.pool.cfg.HeadTimeout)) //nolint:errcheck // a dead connection shows in the read
	}
	resp, err := http.ReadResponse(c.br, x.r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	if slow {
		c.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	}
	c.head.left = math.MaxInt64
	return resp, nil
}

// replayable reports whether the request may be sent twice (RFC 9110, section 9.2.2).
func (x *exchange) replayable() bool {
	if x.r.ContentLength != 0 && x.r.Body != nil && x.r.Body != http.NoBody {
		return false
	}
	switch x.r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// copyHeader adds the end-to-end fields of src to dst.
func copyHeader(dst, src http.Header) {
	listed := connectionListed(src)
	for name, values := range src {
		switch name {
		case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
			continue
		}
		if !listed[name] {
			dst[name] = values
		}
	}
}

// deliver sends the answer to the client.
func (x *exchange) deliver(resp *http.Response) error {
	h := x.w.Header()
	copyHeader(h, resp.Header)
	if _, typed := h["Content-Type"]; !typed {
		h["Content-Type"] = nil // or the server guesses one
	}
	if resp.StatusCode == http.StatusNotModified && x.r.ProtoMajor == 2 {
		delete(h, "Content-Length") // optional there, and clients written in Go would miss the body
	}
	announced := len(resp.Trailer)
	for name := range resp.Trailer {
		h.Add("Trailer", name)
	}
	if x.out.Answer != nil {
		x.out.Answer(resp.StatusCode, h)
	}
	if x.r.ProtoMajor == 1 && x.upload != nil && len(x.upload) == 0 {
		// The body is still on its way: were the connection kept, its rest could
		// be taken for the next request.
		h.Set("Connection", "close")
	}
	x.started.Store(true)
	if x.pool.closed.Load() { // it may not have seen started
		x.started.Store(false)
		clear(h)
		return ErrReset
	}
	x.status = resp.StatusCode
	x.w.WriteHeader(resp.StatusCode)
	if err := x.copyAnswer(resp); err != nil {
		return err
	}
	if announced > 0 && x.r.ProtoMajor == 1 {
		x.flush() // trailers need chunks
	}
	for name, values := range resp.Trailer {
		if len(resp.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
	return nil
}

func (x *exchange) flush() {
	if f, ok := x.w.(http.Flusher); ok {
		f.Flush()
	}
}

// copyAnswer copies the body. It flushes whenever the service has nothing more
// at hand, so that events and frames arrive one by one, and holds a buffer only
// while there are bytes.
func (x *exchange) copyAnswer(resp *http.Response) error {
	if resp.Body == http.NoBody {
		return nil
	}
	br := x.conn.br
	var sent int64
	defer func() {
		if x.timed {
			x.rc.SetWriteDeadline(time.Time{}) //nolint:errcheck // a dead connection shows in the next write
		}
	}()
	for {
		if br.Buffered() == 0 && sent != resp.ContentLength {
			if sent > 0 || resp.ContentLength < 0 {
				x.flush()
			}
			br.Peek(1) //nolint:errcheck // the error shows in the read
		}
		n, end, err := x.copyPiece(resp.Body)
		sent += n
		x.octets.Out = sent
		if end || err != nil {
			return err
		}
		x.timed = x.r.ProtoMajor == 1
	}
}

func (x *exchange) copyPiece(body io.Reader) (n int64, end bool, err error) {
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	got, rerr := body.Read(buf[:])
	if got > 0 {
		if x.timed {
			x.rc.SetWriteDeadline(time.Now().Add(x.pool.cfg.StallTimeout)) //nolint:errcheck // where it is not supported the connection's own limits hold
		}
		if _, err := x.w.Write(buf[:got]); err != nil {
			return int64(got), false, fmt.Errorf("%w: %w", ErrClient, err)
		}
	}
	if rerr != nil && rerr != io.EOF {
		return int64(got), false, fmt.Errorf("%w: %w", ErrAnswer, rerr)
	}
	return int64(got), rerr == io.EOF, nil
}

// keepHint is how long the service says it keeps the connection, less a second;
// 0 when it does not say.
func keepHint(h http.Header) time.Duration {
	for param := range strings.SplitSeq(h.Get("Keep-Alive"), ",") {
		v, ok := strings.CutPrefix(strings.TrimSpace(param), "timeout=")
		if !ok {
			continue
		}
		s, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			continue
		}
		return max(time.Duration(s)*time.Second-time.Second, time.Millisecond)
	}
	return 0
}

// clone101 is the header of a switch of protocols, with the two fields it needs.
func clone101(resp *http.Response, protocol string) http.Header {
	h := http.Header{}
	copyHeader(h, resp.Header)
	delete(h, "Content-Length")
	h["Connection"] = []string{"Upgrade"}
	h["Upgrade"] = []string{protocol}
	return h
}
