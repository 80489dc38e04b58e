package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"

	"github.com/cordonhq/cordon/internal/ingress/h1"
)

// server serves one listener.
type server struct {
	Listener
	in  *Ingress
	h1  *h1.Server  // nil in mode TLSTCP
	h2  *streams    // nil where HTTP/2 is not spoken
	tls *tls.Config // of mode TLS

	open sync.WaitGroup // connections that have not been taken over

	mu     sync.Mutex         // guards the fields below
	conns  map[net.Conn]stage // but for those that h1 serves, which keeps its own
	ending bool               // no connection comes to be served any more
}

// stage is how far a connection is.
type stage uint8

const (
	greeting   stage = iota // it has not said yet what it speaks
	speakingH2              // and the server of HTTP/2 knows it, or will in a moment
)

func (in *Ingress) server(l Listener) (*server, error) {
	s := &server{Listener: l, in: in, conns: map[net.Conn]stage{}}
	switch l.Mode {
	case TLS, TLSTCP:
		if in.cfg.TLS == nil {
			return nil, errors.New("ingress: a TLS listener needs Config.TLS")
		}
	case Plain, Redirect:
	default:
		return nil, fmt.Errorf("ingress: unknown listener mode %d", l.Mode)
	}
	if l.Mode == TLSTCP {
		return s, nil
	}
	if l.Mode == TLS {
		s.tls = in.cfg.TLS.Clone()
		s.tls.MinVersion = max(s.tls.MinVersion, tls.VersionTLS12)
	}
	limits, h := in.cfg.Limits, in.Handler(l.Mode)
	s.h1 = &h1.Server{
		Handler: h, HeaderBytes: limits.HeaderBytes, HeaderTimeout: limits.HeaderTimeout, IdleTimeout: limits.IdleTimeout, Log: in.log,
	}
	if l.Mode == Redirect {
		return s, nil
	}
	var err error
	s.h2, err = newStreams(h, limits, s.tls, in.log)
	return s, err
}

// accept serves connections until the listener is closed, which ctx's end does.
// One that cannot be accepted for want of descriptors is waited for: others will end.
func (s *server) accept(ctx context.Context) error {
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	for wait := time.Duration(0); ; {
		c, err := s.Accept()
		var passing interface{ Temporary() bool }
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			if c != nil {
				c.Close()
			}
			return nil
		case errors.As(err, &passing) && passing.Temporary():
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			s.in.log.Warn("connection not accepted", "err", err)
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return fmt.Errorf("ingress: serve %s: %w", s.Addr(), err)
		}
		wait = 0
		s.open.Go(func() { s.serve(c) })
	}
}

// serve serves one connection until it ends or is taken over.
func (s *server) serve(c net.Conn) {
	info, ok := s.in.sources.enter(c)
	if !ok {
		return
	}
	if s.Mode == TLSTCP {
		defer info.release()
		s.in.serveNamed(info, c)
		return
	}
	over := false
	defer func() {
		if !over || !info.upgrading { // otherwise with the tunnel
			info.release()
		}
	}()
	if !s.begin(c, greeting) {
		return
	}
	defer s.end(c)
	ctx := info.within(s.in.base)
	conn, protocol, err := s.greet(ctx, c)
	if err != nil {
		s.in.log.Debug("connection not served", "src", info.addr, "err", err)
		c.Close()
		return
	}
	if protocol == http2.NextProtoTLS {
		if s.begin(c, speakingH2) {
			s.h2.serve(ctx, conn)
		}
		return
	}
	var state *tls.ConnectionState
	if secure, ok := conn.(*tls.Conn); ok {
		st := secure.ConnectionState()
		state = &st
	}
	s.end(c) // h1 ends it from here on
	over = s.h1.ServeConn(ctx, conn, state)
}

// begin notes that c is at that stage, until end. It returns false, and has closed
// c, when the server has begun to end.
func (s *server) begin(c net.Conn, at stage) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		c.Close()
		return false
	}
	s.conns[c] = at
	return true
}

func (s *server) end(c net.Conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

// greet finds out which protocol a new connection speaks, and gets through the
// handshake of TLS.
func (s *server) greet(ctx context.Context, c net.Conn) (conn net.Conn, protocol string, err error) {
	if s.h2 == nil {
		return c, "", nil
	}
	c.SetDeadline(time.Now().Add(s.in.cfg.Limits.HeaderTimeout)) //nolint:errcheck // a dead connection shows in what follows
	defer c.SetDeadline(time.Time{})                             //nolint:errcheck // as above
	if s.Mode != TLS {
		protocol, err = preface(c)
		return c, protocol, err
	}
	secure := tls.Server(c, s.tls)
	if err := secure.HandshakeContext(ctx); err != nil {
		mistaken(err)
		return nil, "", fmt.Errorf("TLS handshake: %w", err)
	}
	return secure, secure.ConnectionState().NegotiatedProtocol, nil
}

// mistaken answers a client that speaks HTTP to a port of TLS in its own words.
func mistaken(err error) {
	var not tls.RecordHeaderError
	if !errors.As(err, &not) || not.Conn == nil {
		return
	}
	switch string(not.RecordHeader[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO":
		io.WriteString(not.Conn, "HTTP/1.0 400 Bad Request\r\n\r\nThis port speaks HTTPS: use https:// in the URL.\n") //nolint:errcheck // it is closed next
	}
}

// preface returns what a client without TLS speaks: HTTP/2 with prior knowledge (RFC
// 9113, section 3.4) or "", which is HTTP/1. It waits until that is certain and takes
// nothing off the connection. What is no socket speaks HTTP/1.
func preface(c net.Conn) (protocol string, err error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return "", nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return "", err
	}
	var b [len(http2.ClientPreface)]byte
	var n int
	if waited := raw.Read(func(fd uintptr) bool {
		for {
			n, _, err = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
			if !errors.Is(err, syscall.EINTR) {
				break
			}
		}
		if errors.Is(err, syscall.EAGAIN) {
			return false
		}
		// More octets come with another event; an end does too, but leaves the beginning there.
		return err != nil || n == 0 || n == len(b) || !strings.HasPrefix(http2.ClientPreface, string(b[:n]))
	}); waited != nil {
		return "", fmt.Errorf("wait for the first bytes: %w", waited)
	}
	if err == nil && n == len(b) && string(b[:]) == http2.ClientPreface {
		return http2.NextProtoTLS, nil
	}
	return "", err
}

// shutdown lets requests under way finish until ctx ends, and what is idle end.
func (s *server) shutdown(ctx context.Context) {
	s.mu.Lock()
	s.ending = true
	for c, at := range s.conns {
		if at == greeting {
			c.Close()
		}
	}
	s.mu.Unlock()
	if s.h1 == nil {
		return
	}
	var h2 sync.WaitGroup
	if s.h2 != nil {
		h2.Go(func() { s.shutdownH2(ctx) })
	}
	s.h1.Shutdown(ctx) //nolint:errcheck // ctx has ended: close follows
	h2.Wait()
}

// shutdownH2 tells clients of HTTP/2 to go away, which they do with their last
// stream, and says so again for connections of which the server did not know yet.
func (s *server) shutdownH2(ctx context.Context) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for s.speaking() && ctx.Err() == nil {
		s.h2.shutdown(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (s *server) speaking() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns) > 0
}

// close ends every connection at once, and those that are still to come.
func (s *server) close() {
	if s.h1 != nil {
		s.h1.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending = true
	for c := range s.conns {
		c.Close()
	}
}
