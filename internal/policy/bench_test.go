package policy

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// bigPolicy has n rules: a third addresses, a third names, a third wildcards.
func bigPolicy(t testing.TB, n int) *Compiled {
	t.Helper()
	in := Input{DenyOut: []string{"0.0.0.0/0"}}
	for i := range n {
		switch i % 3 {
		case 0:
			in.AllowOut = append(in.AllowOut, fmt.Sprintf("%d.%d.%d.0/24", 11+i>>16, i>>8&255, i&255))
		case 1:
			in.AllowOut = append(in.AllowOut, fmt.Sprintf("host-%d.example.com", i))
		default:
			in.AllowOut = append(in.AllowOut, fmt.Sprintf("*.zone-%d.example.net", i))
		}
	}
	c, err := compile(in, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// benchFlows are hits and misses of each kind, the same for every size.
func benchFlows() []Flow {
	dst := netip.MustParseAddrPort("93.184.216.34:443")
	return []Flow{
		{Proto: TCP, Dst: netip.MustParseAddrPort("11.0.3.9:22")},
		{Proto: TCP, Dst: dst, Name: "host-4.example.com"},
		{Proto: TCP, Dst: dst, Name: "a.b.zone-5.example.net"},
		{Proto: TCP, Dst: dst, Name: "www.not-listed.example.org"},
		{Proto: UDP, Dst: dst},
		{Proto: UDP, Dst: netip.MustParseAddrPort("8.8.8.8:53")},
		{Proto: TCP, Dst: netip.MustParseAddrPort("[2606:4700::1111]:443"), Name: "host-7.example.com"},
		{Proto: TCP, Dst: netip.MustParseAddrPort("169.254.169.254:80")},
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 1000, 100_000} {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			c, flows := bigPolicy(b, n), benchFlows()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				c.Decide(flows[i%len(flows)])
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			in := bigPolicy(b, n).Input()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := compile(in, nil, 1); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	c, flows := bigPolicy(t, 1000), benchFlows()
	for _, f := range flows {
		if n := testing.AllocsPerRun(100, func() { c.Decide(f); c.DecideAddr(f.Name, f.Dst); c.IsSelf(f.Name) }); n != 0 {
			t.Errorf("%+v: %v allocations", f, n)
		}
	}
	if n := testing.AllocsPerRun(100, func() { CanonicalName("www.example.com.") }); n != 0 {
		t.Errorf("CanonicalName: %v allocations", n)
	}
}

// TestDecideCostsTheSameAtAnySize holds the ratio of 100,000 rules to 10; the
// absolute time is BenchmarkDecide's. The sizes take turns and the best round of
// each counts, so that a busy machine does not decide.
func TestDecideCostsTheSameAtAnySize(t *testing.T) {
	if testing.Short() {
		t.Skip("measures time")
	}
	small, big, flows := bigPolicy(t, 10), bigPolicy(t, 100_000), benchFlows()
	measure := func(c *Compiled) time.Duration {
		const rounds = 5000
		start := time.Now()
		for i := range rounds {
			c.Decide(flows[i%len(flows)])
		}
		return time.Since(start) / rounds
	}
	best := [2]time.Duration{time.Hour, time.Hour}
	for range 40 {
		best[0], best[1] = min(best[0], measure(small)), min(best[1], measure(big))
	}
	t.Logf("10 rules %v, 100,000 rules %v", best[0], best[1])
	if best[1] > 2*best[0]+30*time.Nanosecond {
		t.Errorf("100,000 rules take %v, 10 rules %v; want at most twice that", best[1], best[0])
	}
}
