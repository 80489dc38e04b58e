package runtimetest

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// ownersCPU has one owner burn in three sandboxes and another in one. All share one
// processor: between several the kernel divides groups only about equally, the less
// the busier the machine is with other things.
func (s *suite) ownersCPU(t *testing.T) {
	onOneCPU(t)
	r := s.open(t)
	var ids []sandbox.ID
	var slots []*Slot
	for _, owner := range []string{ownerA, ownerA, ownerA, ownerB} {
		id, slot := s.sandbox(t, r, func(spec *sandbox.RuntimeSpec) { spec.Owner, spec.Resources.CPUs = owner, 1 })
		ids, slots = append(ids, id), append(slots, slot)
	}
	used := func() (all [4]time.Duration) {
		for i, id := range ids {
			st, err := r.Stats(t.Context(), id)
			must(t, err)
			all[i] = st.CPUTime
		}
		return all
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	idle := used()
	var wg sync.WaitGroup
	for _, slot := range slots {
		wg.Go(func() { _, _ = slot.Ask(ctx, "burn", strconv.Itoa(60_000)) }) // its sandbox ends before
	}
	before := used()
	burn := func(since [4]time.Duration) bool {
		for i := range before {
			if before[i]-since[i] < 50*time.Millisecond {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(20 * time.Second); !burn(idle); before = used() {
		if time.Now().After(end) {
			t.Fatalf("not all sandboxes burn: at first %v, now %v", idle, before)
		}
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(3 * time.Second)
	after := used()
	cancel()
	wg.Wait()
	many, one := time.Duration(0), after[3]-before[3]
	for i := range 3 {
		many += after[i] - before[i]
	}
	if one < many*7/10 || many < one*7/10 {
		t.Errorf("one sandbox of an owner got %v of CPU time while three of another got %v, want about the same", one, many)
	}
	t.Logf("three sandboxes: %v, one: %v", many, one)
}

// onOneCPU keeps this process, and what it starts until the test ends, on one processor.
func onOneCPU(t *testing.T) {
	t.Helper()
	var all, one unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &all))
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	pin := func(set *unix.CPUSet) {
		threads, err := os.ReadDir("/proc/self/task")
		must(t, err)
		for _, thread := range threads {
			tid, err := strconv.Atoi(thread.Name())
			must(t, err)
			if err := unix.SchedSetaffinity(tid, set); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
		}
	}
	pin(&one)
	pin(&one) // those that a thread made meanwhile, which was not pinned yet
	t.Cleanup(func() { pin(&all); pin(&all) })
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
