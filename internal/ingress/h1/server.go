package h1

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// state is what a connection does; who changes it from idle decides what
// becomes of it.
type state = int32

const (
	idle  state = iota // waiting for a request; may be closed by Shutdown
	busy               // serving one
	ended              // told to close by Shutdown
)

// ServeConn serves one connection until it ends, is closed or is taken over
// (Hijack), and returns then; it has closed nc unless it was taken over. secured
// is the state of nc's TLS, nil for none. ctx is the parent of every request's context.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn, secured *tls.ConnectionState) (hijacked bool) {
	c := &conn{s: s, rwc: nc, tls: secured}
	if a := nc.RemoteAddr(); a != nil {
		c.remote = a.String()
	}
	c.ctx = context.WithValue(ctx, http.LocalAddrContextKey, nc.LocalAddr())
	c.watch.cond.L = &c.watch.mu
	if !s.admit(c) {
		nc.Close()
		return false
	}
	defer s.forget(c)
	return c.serve()
}

func (s *Server) admit(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Load() {
		return false
	}
	if s.conns == nil {
		s.conns = map[*conn]struct{}{}
	}
	s.conns[c] = struct{}{}
	return true
}

// forget is idempotent: a connection that is taken over is forgotten at once.
func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.empty != nil && len(s.conns) == 0 {
		close(s.empty)
		s.empty = nil
	}
}

// Shutdown ends idle connections at once and busy ones after their request,
// whose answer says so if it is not on its way already. It returns when none is
// left, or ctx's error when ctx ends first. Connections that were taken over are
// not the Server's any more. ServeConn closes whatever comes from now on.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing.Store(true)
	for c := range s.conns {
		if atomic.CompareAndSwapInt32(&c.state, idle, ended) {
			c.rwc.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a dead connection shows in the read
		}
	}
	var empty chan struct{}
	if len(s.conns) > 0 {
		if s.empty == nil {
			s.empty = make(chan struct{})
		}
		empty = s.empty
	}
	s.mu.Unlock()
	if empty == nil {
		return nil
	}
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends all connections now, without a farewell of TLS's, which a peer that
// does not read could hold up. It does not wait for their handlers, whose
// requests are cancelled.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing.Store(true)
	for c := range s.conns {
		innermost(c.rwc).Close()
		if x := c.watch.current.Load(); x != nil {
			x.cancel()
		}
	}
	return nil
}

// innermost returns the connection below TLS and the like.
func innermost(c net.Conn) net.Conn {
	for {
		outer, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		c = outer.NetConn()
	}
}

func (s *Server) headerBytes() int {
	if s.HeaderBytes > 0 {
		return s.HeaderBytes
	}
	return 64 << 10
}

func (s *Server) headerTimeout() time.Duration {
	if s.HeaderTimeout > 0 {
		return s.HeaderTimeout
	}
	return 10 * time.Second
}

func (s *Server) idleTimeout() time.Duration {
	if s.IdleTimeout > 0 {
		return s.IdleTimeout
	}
	return 2 * time.Minute
}

func (s *Server) stallTimeout() time.Duration {
	if s.StallTimeout > 0 {
		return s.StallTimeout
	}
	return 5 * time.Minute
}

func (s *Server) log() *slog.Logger {
	if s.Log != nil {
		return s.Log
	}
	return slog.New(slog.DiscardHandler)
}

// dateLine is a Date field, good for one second.
type dateLine struct {
	second int64
	field  string
}

func (s *Server) dateField() string {
	now := time.Now()
	d := s.date.Load()
	if d == nil || d.second != now.Unix() {
		d = &dateLine{now.Unix(), "Date: " + now.UTC().Format(http.TimeFormat) + "\r\n"}
		s.date.Store(d)
	}
	return d.field
}
