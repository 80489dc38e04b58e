package sandbox

import (
	"context"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// onDisk lists what is in a Manager's snapshot directory.
func onDisk(t *testing.T, m *Manager) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(m.cfg.SnapshotDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func create(t *testing.T, m *Manager, req CreateRequest) Record {
	t.Helper()
	rec, err := m.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func noInternet() policy.Input { return policy.Input{DenyOut: []string{"0.0.0.0/0"}} }

// steps returns what happened since the call before.
func (w *world) since() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.steps
	w.steps = nil
	return out
}

func TestPauseStopsBeforeItCopies(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	rec := create(t, m, CreateRequest{})
	w.since()
	if err := m.Pause(t.Context(), "", rec.ID); err != nil {
		t.Fatal(err)
	}
	want := []string{"freeze", "checkpoint", "put", "release", "destroy"}
	if got := w.since(); !slices.Equal(got, want) {
		t.Errorf("steps of a pause: %v, want %v", got, want)
	}
}

func TestFailedPauseLetsTheSandboxGoOn(t *testing.T) {
	for _, step := range []string{"freeze", "checkpoint", "put"} {
		t.Run(step, func(t *testing.T) {
			w := newWorld()
			m := newManager(t, w)
			runManager(t, m)
			rec := create(t, m, CreateRequest{})
			w.failAt(step, true)
			if err := m.Pause(t.Context(), "", rec.ID); err == nil {
				t.Error("paused")
			}
			w.failAt(step, false)
			if w.paused[rec.ID] {
				t.Error("the processes are stopped")
			}
			if left := onDisk(t, m); len(left) > 0 {
				t.Errorf("left on disk: %v", left)
			}
			if got, err := m.Get(t.Context(), "", rec.ID); err != nil || got.State != Running {
				t.Errorf("state %s, %v", got.State, err)
			}
			if err := m.Pause(t.Context(), "", rec.ID); err != nil {
				t.Errorf("a second try: %v", err)
			}
		})
	}
}

func TestBrokenOffPauseGoesOnAfterRestart(t *testing.T) {
	w := newWorld()
	dir := t.TempDir()
	first := newManager(t, w, func(c *Config) { c.SnapshotDir = dir })
	rec := func() Record {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = first.Run(ctx) }()
		return create(t, first, CreateRequest{Egress: noInternet()})
	}()
	w.paused[rec.ID] = true // the server was killed in the middle
	if err := os.MkdirAll(filepath.Join(dir, checkpoint.NewName()+".partial"), 0o700); err != nil {
		t.Fatal(err)
	}
	next := newManager(t, w, func(c *Config) { c.SnapshotDir = dir })
	if err := next.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.paused[rec.ID] {
		t.Error("the processes are still stopped")
	}
	if w.policyOf(rec.ID) == nil {
		t.Error("the sandbox is without its rules")
	}
	if left := onDisk(t, next); len(left) > 0 {
		t.Errorf("left on disk: %v", left)
	}
}

func TestSnapshots(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	rec := create(t, m, CreateRequest{Owner: "me", Egress: noInternet()})
	snap, err := m.CreateSnapshot(t.Context(), "me", rec.ID, "mine:v1")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("others neither see nor use it", func(t *testing.T) {
		if page, _, err := m.ListSnapshots(t.Context(), SnapshotsRequest{Owner: "you"}); err != nil || len(page) != 0 {
			t.Errorf("listed: %v, %v", page, err)
		}
		for _, name := range []string{snap.ID, "mine:v1"} {
			if _, err := m.Create(t.Context(), CreateRequest{Owner: "you", Template: name}); !errs.Is(err, errs.NotFound) {
				t.Errorf("create from %s: %v, want not found", name, err)
			}
			if err := m.DeleteSnapshot(t.Context(), "you", name); !errs.Is(err, errs.NotFound) {
				t.Errorf("delete %s: %v, want not found", name, err)
			}
		}
	})
	t.Run("a sandbox of it is under its rules before it runs", func(t *testing.T) {
		w.since()
		made := create(t, m, CreateRequest{Owner: "me", Template: "mine:v1", Egress: noInternet()})
		got := w.since()
		if a, r := slices.Index(got, "apply"), slices.Index(got, "restore"); a < 0 || r < a {
			t.Errorf("steps: %v, want apply before restore", got)
		}
		if made.TemplateID != snap.ID || made.Image != "base" || made.ControlToken == rec.ControlToken {
			t.Errorf("record: template %s, image %s", made.TemplateID, made.Image)
		}
	})
	t.Run("the same name moves to the new one", func(t *testing.T) {
		again, err := m.CreateSnapshot(t.Context(), "me", rec.ID, "mine:v1")
		if err != nil || again.ID != snap.ID {
			t.Errorf("got %s, %v; want %s", again.ID, err, snap.ID)
		}
		if got := onDisk(t, m); !slices.Equal(got, []string{again.Checkpoint}) {
			t.Errorf("on disk: %v, want only the new one", got)
		}
	})
	t.Run("a paused sandbox can be copied without waking it", func(t *testing.T) {
		if err := m.Pause(t.Context(), "", rec.ID); err != nil {
			t.Fatal(err)
		}
		other, err := m.CreateSnapshot(t.Context(), "me", rec.ID, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Kill(t.Context(), "", rec.ID); err != nil {
			t.Fatal(err)
		}
		create(t, m, CreateRequest{Owner: "me", Template: other.ID})
	})
	t.Run("pages hold all, newest first", func(t *testing.T) {
		var ids []string
		for req := (SnapshotsRequest{Owner: "me", Limit: 1}); ; {
			page, next, err := m.ListSnapshots(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range page {
				ids = append(ids, s.ID)
			}
			if req.Cursor = next; next == "" {
				break
			}
		}
		if len(ids) != 2 || ids[1] != snap.ID && ids[0] != snap.ID {
			t.Errorf("pages hold %v", ids)
		}
	})
}

// TestSnapshotsOfOneNameAtOnce takes snapshots of several sandboxes under one name at
// the same time, and deletes that name meanwhile.
func TestSnapshotsOfOneNameAtOnce(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	var recs []Record
	for range 6 {
		recs = append(recs, create(t, m, CreateRequest{Owner: "me", Egress: noInternet()}))
	}
	check := func(atMost int) {
		t.Helper()
		page, _, err := m.ListSnapshots(t.Context(), SnapshotsRequest{Owner: "me", Name: "one"})
		if err != nil || len(page) > atMost || atMost == 1 && len(page) == 0 {
			t.Fatalf("%d snapshots have the name (%v)", len(page), err)
		}
		var want []string
		for _, s := range page {
			want = append(want, s.Checkpoint)
		}
		if got := onDisk(t, m); !slices.Equal(got, want) {
			t.Errorf("checkpoints on disk: %v, want %v", got, want)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.snaps) != len(page) {
			t.Errorf("%d records in the store, want %d", len(w.snaps), len(page))
		}
	}
	var wg sync.WaitGroup
	take := func(rec Record) {
		if _, err := m.CreateSnapshot(t.Context(), "me", rec.ID, "one"); err != nil {
			t.Error(err)
		}
	}
	for _, rec := range recs {
		wg.Go(func() { take(rec) })
	}
	wg.Wait()
	check(1)
	for _, rec := range recs {
		wg.Go(func() { take(rec) })
		wg.Go(func() {
			if err := m.DeleteSnapshot(t.Context(), "me", "one"); err != nil && !errs.Is(err, errs.NotFound) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := m.DeleteSnapshot(t.Context(), "me", "one"); err != nil && !errs.Is(err, errs.NotFound) {
		t.Error(err)
	}
	check(0)
}

// TestSubscribersAreToldOfEveryChange looks at what is told of a sandbox while its life
// takes each of its turns.
func TestSubscribersAreToldOfEveryChange(t *testing.T) {
	var mu sync.Mutex
	var told []Change
	w := newWorld()
	m := newManager(t, w)
	m.Subscribe(func(_ ID, c Change) { mu.Lock(); told = append(told, c); mu.Unlock() })
	runManager(t, m)
	kill := func(id ID) error { return m.Kill(t.Context(), "", id) }
	pause := func(id ID) error { return m.Pause(t.Context(), "", id) }
	resume := func(id ID) error { _, _, err := m.Connect(t.Context(), "", id, 0); return err }
	for _, c := range []struct {
		name string
		do   []func(id ID) error
		want []Change
	}{
		{"created", nil, nil},
		{"killed as it runs", []func(ID) error{kill}, []Change{Stopped, Gone}},
		{"paused", []func(ID) error{pause}, []Change{Stopped}},
		{"paused and killed", []func(ID) error{pause, kill}, []Change{Stopped, Gone}},
		{"paused and resumed", []func(ID) error{pause, resume}, []Change{Stopped, Started}},
		{"copied", []func(ID) error{func(id ID) error {
			_, err := m.Fork(t.Context(), "", id, ForkRequest{Count: 1, Strict: true})
			return err
		}}, []Change{Started}},
		{"reset", []func(ID) error{func(id ID) error { _, err := m.Reset(t.Context(), "", id, ResetRequest{}); return err }}, []Change{Stopped, Started}},
		{"reset while paused", []func(ID) error{pause, func(id ID) error {
			_, err := m.Reset(t.Context(), "", id, ResetRequest{Resume: true})
			return err
		}}, []Change{Stopped, Started}},
		{"lost in a reset", []func(ID) error{func(id ID) error {
			w.failAt("start", true)
			defer w.failAt("start", false)
			if _, err := m.Reset(t.Context(), "", id, ResetRequest{}); err == nil {
				t.Error("reset without a start")
			}
			return nil
		}}, []Change{Stopped, Stopped, Gone}},
		{"under new rules", []func(ID) error{func(id ID) error { return m.SetNetwork(t.Context(), "", id, NetworkUpdate{}) }}, []Change{PolicyChanged}},
		{"under new rules and sources", []func(ID) error{func(id ID) error {
			return m.SetNetwork(t.Context(), "", id, NetworkUpdate{AllowIn: []netip.Prefix{}})
		}}, []Change{PolicyChanged, AccessChanged}},
		{"under new rules while paused", []func(ID) error{pause, func(id ID) error { return m.SetNetwork(t.Context(), "", id, NetworkUpdate{}) }}, []Change{Stopped}},
		{"without its links", []func(ID) error{func(id ID) error { return m.RevokeLinks(t.Context(), "", id, "") }}, []Change{AccessChanged}},
		{"killed as its record cannot be written at first", []func(ID) error{func(id ID) error {
			w.failAt("delete", true)
			defer w.failAt("delete", false)
			if err := m.Kill(t.Context(), "", id); err == nil {
				t.Error("killed without its record")
			}
			return nil
		}, kill}, []Change{Stopped, Stopped, Gone}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rec := create(t, m, CreateRequest{})
			mu.Lock()
			if !slices.Equal(told, []Change{Started}) {
				t.Errorf("told of the create: %v", told)
			}
			told = nil
			mu.Unlock()
			defer func() { mu.Lock(); told = nil; mu.Unlock() }()
			for _, do := range c.do {
				if err := do(rec.ID); err != nil {
					t.Fatal(err)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(told, c.want) {
				t.Errorf("told %v, want %v", told, c.want)
			}
		})
	}
}

// TestCheckpointsAreClosedToOthers looks at the modes of what a snapshot leaves on the
// disk, and of what an earlier version left open.
func TestCheckpointsAreClosedToOthers(t *testing.T) {
	w := newWorld()
	dir := t.TempDir()
	m := newManager(t, w, func(c *Config) { c.SnapshotDir = dir })
	runManager(t, m)
	rec := create(t, m, CreateRequest{Owner: "me", Egress: noInternet()})
	if _, err := m.CreateSnapshot(t.Context(), "me", rec.ID, "x"); err != nil {
		t.Fatal(err)
	}
	modes := func(change fs.FileMode) {
		t.Helper()
		files := 0
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			want := fs.FileMode(0o600)
			if d.IsDir() {
				want = 0o700
			} else {
				files++
			}
			fi, err := d.Info()
			if err == nil && path != dir && fi.Mode().Perm() != want {
				t.Errorf("%s has mode %v, want %v", path, fi.Mode(), want)
			}
			if change == 0 {
				return err
			}
			return os.Chmod(path, want|change)
		})
		if err != nil || files < 2 {
			t.Fatalf("%d files, %v", files, err)
		}
	}
	modes(0o055)
	next := newManager(t, w, func(c *Config) { c.SnapshotDir = dir })
	if err := next.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	modes(0)
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the folder has mode %v (%v)", fi.Mode(), err)
	}
}

func TestSnapshotsThatAreRefused(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	rec := create(t, m, CreateRequest{Owner: "me", Egress: noInternet()})
	snap, err := m.CreateSnapshot(t.Context(), "me", rec.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("names that cannot be are refused", func(t *testing.T) {
		for name, want := range map[string]errs.Kind{"../x": errs.Invalid, "a b": errs.Invalid, strings.Repeat("a", 99): errs.Invalid, "base": errs.Conflict} {
			if _, err := m.CreateSnapshot(t.Context(), "me", rec.ID, name); errs.KindOf(err) != want {
				t.Errorf("%q: %v, want %v", name, err, want)
			}
		}
	})
	t.Run("a change of one octet is found, and nothing is left running", func(t *testing.T) {
		s, _ := m.snapshots.find("me", snap.ID)
		if err := os.WriteFile(filepath.Join(m.launch.vault.Path(s.Checkpoint), "memory"), []byte(sandboxid.New()), 0o600); err != nil {
			t.Fatal(err)
		}
		before := len(w.leftovers())
		if _, err := m.Create(t.Context(), CreateRequest{Owner: "me", Template: snap.ID}); !errs.Is(err, errs.Conflict) {
			t.Errorf("got %v, want a conflict", err)
		}
		if after := len(w.leftovers()); after != before {
			t.Errorf("%d things are left, there were %d", after, before)
		}
	})
}

func TestForkCopiesWhatIsTheUsersAndRenewsTheRest(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	no := false
	src := create(t, m, CreateRequest{
		Owner: "me", Egress: noInternet(), Metadata: map[string]string{"a": "b"}, EnvVars: map[string]string{"K": "V"},
		Secure: true, AllowPublicTraffic: &no,
	})
	copies, err := m.Fork(t.Context(), "me", src.ID, ForkRequest{Count: 3})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{src.AccessToken: true, src.TrafficToken: true, src.ControlToken: true, string(src.ID): true}
	for _, c := range copies {
		if c.Err != nil {
			t.Fatal(c.Err)
		}
		r := c.Record
		for _, value := range []string{r.AccessToken, r.TrafficToken, r.ControlToken, string(r.ID)} {
			if value == "" || seen[value] {
				t.Errorf("%q is empty or another's", value)
			}
			seen[value] = true
		}
		if r.Metadata["a"] != "b" || r.EnvVars["K"] != "V" || r.Owner != "me" || w.policyOf(r.ID) == nil {
			t.Errorf("not copied: %+v", r)
		}
		if in := w.agents[r.Lease.Addr4.Addr()]; in.SandboxID != r.ID || in.AccessToken != r.AccessToken || in.ControlToken != r.ControlToken {
			t.Errorf("its agent was told %+v", in)
		}
	}
	if left := onDisk(t, m); len(left) > 0 {
		t.Errorf("left on disk: %v", left)
	}
	w.failAt("restore", true)
	if _, err := m.Fork(t.Context(), "me", src.ID, ForkRequest{Count: 2, Strict: true}); err == nil {
		t.Error("a strict fork without copies")
	}
	w.failAt("restore", false)
	if page, _, _ := m.List(t.Context(), ListRequest{}); len(page) != 4 {
		t.Errorf("%d sandboxes, want 4", len(page))
	}
}

func TestResetKeepsNameRulesAndTokens(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	rec := create(t, m, CreateRequest{Owner: "me", Egress: noInternet(), Secure: true})
	got, err := m.Reset(t.Context(), "me", rec.ID, ResetRequest{Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != rec.ID || got.AccessToken != rec.AccessToken || got.Generation != rec.Generation || w.policyOf(rec.ID) == nil {
		t.Errorf("reset: %+v", got)
	}
	if left := time.Until(got.Expires); left < 59*time.Minute {
		t.Errorf("it lives for %v", left)
	}
	w.failAt("start", true)
	if _, err := m.Reset(t.Context(), "me", rec.ID, ResetRequest{}); err == nil {
		t.Error("reset without a start")
	}
	w.failAt("start", false)
	if left := w.leftovers(); len(left) > 0 {
		t.Errorf("a reset that failed leaves %v", left)
	}
}

func TestStartCommandRunsOnceAndIsRestoredAfterwards(t *testing.T) {
	w := newWorld()
	dir := t.TempDir()
	edit := func(c *Config) { c.SnapshotDir, c.Images = dir, startImages{fakeImages{w}} }
	m := newManager(t, w, edit)
	runManager(t, m)
	count := func(steps []string, step string) (n int) {
		for _, s := range steps {
			if s == step {
				n++
			}
		}
		return n
	}
	create(t, m, CreateRequest{})
	if got := w.since(); count(got, "start command") != 1 || count(got, "checkpoint") != 1 || slices.Index(got, "checkpoint") > slices.Index(got, "init") {
		t.Errorf("the first: %v, want the command, then a checkpoint, then an owner", got)
	}
	create(t, m, CreateRequest{})
	if got := w.since(); count(got, "start command") != 0 || count(got, "restore") != 1 {
		t.Errorf("the second: %v, want a restore", got)
	}
	w.failAt("restore", true)
	create(t, m, CreateRequest{})
	w.failAt("restore", false)
	if got := w.since(); count(got, "start command") != 1 || count(got, "checkpoint") != 1 {
		t.Errorf("after a refused restore: %v, want a cold start and a new checkpoint", got)
	}
	if left := onDisk(t, m); len(left) != 1 {
		t.Errorf("on disk: %v, want one checkpoint", left)
	}
	later := newManager(t, w, edit)
	if err := later.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	runManager(t, later)
	w.since()
	create(t, later, CreateRequest{})
	if got := w.since(); count(got, "restore") != 1 {
		t.Errorf("after a restart: %v, want a restore", got)
	}
	w.failAt("start command", true)
	w.failAt("restore", true)
	before := len(w.leftovers())
	if _, err := later.Create(t.Context(), CreateRequest{}); err == nil {
		t.Error("handed out without being ready")
	}
	if after := len(w.leftovers()); after != before {
		t.Errorf("%d things are left, there were %d", after, before)
	}
}

// startImages is fakeImages with a start command.
type startImages struct{ fakeImages }

func (i startImages) Resolve(ctx context.Context, template string) (Image, error) {
	img, err := i.fakeImages.Resolve(ctx, template)
	img.Start = []string{"/bin/server"}
	return img, err
}

func TestNothingNewOnADiskThatIsFull(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	var full atomic.Bool
	m.launch.space.Stat = func(string) (int64, int64, error) {
		if full.Load() {
			return 100 << 20, 100 << 30, nil
		}
		return 90 << 30, 100 << 30, nil
	}
	runManager(t, m)
	rec := create(t, m, CreateRequest{})
	full.Store(true)
	_, createErr := m.Create(t.Context(), CreateRequest{})
	_, snapErr := m.CreateSnapshot(t.Context(), "", rec.ID, "")
	_, forkErr := m.Fork(t.Context(), "", rec.ID, ForkRequest{Count: 1})
	for what, err := range map[string]error{"create": createErr, "pause": m.Pause(t.Context(), "", rec.ID), "snapshot": snapErr, "fork": forkErr} {
		if !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "too full") {
			t.Errorf("%s: %v, want unavailable and the reason", what, err)
		}
	}
	m.guardDisk(t.Context()) // the fake's layers are empty: nobody is to blame
	if _, err := m.Get(t.Context(), "", rec.ID); err != nil {
		t.Errorf("a sandbox that wrote nothing: %v", err)
	}
}

func TestHistoryIsARing(t *testing.T) {
	h := newHistory()
	rec := Record{ID: sandboxid.New(), Resources: Resources{CPUs: 2, MemoryMB: 64, DiskMB: 10}}
	start := time.Unix(1000, 0)
	for i := range samplesKept + 10 {
		h.add(&rec, Stats{CPUTime: time.Duration(i) * 5 * time.Second, MemoryBytes: 1 << 40, DiskBytes: 3}, start.Add(time.Duration(i)*sampleEvery))
	}
	got := h.of(rec.ID)
	if len(got) != samplesKept {
		t.Fatalf("%d samples, want %d", len(got), samplesKept)
	}
	for i := 1; i < len(got); i++ {
		if got[i].Time.Sub(got[i-1].Time) != sampleEvery {
			t.Fatalf("sample %d is %v after the one before", i, got[i].Time.Sub(got[i-1].Time))
		}
	}
	if last := got[len(got)-1]; last.CPUUsedPct != 50 || last.MemUsed != 64<<20 || last.DiskUsed != 3 {
		t.Errorf("one of two CPUs for all the time, and more memory than there is: %+v", last)
	}
}

// TestPinsGoAlong: what names opened for a sandbox is open in its next life, in its
// copies and in what is made of its snapshots, and each has it for itself.
func TestPinsGoAlong(t *testing.T) {
	w := newWorld()
	m := newManager(t, w)
	runManager(t, m)
	rec := create(t, m, CreateRequest{Egress: noInternet()})
	pins := []Pin{{Name: "db.a.test", Dst: netip.MustParseAddrPort("198.51.100.10:5432"), Verified: time.Now().UTC()}}
	has := func(what string, id ID) {
		t.Helper()
		w.mu.Lock()
		defer w.mu.Unlock()
		if got := w.pins[id]; len(got) != 1 || got[0] != pins[0] {
			t.Errorf("%s has the pins %v", what, got)
		}
	}
	w.mu.Lock()
	w.pins[rec.ID] = pins
	w.mu.Unlock()
	snap, err := m.CreateSnapshot(t.Context(), "", rec.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	forks := func(what string) {
		t.Helper()
		copies, err := m.Fork(t.Context(), "", rec.ID, ForkRequest{Count: 1})
		if err != nil || copies[0].Err != nil {
			t.Fatal(err, copies)
		}
		has(what, copies[0].Record.ID)
		if len(copies[0].Record.Pins) != 0 {
			t.Errorf("%s: the record of a running sandbox holds pins", what)
		}
	}
	forks("a copy")
	if err := m.Pause(t.Context(), "", rec.ID); err != nil {
		t.Fatal(err)
	}
	forks("a copy of a paused one")
	second := newManager(t, w, func(c *Config) { c.SnapshotDir = m.cfg.SnapshotDir }) // a restart
	w.mu.Lock()
	delete(w.pins, rec.ID)
	stored := w.stored[rec.ID]
	w.mu.Unlock()
	if len(stored.Pins) != 1 {
		t.Errorf("stored: %v", stored.Pins)
	}
	if err := second.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	runManager(t, second)
	if _, _, err := second.Connect(t.Context(), "", rec.ID, time.Minute); err != nil {
		t.Fatal(err)
	}
	has("the resumed sandbox", rec.ID)
	made := create(t, second, CreateRequest{Template: snap.ID, Egress: noInternet()})
	has("one made of the snapshot", made.ID)
	w.mu.Lock()
	defer w.mu.Unlock()
	if got := w.stored[rec.ID].Pins; len(got) != 0 {
		t.Errorf("resumed, and the record still holds %v", got)
	}
}
