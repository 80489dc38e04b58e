package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// Mode is what a listener speaks.
type Mode uint8

// The modes.
const (
	TLS      Mode = iota // https, HTTP/2 and HTTP/1.1; names that are not ours are refused
	Plain                // http; whatever is not for a sandbox goes to the API
	Redirect             // http; sends everyone to https
	TLSTCP               // TLS ends here, its bytes go to the port that the server name says
)

// Listener is a listener and what it speaks.
type Listener struct {
	net.Listener
	Mode Mode
}

// Run serves on the listeners until ctx ends or one of them fails, then lets
// requests under way finish for DrainTimeout and resets the rest. It closes the
// listeners and the Ingress.
func (in *Ingress) Run(ctx context.Context, listeners ...Listener) error {
	defer in.Close()
	servers := make([]*http.Server, len(listeners))
	for i, l := range listeners {
		s, err := in.server(l.Mode) // also checks the mode of those that are not HTTP
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return err
		}
		servers[i] = s
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, l := range listeners {
		if in.cfg.ProxyProtocol && l.Mode != Plain {
			front := in.behindProxies(l.Listener)
			l.Listener = front
			g.Go(func() error { front.run(); return nil })
		}
		if l.Mode == TLSTCP {
			g.Go(func() error { return in.serveTCP(ctx, l.Listener) })
			continue
		}
		g.Go(func() error { return serveOn(servers[i], l) })
	}
	g.Go(func() error {
		<-ctx.Done()
		in.drain(servers)
		in.Close() // ends what serveTCP waits for
		return nil
	})
	return g.Wait()
}

func serveOn(s *http.Server, l Listener) error {
	serve := s.Serve
	if l.Mode == TLS {
		serve = func(nl net.Listener) error { return s.ServeTLS(nl, "", "") }
	}
	if err := serve(l.Listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("ingress: serve %s: %w", l.Addr(), err)
	}
	return nil
}

// drain ends the servers: first politely, at the deadline not.
func (in *Ingress) drain(servers []*http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), in.cfg.Limits.DrainTimeout)
	defer cancel()
	var g errgroup.Group
	for _, s := range servers {
		g.Go(func() error {
			if err := s.Shutdown(ctx); err != nil {
				return s.Close()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		in.log.Warn("listener not closed", "err", err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for in.underway() > 0 && ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// underway counts requests and tunnels.
func (in *Ingress) underway() (n int64) {
	in.mu.RLock()
	defer in.mu.RUnlock()
	for _, b := range in.backends {
		n += b.inflight.Load()
	}
	return n
}

func (in *Ingress) server(mode Mode) (*http.Server, error) {
	l := in.cfg.Limits
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	s := &http.Server{
		Handler: in.Handler(mode), Protocols: &protocols,
		ReadHeaderTimeout: l.HeaderTimeout, IdleTimeout: l.IdleTimeout, MaxHeaderBytes: l.HeaderBytes,
		DisableGeneralOptionsHandler: true, // OPTIONS * is the service's to answer
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: l.StreamsPerConn,
			SendPingTimeout:      30 * time.Second, PingTimeout: 15 * time.Second, // a peer that vanished
			WriteByteTimeout: time.Minute,
		},
		ErrorLog:    slog.NewLogLogger(in.log.Handler(), slog.LevelDebug), // handshakes and the like: the client's doing
		ConnContext: in.sources.connContext,
		ConnState:   in.sources.connState,
	}
	switch mode {
	case TLS, TLSTCP:
		if in.cfg.TLS == nil {
			return nil, errors.New("ingress: a TLS listener needs Config.TLS")
		}
		s.TLSConfig = in.cfg.TLS.Clone()
		s.TLSConfig.MinVersion = max(s.TLSConfig.MinVersion, tls.VersionTLS12)
		protocols.SetHTTP2(true)
	case Plain:
		protocols.SetUnencryptedHTTP2(true) // prior knowledge only: gRPC clients without TLS
	case Redirect:
	default:
		return nil, fmt.Errorf("ingress: unknown listener mode %d", mode)
	}
	if mode == Redirect {
		return s, nil
	}
	return s, serveHTTP2(s)
}

// redirect sends clients of our names to the same URL with https.
func (in *Ingress) redirect(w http.ResponseWriter, r *http.Request) {
	if in.cfg.Challenge != nil && in.cfg.Challenge(w, r) {
		return
	}
	v := &visit{in: in, w: w, r: r, mode: Redirect, access: access{start: time.Now()}, info: infoOf(r)}
	defer v.end()
	p, err := in.locate(r.Host)
	if err != nil {
		v.refuse(badRequest(err.Error()))
		return
	}
	target, ok := originForm(r)
	if p.kind == foreignHost || !ok {
		v.refuse(badRequest("Host " + shown(r.Host) + " is not served here."))
		return
	}
	host := p.name
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		host = "[" + host + "]"
	}
	if port := in.cfg.HTTPSPort; port != 0 && port != 443 {
		host += ":" + strconv.Itoa(int(port))
	}
	if target == "*" {
		target = "/"
	}
	w.Header().Set("Location", "https://"+host+target)
	v.code = http.StatusPermanentRedirect // keeps method and body
	w.WriteHeader(v.code)
}

// connInfo is what is known of a client's connection.
type connInfo struct {
	conn      net.Conn // nil when the server is not ours
	addr      netip.Addr
	from      string // addr as text
	inside    bool   // a sandbox: addr is its own
	trusted   bool   // a proxy whose X-Forwarded-* we believe
	upgrading bool   // its request may take the connection over; set and read by the goroutine that serves it
	source    *sources
	once      sync.Once
}

// release takes the connection out of its source's count.
func (c *connInfo) release() {
	if c.source != nil {
		c.once.Do(func() { c.source.remove(c) })
	}
}

type connKey struct{}

// infoOf returns what is known of the connection r came on.
func infoOf(r *http.Request) *connInfo {
	if info, ok := r.Context().Value(connKey{}).(*connInfo); ok {
		return info
	}
	info := &connInfo{}
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		info.addr = ap.Addr().Unmap()
		info.from = info.addr.String()
	}
	return info
}

// sources counts connections by where they come from.
type sources struct {
	limit   int
	trusted []netip.Prefix
	inside  func(netip.Addr) (netip.Addr, bool)

	mu    sync.Mutex // guards the fields below
	conns map[net.Conn]*connInfo
	count map[netip.Prefix]int
}

func newSources(c *Config) *sources {
	inside := c.Inside
	if inside == nil {
		inside = func(netip.Addr) (netip.Addr, bool) { return netip.Addr{}, false }
	}
	return &sources{
		limit: c.Limits.ConnsPerSource, trusted: c.TrustedProxies, inside: inside,
		conns: map[net.Conn]*connInfo{}, count: map[netip.Prefix]int{},
	}
}

// key is the address, or the /64 an IPv6 client can choose addresses from.
func (c *connInfo) key() netip.Prefix {
	bits := 32
	if c.addr.Is6() {
		bits = 64
	}
	p, _ := c.addr.Prefix(bits) // zero for the zero address
	return p
}

// connContext and connState are the server's hooks; connContext comes first.
func (s *sources) connContext(ctx context.Context, c net.Conn) context.Context {
	info := &connInfo{conn: c, source: s}
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		info.addr = a.AddrPort().Addr().Unmap().WithZone("")
		info.trusted = s.trusts(info.addr)
		if sandbox, ok := s.inside(info.addr); ok {
			info.addr, info.inside, info.trusted = sandbox, true, false
		}
		info.from = info.addr.String()
	}
	s.mu.Lock()
	s.conns[c] = info
	s.count[info.key()]++
	s.mu.Unlock()
	return context.WithValue(ctx, connKey{}, info)
}

// proxy reports whether the peer is a proxy that says who its client is.
func (s *sources) proxy(c net.Conn) bool {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return false
	}
	addr := a.AddrPort().Addr().Unmap().WithZone("")
	_, inside := s.inside(addr)
	return !inside && s.trusts(addr)
}

func (s *sources) connState(c net.Conn, state http.ConnState) {
	if state != http.StateNew && state != http.StateClosed && state != http.StateHijacked {
		return
	}
	s.mu.Lock()
	info := s.conns[c]
	over := info != nil && !info.trusted && s.count[info.key()] > s.limit
	if state != http.StateNew {
		delete(s.conns, c)
	}
	s.mu.Unlock()
	switch {
	case info == nil:
	case state == http.StateNew && over:
		relay.Abort(c)
	case state == http.StateClosed || state == http.StateHijacked && !info.upgrading:
		info.release()
	}
}

// trusts reports whether addr is a proxy whose X-Forwarded-* we believe.
func (s *sources) trusts(addr netip.Addr) bool {
	for _, p := range s.trusted {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// open counts the connections.
func (s *sources) open() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.count {
		n += c
	}
	return n
}

func (s *sources) remove(c *connInfo) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := c.key(); s.count[k] > 1 {
		s.count[k]--
	} else {
		delete(s.count, k)
	}
}
