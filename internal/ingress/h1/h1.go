// Package h1 speaks HTTP/1.1 (RFC 9112) and hides the framing of its messages:
// where a head and a body end, when a connection can carry another request, how
// a body is cut in chunks. It reads requests and writes answers for an
// http.Handler as net/http's server does, with one difference, which is why it
// exists: the names of header and trailer fields, their order and their
// duplicates are kept as they were sent, in both directions.
package h1

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Field is a field of a header or trailer as it was sent.
type Field struct{ Name, Value string }

// FieldWriter is what the ResponseWriter of a Server can do besides: send a
// header whose names and order count.
type FieldWriter interface {
	// WriteFields sends the status and header. Framing (Content-Length present or
	// chunked, Connection, Date if absent) obeys the same rules as with WriteHeader:
	// it reads Content-Length, Connection, Trailer and Date from fields. Header() is
	// ignored, except for trailers set later.
	WriteFields(status int, fields []Field)
	// WriteTrailers says what the trailer of a chunked answer will be, before the
	// handler returns.
	WriteTrailers(fields []Field)
}

// Server serves connections of HTTP/1.0 and 1.1.
type Server struct {
	Handler       http.Handler
	HeaderBytes   int           // of a request line and header together; over it: 431
	HeaderTimeout time.Duration // from the first byte waited for of a connection; from the first byte of a later request
	IdleTimeout   time.Duration // between requests of a kept connection
	Log           *slog.Logger  // Debug: clients' doing
}

var errTodo = errors.New("h1: not written yet")

// ServeConn serves one connection.
func (s *Server) ServeConn(ctx context.Context, c net.Conn, state *tls.ConnectionState) (hijacked bool) {
	c.Close()
	return false
}

// Shutdown ends the server politely.
func (s *Server) Shutdown(ctx context.Context) error { return errTodo }

// Close ends all connections now.
func (s *Server) Close() error { return errTodo }

// Fields returns the header of r as it came.
func Fields(r *http.Request) []Field { return nil }

// Trailers returns the trailer of r as it came.
func Trailers(r *http.Request) []Field { return nil }

// Spell lays a header out as original was.
func Spell(dst []Field, h http.Header, original []Field) []Field { return dst }

// ReadResponse reads the head of an answer.
func ReadResponse(br *bufio.Reader, r *http.Request) (resp *http.Response, fields []Field, err error) {
	return nil, nil, errTodo
}

// ResponseTrailers returns the trailer of resp as it came, once its body is read.
func ResponseTrailers(resp *http.Response) []Field { return nil }
