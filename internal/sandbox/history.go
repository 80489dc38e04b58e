package sandbox

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Samples of the past are taken from outside, off the sandboxes' cgroups: asking
// their agents would wake hundreds of idle sandboxes every few seconds. So they
// count the sandbox's kernel too, some 15 MB.
const (
	sampleEvery = 5 * time.Second
	// samplesKept is an hour of samples, 60 kB for each sandbox.
	samplesKept = 720
)

// history keeps the last samples of each sandbox, in memory.
type history struct {
	mu    sync.Mutex // guards rings and what is in them
	rings map[ID]*ring
}

// ring is the samples of one sandbox; next is where the oldest is, once it is full.
type ring struct {
	samples []Metrics
	next    int
	last    Stats // of the sample before, and when it was
	at      time.Time
}

func newHistory() *history { return &history{rings: map[ID]*ring{}} }

// add notes what a sandbox uses now.
func (h *history) add(rec *Record, s Stats, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.rings[rec.ID]
	if r == nil {
		r = &ring{}
		h.rings[rec.ID] = r
	}
	res := rec.Resources
	sample := Metrics{
		Time: now.UTC(), CPUCount: res.CPUs,
		MemUsed: min(s.MemoryBytes, res.MemoryMB<<20), MemTotal: res.MemoryMB << 20,
		DiskUsed: min(s.DiskBytes, res.DiskMB<<20), DiskTotal: res.DiskMB << 20,
	}
	// After a resume the time in use starts over.
	if wall := now.Sub(r.at); !r.at.IsZero() && wall > 0 && s.CPUTime >= r.last.CPUTime && r.at.After(rec.Started) {
		used := float64(s.CPUTime-r.last.CPUTime) / float64(wall) / float64(max(res.CPUs, 1))
		sample.CPUUsedPct = min(100*used, 100)
	}
	r.last, r.at = s, now
	if len(r.samples) < samplesKept {
		r.samples = append(r.samples, sample)
		return
	}
	r.samples[r.next] = sample
	r.next = (r.next + 1) % samplesKept
}

// of returns a sandbox's samples, oldest first.
func (h *history) of(id ID) []Metrics {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.rings[id]
	if r == nil {
		return nil
	}
	return slices.Concat(r.samples[r.next:], r.samples[:r.next])
}

// layer is the size of a sandbox's writable layer at the last sample.
func (h *history) layer(id ID) int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.rings[id]; r != nil {
		return r.last.DiskBytes
	}
	return 0
}

func (h *history) forget(id ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.rings, id)
}

// sample notes what every running sandbox uses.
func (m *Manager) sample(ctx context.Context) {
	for _, e := range m.table.all() {
		rec := e.view.Load().rec
		if rec.State != Running || ctx.Err() != nil {
			continue
		}
		if s, err := m.cfg.Runtime.Stats(ctx, rec.ID); err == nil { // else it is ending
			m.history.add(&rec, s, time.Now())
		}
	}
}

// every calls f each d until ctx ends, one call at a time.
func every(ctx context.Context, d time.Duration, f func(context.Context)) {
	tick := time.NewTicker(d)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f(ctx)
		}
	}
}
