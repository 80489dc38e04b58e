package ingress

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// Services speak HTTP/1.1, HTTP/2 without TLS ("h2c"), or both, and nothing of a
// request says which. HTTP/1.1 is tried first. What a port speaks is learned from its
// answers, and by asking it where HTTP/1.1 cannot do: a client that goes on sending
// while it is answered needs HTTP/2 all the way.

// speech is what is known of a port.
type speech struct {
	http1 atomic.Bool // it has answered in HTTP/1
	only2 atomic.Bool // it speaks HTTP/2 and does not understand HTTP/1

	mu    sync.Mutex // guards the fields below, and lets one ask at a time
	http2 bool
	until time.Time // before then it is not asked again
}

const (
	// speechPorts bounds what is remembered of a sandbox's ports.
	speechPorts = 1024
	// askTimeout is how long a port may think about whether it speaks HTTP/2.
	askTimeout = time.Second
	// believeNo is how long a port that does not is not asked again, since another
	// service may have taken it; believeSilence, one that said nothing in time.
	believeNo, believeSilence = time.Minute, 5 * time.Second
	// heldBody is the size up to which the body of a request to a port of which
	// nothing is known is held, so that it can be sent in the other protocol.
	heldBody = 16 << 10
)

// speech returns what is known of a port, to be added to.
func (b *backend) speech(port uint16) *speech {
	if s, ok := b.speeches.Load(port); ok {
		return s.(*speech)
	}
	if b.spoken.Add(1) > speechPorts {
		b.speeches.Clear()
		b.spoken.Store(1)
	}
	s, _ := b.speeches.LoadOrStore(port, &speech{})
	return s.(*speech)
}

// forget is called when a port has not done what was known of it.
func (b *backend) forget(port uint16) {
	if _, had := b.speeches.LoadAndDelete(port); had {
		b.spoken.Add(-1)
	}
}

// byHTTP2 decides how a request is sent to the service.
func (v *visit) byHTTP2(c *call) bool {
	r := v.r
	switch {
	case isGRPC(r):
		return true // it is nothing else
	case c.upgrade != "" || c.to.port == c.target.agentPort():
		return false
	}
	s := c.backend.speech(c.to.port)
	switch {
	case s.only2.Load():
		return true
	case r.ProtoMajor == 2 && r.ContentLength < 0:
		return c.backend.speaksHTTP2(r.Context(), c.to.port, s)
	case !s.http1.Load() && (r.ContentLength < 0 || r.ContentLength > heldBody): // it could not be sent again
		if c.backend.speaksHTTP2(r.Context(), c.to.port, s) && !c.backend.answersHTTP1(r.Context(), c.to.port) {
			s.only2.Store(true)
		}
		return s.only2.Load()
	}
	if !s.http1.Load() && r.ContentLength > 0 {
		c.held = &heldReader{from: r.Body}
		v.r = r.WithContext(r.Context())
		v.r.Body = c.held
	}
	return false
}

// turnsOut reports whether a request that failed in HTTP/1 is to be sent by HTTP/2:
// the service does not understand HTTP/1 and so has not taken the request.
func (v *visit) turnsOut(c *call, err error) bool {
	s := c.backend.speech(c.to.port)
	if c.upgrade != "" || v.r.ContentLength != 0 && c.held == nil || s.http1.Load() || v.r.Context().Err() != nil {
		return false
	}
	switch {
	case errors.Is(err, relay.ErrHTTP2):
	case errors.Is(err, relay.ErrNoTLS): // the request was not sent
		if isTimeout(err) { // it would be as silent again
			return false
		}
		if !c.backend.speaksHTTP2(v.r.Context(), c.to.port, s) {
			return false
		}
	case errors.Is(err, relay.ErrNoAnswer): // as a service ends that breaks down, too
		if !c.backend.speaksHTTP2(v.r.Context(), c.to.port, s) || c.backend.answersHTTP1(v.r.Context(), c.to.port) {
			return false
		}
	default:
		return false
	}
	s.only2.Store(true)
	if c.held != nil {
		v.r.Body = c.held.again()
	}
	return true
}

// heldReader keeps what is read of a short body.
type heldReader struct {
	from io.ReadCloser
	kept bytes.Buffer
}

func (h *heldReader) Read(b []byte) (int, error) {
	n, err := h.from.Read(b)
	h.kept.Write(b[:n])
	return n, err
}

func (h *heldReader) Close() error { return h.from.Close() }

// again is the body from its beginning.
func (h *heldReader) again() io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(h.kept.Bytes()), h.from), h.from}
}

// speaksHTTP2 asks a port whether it speaks HTTP/2, unless that is known.
func (b *backend) speaksHTTP2(ctx context.Context, port uint16, s *speech) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http2 || time.Now().Before(s.until) {
		return s.http2
	}
	ctx, cancel := context.WithTimeout(ctx, b.in.cfg.Limits.DialTimeout+askTimeout)
	defer cancel()
	c, err := b.dial(ctx, port)
	if err != nil {
		return false // whoever sends the request says so
	}
	defer c.Close()
	ask := askClear
	if b.target.secure(port) {
		ask = func(_ context.Context, c net.Conn) (bool, error) { return b.askTLS(ctx, c, port) }
	}
	yes, err := ask(ctx, c)
	switch s.http2 = yes; {
	case yes:
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		s.until = time.Now().Add(believeSilence)
	default:
		s.until = time.Now().Add(believeNo)
	}
	return yes
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// beginning is how a client begins HTTP/2 (RFC 9113, section 3.4), with SETTINGS that
// change nothing.
const beginning = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// askClear begins HTTP/2 and reports whether the other side does so too.
func askClear(_ context.Context, c net.Conn) (bool, error) {
	if err := c.SetDeadline(time.Now().Add(askTimeout)); err != nil {
		return false, err
	}
	if _, err := io.WriteString(c, beginning); err != nil {
		return false, err
	}
	var head [9]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return false, err
	}
	return relay.BeginsHTTP2(head[:]), nil
}

// answersHTTP1 reports whether a port answers a request that asks for nothing.
func (b *backend) answersHTTP1(ctx context.Context, port uint16) bool {
	ctx, cancel := context.WithTimeout(ctx, b.in.cfg.Limits.DialTimeout)
	defer cancel()
	c, err := b.dial(ctx, port)
	if err != nil {
		return true // nothing is known
	}
	defer c.Close()
	if conf := b.tlsFor(port, "http/1.1"); conf != nil {
		c = tls.Client(c, conf)
	}
	if err := c.SetDeadline(time.Now().Add(askTimeout)); err != nil {
		return true
	}
	if _, err := io.WriteString(c, "OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
		return isTimeout(err)
	}
	var head [5]byte
	_, err = io.ReadFull(c, head[:])
	return isTimeout(err) || string(head[:]) == "HTTP/"
}

// askTLS lets the service choose.
func (b *backend) askTLS(ctx context.Context, c net.Conn, port uint16) (bool, error) {
	s := tls.Client(c, b.tlsFor(port, "h2", "http/1.1"))
	if err := s.HandshakeContext(ctx); err != nil {
		return false, err
	}
	return s.ConnectionState().NegotiatedProtocol == "h2", nil
}

// secure reports whether the services of a port speak TLS themselves.
func (t *Target) secure(port uint16) bool { return slices.Contains(t.HTTPSPorts, port) }

// tlsFor is for a connection to a service that speaks TLS itself, nil where it does
// not. Its certificate proves nothing: the connection goes to the sandbox's own
// address, and what is in there is not trusted anyway.
func (b *backend) tlsFor(port uint16, protocols ...string) *tls.Config {
	if !b.target.secure(port) {
		return nil
	}
	name := b.target.mask(port)
	if name == "" {
		name = fmt.Sprintf("%d-%s.%s", port, b.target.ID, b.in.cfg.Domains[0])
	} else if host, _, err := net.SplitHostPort(name); err == nil {
		name = host
	}
	return &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: protocols, MinVersion: tls.VersionTLS12} //nolint:gosec // see above
}
