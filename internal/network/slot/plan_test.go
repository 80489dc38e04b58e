package slot_test

import (
	"net/netip"
	"testing"

	"github.com/cordonhq/cordon/internal/network/slot"
)

func TestAddressesOfSlots(t *testing.T) {
	p := slot.Plan{Name: "x", Dir: "/run/x", Most: 1 << 15, Subnet4: netip.MustParsePrefix("10.223.0.0/16"), Subnet6: netip.MustParsePrefix("fd12:3456:789a::/48")}
	if p.Capacity() != 16384 {
		t.Error("capacity", p.Capacity())
	}
	seen := map[netip.Addr]bool{}
	for _, i := range []int{0, 1, 63, 64, 255, 256, 16383} {
		l := p.Lease(i, true)
		for _, a := range []netip.Addr{l.Addr4.Addr(), l.Addr6.Addr()} {
			if got, ok := p.SlotOf(a); !ok || got != i || seen[a] {
				t.Errorf("slot %d: %s belongs to %d, %t", i, a, got, ok)
			}
			seen[a] = true
		}
		for _, a := range []netip.Addr{l.Gate4, l.Gate6, l.Addr4.Addr().Next(), l.Addr6.Addr().Next()} {
			if got, ok := p.SlotOf(a); ok {
				t.Errorf("slot %d: %s belongs to %d; want nobody", i, a, got)
			}
		}
		if !l.Addr4.Contains(l.Gate4) || !l.Addr6.Contains(l.Gate6) || len(l.Link) > 15 {
			t.Errorf("slot %d: %+v", i, l)
		}
		if k, ok := p.Number(l.Link); !ok || k != i {
			t.Errorf("link %s is number %d, %t", l.Link, k, ok)
		}
	}
	for _, name := range []string{"cdx-16384", "cdx--1", "cdx-01", "cdxy-1", "cdx-", "eth0"} {
		if _, ok := p.Number(name); ok {
			t.Errorf("%s counts as ours", name)
		}
	}
}
