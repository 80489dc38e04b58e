package ingress

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// guest is a request or tunnel under way, with what is needed to judge it anew and
// to end it. It must not hold on to the request: tunnels live long.
type guest struct {
	from  caller
	agent bool // it speaks to the agent
	owner bool // an API key or the sandbox's own token admitted it: no list applies
	link  string
	busy  bool // it counts as traffic
	timer *time.Timer

	started time.Time // when it asked the agent to start a command; zero: it did not
	opened  uint16    // the port that is taken for this command's; guarded by guests.mu

	conn   net.Conn // of a client that speaks HTTP/1
	cancel context.CancelFunc
	rc     *http.ResponseController // with cancel, of one that speaks HTTP/2

	prev, next *guest // guarded by guests.mu
}

// guests are those of one life of a sandbox.
type guests struct {
	mu   sync.Mutex // guards the list and, while they are in it, its members
	head *guest
	// sources counts who occupies the sandbox; see occupy.
	sources map[netip.Prefix]int
	busy    atomic.Int64
}

// enter makes the request a guest of the sandbox until depart. It returns false
// when what admitted it was withdrawn meanwhile.
func (v *visit) enter(b *backend, t *Target, to route, k ticket) (*guest, bool) {
	path, _, _ := strings.Cut(to.target, "?")
	agent := to.port == t.agentPort()
	g := &guest{from: v.caller(), agent: agent, link: strings.Clone(k.link), busy: !agent || !healthPoll(v.r.Method, path)}
	if g.conn = v.info.http1Conn(v.r); g.conn == nil {
		ctx, cancel := context.WithCancel(v.r.Context()) // freed with the request's own
		g.cancel, g.rc = cancel, http.NewResponseController(v.w)
		v.r = v.r.WithContext(ctx)
	}
	if agent && startsCommand(v.r, path) && t.agentAdmits(v.r, to.target) {
		g.started = time.Now()
	}
	return g, b.join(g, t, k.expires, v.judged)
}

// join puts g among the guests, until expires if that is not zero. It returns false,
// and g has departed, when what admitted it was withdrawn after judged was read.
func (b *backend) join(g *guest, t *Target, expires time.Time, judged uint64) bool {
	b.guests.mu.Lock()
	if g.next = b.guests.head; g.next != nil {
		g.next.prev = g
	}
	b.guests.head = g
	if !expires.IsZero() {
		g.timer = time.AfterFunc(time.Until(expires), func() { b.guests.cut(g) })
	}
	b.guests.mu.Unlock()
	if !g.started.IsZero() {
		b.started.Store(g.started.UnixNano())
	}
	if g.busy {
		b.guests.busy.Add(1)
	}
	if b.in.judged.Load() != judged {
		if now, ok := b.in.cfg.Lookup(t.ID); !ok || !now.keeps(g) {
			b.depart(g)
			return false
		}
	}
	return true
}

// depart ends what occupy and enter began.
func (b *backend) depart(g *guest) {
	b.vacate(g.from.addr)
	b.guests.mu.Lock()
	if g.prev != nil {
		g.prev.next = g.next
	} else if b.guests.head == g {
		b.guests.head = g.next
	}
	if g.next != nil {
		g.next.prev = g.prev
	}
	g.prev, g.next = nil, nil
	g.conn, g.rc = nil, nil // a cut that comes late finds nothing
	if g.timer != nil {
		g.timer.Stop()
	}
	b.guests.mu.Unlock()
	if g.busy {
		b.guests.busy.Add(-1)
		b.in.traffic(b.target)
	}
}

// cut ends a guest at once: what it has of an answer cannot pass for all of it.
func (s *guests) cut(g *guest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g.end()
}

// end needs guests.mu.
func (g *guest) end() {
	switch {
	case g.conn != nil:
		relay.Abort(g.conn)
	case g.rc != nil:
		g.cancel()
		// These reset the stream; there is nothing to do where it is gone.
		g.rc.SetReadDeadline(longAgo)  //nolint:errcheck // see above
		g.rc.SetWriteDeadline(longAgo) //nolint:errcheck // see above
	}
}

// keeps reports whether the guest would still be let in.
func (t *Target) keeps(g *guest) bool {
	if g.owner || g.agent && t.AccessToken != "" {
		return true
	}
	return t.allows(g.from) && (g.link == "" || t.hasLink(g.link))
}

// Recheck judges everyone who speaks to the sandbox anew, and resets the connections
// of those who would not be let in now. It is to be called after a link was revoked
// or the list of sources changed; requests that come after the call are judged by
// the new rules in any case.
func (in *Ingress) Recheck(id string) {
	in.judged.Add(1)
	in.mu.RLock()
	b := in.backends[id]
	in.mu.RUnlock()
	if b == nil {
		return
	}
	t, ok := in.cfg.Lookup(id)
	b.guests.mu.Lock()
	defer b.guests.mu.Unlock()
	for g := b.guests.head; g != nil; g = g.next {
		if !ok || !t.keeps(g) {
			g.end()
		}
	}
}

// InUse reports whether a request or tunnel to the sandbox is under way, health
// polls aside.
func (in *Ingress) InUse(id string) bool {
	in.mu.RLock()
	b := in.backends[id]
	in.mu.RUnlock()
	return b != nil && b.guests.busy.Load() > 0
}

// traffic tells that somebody used the sandbox, if its life depends on that.
func (in *Ingress) traffic(t *Target) {
	if t.TrafficExtends && in.cfg.Traffic != nil {
		in.cfg.Traffic(t.ID)
	}
}
