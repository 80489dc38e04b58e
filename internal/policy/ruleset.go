package policy

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// ruleRef is the number of a rule in Compiled.rules; 0 is no rule.
type ruleRef int32

// or returns r, or other where r is no rule: the rule written first is the one named.
func (r ruleRef) or(other ruleRef) ruleRef {
	if r != 0 {
		return r
	}
	return other
}

// ruleSet is one list of rules, compiled.
type ruleSet struct {
	addrs     addrSet
	addrPorts map[uint16]*addrSet
	names     *nameSet            // rules without a port: TCP 80 and 443
	namePorts map[uint16]*nameSet // host:port rules
	pinPorts  map[uint16]*nameSet // those that are about every protocol on the port
	prefixes  []PrefixPort        // merged, for the kernel
}

func (s *ruleSet) add(e entry, r ruleRef) {
	switch {
	case e.isAddr() && e.port == 0:
		s.addrs.add(e.prefix, r)
		s.prefixes = append(s.prefixes, PrefixPort{e.prefix, 0})
	case e.isAddr():
		if s.addrPorts == nil {
			s.addrPorts = map[uint16]*addrSet{}
		}
		if s.addrPorts[e.port] == nil {
			s.addrPorts[e.port] = new(addrSet)
		}
		s.addrPorts[e.port].add(e.prefix, r)
		s.prefixes = append(s.prefixes, PrefixPort{e.prefix, e.port})
	case e.port == 0:
		if s.names == nil {
			s.names = new(nameSet)
		}
		s.names.add(e, r)
	default:
		addPort(&s.namePorts, e, r)
		if !e.shown {
			addPort(&s.pinPorts, e, r)
		}
	}
}

func addPort(sets *map[uint16]*nameSet, e entry, r ruleRef) {
	if *sets == nil {
		*sets = map[uint16]*nameSet{}
	}
	if (*sets)[e.port] == nil {
		(*sets)[e.port] = new(nameSet)
	}
	(*sets)[e.port].add(e, r)
}

// addDeny is add for a deny list: 0.0.0.0/0 means IPv6 too.
func (s *ruleSet) addDeny(e entry, r ruleRef) {
	s.add(e, r)
	if e.all() {
		e.prefix = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		s.add(e, r)
	}
}

func (s *ruleSet) hasNames() bool { return s.names != nil || s.namePorts != nil }

// proxied reports whether some name rule is about a port of the proxy.
func (s *ruleSet) proxied() bool {
	return s.names != nil || s.namePorts[80] != nil || s.namePorts[443] != nil
}

// pins reports whether some name rule is about every protocol on a port.
func (s *ruleSet) pins() bool { return len(s.pinPorts) > 0 }

// matchAddr finds the rule for an address. Port 0, as of ICMP, matches only
// rules without a port.
func (s *ruleSet) matchAddr(a netip.Addr, port uint16) ruleRef {
	if r := s.addrs.match(a); r != 0 || s.addrPorts == nil {
		return r
	}
	if set := s.addrPorts[port]; set != nil {
		return set.match(a)
	}
	return 0
}

// matchDenied is matchAddr for a deny list: the NAT64 and 6to4 forms of a denied
// IPv4 address are denied with it.
func (s *ruleSet) matchDenied(a netip.Addr, port uint16) ruleRef {
	r := s.matchAddr(a, port)
	if r == 0 {
		if v4, ok := embedded(a); ok {
			return s.matchAddr(v4, port)
		}
	}
	return r
}

// matchName finds the rule that lists name for a TCP port.
func (s *ruleSet) matchName(name string, port uint16) ruleRef {
	if name == "" {
		return 0
	}
	if proxyPort(port) {
		if r := s.names.match(name); r != 0 {
			return r
		}
	}
	if s.namePorts == nil {
		return 0
	}
	return s.namePorts[port].match(name)
}

// coversPort reports whether a name could match on a TCP port.
func (s *ruleSet) coversPort(port uint16) bool {
	return proxyPort(port) && s.names != nil || s.namePorts[port] != nil
}

// listsName finds the rule that lists name for any port, exact rules first.
func (s *ruleSet) listsName(name string) ruleRef {
	return s.exactName(name).or(s.wildName(name))
}

func (s *ruleSet) exactName(name string) ruleRef {
	return s.anyPort(func(set *nameSet) ruleRef { return set.exact(name) })
}

func (s *ruleSet) wildName(name string) ruleRef {
	return s.anyPort(func(set *nameSet) ruleRef { return set.below(name) })
}

// anyPort returns the earliest rule that match finds, so that the answer does
// not depend on the order of a map.
func (s *ruleSet) anyPort(match func(*nameSet) ruleRef) ruleRef {
	best := match(s.names)
	for _, set := range s.namePorts {
		if r := match(set); r != 0 && (best == 0 || r < best) {
			best = r
		}
	}
	return best
}

func proxyPort(port uint16) bool { return port == 80 || port == 443 }

// addrSet matches addresses by longest prefix.
type addrSet struct{ t bart.Table[ruleRef] }

func (s *addrSet) add(p netip.Prefix, r ruleRef) {
	if _, dup := s.t.Get(p); !dup {
		s.t.Insert(p, r)
	}
}

func (s *addrSet) match(a netip.Addr) ruleRef {
	r, _ := s.t.Lookup(a)
	return r
}

// merge returns the smallest sorted list of disjoint prefixes that covers the
// same addresses, for each port on its own.
func merge(in []PrefixPort) []PrefixPort {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b PrefixPort) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	out := in[:0]
	for _, p := range in {
		if n := len(out); n > 0 && out[n-1].Port == p.Port && out[n-1].Prefix.Contains(p.Prefix.Addr()) {
			continue // sorted: the wider prefix came first
		}
		out = append(out, p)
		for len(out) > 1 && siblings(out[len(out)-2], out[len(out)-1]) {
			out = out[:len(out)-1]
			last := &out[len(out)-1]
			last.Prefix = netip.PrefixFrom(last.Prefix.Addr(), last.Prefix.Bits()-1)
		}
	}
	return slices.Clip(out)
}

// siblings reports whether a, sorted before b, and b are the halves of one prefix.
func siblings(a, b PrefixPort) bool {
	bits := a.Prefix.Bits()
	if a.Port != b.Port || bits != b.Prefix.Bits() || bits == 0 || a.Prefix.Addr().BitLen() != b.Prefix.Addr().BitLen() {
		return false
	}
	parent := netip.PrefixFrom(a.Prefix.Addr(), bits-1)
	return parent == parent.Masked() && parent.Contains(b.Prefix.Addr())
}
