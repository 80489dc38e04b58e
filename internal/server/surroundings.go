package server

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// How often the addresses of denied names are asked for, and how long one that is not
// among the answers any more stays denied: name servers hand out theirs in turns. While
// a name cannot be asked for, what is known of it stays denied.
const (
	deniedEvery  = time.Minute
	deniedLinger = 15 * time.Minute
	deniedWait   = 5 * time.Second
	deniedAtOnce = 16 // look-ups
)

// deniedNames keeps the addresses of the operator's denied names.
type deniedNames struct {
	seen map[netip.AddrPort]time.Time
	by   map[netip.AddrPort]int // the entry
}

// warnDenied says at start what a denial by name does not do.
func (s *server) warnDenied() {
	var shown []string
	exact := map[int]bool{}
	for _, d := range s.operator.DeniedNames() {
		exact[d.Entry] = true
	}
	for i, text := range s.operator.AlwaysDeny {
		if _, err := addressRange(text); err != nil && !exact[i] && !strings.Contains(text, "/") {
			if _, err := netip.ParseAddrPort(text); err != nil {
				shown = append(shown, text)
			}
		}
	}
	if len(shown) > 0 {
		s.log.Warn("these entries of network.always_deny bind connections that show a name, and questions for it: a program that knows an address of such"+
			" a name reaches it by that, unless its range is denied too", "entries", strings.Join(shown, " "))
	}
}

// followDenied keeps the addresses of denied names denied, until ctx ends.
func (s *server) followDenied(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(deniedEvery):
		}
		if err := s.denyNames(ctx); err != nil {
			s.log.Error("the addresses of denied names are not up to date", "err", err)
		}
	}
}

// denyNames asks for the addresses of all denied names.
func (s *server) denyNames(ctx context.Context) error {
	names := s.operator.DeniedNames()
	if len(names) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, deniedWait)
	defer cancel()
	var mu sync.Mutex // guards s.deniedNow
	var g errgroup.Group
	g.SetLimit(deniedAtOnce)
	now := time.Now()
	for _, d := range names {
		g.Go(func() error {
			addrs, err := s.resolver.Resolve(ctx, serverItself, d.Name)
			if err != nil {
				s.log.Debug("a denied name has no address to deny", "name", d.Name, "err", err)
			}
			mu.Lock()
			defer mu.Unlock()
			s.deniedNow.learn(d, addrs, err, now)
			return nil
		})
	}
	_ = g.Wait() // they return nothing
	s.deniedNow.expire(now)
	return s.network.SetDenied(s.deniedNow.by)
}

// learn takes in what a look-up of a denied name brought.
func (n *deniedNames) learn(d policy.DeniedName, addrs []netip.Addr, err error, now time.Time) {
	for _, a := range addrs {
		dst := netip.AddrPortFrom(a, d.Port)
		n.seen[dst], n.by[dst] = now, d.Entry
	}
	if err == nil || errs.Is(err, errs.NotFound) {
		return
	}
	for dst, entry := range n.by {
		if entry == d.Entry && dst.Port() == d.Port {
			n.seen[dst] = now
		}
	}
}

// expire forgets what no answer has had for a while.
func (n *deniedNames) expire(now time.Time) {
	for dst, at := range n.seen {
		if now.Sub(at) > deniedLinger {
			delete(n.seen, dst)
			delete(n.by, dst)
		}
	}
}

// How often the server looks again at what names say of the network around it, and
// how long one look may take.
const (
	surroundingsEvery = 10 * time.Minute
	surroundingsWait  = 10 * time.Second
)

// followSurroundings keeps the network's NAT64 prefixes known, until ctx ends.
func (s *server) followSurroundings(ctx context.Context) error {
	var known []netip.Prefix
	for {
		if s.network.HasIPv6() {
			found := s.findNAT64(ctx)
			if !slices.Equal(found, known) {
				if err := s.network.SetNAT64(found); err != nil {
					s.log.Error("the ranges around the machine are not up to date", "err", err)
				} else {
					known = found
					s.log.Info("the network translates IPv4 addresses", "nat64", found)
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(surroundingsEvery):
		}
	}
}

// findNAT64 asks for the name that has no IPv6 address but those a NAT64 gives it
// (RFC 7050, 3). Whatever fails leaves what the configuration says.
func (s *server) findNAT64(ctx context.Context) []netip.Prefix {
	ctx, cancel := context.WithTimeout(ctx, surroundingsWait)
	defer cancel()
	addrs, err := s.resolver.Resolve(ctx, serverItself, "ipv4only.arpa")
	if err != nil {
		s.log.Debug("no NAT64 prefix found", "err", err)
	}
	out := slices.Clone(s.cfg.Network.nat64())
	for _, a := range addrs {
		if p, ok := prefixOf(a); ok && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

// prefixOf finds the prefix below which an address is one of the two of ipv4only.arpa.
func prefixOf(a netip.Addr) (netip.Prefix, bool) {
	for _, bits := range []int{96, 64, 56, 48, 40, 32} {
		p, err := a.Prefix(bits)
		if err != nil || !a.Is6() {
			return netip.Prefix{}, false
		}
		for _, last := range []byte{170, 171} {
			known := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 0, last}), 32)
			if e, ok := policy.Embed(known, p); ok && e.Addr() == a {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// serverItself stands for a sandbox in the resolver's look-ups that no sandbox asked for.
const serverItself = ""

// resolvable is the policy of such look-ups: none but the floor.
var resolvable = func() *policy.Compiled {
	p, err := policy.Compile(policy.Input{}, nil, 0)
	if err != nil {
		panic(err) // it has no rules
	}
	return p
}()
