package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// childDir tells the test binary to be the writer of TestRecordSurvivesKill.
const childDir = "CORDON_TEST_STORE_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		writeForever(dir)
	}
	// The engine keeps one goroutine for the whole process.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server.init.0.func1"))
}

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.cfg.Dir)
}

func record() sandbox.Record {
	no := false
	return sandbox.Record{
		ID: sandboxid.New(), Owner: "k0123456789abcdef", TemplateID: "base", State: sandbox.Running,
		Metadata: map[string]string{"a": "b"}, EnvVars: map[string]string{"K": "V"},
		Created: time.Now().UTC(), Expires: time.Now().Add(time.Hour).UTC(),
		Egress:             policy.Input{AllowOut: []string{"*.example.com"}, DenyOut: []string{"0.0.0.0/0"}, AllowInternetAccess: &no},
		AllowPublicTraffic: &no, ControlToken: "secret",
		AllowIn: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		Domains: []sandbox.Domain{{Name: "app.example.com", Port: 3000}},
		Pins:    []sandbox.Pin{{Name: "a.example.com", Dst: netip.MustParseAddrPort("93.184.216.1:443"), Verified: time.Now().UTC()}},
		LinkKey: "key", HTTPSPorts: []uint16{8443}, Links: []sandbox.Link{{ID: "u1", Port: 3000, Expires: time.Now().Add(time.Hour).UTC()}},
	}
}

func put(t testing.TB, s *Store, r sandbox.Record) uint64 {
	t.Helper()
	rev, err := s.PutSandbox(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func list(t testing.TB, s *Store) []sandbox.Record {
	t.Helper()
	rs, err := s.Sandboxes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func TestRecordsAreReadBackAndSurviveReopen(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "store"))
	r := record()
	r.Revision = put(t, s, r)
	want := []sandbox.Record{r}
	same := cmpopts.EquateEmpty()
	if diff := cmp.Diff(want, list(t, s), same, cmpopts.EquateComparable(r.Lease, netip.Prefix{}, netip.AddrPort{})); diff != "" {
		t.Errorf("own write (-want +got):\n%s", diff)
	}
	s = reopen(t, s)
	if diff := cmp.Diff(want, list(t, s), same, cmpopts.EquateComparable(r.Lease, netip.Prefix{}, netip.AddrPort{})); diff != "" {
		t.Errorf("after reopening (-want +got):\n%s", diff)
	}
	if err := s.DeleteSandbox(t.Context(), r.ID); err != nil {
		t.Fatal(err)
	}
	if got := list(t, s); len(got) != 0 {
		t.Errorf("after deletion: %d records", len(got))
	}
	s = reopen(t, s)
	if got := list(t, s); len(got) != 0 {
		t.Errorf("after deletion and reopening: %d records", len(got))
	}
}

func TestRevisionsDecide(t *testing.T) {
	s := open(t, t.TempDir())
	r := record()
	first := put(t, s, r)
	steps := []struct {
		name string
		rev  uint64
		want errs.Kind
		ok   bool
	}{
		{name: "creating what exists is a conflict", rev: 0, want: errs.Conflict},
		{name: "the stored revision may be replaced", rev: first, ok: true},
		{name: "an older revision is a conflict", rev: first, want: errs.Conflict},
		{name: "a revision from the future is a conflict", rev: first + 1000, want: errs.Conflict},
	}
	for _, st := range steps {
		t.Run(st.name, func(t *testing.T) {
			r.Revision = st.rev
			_, err := s.PutSandbox(t.Context(), r)
			if st.ok && err != nil || !st.ok && !errs.Is(err, st.want) {
				t.Errorf("put at %d: %v", st.rev, err)
			}
		})
	}
	last := list(t, s)[0].Revision
	if err := s.DeleteSandbox(t.Context(), r.ID); err != nil {
		t.Fatal(err)
	}
	r.Revision = last
	if _, err := s.PutSandbox(t.Context(), r); !errs.Is(err, errs.Conflict) {
		t.Errorf("put over a deleted record: %v, want a conflict", err)
	}
	if err := s.DeleteSandbox(t.Context(), r.ID); err != nil {
		t.Errorf("delete an absent record: %v", err)
	}
	r.Revision = 0
	put(t, s, r) // may be created again
}

func TestOneOfManyConcurrentWritersWins(t *testing.T) {
	s := open(t, t.TempDir())
	r := record()
	for round := range 20 {
		var won, lost atomic.Int32
		var rev atomic.Uint64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				got, err := s.PutSandbox(context.Background(), r)
				switch {
				case err == nil:
					won.Add(1)
					rev.Store(got)
				case errs.Is(err, errs.Conflict):
					lost.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || lost.Load() != 7 {
			t.Fatalf("round %d: %d won, %d lost", round, won.Load(), lost.Load())
		}
		if got := list(t, s)[0].Revision; got != rev.Load() {
			t.Fatalf("round %d: view has revision %d, written was %d", round, got, rev.Load())
		}
		r.Revision = rev.Load()
		if round%5 == 4 {
			if err := s.DeleteSandbox(t.Context(), r.ID); err != nil {
				t.Fatal(err)
			}
			r.Revision = 0 // the next round races to create over a deletion
		}
	}
}

// TestDeletedStaysDeleted churns one key: a late report of the watch must not
// bring a deleted record back, nor hide a new one.
func TestDeletedStaysDeleted(t *testing.T) {
	s := open(t, t.TempDir())
	r := record()
	for i := range 200 {
		put(t, s, r)
		if got := list(t, s); len(got) != 1 {
			t.Fatalf("round %d: after put %d records", i, len(got))
		}
		if err := s.DeleteSandbox(t.Context(), r.ID); err != nil {
			t.Fatal(err)
		}
		if got := list(t, s); len(got) != 0 {
			t.Fatalf("round %d: after delete %d records", i, len(got))
		}
	}
}

// TestViewFollowsOtherWriters writes as another process on the same engine would.
func TestViewFollowsOtherWriters(t *testing.T) {
	s := open(t, t.TempDir())
	theirs, ours := record(), record()
	data, err := encode(&theirs)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.sandboxes.kv.Put(t.Context(), "0", data); err != nil {
		t.Fatal(err)
	}
	put(t, s, ours) // whether or not the view knows yet that slot 0 is taken
	eventually(t, func() bool { return len(list(t, s)) == 2 })
	gone, err := encode[sandbox.Record](nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.sandboxes.kv.Put(t.Context(), "0", gone); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { got := list(t, s); return len(got) == 1 && got[0].ID == ours.ID })
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
	t.Fatal("not within a second")
}

// TestViewCannotBeChangedFromOutside fails when a field with a pointer, map or
// slice is added to what is stored and forgotten where that is cloned.
func TestViewCannotBeChangedFromOutside(t *testing.T) {
	s := open(t, t.TempDir())
	r := record()
	wantDeep(t, "Record", r, s.sandboxes.clone(r))
	snap := sandbox.Snapshot{ID: "s0", Names: []string{"first"}, Pins: r.Pins}
	wantDeep(t, "Snapshot", snap, s.snapshots.clone(snap))
	key := auth.Key{ID: "k0", Name: "first"}
	wantDeep(t, "Key", key, s.keys.clone(key))
}

// wantDeep asserts that a clone is the same and shares nothing that can be changed.
func wantDeep[T any](t *testing.T, name string, original, clone T) {
	t.Helper()
	if diff := cmp.Diff(original, clone, cmpopts.EquateComparable(sandbox.Lease{}, netip.Prefix{}, netip.AddrPort{})); diff != "" {
		t.Fatalf("the clone differs:\n%s", diff)
	}
	var shared func(path string, a, b reflect.Value)
	shared = func(path string, a, b reflect.Value) {
		switch a.Kind() {
		case reflect.Struct:
			if a.Type().PkgPath() == "time" || a.Type().PkgPath() == "net/netip" {
				return // immutable
			}
			for i := range a.NumField() {
				shared(path+"."+a.Type().Field(i).Name, a.Field(i), b.Field(i))
			}
		case reflect.Map, reflect.Slice, reflect.Pointer:
			if a.IsNil() {
				t.Errorf("%s is empty here: fill it, so that this test sees it", path)
			} else if a.Pointer() == b.Pointer() {
				t.Errorf("%s is shared with the view", path)
			}
			if a.Kind() == reflect.Slice {
				for i := range a.Len() {
					shared(fmt.Sprintf("%s[%d]", path, i), a.Index(i), b.Index(i))
				}
			}
		case reflect.Interface, reflect.Func, reflect.Chan:
			t.Errorf("%s cannot be stored", path)
		}
	}
	shared(name, reflect.ValueOf(original), reflect.ValueOf(clone))
}

// TestSlotsAreUsedAgain keeps the bucket as small as the most records it ever
// held at once, and finds deleted records deleted after every kind of restart.
func TestSlotsAreUsedAgain(t *testing.T) {
	s := open(t, t.TempDir())
	kept := record()
	put(t, s, kept)
	for range 50 {
		a, b := record(), record()
		a.Revision = put(t, s, a)
		put(t, s, a)
		put(t, s, b)
		for _, id := range []sandbox.ID{a.ID, b.ID} {
			if err := s.DeleteSandbox(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := len(s.sandboxes.slots); n != 3 {
		t.Errorf("%d slots for at most 3 records at once", n)
	}
	s = reopen(t, s)
	if got := list(t, s); len(got) != 1 || got[0].ID != kept.ID {
		t.Errorf("%d records after reopening, want the kept one", len(got))
	}
	if n := len(s.sandboxes.slots); n != 3 {
		t.Errorf("%d slots after reopening", n)
	}
}

func TestKeysAreKept(t *testing.T) {
	s := open(t, t.TempDir())
	now := time.Now()
	a, _ := auth.NewKey("first", true, now)
	b, _ := auth.NewKey("second", false, now.Add(time.Second))
	for _, k := range []auth.Key{b, a} {
		if err := s.PutKey(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	a.Name = "renamed"
	if err := s.PutKey(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	got, err := s.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]auth.Key{a, b}, got); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
	for range 2 {
		if err := s.DeleteKey(t.Context(), a.ID); err != nil {
			t.Fatal(err)
		}
	}
	if got, _ := s.Keys(t.Context()); len(got) != 1 || got[0].ID != b.ID {
		t.Errorf("after deletion: %v", got)
	}
}

func TestRefusals(t *testing.T) {
	s := open(t, t.TempDir())
	big := record()
	big.EnvVars["BIG"] = strings.Repeat("x", maxValue)
	_, bigErr := s.PutSandbox(t.Context(), big)
	_, idErr := s.PutSandbox(t.Context(), sandbox.Record{ID: "i>"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, ctxErr := s.PutSandbox(ctx, record())
	tests := []struct {
		name, want string
		err        error
	}{
		{"a record over the limit", "shorten its metadata", bigErr},
		{"a malformed sandbox ID", "not of the form", idErr},
		{"a cancelled context", "context canceled", ctxErr},
		{"a key ID that would be a wildcard", "may only have", s.PutKey(t.Context(), auth.Key{ID: "*"})},
		{"deleting a key by wildcard", "may only have", s.DeleteKey(t.Context(), ">")},
		{"deleting a sandbox by wildcard", "not of the form", s.DeleteSandbox(t.Context(), ">")},
		{"an event of no sandbox", "no sandbox ID", s.AppendEvent(t.Context(), sandbox.Event{})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
				t.Errorf("got %v, want %q", tt.err, tt.want)
			}
		})
	}
	if got := list(t, s); len(got) != 0 {
		t.Errorf("a refused record was stored: %d", len(got))
	}
}

func TestOneSandboxDoesNotCrowdOutTheEventsOfOthers(t *testing.T) {
	dir := t.TempDir()
	first, err := Open(t.Context(), Config{Dir: dir, MaxEvents: 50}) // as servers of before kept them
	if err != nil {
		t.Fatal(err)
	}
	other, noisy := sandboxid.New(), sandboxid.New()
	if err := errors.Join(first.AppendEvent(t.Context(), sandbox.Event{ID: "other", Sandbox: other, Name: "create"}), first.Close()); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), Config{Dir: dir, MaxEvents: 50, MaxSandboxEvents: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 120 {
		if err := s.AppendEvent(t.Context(), sandbox.Event{ID: fmt.Sprint(i), Sandbox: noisy, Name: "network"}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Events(t.Context())
	if err != nil || len(got) != 11 || got[0].ID != "other" || got[1].ID != "110" {
		t.Errorf("%d events, want the other's and the ten latest: %v, %v", len(got), got, err)
	}
}

// TestAFloodOfOneKeysEventsLeavesAnothersHistory has one key with many sandboxes, of which
// each stays below the limit of a sandbox.
func TestAFloodOfOneKeysEventsLeavesAnothersHistory(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, MaxEvents: 100, MaxEventBytes: 60 << 10}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	var want []string
	add := func(owner string, id sandbox.ID, name, detail string) {
		t.Helper()
		if err := s.AppendEvent(t.Context(), sandbox.Event{ID: name, Time: time.Now().UTC(), Owner: owner, Sandbox: id, Name: "create", Detail: detail}); err != nil {
			t.Fatal(err)
		}
	}
	mine := sandboxid.New()
	for i := range 10 {
		want = append(want, fmt.Sprint("mine ", i))
		add("k1", mine, want[i], "")
	}
	for i := range 300 {
		add("k2", sandboxid.New(), fmt.Sprint(i), strings.Repeat("x", 10*(i%200)))
	}
	check := func() {
		t.Helper()
		all, err := s.Events(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		theirs := 0
		for _, e := range all {
			if e.Owner == "k1" {
				got = append(got, e.ID)
			} else {
				theirs++
			}
		}
		if !slices.Equal(got, want) || theirs == 0 || theirs > 50 || all[len(all)-1].ID != "299" {
			t.Errorf("after a flood of another key's, a key has the events %v; the other has %d", got, theirs)
		}
	}
	check()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	check()
}

// TestEventsOfTheFormerLayoutAreDividedToo opens a stream that one key filled when keys
// had no shares.
func TestEventsOfTheFormerLayoutAreDividedToo(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir, MaxEvents: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 60 {
		e := sandbox.Event{ID: fmt.Sprint(i), Owner: "k2", Sandbox: sandboxid.New(), Name: "create"}
		data, err := encode(&e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.eng.js.Publish(t.Context(), "events."+string(e.Sandbox), data); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = Open(t.Context(), Config{Dir: dir, MaxEvents: 40})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 3 {
		if err := s.AppendEvent(t.Context(), sandbox.Event{ID: fmt.Sprint("mine ", i), Owner: "k1", Sandbox: sandboxid.New(), Name: "create"}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Events(t.Context())
	if err != nil || len(got) < 10 || len(got) > 23 || got[len(got)-1].ID != "mine 2" || got[len(got)-4].ID != "59" {
		t.Errorf("%d events: %v, %v", len(got), got, err)
	}
	info, err := s.events.Info(t.Context())
	if err != nil || int(info.State.Msgs) != len(got) {
		t.Errorf("the stream has %d events, want %d: %v", info.State.Msgs, len(got), err)
	}
}

func TestEventsAreOrderedAndBounded(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir, MaxEvents: 100, MaxEventAge: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got, err := s.Events(t.Context()); err != nil || len(got) != 0 {
		t.Fatalf("empty stream: %v, %v", got, err)
	}
	id := sandboxid.New()
	for i := range 120 {
		e := sandbox.Event{ID: fmt.Sprint(i), Time: time.Now().UTC(), Sandbox: id, Name: "create"}
		if err := s.AppendEvent(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	check := func(s *Store) {
		t.Helper()
		got, err := s.Events(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// A key that is alone keeps half; a tenth of that is dropped at once.
		if len(got) < 45 || len(got) > 50 {
			t.Fatalf("%d events, want 45 to 50", len(got))
		}
		for i, e := range got {
			if want := fmt.Sprint(120 - len(got) + i); e.ID != want {
				t.Fatalf("event %d is %s, want %s", i, e.ID, want)
			}
		}
	}
	check(s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = Open(t.Context(), Config{Dir: dir, MaxEvents: 100, MaxEventAge: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check(s)
}

func TestAThousandRecords(t *testing.T) {
	s := open(t, t.TempDir())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 250 {
				if _, err := s.PutSandbox(context.Background(), record()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(list(t, s)); got != 1000 {
		t.Fatalf("%d records", got)
	}
	start := time.Now()
	s = reopen(t, s)
	took := time.Since(start)
	if got := len(list(t, s)); got != 1000 {
		t.Fatalf("%d records after reopening", got)
	}
	t.Logf("reopened with 1,000 records in %v", took)
	if took > 5*time.Second {
		t.Errorf("reopening took %v", took)
	}
}

// writeForever is the child of TestRecordSurvivesKill: it stores records and
// names each one after the store said it is written.
func writeForever(dir string) {
	s, err := Open(context.Background(), Config{Dir: dir})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for range 10_000 {
		r := record()
		rev, err := s.PutSandbox(context.Background(), r)
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(r.ID, rev)
	}
	os.Exit(0)
}

func TestRecordSurvivesKill(t *testing.T) {
	dir := t.TempDir()
	seen := map[sandbox.ID]bool{}
	for round := range 3 {
		for _, id := range killedWriter(t, dir, 20+round*7) {
			seen[id] = true
		}
		s := open(t, dir)
		have := map[sandbox.ID]bool{}
		for _, r := range list(t, s) {
			have[r.ID] = true
		}
		for id := range seen {
			if !have[id] {
				t.Errorf("round %d: record %s was acknowledged and is gone", round, id)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// killedWriter runs a writer on dir, kills it after n records and returns the
// IDs it had named by then.
func killedWriter(t *testing.T, dir string, n int) []sandbox.ID {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ids []sandbox.ID
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		id, _, _ := strings.Cut(lines.Text(), " ")
		if !sandbox.ID(id).Valid() {
			t.Errorf("writer: %s", lines.Text())
			break
		}
		ids = append(ids, sandbox.ID(id))
		if len(ids) == n {
			cmd.Process.Signal(syscall.SIGKILL) // what is still in the pipe was acknowledged as well
		}
	}
	cmd.Wait()
	if len(ids) < n {
		t.Fatalf("writer named %d records, want %d", len(ids), n)
	}
	return ids
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	_, err := Open(t.Context(), Config{Dir: dir})
	if !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Fatalf("second open: %v", err)
	}
	put(t, s, record()) // the first one is unharmed
}

func TestDirectoriesThatAreRefused(t *testing.T) {
	used := func(t *testing.T) string {
		dir := t.TempDir()
		s := open(t, dir)
		for range 10 {
			put(t, s, record())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	write := func(t *testing.T, path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name, want string
		damage     func(t *testing.T) string
	}{
		{"a directory with other people's files", "not a cordon state directory", func(t *testing.T) string {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "thesis.tex"), "")
			return dir
		}},
		{"a format of the future", "format 2", func(t *testing.T) string {
			dir := used(t)
			write(t, filepath.Join(dir, formatFile), `{"format":2}`)
			return dir
		}},
		{"a format file of garbage", "damaged", func(t *testing.T) string {
			dir := used(t)
			write(t, filepath.Join(dir, formatFile), "\x00\x00")
			return dir
		}},
		{"a bucket whose description is garbage", "sandboxes cannot be read", func(t *testing.T) string {
			dir := used(t)
			write(t, filepath.Join(dir, "jetstream/$G/streams/KV_sandboxes/meta.inf"), "garbage")
			return dir
		}},
		{"a bucket that is gone", "keys cannot be read", func(t *testing.T) string {
			dir := used(t)
			if err := os.RemoveAll(filepath.Join(dir, "jetstream/$G/streams/KV_keys")); err != nil {
				t.Fatal(err)
			}
			return dir
		}},
		{"a record of the future", "schema 99", func(t *testing.T) string {
			dir := t.TempDir()
			s := open(t, dir)
			if _, err := s.sandboxes.kv.Put(t.Context(), "0", []byte(`{"schema":99}`)); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			return dir
		}},
		{"a file in the place of the directory", "state directory", func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "file")
			write(t, path, "")
			return path
		}},
		{"no directory at all", "no directory is configured", func(*testing.T) string { return "" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Open(t.Context(), Config{Dir: tt.damage(t)})
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// damage edits the one block file that holds the records of a closed store.
func damage(t *testing.T, dir, part string, edit func([]byte) []byte) {
	t.Helper()
	blocks, err := filepath.Glob(filepath.Join(dir, "jetstream/$G/streams/KV_"+part+"/msgs/*.blk"))
	if err != nil || len(blocks) != 1 {
		t.Fatalf("blocks: %v, %v", blocks, err)
	}
	b, err := os.ReadFile(blocks[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blocks[0], edit(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedRecordsAreNotForgotten flips bytes in the middle of the records, at
// their end and cuts them off: the engine itself would go on with what is left.
func TestDamagedRecordsAreNotForgotten(t *testing.T) {
	edits := map[string]func([]byte) []byte{
		"damage in the middle": func(b []byte) []byte { copy(b[len(b)/2:], "damage damage damage"); return b },
		"damage at the end":    func(b []byte) []byte { copy(b[len(b)-30:], "damage damage damage"); return b },
		"cut in the middle":    func(b []byte) []byte { return b[:len(b)/2] },
		"nothing left":         func(b []byte) []byte { return nil },
	}
	for name, edit := range edits {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			for range 20 {
				put(t, s, record())
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			damage(t, dir, sandboxBucket, edit)
			s, err := Open(t.Context(), Config{Dir: dir, patience: time.Second})
			if err == nil {
				n := len(list(t, s))
				s.Close()
				t.Fatalf("opened with %d of 20 records", n)
			}
			if !strings.Contains(err.Error(), "restore the") || !strings.Contains(err.Error(), sandboxBucket) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestRevokedKeyStaysRevoked loses the deletion of a key to damage.
func TestRevokedKeyStaysRevoked(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	k, _ := auth.NewKey("leaked", true, time.Now())
	if err := s.PutKey(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteKey(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	damage(t, dir, keyBucket, func(b []byte) []byte { return b[:len(b)-40] })
	if s, err := Open(t.Context(), Config{Dir: dir}); err == nil {
		got, _ := s.Keys(t.Context())
		s.Close()
		t.Fatalf("opened, with keys %v", got)
	}
}

// TestUnfinishedWriteIsDropped leaves half an entry at the end, as a power
// failure during a write does: nothing acknowledged is lost, so the store opens.
func TestUnfinishedWriteIsDropped(t *testing.T) {
	dir := t.TempDir()
	killedWriter(t, dir, 20)
	s := open(t, dir)
	want := len(list(t, s))
	last := list(t, s)[want-1]
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	damage(t, dir, sandboxBucket, func(b []byte) []byte { return append(b, b[:50]...) })
	s = open(t, dir)
	if got := len(list(t, s)); got != want {
		t.Errorf("%d records, want %d", got, want)
	}
	last.State = sandbox.Paused
	put(t, s, last) // goes on where it was
	if got := len(list(t, reopen(t, s))); got != want {
		t.Errorf("%d records after another write, want %d", got, want)
	}
}

func TestSignalsStayWithTheCaller(t *testing.T) {
	got := make(chan os.Signal, 1)
	signal.Notify(got, syscall.SIGHUP)
	defer signal.Stop(got)
	s := open(t, t.TempDir())
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	select {
	case <-got:
	case <-time.After(5 * time.Second):
		t.Fatal("the signal did not arrive")
	}
	put(t, s, record())
}

func TestClosedStoreRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutSandbox(t.Context(), record()); err == nil {
		t.Error("a closed store took a record")
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

func BenchmarkPutSandbox(b *testing.B) {
	s := open(b, b.TempDir())
	for b.Loop() {
		put(b, s, record())
	}
}

func BenchmarkUpdateSandbox(b *testing.B) {
	s := open(b, b.TempDir())
	r := record()
	for b.Loop() {
		r.Revision = put(b, s, r)
	}
}

func BenchmarkSandboxes1000(b *testing.B) {
	s := open(b, b.TempDir())
	for range 1000 {
		put(b, s, record())
	}
	for b.Loop() {
		list(b, s)
	}
}

func BenchmarkOpenEmpty(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		s, err := Open(b.Context(), Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// An empty list of sources lets nobody in; none at all everybody. The difference
// must survive the disk.
func TestAnEmptyListOfSourcesStaysEmpty(t *testing.T) {
	for _, list := range [][]netip.Prefix{nil, {}} {
		text, err := encode(&sandbox.Record{AllowIn: list})
		if err != nil {
			t.Fatal(err)
		}
		back, err := decode[sandbox.Record](text)
		if err != nil || (back.AllowIn == nil) != (list == nil) || (cloneRecord(*back).AllowIn == nil) != (list == nil) {
			t.Errorf("%#v became %#v (%v)", list, back.AllowIn, err)
		}
	}
}
