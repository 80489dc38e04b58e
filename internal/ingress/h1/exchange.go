package h1

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// exchange is a request and its answer; it is the handler's ResponseWriter.
type exchange struct {
	c           *conn
	req         *http.Request
	fields      []Field // of the request
	ctx         requestContext
	cancel      context.CancelFunc
	body        body
	expected    bool // the client sent Expect: 100-continue with a body
	keepAlive10 bool // the client speaks HTTP/1.0 and asked for the connection to be kept

	interim sync.Mutex  // held while something is sent before the answer's head
	goAhead atomic.Bool // the client waits for a 100 before it sends the body
	over    atomic.Bool // the handler returned
	timed   atomic.Bool // the handler set a deadline for reading
	written atomic.Bool // and one for writing

	// The answer. Its header is laid out in c.bufs.head when the handler has
	// given it, and completed and sent when its framing is known.
	header     http.Header
	status     int   // 0 until the handler has given the header
	sent       bool  // the head
	length     int64 // declared; -1: not
	size       int64 // of the body so far
	chunked    bool
	close      bool // the connection, after the answer
	fullDuplex bool
	given      given
	declared   []string // names of the trailer's fields
	trailer    []Field  // by WriteTrailers
}

// given is what the handler's header says that framing depends on.
type given struct {
	connection string // values of Connection, joined
	coding     string // Transfer-Encoding
	typed      bool   // no Content-Type is to be guessed
	dated      bool
	trailers   bool
	raw        bool // by WriteFields
}

var (
	_ http.ResponseWriter = (*exchange)(nil)
	_ http.Flusher        = (*exchange)(nil)
	_ http.Hijacker       = (*exchange)(nil)
	_ FieldWriter         = (*exchange)(nil)
)

var (
	errOver    = errors.New("h1: the handler has returned")
	errReading = errors.New("h1: the request's body is being read")
)

// SetReadDeadline is of the request's body.
func (x *exchange) SetReadDeadline(t time.Time) error {
	if x.over.Load() {
		return errOver
	}
	x.timed.Store(!t.IsZero())
	x.c.moved.Store(true)
	return x.c.rwc.SetReadDeadline(t)
}

// SetWriteDeadline is of the answer.
func (x *exchange) SetWriteDeadline(t time.Time) error {
	if x.over.Load() {
		return errOver
	}
	x.written.Store(!t.IsZero())
	x.c.writeMoved.Store(true)
	return x.c.rwc.SetWriteDeadline(t)
}

// EnableFullDuplex says that the handler reads the body while it answers:
// otherwise the rest of it is read before the answer's head is sent, since some
// clients do not read while they write.
func (x *exchange) EnableFullDuplex() error {
	x.fullDuplex = true
	return nil
}

// Hijack hands the connection over, with what was read of it too early. The
// buffers are small: they are for the end of one protocol, not for the next one.
func (x *exchange) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c := x.c
	switch {
	case x.c.hijacked.Load():
		return nil, nil, http.ErrHijacked
	case x.over.Load():
		return nil, nil, errOver
	case !x.body.take():
		return nil, nil, errReading
	}
	x.goAhead.Store(false)
	if x.status != 0 {
		x.FlushError() //nolint:errcheck // shows in what the handler writes next
	}
	c.disarm()
	c.hijacked.Store(true)
	c.rwc.SetDeadline(time.Time{})                      //nolint:errcheck // a dead connection shows in its use
	buffered, _ := c.bufs.br.Peek(c.bufs.br.Buffered()) // never more than is there: no error
	early := &leftover{conn: c.rwc, b: append(append([]byte(nil), buffered...), c.early...)}
	c.giveBuffers()
	c.s.forget(c)
	br := bufio.NewReaderSize(early, len(early.b)) // at least 16 octets
	br.Peek(len(early.b))                          //nolint:errcheck // it is there
	return c.rwc, bufio.NewReadWriter(br, bufio.NewWriterSize(c.rwc, 512)), nil
}

// leftover reads what came early, then from the connection.
type leftover struct {
	conn net.Conn
	b    []byte
}

func (l *leftover) Read(p []byte) (int, error) {
	if len(l.b) == 0 {
		return l.conn.Read(p)
	}
	n := copy(p, l.b)
	if l.b = l.b[n:]; len(l.b) == 0 {
		l.b = nil
	}
	return n, nil
}
