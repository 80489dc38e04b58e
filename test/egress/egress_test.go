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
	p := startPins(t, s) // they take half a minute to run out
	for _, c := range []struct {
		name string
		run  func(*testing.T, *live)
	}{
		{"rules", testRules},
		{"cut", testCut},
		{"quiet", testQuiet},
		{"modes", testModes},
		{"suggest", testSuggest},
		{"hellos", testHellos},
		{"follow", testFollow},
		{"calls", testCalls},
		{"latency", testLatency},
		{"flood", testFlood},
		{"log", testLogLoad},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, s) })
	}
	t.Run("pins", p.finish)
}

func contains(s, part string) bool { return strings.Contains(s, part) }

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

func mustAddr(host string) netip.Addr {
	a, ok := parseAddr(host)
	if !ok {
		panic(host + " is no address")
	}
	return a
}
