package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
)

// watching records a stream's events as "CREATE name".
type watching struct {
	mu     sync.Mutex
	events []string
	raw    []*pb.FilesystemEvent
	alive  int
}

func (w *watching) all() []string     { w.mu.Lock(); defer w.mu.Unlock(); return slices.Clone(w.events) }
func (w *watching) has(e string) bool { return slices.Contains(w.all(), e) }

func (h *harness) watch(req *pb.WatchDirRequest, headers ...string) *watching {
	h.t.Helper()
	r := connect.NewRequest(req)
	for i := 0; i < len(headers); i += 2 {
		r.Header().Set(headers[i], headers[i+1])
	}
	s, err := h.files().WatchDir(h.t.Context(), r)
	if err != nil {
		h.t.Fatal(err)
	}
	if !s.Receive() || s.Msg().GetStart() == nil {
		h.t.Fatalf("the first event is %v (%v), want start", s.Msg(), s.Err())
	}
	w := &watching{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s.Receive() {
			w.mu.Lock()
			if ev := s.Msg().GetFilesystem(); ev != nil {
				w.events = append(w.events, strings.TrimPrefix(ev.GetType().String(), "EVENT_TYPE_")+" "+ev.GetName())
				w.raw = append(w.raw, ev)
			} else {
				w.alive++
			}
			w.mu.Unlock()
		}
	}()
	h.t.Cleanup(func() { s.Close(); <-done })
	return w
}

func (h *harness) dir(path string) string {
	h.t.Helper()
	full := filepath.Join(h.home, path)
	if err := os.MkdirAll(full, 0o777); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Chmod(full, 0o777); err != nil {
		h.t.Fatal(err)
	}
	return full
}

func TestWatchingTellsEveryKindOfChange(t *testing.T) {
	h := claimed(t)
	d := h.dir("w")
	w := h.watch(&pb.WatchDirRequest{Path: "w"})
	h.write(d+"/f", "1")
	eventually(t, "creation and writing", func() bool { return w.has("CREATE f") && w.has("WRITE f") })
	os.Chmod(d+"/f", 0o600)
	eventually(t, "a change of mode", func() bool { return w.has("CHMOD f") })
	os.Rename(d+"/f", d+"/g")
	eventually(t, "a rename", func() bool { return w.has("RENAME f") && w.has("CREATE g") })
	os.Remove(d + "/g")
	eventually(t, "a removal", func() bool { return w.has("REMOVE g") })
	os.Mkdir(d+"/sub", 0o777)
	h.write(d+"/sub/below", "x")
	eventually(t, "a new directory", func() bool { return w.has("CREATE sub") })
	time.Sleep(50 * time.Millisecond)
	if w.has("CREATE sub/below") {
		t.Error("a watch that is not recursive told of a change below")
	}
}

func TestARecursiveWatchMissesNothingAndRepeatsNothing(t *testing.T) {
	h := claimed(t)
	d := h.dir("w/old")
	d = filepath.Dir(d)
	w := h.watch(&pb.WatchDirRequest{Path: "w", Recursive: true, IncludeEntry: true})
	h.write(d+"/old/x", "1")
	eventually(t, "a change in a directory that was there", func() bool { return w.has("CREATE old/x") })
	// All at once: what is put into a directory before its watch exists must be told too.
	for i := range 20 {
		deep := fmt.Sprintf("%s/n%d/a/b", d, i)
		if err := os.MkdirAll(deep, 0o777); err != nil {
			t.Fatal(err)
		}
		h.write(deep+"/f", "1")
	}
	for i := range 20 {
		for _, tail := range []string{"", "/a", "/a/b", "/a/b/f"} {
			eventually(t, "everything new is told", func() bool { return w.has(fmt.Sprintf("CREATE n%d%s", i, tail)) })
		}
	}
	seen := map[string]bool{}
	for _, e := range w.all() {
		if strings.HasPrefix(e, "CREATE ") && seen[e] {
			t.Errorf("told twice: %s", e)
		}
		seen[e] = true
	}
	// A renamed directory reports under its new name only.
	if err := os.Rename(d+"/n0", d+"/moved"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the contents under the new name", func() bool { return w.has("CREATE moved/a/b/f") })
	h.write(d+"/moved/a/b/g", "1")
	eventually(t, "a change under the new name", func() bool { return w.has("CREATE moved/a/b/g") })
	if w.has("CREATE n0/a/b/g") {
		t.Error("a change was told under the old name")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ev := range w.raw {
		if ev.GetName() == "old/x" && ev.GetType() == pb.EventType_EVENT_TYPE_CREATE {
			if e := ev.GetEntry(); e.GetPath() != d+"/old/x" || e.GetType() != pb.FileType_FILE_TYPE_FILE {
				t.Errorf("entry: %v", e)
			}
		}
	}
}

func TestAQuietWatchShowsLife(t *testing.T) {
	h := claimed(t)
	h.dir("w")
	w := h.watch(&pb.WatchDirRequest{Path: "w"}, "Keepalive-Ping-Interval", "1")
	eventually(t, "a keepalive", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.alive > 0 })
}

func TestPolledWatchers(t *testing.T) {
	h := claimed(t)
	f, ctx := h.files(), t.Context()
	d := h.dir("w")
	made, err := f.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: "w"}))
	if err != nil {
		t.Fatal(err)
	}
	id := made.Msg.GetWatcherId()
	var got []string
	poll := func() error {
		resp, err := f.GetWatcherEvents(ctx, connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id}))
		if err != nil {
			return err
		}
		for _, e := range resp.Msg.GetEvents() {
			got = append(got, e.GetType().String()+" "+e.GetName())
		}
		return nil
	}
	h.write(d+"/f", "")
	eventually(t, "the event", func() bool { return poll() == nil && slices.Contains(got, "EVENT_TYPE_CREATE f") })
	got = nil
	if err := poll(); err != nil || len(got) != 0 {
		t.Errorf("events are told once: %v %v", got, err)
	}
	// Nobody polls: the queues are bounded, and the client learns that events are lost.
	const room = 500
	h.agent.watchers.queued.Add(maxQueuedAll - room)
	for i := range room {
		h.write(fmt.Sprintf("%s/many%d", d, i), "")
	}
	for i := range 10 {
		h.write(fmt.Sprintf("%s/more%d", d, i), "x")
	}
	queue, err := h.agent.watchers.find(id)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the queue is full", func() bool { queue.mu.Lock(); defer queue.mu.Unlock(); return queue.err != nil })
	if err := poll(); err != nil {
		t.Errorf("what was kept: %v", err)
	}
	if err := poll(); code(err) != "data_loss" {
		t.Errorf("behind it: %v, want data_loss", err)
	}
	if len(got) != room {
		t.Errorf("%d events were kept, want %d", len(got), room)
	}
	if _, err := f.RemoveWatcher(ctx, connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: id})); err != nil {
		t.Fatal(err)
	}
	if err := poll(); code(err) != "not_found" {
		t.Errorf("after removal: %v", err)
	}
	if n := h.agent.watchers.queued.Load(); n != maxQueuedAll-room {
		t.Errorf("%d events are counted as queued, want %d", n, maxQueuedAll-room)
	}
}
