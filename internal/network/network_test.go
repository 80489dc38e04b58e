package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

func at(addr string) netip.AddrPort { return netip.MustParseAddrPort(addr) }

func TestNothingPassesBeforeAPolicy(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	to := netip.AddrPortFrom(public4, 7777)
	if reaches(l, to) {
		t.Fatal("a slot without a policy reached the internet")
	}
	w.apply(l, policy.Input{})
	who, err := hello(l, to)
	if err != nil || who != uplink4.Addr().String() {
		t.Fatalf("after an allowing policy: called as %q, %v; want %s", who, err, uplink4.Addr())
	}
	who, err = hello(l, netip.AddrPortFrom(public6, 7777))
	if err != nil || who != uplink6.Addr().String() {
		t.Fatalf("IPv6: called as %q, %v; want %s", who, err, uplink6.Addr())
	}
}

func TestPolicies(t *testing.T) {
	w := start(t)
	w.serve(7777, 8888)
	all, no := []string{"0.0.0.0/0"}, false
	cases := []struct {
		name    string
		in      policy.Input
		allowed []string
		refused []string
	}{
		{
			name:    "without rules everything but the floor is allowed",
			allowed: []string{"198.51.100.10:7777", "[2001:db8:2::10]:7777", "8.8.8.8:7777"},
			refused: []string{"10.1.2.3:7777", "169.254.169.254:7777", "192.168.0.1:7777", "100.64.0.1:7777", "[fd00::1]:7777", "[64:ff9b::a00:1]:7777", "192.0.0.8:7777"},
		},
		{
			name:    "no internet access means none, in both families",
			in:      policy.Input{AllowInternetAccess: &no},
			refused: []string{"198.51.100.10:7777", "[2001:db8:2::10]:7777"},
		},
		{
			name:    "allow beats deny, and the floor beats allow",
			in:      policy.Input{DenyOut: all, AllowOut: []string{"198.51.100.0/24", "10.0.0.0/8", "2001:db8:2::/48"}},
			allowed: []string{"198.51.100.10:7777", "198.51.100.255:7777", "[2001:db8:2::10]:7777"},
			refused: []string{"198.51.101.0:7777", "10.0.0.1:7777", "[2001:db8:3::1]:7777"},
		},
		{
			name:    "the edges of a range",
			in:      policy.Input{DenyOut: []string{"198.51.100.64/26", "198.51.100.3", "2001:db8:2::ff/128", "2001:db8:2:8000::/49"}},
			allowed: []string{"198.51.100.63:7777", "198.51.100.128:7777", "198.51.100.2:7777", "198.51.100.4:7777", "[2001:db8:2::100]:7777", "[2001:db8:2:7fff:ffff:ffff:ffff:ffff]:7777"},
			refused: []string{"198.51.100.64:7777", "198.51.100.127:7777", "198.51.100.3:7777", "[2001:db8:2::ff]:7777", "[2001:db8:2:8000::]:7777", "[2001:db8:2:ffff::1]:7777"},
		},
		{
			name:    "rules for a port",
			in:      policy.Input{DenyOut: all, AllowOut: []string{"198.51.100.0/24:7777", "198.51.102.0/24:8888", "198.51.103.7:7777", "[2001:db8:2::10]:8888"}},
			allowed: []string{"198.51.100.10:7777", "198.51.102.10:8888", "198.51.103.7:7777", "[2001:db8:2::10]:8888"},
			refused: []string{"198.51.100.10:8888", "198.51.102.10:7777", "198.51.103.8:7777", "[2001:db8:2::10]:7777"},
		},
		{
			name:    "the last addresses of all are in no way special",
			in:      policy.Input{DenyOut: []string{"223.255.255.255", "ff00::/8", "fe00::/7", "200.0.0.0/5"}},
			allowed: []string{"223.255.255.254:7777"},
			refused: []string{"223.255.255.255:7777", "200.0.0.1:7777", "207.255.255.255:7777"},
		},
		{
			name:    "observing refuses nothing but the floor",
			in:      policy.Input{DenyOut: all, Mode: policy.ModeObserve},
			allowed: []string{"198.51.100.10:7777", "[2001:db8:2::10]:7777"},
			refused: []string{"10.0.0.1:7777"},
		},
	}
	l := w.lease()
	told := false
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w.t = t
			p := w.apply(l, c.in)
			for _, a := range c.allowed {
				if v := p.Decide(policy.Flow{Proto: policy.TCP, Dst: at(a)}); !v.Allow {
					t.Errorf("%s: the policy itself denies it", a)
				}
				if _, err := hello(l, at(a)); err != nil {
					t.Errorf("%s: %v", a, err)
				}
			}
			for _, a := range c.refused {
				best := time.Hour
				for range 5 { // the machine may be busy
					began := time.Now()
					conn, err := dial(l, "tcp", at(a))
					best = min(best, time.Since(began))
					if err == nil {
						conn.Close()
					}
					if !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("%s: %v; want connection refused", a, err)
						break
					}
					if best < 50*time.Millisecond {
						break
					}
				}
				if best > 50*time.Millisecond {
					t.Errorf("%s: refused only after %v", a, best)
				}
				err := echoUDP(l, at(a), 200*time.Millisecond)
				if err == nil {
					t.Errorf("%s: an answer over UDP", a)
				}
				// The kernel bounds how many ICMP errors one host gets a second, so not
				// every datagram is answered by one.
				if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("%s: UDP: %v; want port unreachable", a, err)
				}
				told = told || errors.Is(err, syscall.ECONNREFUSED)
			}
		})
	}
	w.t = t
	if !told {
		t.Error("no refused datagram was answered by ICMP")
	}
}

// TestTheKernelJudgesAsThePolicyDoes tries destinations at and around the edges of
// every rule and of the floor, and compares with Decide.
func TestTheKernelJudgesAsThePolicyDoes(t *testing.T) {
	w := start(t)
	w.serve(7777)
	op := &policy.Operator{
		FloorOpen: []string{"10.20.0.0/16", "10.30.0.1:7777"}, AlwaysDeny: []string{"198.51.100.128/25"}, AlwaysAllow: []string{"198.51.101.0/24"},
	}
	p := compiled(t, policy.Input{
		DenyOut: []string{"198.51.0.0/16", "203.0.112.0/24:7777", "2001:db8:5::/48"}, AllowOut: []string{"198.51.100.0/24", "198.51.7.7", "2001:db8:5:1::/64"},
	}, op)
	l := w.lease()
	if err := w.Apply(context.Background(), l, p); err != nil {
		t.Fatal(err)
	}
	var prefixes []netip.Prefix
	for _, s := range []string{"198.51.0.0/16", "198.51.100.0/24", "198.51.100.128/25", "198.51.101.0/24", "198.51.7.7/32",
		"203.0.112.0/24", "10.20.0.0/16", "10.30.0.1/32", "2001:db8:5::/48", "2001:db8:5:1::/64"} {
		prefixes = append(prefixes, netip.MustParsePrefix(s))
	}
	for _, r := range policy.Floor() {
		prefixes = append(prefixes, r.Prefix)
	}
	seen := map[netip.Addr]bool{}
	var tried, allowed int
	for _, prefix := range prefixes {
		first, last := prefix.Masked().Addr(), nft.Last(prefix)
		for _, a := range []netip.Addr{first.Prev(), first, last, last.Next()} {
			if !a.IsValid() || seen[a] || !a.IsGlobalUnicast() && !a.IsPrivate() || a.Is4In6() || uplink4.Masked().Contains(a) {
				continue
			}
			seen[a] = true
			to := netip.AddrPortFrom(a, 7777)
			want := p.Decide(policy.Flow{Proto: policy.TCP, Dst: to}).Allow
			_, err := hello(l, to)
			if got := err == nil; got != want {
				t.Errorf("%s: the kernel says %t (%v), the policy %t", a, got, err, want)
			}
			tried++
			if want {
				allowed++
			}
		}
	}
	if tried < 60 || allowed < 15 {
		t.Errorf("only %d destinations tried, %d of them allowed", tried, allowed)
	}
}

func TestEachRefusalNamesItsRule(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"198.51.100.0/24"}})
	for dst, want := range map[string]policy.Reason{
		"198.51.100.10:7777": policy.ReasonDenyAddr, "10.0.0.1:7777": policy.ReasonFloor, uplink4.Addr().String() + ":22": policy.ReasonFloor,
	} {
		if c, err := dial(l, "tcp", at(dst)); err == nil {
			c.Close()
			t.Fatal("connected to", dst)
		}
		e := w.flows.wait(t, "denied "+dst, func(e flowEvent) bool { return e.Dst == at(dst) && e.Verdict == "deny" })
		if e.Reason != want || e.Sandbox != string(l.Sandbox) || e.Rule.ID == "" || e.Proto != "tcp" || e.Generation != 1 {
			t.Errorf("%s: %+v; want reason %s with a rule", dst, e, want)
		}
	}
	who, err := hello(l, at("198.51.101.1:7777"))
	if err != nil {
		t.Fatal(who, err)
	}
	is := func(v string) func(flowEvent) bool {
		return func(e flowEvent) bool { return e.Dst == at("198.51.101.1:7777") && string(e.Verdict) == v }
	}
	if e := w.flows.wait(t, "allowed", is("allow")); e.Reason != policy.ReasonDefaultAllow || e.Sandbox != string(l.Sandbox) {
		t.Errorf("allowed: %+v", e)
	}
	flows, err := w.flowsOf(w.byID[l.Sandbox])
	if err != nil || len(flows) == 0 {
		t.Fatal("no flow is marked:", flows, err)
	}
	for _, f := range flows { // as its timeout would
		if err := w.ct.Forget(f); err != nil {
			t.Fatal(err)
		}
	}
	if e := w.flows.wait(t, "closed", is("close")); e.BytesIn == 0 || e.BytesOut == 0 || e.Duration == 0 {
		t.Errorf("closed: %+v; want bytes and duration", e)
	}
}

func TestNoSandboxReachesAnotherOrTheHost(t *testing.T) {
	w := start(t)
	a, b := w.lease(), w.lease()
	op := &policy.Operator{FloorOpen: []string{"10.0.0.0/8"}} // even then
	for _, l := range []sandbox.Lease{a, b} {
		if err := w.Apply(context.Background(), l, compiled(t, policy.Input{}, op)); err != nil {
			t.Fatal(err)
		}
	}
	inside := listenIn(t, b, "[::]:9000")
	defer inside.Close()
	onHost := listenHost(t, ":9001")
	defer onHost.Close()
	for _, to := range []string{
		b.Addr4.Addr().String() + ":9000", "[" + b.Addr6.Addr().String() + "]:9000",
		a.Gate4.String() + ":9001", b.Gate4.String() + ":9001", uplink4.Addr().String() + ":9001",
		"[" + a.Gate6.String() + "]:9001", "[" + uplink6.Addr().String() + "]:9001",
	} {
		if c, err := dial(a, "tcp", at(to)); !errors.Is(err, syscall.ECONNREFUSED) {
			if err == nil {
				c.Close()
			}
			t.Errorf("%s: %v; want refused", to, err)
		}
	}
	// The host itself reaches both, before and after a policy.
	c, err := hostDial(netip.AddrPortFrom(b.Addr4.Addr(), 9000))
	if err != nil {
		t.Fatal("the host cannot reach its sandbox:", err)
	}
	c.Close()
	if c, err = hostDial(netip.AddrPortFrom(b.Addr6.Addr(), 9000)); err != nil {
		t.Fatal("the host cannot reach its sandbox by IPv6:", err)
	}
	c.Close()
	// Nobody outside does: the internet has a route, and the host forwards.
	err = inNamespace(w.internet, func() error {
		c, err := dialFromHere(netip.AddrPortFrom(b.Addr4.Addr(), 9000))
		if err == nil {
			c.Close()
			return errors.New("the internet reached a sandbox")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTheHostReachesASlotWithoutAPolicy(t *testing.T) {
	w := start(t)
	l := w.lease()
	inside := listenIn(t, l, "0.0.0.0:49983")
	defer inside.Close()
	c, err := hostDial(netip.AddrPortFrom(l.Addr4.Addr(), 49983))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestManyPrefixes(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	var deny []string
	for i := range 10000 {
		deny = append(deny, fmt.Sprintf("%d.%d.%d.0/25", 11+i/2500, i%2500/50, i%50*2))
	}
	began := time.Now()
	w.apply(l, policy.Input{DenyOut: deny})
	t.Logf("10,000 prefixes in force after %v", time.Since(began))
	for _, a := range []string{"11.0.0.1:7777", "13.20.40.127:7777", "14.49.98.0:7777"} {
		if _, err := dial(l, "tcp", at(a)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v; want refused", a, err)
		}
	}
	for _, a := range []string{"11.0.0.128:7777", "11.0.1.0:7777", "14.49.99.1:7777", "15.0.0.1:7777"} {
		if _, err := hello(l, at(a)); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	began = time.Now()
	w.apply(l, policy.Input{DenyOut: []string{"11.0.0.0/8"}})
	t.Logf("replaced by one after %v", time.Since(began))
	if _, err := hello(l, at("12.0.0.1:7777")); err != nil {
		t.Error(err)
	}
}
