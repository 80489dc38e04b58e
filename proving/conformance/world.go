package conformance

import (
	"net/netip"
	"strings"

	"github.com/cordonhq/cordon/client"
)

// The lab's cast. A is allowed and B is not, in every case that does not say
// otherwise; both are in lab/world.zone.
const (
	nameA        = "allowed.test"
	nameB        = "denied.test"
	nameShared   = "shared-a.test" // allowed, at the address of
	nameNeighbor = "shared-b.test" // which is not
	nameWild     = "wild.test"     // apex of an allowed wildcard
	nameTunnel   = "tunnel.attacker.test"
	unicodeName  = "xn--bcher-kva.test" // bücher.test
)

var (
	addrA        = netip.MustParseAddr("198.51.100.10")
	addrB        = netip.MustParseAddr("198.51.100.20")
	addrShared   = netip.MustParseAddr("198.51.100.30")
	addrWild     = netip.MustParseAddr("198.51.100.40")
	addrUnicode  = netip.MustParseAddr("198.51.100.60")
	addrAttacker = netip.MustParseAddr("198.51.100.66")
	addrDNS      = netip.MustParseAddr("8.8.8.8")

	// Names at the limits of RFC 1035 section 2.3.4: a label of 63 octets, and a
	// name of 253.
	longLabel = strings.Repeat("l", 63)
	longName  = strings.Repeat(strings.Repeat("n", 61)+".", 4) + "test1"
)

// only is a policy that denies everything but what is listed.
func only(allowed ...string) client.Network {
	return client.Network{AllowOut: allowed, DenyOut: []string{client.AllTraffic}}
}

// standard is the policy most cases run under: A, a name on a shared address and
// a wildcard.
func standard() client.Network { return only(nameA, nameShared, "*."+nameWild) }

// everything is the policy that denies nothing but the floor.
func everything() client.Network { return client.Network{} }

func at(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
