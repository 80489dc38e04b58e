package nft

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"github.com/cordonhq/cordon/internal/policy"
)

// span is a range of addresses for one port (0: all), both ends included.
type span struct {
	port        uint16
	first, last netip.Addr
}

// ranges returns the spans of one family, sorted, with what overlaps or touches
// joined: the kernel refuses a set whose elements overlap.
func ranges(in []policy.PrefixPort, v6 bool) []span {
	var out []span
	for _, p := range in {
		if p.Prefix.IsValid() && p.Prefix.Addr().Is6() == v6 {
			out = append(out, span{p.Port, p.Prefix.Masked().Addr(), Last(p.Prefix)})
		}
	}
	slices.SortFunc(out, func(a, b span) int {
		return cmp.Or(cmp.Compare(a.port, b.port), a.first.Compare(b.first))
	})
	joined := out[:0]
	for _, s := range out {
		if k := len(joined) - 1; k >= 0 && joined[k].port == s.port && touches(joined[k].last, s.first) {
			if joined[k].last.Less(s.last) {
				joined[k].last = s.last
			}
			continue
		}
		joined = append(joined, s)
	}
	return joined
}

// touches reports whether a range that ends at last leaves no gap before first.
func touches(last, first netip.Addr) bool {
	next := last.Next()
	return !next.IsValid() || !next.Less(first)
}

// Last returns the highest address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// intervals encodes spans for an interval set: each start, and behind each end the
// start of a gap. The gap behind the last address of all has no start.
func intervals(spans []span) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, 2*len(spans))
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: s.first.AsSlice()})
		if end := s.last.Next(); end.IsValid() {
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// portIntervals encodes spans for a set of address and port.
func portIntervals(spans []span) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, len(spans))
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: withPort(s.first, s.port), KeyEnd: withPort(s.last, s.port)})
	}
	return out
}

// withPort is the key of address and port, each padded to whole registers.
func withPort(a netip.Addr, port uint16) []byte {
	return append(a.AsSlice(), byte(port>>8), byte(port), 0, 0)
}

// prefixElements encodes prefixes of one family for an interval set.
func prefixElements(list []netip.Prefix, v6 bool) []nftables.SetElement {
	all := make([]policy.PrefixPort, len(list))
	for i, p := range list {
		all[i].Prefix = p
	}
	return intervals(ranges(all, v6))
}
