package sandbox

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// layered has sandboxes with layers of the sizes given.
type layered struct {
	fakeRuntime
	layers map[ID]int64
}

func (r layered) Stats(_ context.Context, id ID) (Stats, error) {
	return Stats{DiskBytes: r.layers[id]}, nil
}

// onADisk is a manager over a disk of which free bytes are free and 4 GiB stay so.
func onADisk(t *testing.T, free *int64) (*Manager, map[ID]int64) {
	t.Helper()
	w, layers := newWorld(), map[ID]int64{}
	m := newManager(t, w, func(c *Config) {
		c.Runtime, c.MinFree = layered{fakeRuntime{w}, layers}, 4<<30
	})
	m.launch.space.Stat = func(string) (int64, int64, error) { return *free, 200 << 30, nil }
	runManager(t, m)
	return m, layers
}

func TestTheGuardTakesFromTheKeyThatUsesMost(t *testing.T) {
	free := int64(100 << 30)
	m, layers := onADisk(t, &free)
	one := create(t, m, CreateRequest{Owner: "one"}) // the largest layer, and all that its key has
	layers[one.ID] = 5 << 30
	largest := ID("")
	for i := range 10 {
		rec := create(t, m, CreateRequest{Owner: "many"})
		layers[rec.ID] = int64(1+i%4) << 30
		if i == 3 {
			largest = rec.ID
		}
		if i == 7 {
			layers[rec.ID]-- // as large, but for a byte
		}
	}
	free = 1<<30 - 1
	m.guardDisk(t.Context())
	if _, err := m.Get(t.Context(), "", one.ID); err != nil {
		t.Errorf("the sandbox of the key that uses less: %v", err)
	}
	if _, err := m.Get(t.Context(), "", largest); !errs.Is(err, errs.NotFound) {
		t.Errorf("the largest sandbox of the key that uses most: %v", err)
	}
	free = 2 << 30
	m.guardDisk(t.Context())
	if q, _ := m.Quota(t.Context(), ""); q.Sandboxes != 10 {
		t.Errorf("%d sandboxes are left, want 10", q.Sandboxes)
	}
}

func TestTheGuardKillsWhatMakesRoom(t *testing.T) {
	small := &stored{bytes: 100 << 30, layer: 1 << 20, layers: 1 << 20, largest: &entry{}} // nearly all in snapshots
	large := &stored{bytes: 50 << 30, layer: 10 << 30, layers: 10 << 30, largest: &entry{}}
	if owner, _ := toBlame(map[string]*stored{"small": small, "large": large}); owner != "large" {
		t.Errorf("%s is to blame", owner)
	}
	if owner, _ := toBlame(map[string]*stored{"small": small}); owner != "small" {
		t.Errorf("alone: %q", owner)
	}
	if owner, worst := toBlame(map[string]*stored{"snapshots": {bytes: 5}}); worst != nil {
		t.Errorf("without a layer %q is to blame", owner)
	}
}

func TestManySmallLayersAreToBlameTogether(t *testing.T) {
	free := int64(104 << 30)
	m, layers := onADisk(t, &free)
	other := mustCreate(t, m, "other")
	layers[other.ID] = 2 * worthwhile
	for range 10 {
		layers[mustCreate(t, m, "many").ID] = worthwhile - 1
	}
	m.sample(t.Context())
	if owner, worst := toBlame(m.disk.use()); owner != "many" || worst.largest == nil {
		t.Errorf("%q is to blame", owner)
	}
}

// TestKeysCannotFillTheStore has keys store all that they can, snapshots and files both.
func TestKeysCannotFillTheStore(t *testing.T) {
	free := int64(104 << 30)
	m, layers := onADisk(t, &free)
	for _, owner := range []string{"a", "b", "c", "d", "e", "f"} {
		rec, err := m.Create(t.Context(), CreateRequest{Owner: owner})
		if errs.Is(err, errs.Unavailable) && owner > "d" {
			break // no room for anything is left, and what is kept is
		} else if err != nil {
			t.Fatal(err)
		}
		layers[rec.ID] = 1 << 30
		free -= 1 << 30
		m.sample(t.Context())
		for range 200 {
			var snap Snapshot
			if snap, err = m.CreateSnapshot(t.Context(), owner, rec.ID, ""); err != nil {
				break
			}
			m.snapshots.mu.Lock()
			snap.Bytes = 1 << 30
			m.snapshots.byID[snap.ID] = snap
			m.snapshots.mu.Unlock()
			free -= 1 << 30
		}
		if !errs.Is(err, errs.Exhausted) && !errs.Is(err, errs.Unavailable) {
			t.Fatalf("key %s stores without end: %v", owner, err)
		}
		if owner == "a" && (!errs.Is(err, errs.Exhausted) || !strings.Contains(err.Error(), "disk space of files, snapshots and paused sandboxes: this API key holds its share of 7")) {
			t.Errorf("a key alone: %v, want its share of three quarters of 100 GiB", err)
		}
		if owner != "b" {
			continue
		}
		if _, err := m.Create(t.Context(), CreateRequest{Owner: "late", Timeout: time.Minute}); err != nil || free < 8<<30 {
			t.Errorf("a key that comes after two that store all they can: %v, %d MiB are free", err, free>>20)
		}
	}
	if free < 3<<30 { // the layers grow as they like, until the guard sees it
		t.Errorf("%d MiB are left, much less than is kept", free>>20)
	}
}
