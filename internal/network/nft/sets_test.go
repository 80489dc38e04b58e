package nft

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/policy"
)

func pp(s string, port uint16) policy.PrefixPort {
	return policy.PrefixPort{Prefix: netip.MustParsePrefix(s), Port: port}
}

func show(spans []span) (out string) {
	for _, s := range spans {
		out += fmt.Sprintf("%d: %s-%s; ", s.port, s.first, s.last)
	}
	return strings.TrimSuffix(out, "; ")
}

func TestRanges(t *testing.T) {
	cases := []struct {
		name string
		in   []policy.PrefixPort
		v6   bool
		want string
	}{
		{"neighbours are joined", []policy.PrefixPort{pp("10.0.1.0/24", 0), pp("10.0.0.0/24", 0)}, false, "0: 10.0.0.0-10.0.1.255"},
		{"what lies within is swallowed", []policy.PrefixPort{pp("10.0.0.0/8", 0), pp("10.9.0.0/16", 0), pp("11.0.0.0/32", 0)}, false, "0: 10.0.0.0-11.0.0.0"},
		{"ports keep apart", []policy.PrefixPort{pp("10.0.0.0/24", 80), pp("10.0.0.0/24", 0)}, false, "0: 10.0.0.0-10.0.0.255; 80: 10.0.0.0-10.0.0.255"},
		{"everything", []policy.PrefixPort{pp("0.0.0.0/0", 0), pp("255.255.255.255/32", 0)}, false, "0: 0.0.0.0-255.255.255.255"},
		{"the other family is left out", []policy.PrefixPort{pp("10.0.0.0/24", 0), pp("ffff::/16", 0)}, true, "0: ffff::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
	}
	for _, c := range cases {
		if got := show(ranges(c.in, c.v6)); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
	}
	last := intervals(ranges([]policy.PrefixPort{pp("255.255.255.255/32", 0)}, false))
	if len(last) != 1 || last[0].IntervalEnd {
		t.Errorf("the last address of all: %v; want a start without an end", last)
	}
}

// TestIntervalsCoverWhatTheirPrefixesDo compares with looking at every prefix.
func TestIntervalsCoverWhatTheirPrefixesDo(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 200 {
		var list []policy.PrefixPort
		for range 1 + r.IntN(20) {
			a := netip.AddrFrom4([4]byte{byte(254 + r.IntN(2)), byte(r.IntN(3)), byte(r.Uint32()), byte(r.Uint32())})
			list = append(list, policy.PrefixPort{Prefix: netip.PrefixFrom(a, 8+r.IntN(25))})
		}
		elems := intervals(ranges(list, false))
		for range 200 {
			a := netip.AddrFrom4([4]byte{byte(254 + r.IntN(2)), byte(r.IntN(3)), byte(r.Uint32()), byte(r.Uint32())})
			want := slices.ContainsFunc(list, func(p policy.PrefixPort) bool { return p.Prefix.Contains(a) })
			got := false
			for _, e := range elems { // sorted: the last boundary at or below a decides
				if k, _ := netip.AddrFromSlice(e.Key); !a.Less(k) {
					got = !e.IntervalEnd
				}
			}
			if got != want {
				t.Fatalf("round %d: %s in %v: %t; want %t", round, a, list, got, want)
			}
		}
	}
}

func TestMarksOfSlots(t *testing.T) {
	for _, s := range []int{0, 5, MaxSlots - 1} {
		for _, gen := range []uint16{0, 1, 4095, 4096} {
			slot, proxied, ok := SlotOfMark(MarkOf(s, gen))
			if slot != s || proxied || !ok {
				t.Errorf("mark of %d, %d reads %d, %t, %t", s, gen, slot, proxied, ok)
			}
		}
	}
	if _, _, ok := SlotOfMark(0x1); ok {
		t.Error("a foreign mark counts as ours")
	}
}
