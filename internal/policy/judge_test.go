package policy

import (
	"net/netip"
	"testing"
)

// TestJudgeByPortAndProtocol: a rule without a port is about TLS on 443 and HTTP on 80,
// one with a port about every protocol on it.
func TestJudgeByPortAndProtocol(t *testing.T) {
	c, err := Compile(Input{AllowOut: []string{"a.test", "git.a.test:443", "web.a.test:80", "db.a.test:5432"}, DenyOut: []string{"0.0.0.0/0"}}, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		port  uint16
		wire  Wire
		pins  []string
		allow bool
		route Route
	}{
		{"a.test", 443, WireTLS, nil, true, RouteName},
		{"a.test", 443, WireHTTP, nil, false, 0},
		{"a.test", 80, WireHTTP, nil, true, RouteName},
		{"a.test", 80, WireTLS, nil, false, 0},
		{"", 443, WireOther, []string{"a.test"}, false, 0},
		{"git.a.test", 443, WireTLS, nil, true, RouteName},
		{"git.a.test", 443, WireHTTP, nil, true, RouteName},
		{"", 443, WireOther, []string{"git.a.test"}, true, RoutePinned},
		{"", 443, WireOther, []string{"a.test", "gone.test", "git.a.test"}, true, RoutePinned},
		{"", 443, WireOther, nil, false, 0},
		{"git.a.test", 80, WireHTTP, nil, false, 0},
		{"", 80, WireOther, []string{"web.a.test"}, true, RoutePinned},
		{"db.a.test", 5432, WireTLS, nil, true, RouteName},
		{"db.a.test", 5432, WireHTTP, nil, true, RouteName},
		{"", 5432, WireOther, []string{"db.a.test"}, true, RoutePinned},
		{"b.test", 443, WireTLS, []string{"git.a.test"}, false, 0},
	} {
		j := c.Judge(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), tt.port), tt.name, tt.wire, tt.pins)
		if j.Allow != tt.allow || j.Route != tt.route {
			t.Errorf("%q on %d, wire %d, pins %q: %+v, want %v by route %d", tt.name, tt.port, tt.wire, tt.pins, j, tt.allow, tt.route)
		}
	}
	if entry, ok := c.PortRule(443); !ok || entry != "a.test:443" {
		t.Errorf("the rule to write is %q, %v", entry, ok)
	}
	if _, ok := c.PortRule(5432); ok {
		t.Error("a rule for a port is said to be missing")
	}
}

// TestJudgeNeverAllowsMoreThanDecide: what Judge lets pass, Decide allows for the name
// that decided, and a name that does not count changes nothing.
func TestJudgeNeverAllowsMoreThanDecide(t *testing.T) {
	names := []string{"", "a.test", "x.a.test", "b.test", "git.a.test"}
	entries := []string{"a.test", "*.a.test", "git.a.test:443", "b.test:80", "*:5432", "198.51.100.0/24", "198.51.100.1:443"}
	for mask := range 1 << len(entries) {
		in := Input{DenyOut: []string{"0.0.0.0/0"}}
		for i, e := range entries {
			if mask&(1<<i) != 0 {
				in.AllowOut = append(in.AllowOut, e)
			}
		}
		c, err := Compile(in, nil, 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, port := range []uint16{80, 443, 5432, 22} {
			dst := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.9"), port)
			bare := c.Decide(Flow{Proto: TCP, Dst: dst})
			for _, name := range names {
				for _, wire := range []Wire{WireOther, WireTLS, WireHTTP} {
					for _, pin := range names[1:] {
						j := c.Judge(dst, name, wire, []string{pin})
						if want := c.Decide(Flow{Proto: TCP, Dst: dst, Name: j.Name}); j.Verdict != want {
							t.Fatalf("%q: %q %d %d %q: %+v, Decide says %+v", in.AllowOut, name, port, wire, pin, j, want)
						}
						if j.Name != "" && j.Name != name && (j.Name != pin || j.Route != RoutePinned || bare.Allow) {
							t.Fatalf("%q: %q %d %d %q: decided by %q", in.AllowOut, name, port, wire, pin, j.Name)
						}
					}
				}
			}
		}
	}
}
