package policy

import (
	"net/netip"
)

// Decide judges a flow: the operator's denials, the always blocked ranges, the operator's
// permissions, then allow, then deny, then default allow. No mode changes what the
// operator denies and what is always blocked. Port 53 is judged like any other: whether the resolver may be spoken to.
func (c *Compiled) Decide(f Flow) Verdict {
	port, name := f.Dst.Port(), f.Name
	switch f.Proto {
	case TCP:
	case UDP:
		name = "" // names are shown on TCP only
	case ICMP, ICMPv6:
		name, port = "", 0
	default:
		return Verdict{Rule: Rule{ID: "protocol", Text: "only TCP, UDP and ICMP are forwarded"}, Reason: ReasonProtocol}
	}
	dst := plain(f.Dst.Addr())
	if v, settled := c.decideAbove(name, dst, port); settled {
		return v
	}
	if r := c.allow.matchAddr(dst, port); r != 0 {
		return c.allowed(r, ReasonAllowAddr)
	}
	if r := c.allow.matchName(name, port); r != 0 {
		return c.allowed(r, ReasonAllowName)
	}
	if c.autoDNS && port == 53 && dst == DefaultNameserver {
		return c.allowed(c.autoDNSRef, ReasonAllowDNS)
	}
	if r := c.deny.matchDenied(dst, port); r != 0 {
		return c.denied(r, c.whyDenied(f, port))
	}
	return c.allowed(0, ReasonDefaultAllow)
}

// whyDenied tells a flow that no name could have saved from one that showed the
// wrong name or none, and UDP to a name that is listed.
func (c *Compiled) whyDenied(f Flow, port uint16) Reason {
	switch {
	case f.Proto == UDP && (c.allow.matchName(f.Name, port) != 0 || c.opAllow.matchName(f.Name, port) != 0):
		return ReasonNameTCP
	case f.Proto != TCP || !c.allow.coversPort(port) && !c.opAllow.coversPort(port):
		return ReasonDenyAddr
	case f.Name == "":
		return ReasonNoName
	default:
		return ReasonNameDenied
	}
}

// DecideAddr judges an address the proxy is about to dial for a flow that was
// allowed by name: only the always blocked ranges and the operator's denials can still refuse it.
func (c *Compiled) DecideAddr(name string, dst netip.AddrPort) Verdict {
	addr, port := plain(dst.Addr()), dst.Port()
	if v, settled := c.decideAbove(name, addr, port); settled {
		return v
	}
	if r := c.allow.matchName(name, port); r != 0 {
		return c.allowed(r, ReasonAllowName)
	}
	return c.allowed(0, ReasonDefaultAllow)
}

// DecideQuery judges whether the resolver may resolve name (canonical) at all.
// In open mode every name passes that the operator does not deny.
func (c *Compiled) DecideQuery(name string) Verdict {
	if c.opDeny.names != nil {
		if r := c.opDeny.names.match(name); r != 0 {
			return c.forbidden(r)
		}
	}
	if r := c.floorOpen.listsName(name); r != 0 {
		return c.allowed(r, ReasonFloorOpen)
	}
	if r := c.opAllow.listsName(name); r != 0 {
		return c.allowed(r, ReasonOperator)
	}
	if r := c.allow.listsName(name); r != 0 {
		return c.allowed(r, ReasonAllowName)
	}
	if c.dns == DNSStrict {
		v := c.denied(0, ReasonNameDenied)
		v.Rule = Rule{ID: "dns", Text: "strict: only listed names are resolved"}
		return v
	}
	return c.allowed(0, ReasonDefaultAllow)
}

// AnswerAllowed reports whether the resolver may hand addr to the sandbox as an
// answer for name: always blocked addresses are removed (rebinding) unless the operator opened them.
func (c *Compiled) AnswerAllowed(name string, addr netip.Addr) bool {
	addr = plain(addr)
	if _, floor := c.inFloor(addr); !floor {
		return true
	}
	if addr == ServiceAddr4 && c.IsSelf(name) || c.floorOpen.listsName(name) != 0 || c.floorOpen.addrs.match(addr) != 0 {
		return true
	}
	for _, set := range c.floorOpen.addrPorts {
		if set.match(addr) != 0 {
			return true
		}
	}
	return false
}

// plain is the form addresses are judged in: IPv4-mapped ones as the IPv4
// address they are, without a zone.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// decideFloor settles a flow to an always blocked address. The service's own address is
// judged like a public one when the name shown is ours: the ingress behind it
// checks everything again.
func (c *Compiled) decideFloor(name string, dst netip.Addr, port uint16) (v Verdict, settled bool) {
	rule, floor := c.inFloor(dst)
	if !floor || dst == ServiceAddr4 && proxyPort(port) && c.IsSelf(name) {
		return Verdict{}, false
	}
	r := c.floorOpen.matchAddr(dst, port)
	if r == 0 {
		r = c.floorOpen.matchName(name, port)
	}
	if r != 0 {
		return c.allowed(r, ReasonFloorOpen), true
	}
	return Verdict{Rule: rule, Reason: ReasonFloor}, true
}

// inFloor finds the always blocked range of an address or of the IPv4 address it leads to.
func (c *Compiled) inFloor(a netip.Addr) (Rule, bool) {
	if !a.IsValid() {
		return Rule{ID: "floor", Text: "no address"}, true
	}
	if rule, ok := floorTable().Lookup(a); ok {
		return rule, true
	}
	if c.hostAddrs.Contains(a) || c.isHost != nil && c.isHost(a) {
		return Rule{ID: "floor", Text: "an address of the host"}, true
	}
	if v4, ok := embedded(a); ok {
		return c.inFloor(v4)
	}
	return Rule{}, false
}

// decideAbove settles a flow that the layers above the sandbox's own rules speak of:
// the operator's denials, the always blocked ranges with their exceptions, the operator's permissions.
func (c *Compiled) decideAbove(name string, dst netip.Addr, port uint16) (v Verdict, settled bool) {
	if r := c.opDeny.matchDenied(dst, port).or(c.opDeny.matchName(name, port)); r != 0 {
		return c.forbidden(r), true
	}
	// On the proxy's ports the name that is shown decides, and the proxy goes where that
	// leads: other names may be at the same address.
	if c.deniedAddr != nil && (name == "" || !proxyPort(port)) {
		if i, ok := c.deniedAddr(netip.AddrPortFrom(dst, port)); ok && i < len(c.opDenyRefs) {
			return c.forbidden(c.opDenyRefs[i]), true
		}
	}
	if v, settled := c.decideFloor(name, dst, port); settled {
		return v, true
	}
	r := c.opAllow.matchAddr(dst, port).or(c.opAllow.matchName(name, port))
	return c.allowed(r, ReasonOperator), r != 0
}

// forbidden is a denial of the operator's, in every mode.
func (c *Compiled) forbidden(r ruleRef) Verdict {
	return Verdict{Rule: c.rules[r], Reason: ReasonOperator}
}

func (c *Compiled) allowed(r ruleRef, why Reason) Verdict {
	return Verdict{Allow: true, Rule: c.rules[r], Reason: why}
}

// denied is a denial, or what observe mode makes of it.
func (c *Compiled) denied(r ruleRef, why Reason) Verdict {
	observed := c.input.Mode == ModeObserve
	return Verdict{Allow: observed, Rule: c.rules[r], Reason: why, Observed: observed}
}
