package policy

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// outcome is what the kernel does with a flow.
type outcome string

const (
	passes  outcome = "passes"
	refused outcome = "refused"
	shown   outcome = "is shown to the proxy"
)

// inKernel walks the order that is written at KernelRules. pinned says that the
// resolver has pinned the destination, host that it is an address of the host.
func inKernel(k KernelRules, f Flow, pinned, host bool) outcome {
	a, port := f.Dst.Addr(), f.Dst.Port()
	if f.Proto == ICMP {
		port = 0
	}
	has := func(list []PrefixPort) bool {
		return slices.ContainsFunc(list, func(p PrefixPort) bool {
			return p.Prefix.Contains(a) && (p.Port == 0 || p.Port == port)
		})
	}
	proxied := f.Proto == TCP && slices.Contains(k.ProxyPorts, port)
	floor := host || slices.ContainsFunc(Floor(), func(r FloorRange) bool { return r.Prefix.Contains(a) })
	switch {
	case has(k.OperatorDeny):
		return refused
	case proxied && a == ServiceAddr4 && k.Service:
		return shown
	case has(k.FloorOpen) || host && has(k.HostOpen):
		if proxied && k.OperatorNames {
			return shown
		}
		return passes
	case floor && proxied && k.FloorNames:
		return shown
	case floor:
		return refused
	case proxied && k.OperatorNames && k.NameRules:
		return shown
	case has(k.OperatorAllow), has(k.Allow):
		if proxied && k.OperatorNames {
			return shown
		}
		return passes
	case proxied && k.NameRules, f.Proto == TCP && k.Pins && pinned:
		return shown
	case k.AutoDNS && f.Proto != ICMP && port == 53 && a == DefaultNameserver:
		return passes
	case !k.Observe && has(k.Deny):
		return refused
	case proxied && k.OperatorNames:
		return shown
	}
	return passes
}

// crowdedAddr is an address that rules, exceptions and always blocked ranges meet at.
func crowdedAddr(rng *rand.Rand) netip.Addr {
	switch rng.IntN(6) {
	case 0:
		return netip.AddrFrom4([4]byte{10, byte(rng.IntN(2)), 0, byte(rng.IntN(8))})
	case 1:
		return netip.AddrFrom4([4]byte{203, 0, 113, byte(rng.IntN(4))}) // the host's
	case 2:
		return netip.AddrFrom16([16]byte{0, 0x64, 0xff, 0x9b, 12: 10, 13: byte(rng.IntN(2)), 15: byte(rng.IntN(8))})
	case 3:
		return []netip.Addr{ServiceAddr4, DefaultNameserver, netip.AddrFrom16([16]byte{0xfc, 15: byte(rng.IntN(4))})}[rng.IntN(3)]
	}
	return randomAddr(rng)
}

func crowdedEntry(rng *rand.Rand, names bool) string {
	if names && rng.IntN(3) == 0 {
		return randomEntry(rng, true)
	}
	a := crowdedAddr(rng)
	text := netip.PrefixFrom(a, a.BitLen()-rng.IntN(12)).Masked().String()
	if rng.IntN(8) == 0 {
		text = []string{"0.0.0.0/1", "0.0.0.0/0", "::/0", "8.0.0.0/6", "200.0.0.0/5"}[rng.IntN(5)]
	}
	switch rng.IntN(4) {
	case 0:
		if a.Is4() {
			return text + ":443"
		}
	case 1:
		if a.Is4() {
			return text + ":5432"
		}
	}
	return text
}

// TestTheKernelDecidesAsDecide compares the kernel's order with Decide over random
// policies: what the kernel settles, Decide settles alike whatever name is shown.
func TestTheKernelDecidesAsDecide(t *testing.T) {
	rng := rand.New(rand.NewPCG(16, 3))
	hosts := netip.MustParsePrefix("203.0.113.0/31")
	names := []string{"", "a.com", "www.example.com", "b", "intra.corp", "x.cordon.localhost"}
	count := map[outcome]int{}
	for range 3000 {
		var in Input
		op := Operator{SelfDomains: []string{"cordon.localhost"}, HostAddrs: []netip.Prefix{hosts}}
		named := rng.IntN(2) == 0
		for _, l := range []struct {
			list  *[]string
			names bool
		}{{&in.AllowOut, named}, {&in.DenyOut, false}, {&op.AlwaysAllow, true}, {&op.AlwaysDeny, true}, {&op.FloorOpen, false}} {
			for range rng.IntN(4) {
				*l.list = append(*l.list, crowdedEntry(rng, l.names))
			}
		}
		if rng.IntN(2) == 0 {
			op.FloorOpen = append(op.FloorOpen, []string{"intra.corp", "intra.corp:443", "b:5432"}[rng.IntN(3)])
		}
		if named || rng.IntN(3) == 0 {
			in.DenyOut = append(in.DenyOut, "0.0.0.0/0")
		}
		in.Mode = []Mode{ModeEnforce, ModeEnforce, ModeObserve}[rng.IntN(3)]
		c := mustCompile(t, in, &op)
		for range 60 {
			f := Flow{Proto: []Proto{TCP, TCP, UDP, ICMP}[rng.IntN(4)], Dst: netip.AddrPortFrom(crowdedAddr(rng), somePorts[rng.IntN(len(somePorts))])}
			if f.Dst.Addr().Is4In6() {
				continue // never on a wire
			}
			// What is blocked of the IPv6 forms of the host's own addresses is
			// compared with the sets that the kernel has beside the policy's rules.
			v4, embeds := embedded(f.Dst.Addr())
			host := hosts.Contains(f.Dst.Addr()) || embeds && hosts.Contains(v4)
			got := inKernel(c.Kernel(), f, false, host)
			count[got]++
			if got == shown {
				if f.Proto != TCP {
					t.Fatalf("%+v %+v: %v is no flow of the proxy", in, op, f)
				}
				continue // the proxy asks Decide
			}
			for _, f.Name = range names {
				if !proxyPort(f.Dst.Port()) {
					f.Name = "" // no name is seen there; pins go to the proxy
				}
				if v := c.Decide(f); v.Allow != (got == passes) {
					t.Fatalf("%+v\n%+v\n%v: the kernel: it %s; Decide: %s", in, op, f, got, say(v))
				}
			}
		}
	}
	for _, o := range []outcome{passes, refused, shown} {
		if count[o] < 5000 {
			t.Errorf("%d flows where it %s: the test is lopsided: %v", count[o], o, count)
		}
	}
}

// TestNoModeTurnsTheOperatorsDenials off: observe is a tenant's choice.
func TestNoModeTurnsTheOperatorsDenialsOff(t *testing.T) {
	op := &Operator{AlwaysDeny: []string{"6.6.6.0/24", "bad.com", "*.bad.com", "db.evil.com:5432"}}
	for _, in := range []Input{
		{Mode: ModeObserve}, {Mode: ModeObserve, AllowOut: []string{"6.6.6.0/24", "0.0.0.0/0"}}, {},
		{Mode: ModeObserve, AllowOut: []string{"bad.com", "*"}, DenyOut: []string{"0.0.0.0/0"}},
	} {
		c := mustCompile(t, in, op)
		for f, want := range map[string]string{
			"tcp 6.6.6.9:22":                     "deny operator operator.deny[0]",
			"udp 6.6.6.9:443":                    "deny operator operator.deny[0]",
			"icmp 6.6.6.9":                       "deny operator operator.deny[0]",
			"tcp [64:ff9b::606:609]:22":          "deny operator operator.deny[0]",
			"tcp 9.9.9.9:443 bad.com":            "deny operator operator.deny[1]",
			"tcp 9.9.9.9:80 x.bad.com":           "deny operator operator.deny[2]",
			"tcp 9.9.9.9:5432 db.evil.com":       "deny operator operator.deny[3]",
			"tcp 6.6.6.9:443 somewhere-else.com": "deny operator operator.deny[0]",
		} {
			v := c.Decide(flow(t, f))
			if got := say(v); got != want || v.Observed {
				t.Errorf("%+v: %s: got %s, observed %v; want %s", in, f, got, v.Observed, want)
			}
		}
		for _, name := range []string{"bad.com", "x.bad.com"} {
			if v := c.DecideQuery(name); v.Allow || v.Observed || v.Reason != ReasonOperator {
				t.Errorf("%+v: the name %s is resolved: %s", in, name, say(v))
			}
		}
		if v := c.DecideAddr("a.com", netip.MustParseAddrPort("6.6.6.6:443")); v.Allow {
			t.Errorf("%+v: the proxy dials an address that the operator denies: %s", in, say(v))
		}
		if got := inKernel(c.Kernel(), flow(t, "tcp 6.6.6.9:22"), false, false); got != refused {
			t.Errorf("%+v: in the kernel it %s", in, got)
		}
		for _, dst := range []string{"tcp 9.9.9.9:443", "tcp 9.9.9.9:80"} {
			if got := inKernel(c.Kernel(), flow(t, dst), false, false); got != shown {
				t.Errorf("%+v: %s: in the kernel it %s, so its name is not looked at", in, dst, got)
			}
		}
	}
}

// TestDenialsOfTheOperatorComeBeforeItsHoles: one order for both.
func TestDenialsOfTheOperatorComeBeforeItsHoles(t *testing.T) {
	op := &Operator{
		FloorOpen: []string{"10.0.0.0/8", "intra.corp", "9.0.0.0/8", "203.0.113.0/24:5432"}, AlwaysDeny: []string{"10.1.0.0/16", "intra.corp"},
		HostAddrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32")},
	}
	c := mustCompile(t, Input{DenyOut: []string{"0.0.0.0/0"}}, op)
	for f, want := range map[string]string{
		"tcp 10.2.0.1:22":               "allow floor-open operator.open[0]",
		"tcp 10.1.0.1:22":               "deny operator operator.deny[0]",
		"tcp 172.16.0.1:443 intra.corp": "deny operator operator.deny[1]",
		"tcp 9.9.9.9:22":                "deny deny-address deny[0]", // an exception opens nothing else
		"tcp 203.0.113.7:5432":          "allow floor-open operator.open[3]",
		"tcp 203.0.113.8:5432":          "deny deny-address deny[0]",
	} {
		if got := say(c.Decide(flow(t, f))); got != want {
			t.Errorf("%s: got %s, want %s", f, got, want)
		}
	}
}
