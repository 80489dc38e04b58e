package policy

import "net/netip"

// KernelRules is the part of a policy that the kernel decides. All prefix lists
// are sorted by port and address, merged and disjoint for each port; IPv4 and
// IPv6 are mixed. They are shared: do not write to them. The kernel applies, in order:
//
//  1. FloorOpen → accept; with FloorNames TCP ProxyPorts to the floor → the
//     proxy; the floor (Floor and the host's addresses) → reject
//  2. OperatorDeny → reject, OperatorAllow → accept
//  3. Allow, AllowPorts → accept
//  4. NameRules: TCP ProxyPorts → the proxy
//     Pins: TCP to a pinned address and port → the proxy
//  5. AutoDNS: UDP and TCP 53 to DefaultNameserver → the resolver
//  6. Deny, DenyPorts → reject; everything else → accept
//
// Accepted UDP and TCP 53 always goes to the resolver. In ModeObserve steps 2
// and 6 log instead of rejecting. Deny lists hold the NAT64 and 6to4 forms of
// their IPv4 prefixes.
type KernelRules struct {
	Generation    uint64
	FloorOpen     []PrefixPort
	FloorNames    bool // FloorOpen holds a name for a proxy port: only the proxy can tell
	OperatorDeny  []PrefixPort
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
	k.FloorOpen = merge(c.floorOpen.prefixes)
	k.FloorNames = c.floorOpen.proxied()
	k.OperatorDeny = merge(translated(c.opDeny.prefixes))
	k.OperatorAllow = merge(c.opAllow.prefixes)
	k.Allow = merge(c.allow.prefixes)
	if k.DenyAll {
		k.Deny = merge(c.deny.prefixes)
	} else {
		k.Deny = merge(translated(c.deny.prefixes))
	}
	k.Observe = c.input.Mode == ModeObserve
	// Whoever observes wants to know the names, so the proxy has a look at them.
	k.NameRules = c.allow.proxied() || c.opAllow.proxied() || c.opDeny.proxied() || k.Observe
	k.ProxyPorts = []uint16{80, 443}
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
