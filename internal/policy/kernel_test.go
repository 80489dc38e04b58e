package policy

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func prefixes(t testing.TB, texts ...string) []PrefixPort {
	t.Helper()
	var out []PrefixPort
	for _, s := range texts {
		e, err := parseEntry(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, PrefixPort{e.prefix, e.port})
	}
	return out
}

func TestMergeMakesDisjointPrefixes(t *testing.T) {
	tests := []struct {
		name     string
		in, want []string
	}{
		{"nothing", nil, nil},
		{"duplicates", []string{"1.2.3.4", "1.2.3.4/32"}, []string{"1.2.3.4"}},
		{"contained", []string{"1.2.3.4", "1.0.0.0/8", "1.2.0.0/16"}, []string{"1.0.0.0/8"}},
		{"adjacent halves", []string{"1.0.1.0/24", "1.0.0.0/24"}, []string{"1.0.0.0/23"}},
		{"adjacent but not halves of one", []string{"1.0.1.0/24", "1.0.2.0/24"}, []string{"1.0.1.0/24", "1.0.2.0/24"}},
		{"a cascade up to everything", []string{"0.0.0.0/1", "128.0.0.0/2", "192.0.0.0/3", "224.0.0.0/4", "240.0.0.0/4"}, []string{"0.0.0.0/0"}},
		{"the end of the space", []string{"255.255.255.255", "255.255.255.254"}, []string{"255.255.255.254/31"}},
		{"families stay apart", []string{"::/1", "0.0.0.0/1", "128.0.0.0/1", "8000::/1"}, []string{"0.0.0.0/0", "::/0"}},
		{"ports stay apart", []string{"1.0.0.0/24:80", "1.0.1.0/24:443", "1.0.1.0/24:80", "1.0.0.0/24"}, []string{"1.0.0.0/24", "1.0.0.0/23:80", "1.0.1.0/24:443"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, want := merge(prefixes(t, tt.in...)), prefixes(t, tt.want...)
			if len(got)+len(want) > 0 && !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestMergeKeepsTheSameAddresses(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var in []PrefixPort
		for range rng.IntN(60) {
			a := netip.AddrFrom4([4]byte{1, 2, 3, byte(rng.Uint32())})
			p, _ := a.Prefix(24 + rng.IntN(9))
			in = append(in, PrefixPort{p, uint16(rng.IntN(2))})
		}
		out := merge(in)
		for i := range out {
			for j := range i {
				if out[i].Port == out[j].Port && out[i].Prefix.Overlaps(out[j].Prefix) {
					t.Fatalf("%v overlaps %v", out[i], out[j])
				}
			}
		}
		for b := range 256 {
			for port := range uint16(2) {
				a := netip.AddrFrom4([4]byte{1, 2, 3, byte(b)})
				has := func(p PrefixPort) bool { return p.Port == port && p.Prefix.Contains(a) }
				if slices.ContainsFunc(in, has) != slices.ContainsFunc(out, has) {
					t.Fatalf("%v port %d: in %v out %v", a, port, in, out)
				}
			}
		}
	}
}

func TestKernelRules(t *testing.T) {
	op := &Operator{FloorOpen: []string{"10.0.0.5:22", "intra.corp"}, AlwaysDeny: []string{"6.6.6.6"}, AlwaysAllow: []string{"5.5.5.5"}}
	tests := []struct {
		name string
		in   Input
		op   *Operator
		want KernelRules
	}{
		{"nothing", Input{}, nil, KernelRules{}},
		{"deny all", Input{AllowInternetAccess: new(false), DenyOut: []string{"1.2.3.4"}}, nil,
			KernelRules{Deny: prefixes(t, "0.0.0.0/0", "::/0"), DenyAll: true}},
		{"denials carry their IPv6 forms", Input{DenyOut: []string{"1.2.3.4", "2001:db8::/32"}}, nil,
			KernelRules{Deny: prefixes(t, "1.2.3.4", "64:ff9b::102:304", "2001:db8::/32", "2002:102:304::/48")}},
		{"a domain", Input{AllowOut: []string{"a.com", "1.1.1.0/24", "1.1.1.1:53"}, DenyOut: []string{"0.0.0.0/0"}}, nil,
			KernelRules{Allow: prefixes(t, "1.1.1.0/24", "1.1.1.1:53"), Deny: prefixes(t, "0.0.0.0/0", "::/0"), DenyAll: true, NameRules: true, AutoDNS: true}},
		{"a domain on another port needs no proxy", Input{AllowOut: []string{"a.com:5432"}, DenyOut: []string{"0.0.0.0/0"}}, nil,
			KernelRules{Deny: prefixes(t, "0.0.0.0/0", "::/0"), DenyAll: true, Pins: true, AutoDNS: true}},
		{"the operator", Input{Mode: ModeObserve}, op,
			KernelRules{FloorOpen: prefixes(t, "10.0.0.5:22"), FloorNames: true, OperatorDeny: prefixes(t, "6.6.6.6", "64:ff9b::606:606", "2002:606:606::/48"), OperatorAllow: prefixes(t, "5.5.5.5"), NameRules: true, Observe: true}},
		{"a denied port for all", Input{DenyOut: []string{"0.0.0.0/0:25"}}, nil,
			KernelRules{Deny: prefixes(t, "0.0.0.0/0:25", "[::/0]:25")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.want.Generation, tt.want.ProxyPorts = 7, []uint16{80, 443}
			tt.want.Service = tt.want.NameRules || !tt.want.DenyAll
			got := mustCompile(t, tt.in, tt.op).Kernel()
			if diff := cmp.Diff(tt.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(slices.Equal[[]PrefixPort])); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestFloorListAgreesWithDecide judges the edges of every listed range.
func TestFloorListAgreesWithDecide(t *testing.T) {
	c := mustCompile(t, Input{}, nil)
	for _, r := range Floor() {
		if r.Prefix != r.Prefix.Masked() || r.Why == "" {
			t.Errorf("range %v %q is not masked or has no reason", r.Prefix, r.Why)
		}
		for _, a := range []netip.Addr{r.Prefix.Addr(), last(r.Prefix)} {
			if v := c.Decide(Flow{Proto: TCP, Dst: netip.AddrPortFrom(a, 443)}); v.Allow || v.Reason != ReasonFloor {
				t.Errorf("%v of %v: %s", a, r.Prefix, say(v))
			}
		}
	}
	for _, want := range []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "168.63.129.16/32", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16",
		"198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4", "::/128", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8", "fd00:ec2::254/128",
		"64:ff9b::a00:0/104", "2002:a00::/24", "64:ff9b:1::/48",
	} {
		if !slices.ContainsFunc(Floor(), func(r FloorRange) bool { return r.Prefix.String() == want }) {
			t.Errorf("%s is missing", want)
		}
	}
	for _, open := range []string{"9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0", "198.17.255.255", "198.20.0.0",
		"223.255.255.255", "168.63.129.15", "168.63.129.17", "192.0.1.0", "2000::1", "2001:1::1", "fbff::1", "64:ff9b::808:808", "2002:808:808::1"} {
		if v := c.Decide(Flow{Proto: TCP, Dst: netip.AddrPortFrom(netip.MustParseAddr(open), 443)}); !v.Allow {
			t.Errorf("%s: %s", open, say(v))
		}
	}
}

// last returns the highest address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
