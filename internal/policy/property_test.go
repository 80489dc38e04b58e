package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// naive decides as network.md reads, entry by entry, sharing no code with
// Decide but parseEntry.
type naive struct {
	allow, deny []entry
	denyAll     bool
}

func newNaive(t *testing.T, in Input) naive {
	var n naive
	read := func(texts []string) (out []entry) {
		for _, s := range texts {
			e, err := parseEntry(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, e)
		}
		return out
	}
	n.allow, n.deny = read(in.AllowOut), read(in.DenyOut)
	n.denyAll = slices.Contains(in.DenyOut, "0.0.0.0/0")
	return n
}

func (n naive) decide(f Flow) bool {
	a := f.Dst.Addr()
	if a.Is4In6() {
		a = a.Unmap()
	}
	for _, r := range Floor() {
		if r.Prefix.Contains(a) {
			return false
		}
	}
	port := f.Dst.Port()
	if f.Proto == ICMP {
		port = 0
	}
	domain := false
	for _, e := range n.allow {
		if e.isAddr() && e.prefix.Contains(a) && (e.port == 0 || e.port == port) {
			return true
		}
		domain = domain || !e.isAddr()
		if e.isAddr() || f.Proto != TCP || f.Name == "" || e.port != 0 && e.port != port || e.port == 0 && port != 80 && port != 443 {
			continue
		}
		if !e.wildcard && e.name == f.Name || e.wildcard && (e.name == "" || strings.HasSuffix(f.Name, "."+e.name)) {
			return true
		}
	}
	if domain && n.denyAll && port == 53 && a == DefaultNameserver {
		return true
	}
	for _, e := range n.deny {
		if e.port != 0 && e.port != port {
			continue
		}
		if e.prefix.Bits() == 0 && e.prefix.Addr().Is4() || e.prefix.Contains(a) {
			return false
		}
		for _, t := range translations(e.prefix) {
			if t.Contains(a) {
				return false
			}
		}
	}
	return true
}

// edges are the CIDRs where off-by-one mistakes live.
var edges = []string{
	"0.0.0.0/1", "128.0.0.0/1", "240.0.0.0/4", "255.255.255.255/32", "255.255.255.254/31", "223.255.255.255/32", "1.0.0.0/32", "1.0.0.0/31", "192.0.0.0/2",
	"::/1", "8000::/1", "2000::/3", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", "2001:db8::/32", "2001:db8::1/127", "0.0.0.0/0", "::/0", "::ffff:128.0.0.0/97",
	"9.255.255.255/32", "11.0.0.0/8", "64:ff9b::/96", "2002::/16",
}

func randomAddr(rng *rand.Rand) netip.Addr {
	switch rng.IntN(8) {
	case 0: // near the edges
		p := netip.MustParsePrefix(edges[rng.IntN(len(edges))])
		a := p.Masked().Addr()
		if rng.IntN(2) == 0 {
			a = last(p.Masked())
		}
		switch rng.IntN(3) {
		case 0:
			if next := a.Next(); next.IsValid() {
				return next
			}
		case 1:
			if prev := a.Prev(); prev.IsValid() {
				return prev
			}
		}
		return a
	case 1:
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(rng.IntN(8))})
	case 2:
		var b [16]byte
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return netip.AddrFrom16(b)
	case 3:
		return netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff, 12: byte(rng.Uint32()), 13: 2, 14: 3, 15: byte(rng.IntN(16))})
	case 4:
		return netip.AddrFrom16([16]byte{0, 0x64, 0xff, 0x9b, 12: 1 + byte(rng.IntN(3)), 13: 2, 14: 3, 15: byte(rng.IntN(16))})
	default: // crowded, so that rules and flows meet
		return netip.AddrFrom4([4]byte{1 + byte(rng.IntN(3)), 2, 3, byte(rng.IntN(16))})
	}
}

func randomName(rng *rand.Rand) string {
	labels := []string{"a", "b", "www", "example", "com", "nota"}
	out := make([]string, 1+rng.IntN(4))
	for i := range out {
		out[i] = labels[rng.IntN(len(labels))]
	}
	return strings.Join(out, ".")
}

var somePorts = []uint16{80, 443, 53, 22, 5432}

func randomEntry(rng *rand.Rand, names bool) string {
	port := ""
	if rng.IntN(4) == 0 {
		port = fmt.Sprintf(":%d", somePorts[rng.IntN(len(somePorts))])
	}
	if names && rng.IntN(2) == 0 {
		if rng.IntN(20) == 0 {
			return "*" + port
		}
		return []string{"", "*."}[rng.IntN(2)] + randomName(rng) + port
	}
	if rng.IntN(6) == 0 {
		if e := edges[rng.IntN(len(edges)-7)]; rng.IntN(2) == 0 {
			return e + port
		}
	}
	a := randomAddr(rng)
	return fmt.Sprintf("%s/%d%s", a, a.BitLen()-rng.IntN(9), port)
}

func TestDecideAgreesWithANaiveMatcher(t *testing.T) {
	rng := rand.New(rand.NewPCG(20, 26))
	protos := []Proto{TCP, TCP, TCP, UDP, ICMP}
	allowed, flows := 0, 0
	for flows < 100_000 {
		var in Input
		names := rng.IntN(2) == 0
		for range rng.IntN(12) {
			in.AllowOut = append(in.AllowOut, randomEntry(rng, names))
		}
		for range rng.IntN(12) {
			in.DenyOut = append(in.DenyOut, randomEntry(rng, false))
		}
		if names {
			in.DenyOut = append(in.DenyOut, "0.0.0.0/0")
		}
		c, err := Compile(in, nil, 1)
		if err != nil {
			t.Fatalf("%+v: %v", in, err)
		}
		n := newNaive(t, in)
		for range 200 {
			f := Flow{Proto: protos[rng.IntN(len(protos))], Dst: netip.AddrPortFrom(randomAddr(rng), somePorts[rng.IntN(len(somePorts))])}
			if rng.IntN(3) > 0 {
				f.Name = randomName(rng)
			}
			v := c.Decide(f)
			if want := n.decide(f); v.Allow != want {
				t.Fatalf("%+v\n%+v: got %+v, want %v", in, f, v, want)
			}
			if v.Allow {
				allowed++
			}
			flows++
		}
	}
	if share := float64(allowed) / float64(flows); share < 0.2 || share > 0.8 {
		t.Errorf("%.0f%% of the flows are allowed: the test is lopsided", share*100)
	}
}
