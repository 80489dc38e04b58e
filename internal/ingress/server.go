package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
)

// server serves one listener.
type server struct {
	Listener
	in    *Ingress
	http1 *http.Server // nil in mode TLSTCP
	hand  *handover    // to http1
	h2    *streams     // nil where HTTP/2 is not spoken
	tls   *tls.Config  // of mode TLS

	open sync.WaitGroup // connections that have not been taken over

	mu     sync.Mutex           // guards the fields below
	conns  map[net.Conn]serving // but for those that were taken over
	ending bool                 // no connection comes to be served any more
}

// serving is how far a connection is.
type serving struct {
	at    stage
	http1 *watched
}

type stage uint8

const (
	greeting   stage = iota // it has not said yet what it speaks
	speakingH1              // and http1 has it
	speakingH2              // and h2 knows it, or will in a moment
)

func (in *Ingress) server(l Listener) (*server, error) {
	s := &server{Listener: l, in: in, conns: map[net.Conn]serving{}}
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
	h := in.Handler(l.Mode)
	s.serveHTTP1(h)
	if l.Mode == Redirect {
		return s, nil
	}
	var err error
	s.h2, err = newStreams(h, in.cfg.Limits, s.tls, in.log)
	return s, err
}

// readAhead is what net/http reads beyond Server.MaxHeaderBytes before it refuses.
const readAhead = 4 << 10

func (s *server) serveHTTP1(h http.Handler) {
	limits := s.in.cfg.Limits
	s.hand = &handover{conns: make(chan net.Conn), closed: make(chan struct{}), addr: s.Addr()}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	s.http1 = &http.Server{
		Handler: h, Protocols: &protocols, DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout: limits.HeaderTimeout, IdleTimeout: limits.IdleTimeout, MaxHeaderBytes: max(limits.HeaderBytes-readAhead, 1),
		BaseContext: func(net.Listener) context.Context { return s.in.base },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return watchedOf(c).info.within(ctx) },
		ConnState: func(c net.Conn, state http.ConnState) {
			switch info := watchedOf(c).info; state {
			case http.StateHijacked:
				info.taken = true
			case http.StateClosed:
				info.release()
				info.ended()
			}
		},
		ErrorLog: slog.NewLogLogger(s.in.log.Handler(), slog.LevelDebug), // the client's doing
	}
}

// handover is the listener of a server whose connections are accepted elsewhere.
type handover struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handover) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.closed:
		return false
	}
}

func (h *handover) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *handover) Addr() net.Addr { return h.addr }

// accept serves connections until the listener is closed, which ctx's end does.
// One that cannot be accepted for want of descriptors is waited for: others will end.
func (s *server) accept(ctx context.Context) error {
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if s.http1 != nil {
		s.open.Go(func() { s.http1.Serve(s.hand) }) //nolint:errcheck // it ends when it is shut down
	}
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
	if !s.begin(c, serving{at: greeting}) {
		info.release()
		return
	}
	handed := false
	defer func() {
		if !handed {
			s.end(c)
			info.release()
		}
	}()
	ctx := info.within(s.in.base)
	conn, protocol, err := s.greet(ctx, c)
	if err != nil {
		s.in.log.Debug("connection not served", "src", info.addr, "err", err)
		c.Close()
		return
	}
	if protocol == http2.NextProtoTLS {
		if s.begin(c, serving{at: speakingH2}) {
			s.h2.serve(ctx, conn)
		}
		return
	}
	handed = s.handOver(info, c, conn)
}

// handOver gives a connection to the server of HTTP/1, which returns it by info.ended.
// It returns false when that serves no more.
func (s *server) handOver(info *connInfo, c, conn net.Conn) bool {
	info.http1 = &watched{patient: patient{Conn: conn, stall: s.in.cfg.Limits.Relay.StallTimeout}, info: info}
	if !s.begin(c, serving{at: speakingH1, http1: info.http1}) {
		return false
	}
	s.open.Add(1)
	info.ended = sync.OnceFunc(func() {
		s.end(c)
		s.open.Done()
	})
	var given net.Conn = info.http1
	if isTLS(conn) {
		given = sealed{info.http1}
	}
	if !s.hand.give(given) {
		info.ended()
		c.Close()
		return false
	}
	return true
}

// begin notes how far c is, until end. It returns false, and has closed c, when the
// server has begun to end.
func (s *server) begin(c net.Conn, at serving) bool {
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
	for c, is := range s.conns {
		// http1 waits for five seconds for the first octet of a connection.
		if is.at == greeting || is.http1 != nil && !is.http1.begun() {
			c.Close()
		}
	}
	s.mu.Unlock()
	if s.http1 == nil {
		return
	}
	var h2 sync.WaitGroup
	if s.h2 != nil {
		h2.Go(func() { s.shutdownH2(ctx) })
	}
	s.http1.Shutdown(ctx) //nolint:errcheck // ctx has ended: close follows
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
	for _, is := range s.conns {
		if is.at == speakingH2 {
			return true
		}
	}
	return false
}

// close ends every connection at once, without a farewell of TLS's, which a client
// that does not read could hold up, and those that are still to come.
func (s *server) close() {
	s.mu.Lock()
	s.ending = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	if s.http1 != nil {
		s.http1.Close() // its connections are closed
	}
}
