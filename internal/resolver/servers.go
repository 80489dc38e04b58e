package resolver

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// server is one upstream. Queries go to the servers in the order of the
// configuration; one that does not reply comes last until it replies to a question of
// our own. What it replies, and to which question of a sandbox it does not, changes
// nothing: the owner of a name could otherwise choose the server for everybody.
type server struct {
	addr netip.AddrPort

	mu      sync.Mutex // guards what follows
	silent  bool
	probing bool
	probed  time.Time
}

// probeEvery is how often a silent server is asked whether it is there, while there
// are queries.
const probeEvery = 5 * time.Second

func newServers(addrs []netip.AddrPort) []*server {
	out := make([]*server, len(addrs))
	for i, a := range addrs {
		out[i] = &server{addr: a}
	}
	return out
}

// order returns the servers as the next query is to ask them.
func (r *Resolver) order() []*server {
	first, last := make([]*server, 0, len(r.servers)), []*server(nil)
	for _, s := range r.servers {
		s.mu.Lock()
		silent, probe := s.silent, s.silent && !s.probing && time.Since(s.probed) >= probeEvery
		s.mu.Unlock()
		if probe {
			r.suspect(s)
		}
		if silent {
			last = append(last, s)
		} else {
			first = append(first, s)
		}
	}
	return append(first, last...)
}

// suspect puts a server that did not reply last, and asks it for the name servers of
// the root, which every server knows and no sandbox has a hand in.
func (r *Resolver) suspect(s *server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = true
	if s.probing {
		return
	}
	s.probing = true
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), tryTimeout)
		defer cancel()
		_, err := r.roundTrip(ctx, "udp", s.addr, question{name: "", qtype: dns.TypeNS})
		s.mu.Lock()
		defer s.mu.Unlock()
		s.probing, s.probed = false, time.Now()
		if s.silent = err != nil; s.silent {
			r.cfg.Log.Warn("dns upstream does not reply", "dst", s.addr, "err", err)
		}
	}()
}
