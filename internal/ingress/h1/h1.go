// Package h1 speaks HTTP/1.1 (RFC 9112) and hides the framing of its messages:
// where a head and a body end, when a connection can carry another request, how
// a body is cut in chunks. It reads requests and writes answers for an
// http.Handler as net/http's server does, with one difference, which is why it
// exists: the names of header and trailer fields, their order and their
// duplicates are kept as they were sent, in both directions. Where it is
// stricter than net/http, it is so that nobody behind it can read a request in
// another way; TestStricterThanNetHTTP lists those places.
package h1

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Field is a field of a header or trailer as it was sent.
type Field struct{ Name, Value string }

// FieldWriter is what the ResponseWriter of a Server can do besides: send a
// header whose names and order count.
type FieldWriter interface {
	// WriteFields sends the status and header, once and instead of WriteHeader; an
	// interim status (1xx, not 101) may come before it. Content-Length, Date and
	// Trailer are taken from fields, Connection is heeded ("close"), framing is the
	// Server's: chunked without a Content-Length, Transfer-Encoding is left out. A
	// Date is added where there is none; a Content-Type is not guessed. Header() is
	// ignored, except for trailers that are set in it later.
	WriteFields(status int, fields []Field)
	// WriteTrailers says what the trailer of a chunked answer will be. Called before
	// the body, it makes the answer a chunked one unless its length is declared;
	// called after it, the answer must be chunked already (for it was flushed, is
	// long, or has a Trailer field), or else it has no trailer.
	WriteTrailers(fields []Field)
}

// Server serves connections of HTTP/1.0 and 1.1.
type Server struct {
	Handler       http.Handler
	HeaderBytes   int           // of a request line and header together, over it: 431; 0 for 64 KiB
	HeaderTimeout time.Duration // from the first byte waited for of a connection, from the first byte of a later request; 0 for 10 s
	IdleTimeout   time.Duration // between requests of a kept connection, or a little more; 0 for 2 min
	StallTimeout  time.Duration // for the client to take 64 KiB of an answer, or a little more, where the handler sets no deadline; 0 for 5 min
	Log           *slog.Logger  // clients' doing at Debug, a handler's panic at Error; nil for none

	closing atomic.Bool
	date    atomic.Pointer[dateLine]

	mu    sync.Mutex         // guards the fields below
	conns map[*conn]struct{} // neither ended nor taken over
	empty chan struct{}      // not nil once somebody waits; closed when conns is empty
}

// exchangeKey finds the exchange in a request's context.
type exchangeKey struct{}

// requestContext is the context of a request.
type requestContext struct {
	context.Context
	x *exchange
}

func (c *requestContext) Value(key any) any {
	if _, ok := key.(exchangeKey); ok {
		return c.x
	}
	return c.Context.Value(key)
}

func exchangeOf(r *http.Request) *exchange {
	x, _ := r.Context().Value(exchangeKey{}).(*exchange)
	return x
}

// Fields returns the header of r as it came: spelling, order and duplicates;
// nil when r was not read by a Server. Host, Content-Length and the like are in
// it too. It must not be changed.
func Fields(r *http.Request) []Field {
	if x := exchangeOf(r); x != nil {
		return x.fields
	}
	return nil
}

// Trailers returns the trailer of r as it came, once its body is read to the
// end; nil before.
func Trailers(r *http.Request) []Field {
	if x := exchangeOf(r); x != nil {
		return x.body.trailer()
	}
	return nil
}
