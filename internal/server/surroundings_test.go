package server

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
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

// A name server that stops answering, which may be the denied name's own, frees nothing.
func TestWhatIsDeniedStaysSoWhileItsNameCannotBeAskedFor(t *testing.T) {
	n := deniedNames{seen: map[netip.AddrPort]time.Time{}, by: map[netip.AddrPort]int{}}
	name := policy.DeniedName{Name: "bad.example.com", Entry: 3}
	other := policy.DeniedName{Name: "other.example.com", Entry: 4}
	first, second := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	now := time.Now()
	denied := func(a netip.Addr) bool { _, ok := n.by[netip.AddrPortFrom(a, 0)]; return ok }
	n.learn(name, []netip.Addr{first}, nil, now)
	n.learn(other, []netip.Addr{second}, nil, now)
	for range 60 {
		now = now.Add(deniedEvery)
		n.learn(name, nil, errors.New("the server does not answer"), now)
		n.learn(other, nil, errs.New(errs.NotFound, "it has no address"), now)
		n.expire(now)
	}
	if !denied(first) || denied(second) {
		t.Errorf("denied: %v", n.by)
	}
	n.learn(name, []netip.Addr{second}, nil, now)
	now = now.Add(deniedLinger + time.Second)
	n.learn(name, []netip.Addr{second}, nil, now)
	n.expire(now)
	if denied(first) || !denied(second) {
		t.Errorf("after it moved: %v", n.by)
	}
}
