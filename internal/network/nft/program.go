package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"github.com/cordonhq/cordon/internal/policy"
)

// Program is a policy as the kernel runs it: the rules of a slot's chain and the
// sets they look into.
type Program struct {
	prefix string // of the sets' names, unique for each program
	table  *nftables.Table
	mark   uint32 // of flows accepted under it
	rules  []Rule

	Sets  []*nftables.Set
	Elems [][]nftables.SetElement // by set
	Pins  bool                    // it has sets of pins
}

// Program translates rules in the order that policy.KernelRules documents. gen is the
// generation of the mark of flows that are accepted under it.
func (t Table) Program(s Slot, gen uint16, k policy.KernelRules) *Program {
	mark := MarkOf(s.Num, gen)
	p := &Program{prefix: fmt.Sprintf("s%d_%d_", s.Num, mark&markGen), table: t.Table(), mark: mark, Pins: k.Pins}
	t.budgeted(p, s.Num)
	p.rule(ctMark(mark, ^uint32(0)), accept())
	p.rule(ctMark(mark|markProxied, ^uint32(0)), goTo(chainProxied))
	p.rule(jump(chainScreen))
	p.list("opdeny", k.OperatorDeny, goTo(ClassDeny.chain()))
	if k.OperatorExact {
		p.rule(jump(chainDenied))
	}
	if k.Service {
		p.ports(k.ProxyPorts, daddrIn(netip.PrefixFrom(policy.ServiceAddr4, 32)), goTo(chainProxy))
	}
	pass, hostPass := chainOK, chainHostOpen
	if k.OperatorNames {
		pass, hostPass = chainException, chainHostException
	}
	p.list("open", k.FloorOpen, goTo(pass))
	p.list("openhost", k.HostOpen, jump(hostPass))
	if k.FloorNames {
		p.ports(k.ProxyPorts, nil, jump(chainBlockedNames))
	}
	p.rule(jump(chainBlocked))
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
		p.rule(goTo(ClassDeny.chain()))
		return p
	default:
		p.list("deny", k.Deny, goTo(ClassDeny.chain()))
	}
	p.rule(goTo(pass))
	return p
}

func (p *Program) rule(parts ...[]expr.Any) { p.rules = append(p.rules, when(parts...)) }

// ports adds a rule for each TCP port.
func (p *Program) ports(ports []uint16, match, then []expr.Any) {
	for _, port := range ports {
		p.rule(match, l4proto(policy.TCP), dport(port), then)
	}
}

// list adds what matches a list of prefixes: a comparison for a single one, a set
// for more, so that a packet costs the same whatever the length.
func (p *Program) list(name string, list []policy.PrefixPort, then []expr.Any) {
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

func (p *Program) match(name string, spans []span, kind setKind, then []expr.Any) {
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
// force. The proxy has them too: a name that is shown there may be of another service at the address.
func (p *Program) pinned() {
	for _, v6 := range []bool{false, true} {
		kind := setKind{v6: v6, ports: true, pins: true}
		set := p.set("pins", kind, nil)
		p.rule(l4proto(policy.TCP), daddrInSet(set, v6, true), goTo(chainProxy))
	}
}

func (p *Program) set(name string, kind setKind, elems []nftables.SetElement) string {
	s := p.kindOf(p.setName(name, kind.v6), kind)
	p.Sets, p.Elems = append(p.Sets, s), append(p.Elems, elems)
	return s.Name
}

func (p *Program) setName(name string, v6 bool) string {
	if v6 {
		return p.prefix + name + "6"
	}
	return p.prefix + name + "4"
}

func (p *Program) kindOf(name string, kind setKind) *nftables.Set {
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
		s.Size = MaxPins
	}
	return s
}

// Size is the number of elements of all sets.
func (p *Program) Size() (total int) {
	for _, e := range p.Elems {
		total += len(e)
	}
	return total
}

// Pin encodes a destination that the resolver pinned for the set it belongs to; the
// kernel forgets it after timeout. The comment carries the name, for a server that starts
// anew and for people who list the table.
func (p *Program) Pin(dst netip.AddrPort, timeout time.Duration, name string) (*nftables.Set, nftables.SetElement) {
	v6 := dst.Addr().Is6()
	return p.kindOf(p.setName("pins", v6), setKind{v6: v6, ports: true, pins: true}),
		nftables.SetElement{Key: withPort(dst.Addr(), dst.Port()), Timeout: timeout, Comment: name}
}

// InForce is what there is of the program once it is in force.
func (p *Program) InForce() *InForce {
	f := &InForce{Gen: uint16(p.mark & markGen)}
	for _, s := range p.Sets {
		f.Sets = append(f.Sets, s.Name)
	}
	return f
}

// Forget lets go of the rules and elements; afterwards only Pin and InForce may be called.
func (p *Program) Forget() { p.rules, p.Elems = nil, nil }

// asPrefix returns the prefix that covers exactly a span.
func asPrefix(s span) (netip.Prefix, bool) {
	for bits := range s.first.BitLen() + 1 {
		if p := netip.PrefixFrom(s.first, bits); p.Masked() == p && Last(p) == s.last {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
