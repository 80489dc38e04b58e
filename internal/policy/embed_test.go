package policy

import (
	"net/netip"
	"testing"
)

// TestEmbedFollowsTheStandard has the examples of RFC 6052, 2.4.
func TestEmbedFollowsTheStandard(t *testing.T) {
	for prefix, want := range map[string]string{
		"2001:db8::/32":         "2001:db8:c000:221::/72",
		"2001:db8:100::/40":     "2001:db8:1c0:2:21::/80",
		"2001:db8:122::/48":     "2001:db8:122:c000:2:2100::/88",
		"2001:db8:122:300::/56": "2001:db8:122:3c0:0:221::/96",
		"2001:db8:122:344::/64": "2001:db8:122:344:c0:2:2100::/104",
		"2001:db8:122:344::/96": "2001:db8:122:344::c000:221/128",
		"64:ff9b::/96":          "64:ff9b::c000:221/128",
	} {
		got, ok := Embed(netip.MustParsePrefix("192.0.2.33/32"), netip.MustParsePrefix(prefix))
		w := netip.MustParsePrefix(want)
		if !ok || got.Addr() != w.Addr() || got.Bits() > w.Bits() {
			t.Errorf("below %s: got %s, want %s", prefix, got, want)
		}
		// A range covers the forms of its addresses and no others.
		wide, _ := Embed(netip.MustParsePrefix("192.0.0.0/14"), netip.MustParsePrefix(prefix))
		other, _ := Embed(netip.MustParsePrefix("192.4.0.0/32"), netip.MustParsePrefix(prefix))
		if !wide.Contains(got.Addr()) || wide.Contains(other.Addr()) {
			t.Errorf("below %s: %s is the form of 192.0.0.0/14", prefix, wide)
		}
	}
	for _, prefix := range []string{"2001:db8::/33", "::ffff:0:0/96", "10.0.0.0/8"} {
		if got, ok := Embed(netip.MustParsePrefix("192.0.2.33/32"), netip.MustParsePrefix(prefix)); ok {
			t.Errorf("below %s: %s", prefix, got)
		}
	}
}
