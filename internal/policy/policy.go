// Package policy decides what a network rule means: it parses and validates what
// a user wrote, compiles it once, and decides flows against the result. It is
// pure: it imports nothing of ours but errs, does no I/O and keeps no state.
package policy

import (
	"net/netip"
)

// DNSMode says which names a sandbox's resolver answers.
type DNSMode string

// The DNS modes. DNSAuto derives the mode from the rules: strict when the
// resolver's address is allowed only because a domain is listed, else open.
const (
	DNSAuto   DNSMode = ""
	DNSOpen   DNSMode = "open"
	DNSStrict DNSMode = "strict"
)

// OnDeny says how the proxy tells a client that it was denied.
type OnDeny string

// The ways to deny, where the client speaks HTTP. The zero value is OnDenyExplain:
// no client tries again after a 403, and most do for minutes after a reset.
const (
	OnDenyReset   OnDeny = "reset"
	OnDenyExplain OnDeny = "explain"
)

// Mode says whether the rules are enforced or only watched.
type Mode string

// The modes. The zero value is ModeEnforce. ModeObserve lets everything pass that is
// not always blocked and that the operator does not deny, and records what would have been denied.
const (
	ModeEnforce Mode = "enforce"
	ModeObserve Mode = "observe"
)

// Input is a sandbox's egress rules as its user wrote them. It is what is
// stored; Compile turns it into what decides. The JSON form is the stored form.
type Input struct {
	AllowOut            []string `json:"allowOut,omitempty"`
	DenyOut             []string `json:"denyOut,omitempty"`
	AllowInternetAccess *bool    `json:"allowInternetAccess,omitempty"`
	DNS                 DNSMode  `json:"dns,omitempty"`
	OnDeny              OnDeny   `json:"onDeny,omitempty"`
	Mode                Mode     `json:"mode,omitempty"`
}

// Operator is the layer above every sandbox's rules, from the server's
// configuration. The zero value adds nothing.
type Operator struct {
	// FloorOpen lists exact exceptions to the always blocked ranges: "cidr", "cidr:port",
	// "name" or "name:port".
	FloorOpen []string
	// AlwaysDeny and AlwaysAllow are decided before the sandbox's own rules,
	// deny first. Both take IPs, CIDRs, names and wildcards, with an optional port.
	AlwaysDeny, AlwaysAllow []string
	// DeniedAddr tells whether an address is that of a name in AlwaysDeny
	// ([Operator.DeniedNames]), and the number of its entry; nil: none is.
	DeniedAddr func(netip.AddrPort) (entry int, ok bool)
	// SelfDomains are the domains whose names this service answers itself
	// through its ingress, e.g. "cordon.localhost". Such a name resolves to
	// ServiceAddr4 inside a sandbox.
	SelfDomains []string
	// HostAddrs are the host's own addresses, which are always blocked.
	HostAddrs []netip.Prefix
	// IsHost tells more of them, of the moment it is asked; nil: no more.
	IsHost func(netip.Addr) bool
}

// DeniedName is an exact name of AlwaysDeny.
type DeniedName struct {
	Entry int // its number in the list
	Name  string
	Port  uint16 // 0: every port
}

// DeniedNames lists the exact names of AlwaysDeny. A name binds a connection only that
// shows it; their addresses can be denied as well. Wildcards and presets are not among
// them. It skips entries that Compile refuses.
func (op *Operator) DeniedNames() (out []DeniedName) {
	for i, text := range op.AlwaysDeny {
		if isPreset(text) {
			continue
		}
		if e, err := parseEntry(text); err == nil && !e.isAddr() && !e.wildcard {
			out = append(out, DeniedName{i, e.name, e.port})
		}
	}
	return out
}

// ServiceAddr4 is the address under which a sandbox sees this service's own
// public URLs. It has no owner (RFC 6890 reserves 192.0.0.0/24) and no packet for
// it leaves the host: the kernel hands TCP 80 and 443 to the egress proxy, which
// judges the name and dials the ingress.
var ServiceAddr4 = netip.AddrFrom4([4]byte{192, 0, 0, 8})

// DefaultNameserver is what a sandbox's resolv.conf names first. It is allowed
// for port 53 as soon as a policy lists a domain.
var DefaultNameserver = netip.AddrFrom4([4]byte{8, 8, 8, 8})

// SecondNameserver is the nameserver a sandbox tries next, so that a policy that
// denies the first still leaves DNS working.
var SecondNameserver = netip.AddrFrom4([4]byte{1, 1, 1, 1})

// Proto is a transport protocol number (IANA).
type Proto uint8

// The protocols that can be judged; everything else is dropped.
const (
	ICMP   Proto = 1
	TCP    Proto = 6
	UDP    Proto = 17
	ICMPv6 Proto = 58
)

// Flow is what is to be judged. Name is canonical (CanonicalName) or empty when
// the client showed none.
type Flow struct {
	Proto Proto
	Dst   netip.AddrPort // the destination the sandbox addressed
	Name  string
}

// Reason is a short, stable word for why a verdict was reached; it is a metric
// label and stays in the flow log.
type Reason string

// The reasons a policy itself gives. Other packages add their own (for example
// "bad-hello"), documented where they are defined.
const (
	ReasonFloor        Reason = "floor"         // a range no sandbox may reach
	ReasonFloorOpen    Reason = "floor-open"    // an exception that the operator made
	ReasonOperator     Reason = "operator"      // AlwaysAllow or AlwaysDeny
	ReasonAllowAddr    Reason = "allow-address" // an allowed IP or CIDR
	ReasonAllowName    Reason = "allow-name"    // an allowed domain
	ReasonAllowDNS     Reason = "allow-dns"     // the nameserver that came with a domain rule
	ReasonDenyAddr     Reason = "deny-address"  // a denied IP or CIDR
	ReasonNoName       Reason = "no-name"       // denied, and no name was shown that could allow it
	ReasonPinExpired   Reason = "pin-expired"   // denied, at an address that an allowed name no longer has
	ReasonNameDenied   Reason = "name-denied"   // denied, and the name shown is not listed
	ReasonNameTCP      Reason = "name-tcp-only" // denied UDP to a name that a rule lists for this port, which is about TCP
	ReasonDefaultAllow Reason = "default"       // no rule names it
	ReasonProtocol     Reason = "protocol"      // a protocol that is never forwarded
)

// Rule identifies one rule of a policy. Text is what the user wrote.
type Rule struct {
	ID   string // stable within one Compiled: "allow[0]", "deny[2]", "floor", "operator.deny[1]", "default"
	Text string // "*.example.com", "10.0.0.0/8 (private, RFC 1918)", ""
}

// Verdict is a decision that explains itself.
type Verdict struct {
	Allow  bool
	Rule   Rule
	Reason Reason
	// Observed is set in ModeObserve when Allow is true only because nothing is
	// enforced: the rules would have denied.
	Observed bool
}
