package policy

import "net/netip"

// Compiled is an immutable policy, safe for concurrent use. Every lookup costs
// the same whatever the number of rules: an exact map and a suffix walk for
// names, a prefix trie for addresses.
type Compiled struct {
	// to be designed
}

// Compile validates in and returns what decides. Every error is of kind
// errs.Invalid, names the entry and keeps the wording SDK users match on:
//
//	invalid denied CIDR X
//	invalid allowed address X
//	When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic.
//
// generation numbers the policy within its sandbox and is carried into the flow log.
func Compile(in Input, op *Operator, generation uint64) (*Compiled, error) { panic("not written") }

// Generation returns the number given to Compile.
func (c *Compiled) Generation() uint64 { panic("not written") }

// Input returns what was compiled.
func (c *Compiled) Input() Input { panic("not written") }

// OnDeny returns how the proxy answers a denied client; never empty.
func (c *Compiled) OnDeny() OnDeny { panic("not written") }

// Mode returns whether the rules are enforced; never empty.
func (c *Compiled) Mode() Mode { panic("not written") }

// Decide judges a flow: floor, operator, then allow, then deny, then default
// allow. Port 53 is judged like any other: whether the resolver may be spoken to.
func (c *Compiled) Decide(f Flow) Verdict { panic("not written") }

// DecideAddr judges an address the proxy is about to dial for a flow that was
// allowed by name: only the floor and the operator's denials can still refuse it.
func (c *Compiled) DecideAddr(name string, dst netip.AddrPort) Verdict { panic("not written") }

// DNS returns the mode in force, never DNSAuto.
func (c *Compiled) DNS() DNSMode { panic("not written") }

// DecideQuery judges whether the resolver may resolve name (canonical) at all.
// In open mode every name passes.
func (c *Compiled) DecideQuery(name string) Verdict { panic("not written") }

// WildcardOf returns the wildcard rule that allows name, if a wildcard and not
// an exact rule allows it: the resolver budgets distinct labels under it.
func (c *Compiled) WildcardOf(name string) (Rule, bool) { panic("not written") }

// IsSelf reports whether name belongs to this service's own domains.
func (c *Compiled) IsSelf(name string) bool { panic("not written") }

// AnswerAllowed reports whether the resolver may hand addr to the sandbox as an
// answer for name: floor addresses are removed (rebinding) unless the operator opened them.
func (c *Compiled) AnswerAllowed(name string, addr netip.Addr) bool { panic("not written") }

// PinPorts returns the ports that host:port rules open for name by the name
// binding of the resolver, and the rules; nil when there are none. Ports 80 and
// 443 are never among them: the proxy judges those.
func (c *Compiled) PinPorts(name string) []PinPort { panic("not written") }

// PinPort is one port opened for the addresses of a name.
type PinPort struct {
	Port uint16
	Rule Rule
}

// KernelRules is the part of a policy that the kernel decides. All prefix lists
// are merged, sorted and disjoint; IPv4 and IPv6 are mixed. The kernel applies, in order:
//
//  1. FloorOpen → accept; the floor (Floor and the host's addresses) → reject
//  2. OperatorDeny → reject, OperatorAllow → accept
//  3. Allow, AllowPorts → accept
//  4. NameRules: TCP ProxyPorts → the proxy
//  5. AutoDNS: UDP and TCP 53 to DefaultNameserver → the resolver
//  6. Deny, DenyPorts → reject; everything else → accept
//
// Accepted UDP and TCP 53 always goes to the resolver. In ModeObserve steps 2
// and 6 log instead of rejecting.
type KernelRules struct {
	Generation    uint64
	FloorOpen     []PrefixPort
	OperatorDeny  []PrefixPort
	OperatorAllow []PrefixPort
	Allow         []PrefixPort
	Deny          []PrefixPort
	DenyAll       bool     // Deny covers every destination, both families
	NameRules     bool     // some rule names a domain: ProxyPorts go to the proxy
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
func (c *Compiled) Kernel() KernelRules { panic("not written") }

// Floor returns the ranges no sandbox may reach, with the reason for each; the
// host's own addresses come on top, from Operator.HostAddrs.
func Floor() []FloorRange { panic("not written") }

// FloorRange is one range of the floor.
type FloorRange struct {
	Prefix netip.Prefix
	Why    string // "cloud metadata, link-local (RFC 3927)"
}

// CanonicalName lower-cases name, drops one trailing dot, and checks the LDH
// grammar (RFC 1123, 63-octet labels, 253 octets). An IP literal in any
// spelling is not a name. The second result is false when name is not a domain name.
func CanonicalName(name string) (string, bool) { panic("not written") }
