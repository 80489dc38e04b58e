package policy

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/gaissmai/bart"
)

// FloorRange is one always blocked range.
type FloorRange struct {
	Prefix netip.Prefix
	Why    string // "cloud metadata, link-local, RFC 3927"
}

// Floor returns the ranges no sandbox may reach, with the reason for each; the
// host's own addresses come on top, from Operator.HostAddrs. It holds the NAT64
// and 6to4 forms of every IPv4 range too, so that a packet filter that knows
// nothing but prefixes judges as Decide does. Ranges may lie within each other.
func Floor() []FloorRange {
	out := append(floor4(), floor6()...)
	for _, r := range floor4() {
		for _, p := range translations(r.Prefix) {
			out = append(out, FloorRange{p, "IPv6 form of " + r.Prefix.String() + ", " + r.Why})
		}
	}
	return out
}

func floor4() []FloorRange {
	return []FloorRange{
		{netip.MustParsePrefix("0.0.0.0/8"), "this network, RFC 791"},
		{netip.MustParsePrefix("10.0.0.0/8"), "private, RFC 1918"},
		{netip.MustParsePrefix("100.64.0.0/10"), "carrier-grade NAT, RFC 6598"},
		{netip.MustParsePrefix("127.0.0.0/8"), "loopback, RFC 1122"},
		{netip.MustParsePrefix("168.63.129.16/32"), "cloud metadata, Azure"},
		{netip.MustParsePrefix("169.254.0.0/16"), "cloud metadata, link-local, RFC 3927"},
		{netip.MustParsePrefix("172.16.0.0/12"), "private, RFC 1918"},
		{netip.MustParsePrefix("192.0.0.0/24"), "protocol assignments, RFC 6890"},
		{netip.MustParsePrefix("192.168.0.0/16"), "private, RFC 1918"},
		{netip.MustParsePrefix("198.18.0.0/15"), "benchmarking, RFC 2544"},
		{netip.MustParsePrefix("224.0.0.0/4"), "multicast, RFC 5771"},
		{netip.MustParsePrefix("240.0.0.0/4"), "reserved and broadcast, RFC 1112"},
	}
}

// floor6 lists whole transition mechanisms where nothing that is reachable is
// lost: they are not routed, and an embedded address in their low bits cannot be
// told by a prefix. NAT64 and 6to4 carry public addresses, so only the forms of
// always blocked ranges are blocked too (Floor, embedded).
func floor6() []FloorRange {
	return []FloorRange{
		{netip.MustParsePrefix("::/128"), "unspecified, RFC 4291"},
		{netip.MustParsePrefix("::1/128"), "loopback, RFC 4291"},
		{netip.MustParsePrefix("::/96"), "IPv4-compatible, deprecated, RFC 4291"},
		{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4-mapped, never on a wire, RFC 4291"},
		{netip.MustParsePrefix("::ffff:0:0:0/96"), "IPv4-translated, RFC 2765"},
		{netip.MustParsePrefix("64:ff9b:1::/48"), "local NAT64, RFC 8215"},
		{netip.MustParsePrefix("2001::/32"), "Teredo, RFC 4380"},
		{netip.MustParsePrefix("fc00::/7"), "unique local, RFC 4193"},
		{netip.MustParsePrefix("fd00:ec2::254/128"), "cloud metadata, AWS"},
		{netip.MustParsePrefix("fe80::/10"), "link-local, RFC 4291"},
		{netip.MustParsePrefix("ff00::/8"), "multicast, RFC 4291"},
	}
}

// floorTable has the always blocked ranges as a trie, made once because every policy shares it
// and it is never written to.
var floorTable = sync.OnceValue(func() *bart.Table[Rule] {
	t := new(bart.Table[Rule])
	for _, r := range append(floor4(), floor6()...) {
		t.Insert(r.Prefix, Rule{ID: "floor", Text: r.Prefix.String() + " (" + r.Why + ")"})
	}
	return t
})

// The transition prefixes whose addresses name a public IPv4 address: RFC 6052
// section 2.1 and RFC 3056 section 2.
var (
	nat64  = netip.MustParsePrefix("64:ff9b::/96")
	sixTo4 = netip.MustParsePrefix("2002::/16")
)

// embedded returns the IPv4 address that a NAT64 or 6to4 address leads to.
func embedded(a netip.Addr) (netip.Addr, bool) {
	if !a.Is6() {
		return netip.Addr{}, false
	}
	b := a.As16()
	switch {
	case b[0] == 0x20 && b[1] == 0x02:
		return netip.AddrFrom4([4]byte(b[2:6])), true
	case b[0] == 0 && nat64.Contains(a):
		return netip.AddrFrom4([4]byte(b[12:16])), true
	}
	return netip.Addr{}, false
}

// translations returns the NAT64 and 6to4 forms of an IPv4 prefix, nothing for
// an IPv6 prefix.
func translations(p netip.Prefix) []netip.Prefix { return Translations(p) }

// Translations returns the IPv6 forms of an IPv4 prefix: 6to4, and NAT64 with the
// well-known prefix and with more of a network's own. An IPv6 prefix has none.
func Translations(p netip.Prefix, own ...netip.Prefix) []netip.Prefix {
	if !p.Addr().Is4() {
		return nil
	}
	v4, b := p.Addr().As4(), sixTo4.Addr().As16()
	copy(b[2:], v4[:])
	out := []netip.Prefix{netip.PrefixFrom(netip.AddrFrom16(b), sixTo4.Bits()+p.Bits())}
	for _, prefix := range append([]netip.Prefix{nat64}, own...) {
		if t, ok := Embed(p, prefix); ok {
			out = append(out, t)
		}
	}
	return out
}

// Embed returns the form of an IPv4 prefix below a NAT64 prefix (RFC 6052, 2.2): the
// octet of the bits 64 to 71 is zero, and the address goes round it.
func Embed(p, below netip.Prefix) (netip.Prefix, bool) {
	if !p.Addr().Is4() || !IsNAT64(below) {
		return netip.Prefix{}, false
	}
	v4, b := p.Addr().As4(), below.Masked().Addr().As16()
	at, bits := below.Bits()/8, below.Bits()
	for i := range 4 {
		if at == 8 {
			at, bits = 9, bits+8
		}
		b[at] = v4[i]
		used := min(8, max(0, p.Bits()-8*i))
		if used == 0 {
			break
		}
		at, bits = at+1, bits+used
	}
	return netip.PrefixFrom(netip.AddrFrom16(b), bits).Masked(), true
}

// IsNAT64 reports whether a prefix has one of the lengths of RFC 6052, 2.2.
func IsNAT64(p netip.Prefix) bool {
	return p.Addr().Is6() && !p.Addr().Is4In6() && slices.Contains([]int{32, 40, 48, 56, 64, 96}, p.Bits())
}
