package network

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"github.com/cordonhq/cordon/internal/policy"
)

// program is a policy as the kernel runs it: the rules of a slot's chain and the
// sets they look into.
type program struct {
	prefix string // of the sets' names, unique for each program
	table  *nftables.Table
	sets   []*nftables.Set
	elems  [][]nftables.SetElement // by set
	rules  []rule
	pins   bool
}

// compile translates rules in the order that policy.KernelRules documents. mark is
// the mark of flows accepted under it.
func (n *Network) compile(s *slotState, mark uint32, k policy.KernelRules) *program {
	p := &program{prefix: fmt.Sprintf("s%d_%d_", s.Num, mark&markGen), table: n.table(), pins: k.Pins}
	n.budgeted(p, s)
	p.rule(ctMark(mark, ^uint32(0)), accept())
	p.rule(ctMark(mark|markProxied, ^uint32(0)), goTo(chainProxied))
	p.rule(jump(chainScreen))
	p.list("opdeny", k.OperatorDeny, goTo(classDeny.chain()))
	if k.OperatorExact {
		p.rule(jump(chainDenied))
	}
	if k.Service {
		p.ports(k.ProxyPorts, daddrIn(netip.PrefixFrom(policy.ServiceAddr4, 32)), goTo(chainProxy))
	}
	pass, hostHole := chainOK, chainHostOpen
	if k.OperatorNames {
		pass, hostHole = chainHole, chainHostHole
	}
	p.list("open", k.FloorOpen, goTo(pass))
	p.list("openhost", k.HostOpen, jump(hostHole))
	if k.FloorNames {
		p.ports(k.ProxyPorts, nil, jump(chainFloorNames))
	}
	p.rule(jump(chainFloor))
	if k.OperatorNames && k.NameRules {
		p.ports(k.ProxyPorts, nil, goTo(chainProxy))
	}
	p.list("opallow", k.OperatorAllow, goTo(pass))
	p.list("allow", k.Allow, goTo(pass))
	if k.NameRules && !k.OperatorNames {
		p.ports(k.ProxyPorts, nil, goTo(chainProxy))
	}
	if k.Pins {
		p.pinned()
	}
	if k.AutoDNS {
		for _, proto := range []policy.Proto{policy.UDP, policy.TCP} {
			p.rule(l4proto(proto), daddrIn(netip.PrefixFrom(policy.DefaultNameserver, 32)), dport(53), goTo(chainDNS))
		}
	}
	switch {
	case k.Observe: // what it would have denied is told from the flow log
	case k.DenyAll:
		p.rule(goTo(classDeny.chain()))
		return p
	default:
		p.list("deny", k.Deny, goTo(classDeny.chain()))
	}
	p.rule(goTo(pass))
	return p
}

func (p *program) rule(parts ...[]expr.Any) { p.rules = append(p.rules, when(parts...)) }

// ports adds a rule for each TCP port.
func (p *program) ports(ports []uint16, match, then []expr.Any) {
	for _, port := range ports {
		p.rule(match, l4proto(policy.TCP), dport(port), then)
	}
}

// list adds what matches a list of prefixes: a comparison for a single one, a set
// for more, so that a packet costs the same whatever the length.
func (p *program) list(name string, list []policy.PrefixPort, then []expr.Any) {
	ported := slices.ContainsFunc(list, func(e policy.PrefixPort) bool { return e.Port != 0 })
	for _, v6 := range []bool{false, true} {
		spans := ranges(list, v6)
		withPort := slices.IndexFunc(spans, func(s span) bool { return s.port != 0 }) // ports sort last
		if withPort < 0 {
			withPort = len(spans)
		}
		p.match(name, spans[:withPort], setKind{v6: v6}, then)
		if ported {
			p.match(name+"_ports", spans[withPort:], setKind{v6: v6, ports: true}, then)
		}
	}
}

// setKind says what a set of a program holds.
type setKind struct{ v6, ports, pins bool }

func (p *program) match(name string, spans []span, kind setKind, then []expr.Any) {
	switch {
	case len(spans) == 0:
		return
	case len(spans) == 1 && !kind.ports:
		if prefix, ok := asPrefix(spans[0]); ok {
			p.rule(daddrIn(prefix), then)
			return
		}
	}
	elems := intervals(spans)
	if kind.ports {
		elems = portIntervals(spans)
	}
	set := p.set(name, kind, elems)
	var which []expr.Any
	if kind.ports {
		which = ported()
	}
	p.rule(which, daddrInSet(set, kind.v6, kind.ports), then)
}

// pinned adds the sets of addresses that the resolver pins while the policy is in
// force. The proxy has them too: a name that is shown there may be a neighbour's.
func (p *program) pinned() {
	for _, v6 := range []bool{false, true} {
		kind := setKind{v6: v6, ports: true, pins: true}
		set := p.set("pins", kind, nil)
		p.rule(l4proto(policy.TCP), daddrInSet(set, v6, true), goTo(chainProxy))
	}
}

func (p *program) set(name string, kind setKind, elems []nftables.SetElement) string {
	s := p.kindOf(p.setName(name, kind.v6), kind)
	p.sets, p.elems = append(p.sets, s), append(p.elems, elems)
	return s.Name
}

func (p *program) setName(name string, v6 bool) string {
	if v6 {
		return p.prefix + name + "6"
	}
	return p.prefix + name + "4"
}

func (p *program) kindOf(name string, kind setKind) *nftables.Set {
	s := &nftables.Set{Table: p.table, Name: name, KeyByteOrder: binaryutil.BigEndian, KeyType: nftables.TypeIPAddr}
	if kind.v6 {
		s.KeyType = nftables.TypeIP6Addr
	}
	if kind.ports {
		s.KeyType = nftables.MustConcatSetType(s.KeyType, nftables.TypeInetService)
		s.Concatenation = true
	}
	s.Interval = !kind.pins
	s.HasTimeout = kind.pins
	if kind.pins {
		s.Size = maxPins
	}
	return s
}

// size is the number of elements of all sets.
func (p *program) size() (total int) {
	for _, e := range p.elems {
		total += len(e)
	}
	return total
}

// asPrefix returns the prefix that covers exactly a span.
func asPrefix(s span) (netip.Prefix, bool) {
	for bits := range s.first.BitLen() + 1 {
		if p := netip.PrefixFrom(s.first, bits); p.Masked() == p && lastOf(p) == s.last {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
