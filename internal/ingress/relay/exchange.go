package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
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
	// Answer, when not nil, may change the header of an answer, an interim one too,
	// before it is sent on.
	Answer func(status int, h http.Header)
	// Client is the client's connection when it speaks HTTP/1, so that it can be
	// reset; nil for HTTP/2, where the stream is.
	Client net.Conn
	// Switched, when not nil, is called when a tunnel has taken over.
	Switched func()
	// Done is called once, when the exchange and the tunnel that may follow have
	// ended; it gets the tunnel's octets, nil when there was none.
	Done func(tunnel *Octets)
}

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

	upload   chan error  // result of sendBody; nil when the body is not sent beside the answer
	goAhead  chan bool   // whether the service wants the body; nil when it need not be asked
	interim  sync.Mutex  // held while something is sent before the answer's body
	read     atomic.Bool // the whole body is read from the client
	uploaded bool        // and sent
	detached bool        // a tunnel took over
	octets   Octets      // In is the upload's until it has ended
	answered time.Time   // when the head of the answer was there
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
	} else if err != nil && r.Context().Err() != nil && !errors.Is(err, ErrBody) {
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
		x.sayContinue()
	}
	err := x.copyBody()
	if errors.Is(err, ErrBody) {
		hangUp(x.conn) // the service would wait for the rest, and we for its answer
	}
	x.upload <- err
}

// sayContinue tells a client of HTTP/1 to send its body. Its server would do so when
// the body is read, and not take care that no other interim answer is on its way.
func (x *exchange) sayContinue() {
	if x.r.ProtoMajor != 1 {
		return
	}
	x.interim.Lock()
	defer x.interim.Unlock()
	if x.started.Load() {
		return
	}
	h := x.w.Header()
	ours := maps.Clone(h)
	clear(h)
	x.w.WriteHeader(http.StatusContinue)
	maps.Copy(h, ours)
}

// copyBody sends the request's body and, when it is chunked, its trailers.
func (x *exchange) copyBody() error {
	bw, r := x.conn.bw, x.r
	chunked := r.ContentLength < 0
	timed := !chunked
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
			x.read.Store(true)
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
