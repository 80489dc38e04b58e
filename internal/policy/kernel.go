package policy

import "net/netip"

// KernelRules is the part of a policy that the kernel decides. All prefix lists
// are sorted by port and address, merged and disjoint for each port; IPv4 and
// IPv6 are mixed. They are shared: do not write to them. The kernel applies, in order:
//
//  1. OperatorDeny → reject; OperatorExact: what DeniedAddr says, but TCP ProxyPorts → reject
//  2. Service: TCP ProxyPorts to ServiceAddr4 → the proxy
//  3. FloorOpen, and HostOpen where the destination is the host's → accept, but with
//     OperatorNames TCP ProxyPorts → the proxy; with FloorNames TCP ProxyPorts to what is
//     always blocked → the proxy; what is always blocked (Floor and the host's addresses) → reject
//  4. OperatorNames and NameRules: TCP ProxyPorts → the proxy
//  5. OperatorAllow, Allow → accept, but with OperatorNames TCP ProxyPorts → the proxy
//  6. NameRules: TCP ProxyPorts → the proxy
//     Pins: TCP to a pinned address and port → the proxy
//  7. AutoDNS: UDP and TCP 53 to DefaultNameserver → the resolver
//  8. Deny → reject; everything else → accept, but with OperatorNames TCP ProxyPorts → the proxy
//
// Accepted UDP and TCP 53 always goes to the resolver. In ModeObserve step 8 logs
// instead of rejecting. Deny lists hold the NAT64 and 6to4 forms of their IPv4
// prefixes. Decide follows the same order.
type KernelRules struct {
	Generation    uint64
	Service       bool         // a name shown at ServiceAddr4 may be allowed
	FloorOpen     []PrefixPort // the exceptions to Floor
	HostOpen      []PrefixPort // what they may open of the host's addresses beside
	FloorNames    bool         // an exception is a name for a proxy port: only the proxy can tell
	OperatorDeny  []PrefixPort
	OperatorExact bool // the operator denies an exact name
	OperatorNames bool // the operator denies a name on ProxyPorts: nothing passes there but by the proxy
	OperatorAllow []PrefixPort
	Allow         []PrefixPort
	Deny          []PrefixPort
	DenyAll       bool     // Deny covers every destination, both families
	NameRules     bool     // some rule names a domain, or Observe: ProxyPorts go to the proxy
	ProxyPorts    []uint16 // 80, 443 and, with NameRules, nothing else
	AutoDNS       bool
	Pins          bool // some rule is host:port: keep a pin set
	Observe       bool
}

// PrefixPort is a prefix and, unless 0, the one port it is limited to.
type PrefixPort struct {
	Prefix netip.Prefix
	Port   uint16
}

// Kernel returns the part the kernel decides.
func (c *Compiled) Kernel() KernelRules { return c.kernel }

func (c *Compiled) deriveKernel() {
	k := &c.kernel
	k.Generation = c.generation
	k.FloorOpen, k.HostOpen = exceptions(c.floorOpen.prefixes)
	k.FloorNames = c.floorOpen.proxied()
	k.OperatorDeny = merge(translated(c.opDeny.prefixes))
	k.OperatorExact = c.opDenyExact && c.deniedAddr != nil
	k.OperatorNames = c.opDeny.proxied()
	k.OperatorAllow = merge(c.opAllow.prefixes)
	k.Allow = merge(c.allow.prefixes)
	if k.DenyAll {
		k.Deny = merge(c.deny.prefixes)
	} else {
		k.Deny = merge(translated(c.deny.prefixes))
	}
	k.Observe = c.input.Mode == ModeObserve
	// ModeObserve reports names as well, so the proxy has a look at them.
	k.NameRules = c.allow.proxied() || c.opAllow.proxied() || k.Observe
	k.ProxyPorts = []uint16{80, 443}
	k.Service = k.NameRules || !k.DenyAll
	for _, port := range k.ProxyPorts {
		for _, allow := range []*ruleSet{&c.floorOpen, &c.opAllow, &c.allow} {
			k.Service = k.Service || allow.matchAddr(ServiceAddr4, port) != 0
		}
	}
	k.AutoDNS = c.autoDNS
	k.Pins = c.allow.pins() || c.opAllow.pins() || c.floorOpen.pins()
	// The tries decide from here on.
	for _, s := range []*ruleSet{&c.allow, &c.deny, &c.opAllow, &c.opDeny, &c.floorOpen} {
		s.prefixes = nil
	}
}

// translated adds the IPv6 forms of IPv4 prefixes.
func translated(in []PrefixPort) []PrefixPort {
	out := in
	for _, p := range in {
		for _, t := range translations(p.Prefix) {
			out = append(out, PrefixPort{t, p.Port})
		}
	}
	return out
}

// exceptions cuts the operator's exceptions to what they open: one says nothing of an
// address that is not always blocked. What of it is outside of Floor may still be the
// host's.
func exceptions(in []PrefixPort) (blocked, host []PrefixPort) {
	for _, p := range in {
		whole := false
		for _, r := range Floor() {
			if !r.Prefix.Overlaps(p.Prefix) {
				continue
			}
			part := p.Prefix
			if part.Bits() < r.Prefix.Bits() {
				part = r.Prefix
			}
			whole = whole || part == p.Prefix
			blocked = append(blocked, PrefixPort{part, p.Port})
		}
		if !whole {
			host = append(host, p)
		}
	}
	return merge(blocked), merge(host)
}
