package runtimetest

import (
	"context"
	"errors"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// Owners of the tests' sandboxes.
const (
	ownerA = "k000000000000000a"
	ownerB = "k000000000000000b"
)

func (s *suite) assign(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	for range 2 { // again changes nothing
		must(t, r.Assign(t.Context(), id, ownerA))
		ask(t, slot, "hello")
	}
	ask(t, slot, "allocate", "50")
	mine, err := r.Use(t.Context(), ownerA)
	must(t, err)
	all, err := r.UseOfAll(t.Context())
	must(t, err)
	if mine.Memory < 50<<20 || mine.Threads < 2 || all.Memory < mine.Memory || all.Threads < mine.Threads {
		t.Errorf("the owner holds %+v, all hold %+v, after 50 MiB were allocated", mine, all)
	}
	if other, err := r.Use(t.Context(), ownerB); err != nil || other != (sandbox.Use{}) {
		t.Errorf("an owner without sandboxes holds %+v, %v", other, err)
	}
	if _, err := r.Stats(t.Context(), id); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	asked, stop := context.WithCancel(ctx)
	wg.Go(func() { _, _ = slot.Ask(asked, "allocate", "600") })
	if err := r.Wait(ctx, id); !errors.Is(err, sandbox.ErrOutOfMemory) {
		t.Errorf("after it used more memory than it has: got %v, want %v", err, sandbox.ErrOutOfMemory)
	}
	stop()
	wg.Wait()
	must(t, r.Destroy(t.Context(), id))
}

// ownersCPU has one owner burn in three sandboxes and another in one.
func (s *suite) ownersCPU(t *testing.T) {
	r := s.open(t)
	cpus := runtime.NumCPU()
	used := func(ids []sandbox.ID) (sum time.Duration) {
		for _, id := range ids {
			st, err := r.Stats(t.Context(), id)
			must(t, err)
			sum += st.CPUTime
		}
		return sum
	}
	ids := map[string][]sandbox.ID{}
	var slots []*Slot
	for _, owner := range []string{ownerA, ownerA, ownerA, ownerB} {
		id, slot := s.sandbox(t, r, func(spec *sandbox.RuntimeSpec) { spec.Owner, spec.Resources.CPUs = owner, cpus })
		ids[owner], slots = append(ids[owner], id), append(slots, slot)
	}
	many, one := used(ids[ownerA]), used(ids[ownerB])
	var wg sync.WaitGroup
	for _, slot := range slots {
		for range cpus {
			wg.Go(func() { _, _ = slot.Ask(t.Context(), "burn", strconv.Itoa(2000)) })
		}
	}
	wg.Wait()
	many, one = used(ids[ownerA])-many, used(ids[ownerB])-one
	if one < many*6/10 {
		t.Errorf("one sandbox of an owner got %v of CPU time while three of another got %v, want about the same", one, many)
	}
	t.Logf("three sandboxes: %v, one: %v", many, one)
}

func (s *suite) ownersMemory(t *testing.T) {
	r := s.open(t)
	own := func(owner string) func(*sandbox.RuntimeSpec) {
		return func(spec *sandbox.RuntimeSpec) { spec.Owner, spec.Resources.MemoryMB = owner, 512 }
	}
	greedy, slot := s.sandbox(t, r, own(ownerA))
	_, other := s.sandbox(t, r, own(ownerB))
	must(t, r.Limit(t.Context(), ownerA, sandbox.Use{Memory: 200 << 20}))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	asked, stop := context.WithCancel(ctx)
	wg.Go(func() { _, _ = slot.Ask(asked, "allocate", "400") })
	if err := r.Wait(ctx, greedy); !errors.Is(err, sandbox.ErrOutOfMemory) {
		t.Errorf("beyond what its owner may hold: got %v, want %v", err, sandbox.ErrOutOfMemory)
	}
	stop()
	wg.Wait()
	ask(t, other, "allocate", "100")
}
