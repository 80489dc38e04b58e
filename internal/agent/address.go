package agent

import (
	"net"
	"net/netip"
	"slices"
	"sync"
)

// addresses are those that the sandbox had in earlier lives: a pause gives its slot in
// the network back, and the next one has other addresses. Servers that were bound to
// an old one go on listening there, so it stays an address of the sandbox's, on its
// loopback, and the tunnel reaches it.
type addresses struct {
	mu     sync.Mutex // guards what follows
	now    []netip.Addr
	former []netip.Addr // the latest last
}

// maxFormer is how many are kept.
const maxFormer = 16

// move notes the addresses of a new life and returns those of earlier ones.
func (s *addresses) move(now []netip.Addr) []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := func(a netip.Addr) bool { return slices.Contains(now, a) }
	for _, a := range s.now {
		s.former = append(slices.DeleteFunc(s.former, func(f netip.Addr) bool { return f == a }), a)
	}
	s.former = slices.DeleteFunc(s.former, is)
	s.former = s.former[max(0, len(s.former)-maxFormer):]
	s.now = slices.Clone(now)
	return slices.Clone(s.former)
}

func (s *addresses) earlier() []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.former)
}

// keepAddresses makes the addresses of earlier lives local. The runtime forgets them
// at each restore.
func (a *Agent) keepAddresses() {
	for _, ip := range a.addresses.move(a.ownAddresses()) {
		if a.cfg.AddLocal == nil {
			return
		}
		if err := a.cfg.AddLocal(ip); err != nil {
			a.log.Warn("former address not kept", "addr", ip, "err", err)
		}
	}
}

// ownAddresses are the machine's addresses but loopback and link-local ones, and
// those of earlier lives.
func (a *Agent) ownAddresses() []netip.Addr {
	found, err := net.InterfaceAddrs()
	if err != nil {
		return nil // the name then resolves to 127.0.1.1
	}
	former := a.addresses.earlier()
	var out []netip.Addr
	for _, f := range found {
		p, err := netip.ParsePrefix(f.String())
		switch {
		case err != nil, p.Addr().IsLoopback(), p.Addr().IsLinkLocalUnicast():
		case p.IsSingleIP() && slices.Contains(former, p.Addr()): // AddLocal's
		default:
			out = append(out, p.Addr())
		}
	}
	return out
}
