package ingress

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// connInfo is what is known of a client's connection.
type connInfo struct {
	conn    net.Conn // nil when the server is not ours
	addr    netip.Addr
	from    string // addr as text
	inside  bool   // a sandbox: addr is its own
	trusted bool   // a proxy whose X-Forwarded-* we believe
	source  *sources
	once    sync.Once

	// Of connections that speak HTTP/1, to be used by the goroutine that serves them.
	http1     *watched // nil for others, and when the server is not ours
	ended     func()   // the server is told that it has ended, or was taken over
	upgrading bool     // the request may take the connection over
	taken     bool     // it has
}

// handled is called when a request of HTTP/1 has been.
func (c *connInfo) handled() {
	if !c.taken {
		c.http1.hasten()
		return
	}
	if !c.upgrading { // otherwise with the tunnel
		c.release()
	}
	c.ended()
}

// release takes the connection out of its source's count.
func (c *connInfo) release() {
	if c.source != nil {
		c.once.Do(func() { c.source.remove(c) })
	}
}

type connKey struct{}

// within returns ctx with what is known of the connection, for infoOf.
func (c *connInfo) within(ctx context.Context) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

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

	mu    sync.Mutex // guards count
	count map[netip.Prefix]int
}

func newSources(c *Config) *sources {
	inside := c.Inside
	if inside == nil {
		inside = func(netip.Addr) (netip.Addr, bool) { return netip.Addr{}, false }
	}
	return &sources{
		limit: c.Limits.ConnsPerSource, trusted: c.TrustedProxies, inside: inside,
		count: map[netip.Prefix]int{},
	}
}

// key is the address, or the /64 an IPv6 client can choose addresses from.
func (c *connInfo) key() netip.Prefix { return sourceOf(c.addr) }

func sourceOf(addr netip.Addr) netip.Prefix {
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // zero for the zero address
	return p
}

// enter counts a connection and says what is known of it, until release. It returns
// false, and has reset c, when its source has too many.
func (s *sources) enter(c net.Conn) (*connInfo, bool) {
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
	s.count[info.key()]++
	over := !info.trusted && s.count[info.key()] > s.limit
	s.mu.Unlock()
	if over {
		relay.Abort(c)
		info.release()
		return nil, false
	}
	return info, true
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
