package sandbox

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// slowRuntime has sandboxes of a size, and checkpoints that take until they are let.
type slowRuntime struct {
	fakeRuntime
	bytes   int64
	writing chan ID       // told when a checkpoint begins
	finish  chan struct{} // closed to let them end
}

func (r slowRuntime) Stats(context.Context, ID) (Stats, error) {
	return Stats{MemoryBytes: r.bytes}, nil
}

func (r slowRuntime) Checkpoint(ctx context.Context, id ID, dir string) error {
	r.writing <- id
	<-r.finish
	return r.fakeRuntime.Checkpoint(ctx, id, dir)
}

// concurrently tries a second call while the first is writing its checkpoint, and
// returns what the second was answered.
func concurrently(t *testing.T, r slowRuntime, first, second func() error) error {
	t.Helper()
	done := make(chan error, 2)
	go func() { done <- first() }()
	<-r.writing
	go func() { done <- second() }()
	var refused error
	select {
	case <-r.writing: // it is let too: the test will say so
	case refused = <-done:
	}
	close(r.finish)
	for range cap(done) - map[bool]int{true: 1}[refused != nil] {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return refused
}

func TestWhatIsWrittenAtATimeFitsTheDiskTogether(t *testing.T) {
	const free = 12 << 30
	for _, tt := range []struct {
		name string
		call func(*Manager, ID) error
	}{
		{"snapshots", func(m *Manager, id ID) error {
			_, err := m.CreateSnapshot(context.Background(), "me", id, "")
			return err
		}},
		{"pauses", func(m *Manager, id ID) error { return m.Pause(context.Background(), "me", id) }},
		{"forks", func(m *Manager, id ID) error {
			_, err := m.Fork(context.Background(), "me", id, ForkRequest{Count: 1})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			r := slowRuntime{fakeRuntime{w}, free / 3, make(chan ID), make(chan struct{})}
			m := newManager(t, w, func(c *Config) { c.Runtime, c.MinFree = r, free/2 })
			m.launch.space.Stat = func(string) (int64, int64, error) { return free, free, nil }
			runManager(t, m)
			a, b := create(t, m, CreateRequest{Owner: "me"}), create(t, m, CreateRequest{Owner: "me"})
			err := concurrently(t, r, func() error { return tt.call(m, a.ID) }, func() error { return tt.call(m, b.ID) })
			if !errs.Is(err, errs.Unavailable) {
				t.Errorf("a second that does not fit beside the first: %v", err)
			}
			release, err := m.launch.space.Reserve("", free/2)
			if err != nil {
				t.Fatalf("afterwards the room is still reserved: %v", err)
			}
			release()
		})
	}
}

func TestSnapshotsUnderWayCount(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*Config)
	}{
		{"for the key's limit", func(c *Config) { c.Allowance = func(string) Allowance { return Allowance{Paused: 1} } }},
		{"for the server's limit", func(c *Config) { c.MaxSnapshots = 1 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			r := slowRuntime{fakeRuntime{w}, 0, make(chan ID), make(chan struct{})}
			m := newManager(t, w, func(c *Config) { c.Runtime = r }, tt.edit)
			runManager(t, m)
			take := func() error {
				_, err := m.CreateSnapshot(context.Background(), "me", create(t, m, CreateRequest{Owner: "me"}).ID, "")
				return err
			}
			if err := concurrently(t, r, take, take); !errs.Is(err, errs.Exhausted) {
				t.Errorf("a second beside the first: %v", err)
			}
			if page, _, _ := m.ListSnapshots(t.Context(), SnapshotsRequest{}); len(page) != 1 || len(m.snapshots.reserved) != 0 {
				t.Errorf("%d snapshots, room reserved: %v", len(page), m.snapshots.reserved)
			}
		})
	}
}

func TestAKeyAtItsLimitCausesNoCheckpoint(t *testing.T) {
	w := newWorld()
	m := newManager(t, w, func(c *Config) { c.Allowance = func(string) Allowance { return Allowance{Sandboxes: 1} } })
	runManager(t, m)
	rec := create(t, m, CreateRequest{Owner: "me"})
	w.since()
	if _, err := m.Fork(t.Context(), "me", rec.ID, ForkRequest{Count: 100}); !errs.Is(err, errs.Exhausted) {
		t.Errorf("fork: %v", err)
	}
	if got := w.since(); slices.Contains(got, "checkpoint") {
		t.Errorf("steps: %v", got)
	}
}

func TestAnAdminDoesNotDeleteOneOfManyByName(t *testing.T) {
	m := newManager(t, newWorld())
	runManager(t, m)
	var ids []string
	for _, owner := range []string{"me", "you"} {
		snap, err := m.CreateSnapshot(t.Context(), owner, create(t, m, CreateRequest{Owner: owner}).ID, "same")
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, snap.ID)
	}
	if err := m.DeleteSnapshot(t.Context(), "", "same"); !errs.Is(err, errs.Conflict) {
		t.Errorf("by name: %v", err)
	}
	if err := m.DeleteSnapshot(t.Context(), "", ids[0]); err != nil {
		t.Errorf("by ID: %v", err)
	}
	if err := m.DeleteSnapshot(t.Context(), "", "same"); err != nil {
		t.Errorf("by a name that is one's alone: %v", err)
	}
}

// stuckStore writes no snapshot of one owner until it is let go.
type stuckStore struct {
	Store
	owner       string
	stuck, free chan struct{}
}

func (s stuckStore) PutSnapshot(ctx context.Context, snap Snapshot) error {
	if snap.Owner == s.owner {
		close(s.stuck)
		<-s.free
	}
	return s.Store.PutSnapshot(ctx, snap)
}

func TestASnapshotThatIsSlowToStoreHoldsUpNoOtherKey(t *testing.T) {
	stuck, free := make(chan struct{}), make(chan struct{})
	m := newManager(t, newWorld(), func(c *Config) { c.Store = stuckStore{c.Store, "me", stuck, free} })
	runManager(t, m)
	mine, yours := create(t, m, CreateRequest{Owner: "me"}), create(t, m, CreateRequest{Owner: "you"})
	ended := make(chan error, 1)
	go func() {
		_, err := m.CreateSnapshot(context.Background(), "me", mine.ID, "same")
		ended <- err
	}()
	<-stuck
	others := make(chan error, 1)
	go func() {
		_, err := m.CreateSnapshot(context.Background(), "you", yours.ID, "same")
		others <- errors.Join(err, m.DeleteSnapshot(context.Background(), "you", "same"))
	}()
	select {
	case err := <-others:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a key waits until the store has written another's snapshot")
	}
	close(free)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
