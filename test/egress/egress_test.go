package egress_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"
)

// TestEgress runs everything that leaves the server alone, against one server.
func TestEgress(t *testing.T) {
	s := newStand(t, "")
	t.Run("rules", func(t *testing.T) { testRules(t, s) })
}

// hostOf is the host of "host:port".
func hostOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return host
}

func parseAddr(host string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return a, err == nil
}
