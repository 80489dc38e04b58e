package h1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"sync"
	"sync/atomic"
	"time"
)

const (
	trailerBytes = 16 << 10        // of a trailer
	drainBytes   = 256 << 10       // of a body nobody reads, to keep the connection
	drainTime    = 5 * time.Second // for those, before the answer goes out
)

// framed reads a body from a connection up to its end and not beyond.
type framed struct {
	br     *bufio.Reader
	left   int64     // of a body with a length; -1 for one that ends with the connection
	chunks io.Reader // of a chunked one
	fields []Field   // its trailer
	err    error     // why nothing more comes; io.EOF for the end
}

func (f *framed) read(p []byte) (n int, err error) {
	if f.err != nil {
		return 0, f.err
	}
	switch {
	case f.chunks != nil:
		if n, err = f.chunks.Read(p); errors.Is(err, io.EOF) {
			if f.fields, err = readTrailer(f.br); err == nil {
				err = io.EOF
			}
		}
	case f.left >= 0:
		n, err = f.br.Read(p[:min(int64(len(p)), f.left)])
		if f.left -= int64(n); f.left == 0 {
			err = io.EOF
		} else if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
	default:
		n, err = f.br.Read(p)
	}
	if err != nil && !isTimeout(err) { // a deadline may be moved
		f.err = err
	}
	return n, err
}

// errTrailerLine: within chunked framing nobody may see a line end where
// another does not (RFC 9112, section 7.1).
var errTrailerLine = errors.New("line of a trailer without CRLF")

// readTrailer reads what follows the last chunk.
func readTrailer(br *bufio.Reader) ([]Field, error) {
	if b, err := br.Peek(2); err == nil && b[0] == '\r' && b[1] == '\n' {
		br.Discard(2) //nolint:errcheck // it is there
		return nil, nil
	}
	lines, err := readLines(br, trailerBytes)
	if err != nil {
		return nil, err
	}
	if bytes.Count(lines, []byte("\n")) != bytes.Count(lines, []byte("\r\n")) {
		return nil, errTrailerLine
	}
	return parseFields(string(lines), refuseFolds)
}

// mergeTrailer adds fields to a message's Trailer.
func mergeTrailer(dst *http.Header, fields []Field) {
	if len(fields) == 0 {
		return
	}
	came := headerOf(fields)
	if *dst == nil {
		*dst = came
		return
	}
	for name, values := range came {
		(*dst)[name] = values
	}
}

// body is a request's.
type body struct {
	x   *exchange   // nil: there is no body
	eof atomic.Bool // it was read to its end; framed does not change any more

	mu     sync.Mutex // guards the fields below and a read under way
	framed framed
	closed bool
}

func (b *body) open(x *exchange, length int64) {
	b.x = x
	b.framed = framed{br: x.c.bufs.br, left: length}
	if length < 0 {
		b.framed.chunks = httputil.NewChunkedReader(x.c.bufs.br)
	}
}

// Read asks a client that waits for it to go ahead.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	if b.x.goAhead.Load() {
		b.x.sayContinue()
	}
	return b.readLocked(p)
}

func (b *body) readLocked(p []byte) (int, error) {
	if b.framed.err != nil {
		return 0, b.framed.err
	}
	n, err := b.framed.read(p)
	switch {
	case errors.Is(err, io.EOF):
		mergeTrailer(&b.x.req.Trailer, b.framed.fields)
		b.eof.Store(true)
		b.x.c.arm(b.x)
	case err != nil:
		b.x.cancel() // the client is gone, or what it says is not understood
	}
	return n, err
}

// Close ends the reading. What is left is read after the handler, if it is little.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

func (b *body) trailer() []Field {
	if !b.eof.Load() {
		return nil
	}
	return b.framed.fields
}

// done reports whether the body was read to its end.
func (b *body) done() bool { return b.x == nil || b.eof.Load() }

// drain reads the rest of the body if it is not much, and reports whether the
// connection is at its end then; if so, nobody can read from the body any more.
func (b *body) drain() bool {
	if b.x == nil {
		return true
	}
	if !b.mu.TryLock() {
		return false // somebody reads it, who knows how long
	}
	defer b.mu.Unlock()
	if b.framed.err == nil && b.framed.left <= drainBytes {
		if !b.x.timed.Load() {
			b.x.c.setReadDeadline(time.Now().Add(drainTime))
		}
		scrap := make([]byte, 4<<10)
		for n, total, err := 0, 0, error(nil); err == nil && total <= drainBytes; total += n {
			n, err = b.readLocked(scrap)
		}
	}
	b.closed = b.closed || b.eof.Load()
	return b.eof.Load()
}

// take ends the reading for good, because the connection is taken over. It
// reports whether nobody is reading.
func (b *body) take() bool {
	if b.x == nil {
		return true
	}
	if !b.mu.TryLock() {
		return false
	}
	defer b.mu.Unlock()
	b.closed = true
	return true
}
