package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

func TestFormerAddressesAreKept(t *testing.T) {
	ip := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}) }
	var s addresses
	for _, c := range []struct {
		now  netip.Addr
		want []netip.Addr
	}{
		{ip(1), nil},
		{ip(1), nil}, // claimed anew, in the same life
		{ip(2), []netip.Addr{ip(1)}},
		{ip(3), []netip.Addr{ip(1), ip(2)}},
		{ip(1), []netip.Addr{ip(2), ip(3)}}, // the old one again
		{ip(2), []netip.Addr{ip(3), ip(1)}},
	} {
		if got := s.move([]netip.Addr{c.now}); !slices.Equal(got, c.want) {
			t.Errorf("at %s: %v, want %v", c.now, got, c.want)
		}
	}
	for n := range 100 {
		s.move([]netip.Addr{ip(100 + n)})
	}
	if got := s.earlier(); len(got) != maxFormer || got[maxFormer-1] != ip(198) {
		t.Errorf("kept: %v", got)
	}
}

func TestFormerAddressesBecomeLocalAtEachClaim(t *testing.T) {
	h := start(t)
	var added []string
	h.agent.cfg.AddLocal = func(ip netip.Addr) error {
		added = append(added, ip.String())
		return fmt.Errorf("not here")
	}
	h.agent.addresses.move([]netip.Addr{netip.MustParseAddr("203.0.113.5")})
	for range 2 {
		h.claimDefault() // an error does not keep it from being claimed
	}
	if want := []string{"203.0.113.5", "203.0.113.5"}; !slices.Equal(added, want) {
		t.Errorf("made local: %q, want %q", added, want)
	}
}
