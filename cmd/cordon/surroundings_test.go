package main

import (
	"net/netip"
	"testing"
)

func TestNAT64PrefixIsReadFromItsAddresses(t *testing.T) {
	for addr, want := range map[string]string{
		"2001:db8:64::c000:aa":         "2001:db8:64::/96",
		"2001:db8:64::c000:ab":         "2001:db8:64::/96",
		"2001:db8:122:344:c0:0:aa00:0": "2001:db8:122:344::/64",
		"2001:db8:122:3c0:0:aa::":      "2001:db8:122:300::/56",
		"2001:db8:122:c000:0:ab00::":   "2001:db8:122::/48",
		"2001:db8:1c0:0:aa::":          "2001:db8:100::/40",
		"2001:db8:c000:aa::":           "2001:db8::/32",
		"2001:db8:64::c000:ac":         "",
		"192.0.0.170":                  "",
	} {
		got, ok := prefixOf(netip.MustParseAddr(addr))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %s, %v; want %q", addr, got, ok, want)
		}
	}
}
