package sandbox

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/share"
)

// small is a machine with memory for little.
func small(t *testing.T, w *world, change func(*Config)) *Manager {
	t.Helper()
	return newManager(t, w, func(c *Config) {
		c.Host = Use{Memory: 1 << 30, Threads: 1000}
		if change != nil {
			change(c)
		}
	})
}

func TestAStartBeyondTheKeysMemoryIsRefusedAndAnothersIsNot(t *testing.T) {
	w := newWorld()
	m := small(t, w, nil)
	runManager(t, m)
	rec, err := m.Create(t.Context(), CreateRequest{Owner: "a"})
	if err != nil {
		t.Fatal(err)
	}
	w.use(rec.ID, 880<<20) // of 1024; 922 are one key's at most
	_, err = m.Create(t.Context(), CreateRequest{Owner: "a"})
	if !errs.Is(err, errs.Exhausted) || !strings.Contains(err.Error(), "memory of running sandboxes: this API key holds its share") {
		t.Errorf("a start of the key that holds most: %v", err)
	}
	if _, err := m.Create(t.Context(), CreateRequest{Owner: "b"}); err != nil {
		t.Errorf("a start of another key: %v", err)
	}
	if _, err := m.Fork(t.Context(), "a", rec.ID, ForkRequest{Count: 1, Strict: true}); !errs.Is(err, errs.Exhausted) {
		t.Errorf("a copy: %v", err)
	}
	w.use(rec.ID, 1010<<20)
	if _, err := m.Create(t.Context(), CreateRequest{Owner: "c"}); !errs.Is(err, errs.Exhausted) || !strings.Contains(err.Error(), "all keys together") {
		t.Errorf("a start without memory for it: %v", err)
	}
}

func TestAResumeThatTheMachineCannotHoldStaysPaused(t *testing.T) {
	w := newWorld()
	free := int64(1 << 30)
	m := small(t, w, func(c *Config) { c.HostFree = func() int64 { return free } })
	runManager(t, m)
	rec, err := m.Create(t.Context(), CreateRequest{Owner: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Pause(t.Context(), "a", rec.ID); err != nil {
		t.Fatal(err)
	}
	free = 10 << 20
	if _, _, err := m.Connect(t.Context(), "a", rec.ID, 0); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "reserve_memory_mb") {
		t.Errorf("resume: %v", err)
	}
	if got, err := m.Get(t.Context(), "a", rec.ID); err != nil || got.State != Paused {
		t.Errorf("after a refused resume: %v, %v", got.State, err)
	}
	free = 1 << 30
	if _, _, err := m.Connect(t.Context(), "a", rec.ID, 0); err != nil {
		t.Errorf("resume with room: %v", err)
	}
}

func TestASandboxDrawsFromItsOwnersPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := small(t, w, func(c *Config) { c.Spares = map[string]int{"base": 1} })
		runManager(t, m)
		time.Sleep(time.Second) // a spare is ready
		spare, err := m.Create(t.Context(), CreateRequest{Owner: "a", Timeout: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * balanceEvery)
		if got := w.ownerOf(spare.ID); got != "a" {
			t.Errorf("a claimed spare draws from %q", got)
		}
		w.use(spare.ID, 100<<20)
		time.Sleep(2 * balanceEvery)
		alone := w.limitOf("a")
		if want := share.Memory.Of(1<<30, 0).Alone(); alone.Memory != want {
			t.Errorf("a key that is alone may use %d MiB, want %d", alone.Memory>>20, want>>20)
		}
		copies, err := m.Fork(t.Context(), "a", spare.ID, ForkRequest{Count: 1, Strict: true})
		if err != nil || w.ownerOf(copies[0].Record.ID) != "a" {
			t.Errorf("a copy draws from %q, %v", w.ownerOf(copies[0].Record.ID), err)
		}
		if _, err := m.Create(t.Context(), CreateRequest{Owner: "b", Timeout: time.Hour}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * balanceEvery)
		a, b := w.limitOf("a"), w.limitOf("b")
		if sum := a.Memory + b.Memory; sum > 1<<30+100 || b.Memory == 0 || a.Memory < 100<<20 || b.Threads == 0 {
			t.Errorf("two keys may use %+v and %+v, together more than there is, or less than they have", a, b)
		}
	})
}

func TestAnAdoptedSandboxDrawsFromItsOwnersPart(t *testing.T) {
	w := newWorld()
	first := small(t, w, nil)
	runManager(t, first)
	rec, err := first.Create(t.Context(), CreateRequest{Owner: "a"})
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.owners[rec.ID] = "" // as an earlier version left it
	w.mu.Unlock()
	next := small(t, w, nil)
	if err := next.Reconcile(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := w.ownerOf(rec.ID); got != "a" {
		t.Errorf("it draws from %q", got)
	}
}

// Whatever two keys hold, what they may hold until the next look is no more than there is.
func TestCeilingsDoNotAddUpToMoreThanThereIs(t *testing.T) {
	r := share.Memory.Of(1000, 0)
	for a := int64(0); a <= 900; a += 50 {
		for b := int64(0); a+b <= 900; b += 50 {
			x, y := ceiling(r, a, a+b, 2), ceiling(r, b, a+b, 2)
			slack := a/16 + b/16 + 2
			if x+y > 1000+slack || x < a || y < b {
				t.Fatalf("holding %d and %d they may hold %d and %d", a, b, x, y)
			}
		}
	}
	if got := ceiling(share.Memory, 5, 5, 1); got != 0 {
		t.Errorf("without a size the limit is %d", got)
	}
}

func (w *world) use(id ID, memory int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.memory[id] = memory
}

func (w *world) ownerOf(id ID) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.owners[id]
}

func (w *world) limitOf(owner string) Use {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.limits[owner]
}
