package network

import (
	"context"
	"fmt"
	"testing"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

func BenchmarkAcquireFromPool(b *testing.B) {
	w := start(b, func(c *Config) { c.PoolSize = 64 })
	for b.Loop() {
		b.StopTimer()
		for len(w.ready) == 0 {
			fill(b, w)
		}
		id := sandboxid.New()
		b.StartTimer()
		l, err := w.Acquire(context.Background(), id)
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		if err := w.Release(context.Background(), l); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func fill(b *testing.B, w *world) {
	s, err := w.prepare()
	if err != nil {
		b.Fatal(err)
	}
	select {
	case w.ready <- s:
	default:
		w.mu.Lock()
		w.trash = append(w.trash, s)
		w.mu.Unlock()
	}
}

func BenchmarkCreateSlot(b *testing.B) {
	w := start(b)
	for b.Loop() {
		if _, err := w.prepare(); err != nil { // Uninstall deletes them: deleting would hold the kernel's lock
			b.Fatal(err)
		}
	}
}

// BenchmarkApply is a policy update: compile for the kernel, swap, look for live
// flows to cut. "first" is the one at a sandbox's start.
func BenchmarkApply(b *testing.B) {
	prefixes := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("%d.%d.%d.0/25", 11+i/2500, i%2500/50, i%50*2))
		}
		return out
	}
	for _, c := range []struct {
		name string
		in   policy.Input
	}{
		{"nothing", policy.Input{}},
		{"domains", policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com", "*.example.org"}}},
		{"prefixes=10", policy.Input{DenyOut: prefixes(10)}},
		{"prefixes=1000", policy.Input{DenyOut: prefixes(1000)}},
		{"prefixes=10000", policy.Input{DenyOut: prefixes(10000)}},
	} {
		p := compiled(b, c.in, nil)
		b.Run(c.name, func(b *testing.B) {
			w := start(b)
			l := w.lease()
			for b.Loop() {
				if err := w.Apply(context.Background(), l, p); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(c.name+"/first", func(b *testing.B) {
			w := start(b)
			for b.Loop() {
				b.StopTimer()
				l := w.lease()
				b.StartTimer()
				if err := w.Apply(context.Background(), l, p); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := w.Release(context.Background(), l); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
