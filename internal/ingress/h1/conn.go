package h1

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// conn is a connection being served.
type conn struct {
	s      *Server
	rwc    net.Conn
	tls    *tls.ConnectionState
	remote string
	ctx    context.Context
	state  state // atomic

	// While idle a connection has no buffers but small, which holds the greater
	// part of requests whole; early is what is in it and not yet read from bufs.br.
	bufs  *buffers
	small [1 << 10]byte
	early []byte

	watch    watch
	writeErr atomic.Bool // the client does not get what is written
	hijacked atomic.Bool // taken over: not the Server's any more

	deadline time.Time   // for reading, as the idle connection last set it
	moved    atomic.Bool // by others since
	posted   bool        // the last request was a POST

	writeBy    time.Time   // deadline for writing, as limitWrite last set it
	writeMoved atomic.Bool // by others since
}

// Read is what bufs.br reads from.
func (c *conn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.rwc.Read(p)
}

// Write is what bufs.bw writes to.
func (c *conn) Write(p []byte) (n int, err error) {
	x := c.watch.current.Load()
	for n < len(p) && err == nil {
		if x == nil || !x.written.Load() {
			c.limitWrite()
		}
		var taken int
		taken, err = c.rwc.Write(p[n:min(len(p), n+writePiece)])
		n += taken
	}
	if err != nil {
		c.writeErr.Store(true)
		if x != nil {
			x.cancel()
		}
	}
	return n, err
}

// writePiece is what a client has StallTimeout for.
const writePiece = 64 << 10

// limitWrite gives a client that does not read some time; as in await, the deadline
// is moved only when it would come too early.
func (c *conn) limitWrite() {
	now, patience := time.Now(), c.s.stallTimeout()
	if !c.writeBy.Before(now.Add(patience)) && !c.writeMoved.Load() {
		return
	}
	c.writeBy = now.Add(patience + patience/16)
	c.writeMoved.Store(false)
	c.rwc.SetWriteDeadline(c.writeBy) //nolint:errcheck // a dead connection shows in the write
}

// setReadDeadline is for everyone but await, which spares itself most calls.
func (c *conn) setReadDeadline(t time.Time) {
	c.moved.Store(true)
	c.rwc.SetReadDeadline(t) //nolint:errcheck // a dead connection shows in the read
}

// serve serves requests one after the other.
func (c *conn) serve() (hijacked bool) {
	defer func() { // also when a handler ends its goroutine
		if !c.hijacked.Load() {
			c.giveBuffers()
			c.rwc.Close()
		}
	}()
	for first := true; c.await(first) && c.serveOne(first); {
		first = false
	}
	return c.hijacked.Load()
}

// serveOne reads a request, has it answered and reports whether another may follow.
func (c *conn) serveOne(first bool) bool {
	x := &exchange{c: c, length: -1}
	if err := c.next(x, first); err != nil {
		c.refuse(err)
		return false
	}
	return c.answer(x)
}

// await waits for the first octets of a request. It reports false when none
// will come or be served.
func (c *conn) await(first bool) bool {
	c.skipLineEnd()
	if c.bufs != nil && (c.bufs.br.Buffered() > 0 || len(c.early) > 0) {
		return !c.s.closing.Load() // pipelined
	}
	c.giveBuffers()
	atomic.StoreInt32(&c.state, idle)
	patience := c.s.idleTimeout()
	if first {
		patience = c.s.headerTimeout()
	}
	// Setting a deadline costs more than looking at the clock: it is moved only
	// when it would come too early, and then a little too far.
	now := time.Now()
	if c.deadline.Before(now.Add(patience)) || first || c.moved.Load() {
		if c.deadline = now.Add(patience); !first {
			c.deadline = c.deadline.Add(patience / 16)
		}
		c.moved.Store(false)
		c.rwc.SetReadDeadline(c.deadline) //nolint:errcheck // a dead connection shows in the read
	}
	if c.s.closing.Load() { // Shutdown may not have seen that this one is idle, or its deadline is overwritten
		return false
	}
	n, err := c.rwc.Read(c.small[:])
	if n == 0 {
		if err != nil && !errors.Is(err, io.EOF) && !isTimeout(err) {
			c.s.log().Debug("connection lost", "client", c.remote, "err", err)
		}
		return false
	}
	if !atomic.CompareAndSwapInt32(&c.state, idle, busy) {
		return false
	}
	c.early = c.small[:n]
	c.takeBuffers()
	c.bufs.br.Peek(1) //nolint:errcheck // takes what came early
	return true
}

// skipLineEnd takes the line end too many that some old clients send after a
// POST (RFC 9112, section 2.2).
func (c *conn) skipLineEnd() {
	if !c.posted || c.bufs == nil {
		return
	}
	br := c.bufs.br
	for b, _ := br.Peek(min(2, br.Buffered())); len(b) > 0 && (b[0] == '\r' || b[0] == '\n'); b = b[1:] {
		br.Discard(1) //nolint:errcheck // it is there
	}
}

// next reads a request's head.
func (c *conn) next(x *exchange, first bool) error {
	c.skipLineEnd()
	timed := first // the deadline of the first is running
	head, err := readHead(c.bufs.br, c.s.headerBytes(), func(begun []byte) error {
		if !timed {
			timed = true
			c.setReadDeadline(time.Now().Add(c.s.headerTimeout()))
		}
		return begunWell(begun)
	})
	if err == nil {
		err = x.readRequest(head)
	}
	if err != nil {
		return err
	}
	c.posted = x.req.Method == http.MethodPost
	if x.body.x != nil {
		c.setReadDeadline(time.Time{})
	}
	return nil
}

// answer has a request answered and reports whether another may follow.
func (c *conn) answer(x *exchange) (keep bool) {
	returned := false
	defer func() {
		c.watch.current.Store(nil)
		if !returned {
			keep = false
			c.broken(x, recover())
		}
	}()
	c.watch.current.Store(x)
	if x.body.x == nil {
		c.arm(x)
	}
	c.s.Handler.ServeHTTP(x, x.req)
	returned = true
	x.over.Store(true)
	x.cancel()
	if c.hijacked.Load() {
		return false
	}
	x.finish()
	c.disarm()
	if x.keep() {
		return true
	}
	x.shut()
	if !x.body.done() && !c.writeErr.Load() {
		c.linger()
	}
	return false
}

// broken ends an exchange whose handler did not return: it panicked with v, or
// ended its goroutine.
func (c *conn) broken(x *exchange, v any) {
	if v != nil && v != http.ErrAbortHandler { //nolint:errorlint // a panic's value, compared as net/http does
		c.s.log().Error("request handler panicked", "client", c.remote, "err", v, "stack", string(debug.Stack()))
	}
	x.over.Store(true)
	x.cancel()
	if !c.hijacked.Load() {
		c.disarm()
		x.shut()
	}
}
