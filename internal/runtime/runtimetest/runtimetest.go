// Package runtimetest holds the contract that every sandbox runtime passes, and makes
// what a test of one needs on the host: an image, a program inside it, network
// namespaces with a cable between them.
package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// suite is one run of the contract.
type suite struct {
	open   func(*testing.T) sandbox.Runtime
	rootfs string
}

// Run tests the contract of sandbox.Runtime. Each call of open returns another
// Runtime over the same state, as a server that started again would make it.
func Run(t *testing.T, open func(*testing.T) sandbox.Runtime) {
	Privileged(t)
	s := &suite{open: open, rootfs: Rootfs(t)}
	for _, c := range []struct {
		name string
		test func(*testing.T)
	}{
		{"a created sandbox runs nothing until it is started", s.createdRunsNothing},
		{"the agent gets its environment, host name and address and no others", s.identity},
		{"writes are private to a sandbox", s.privateWrites},
		{"binds show files of the host and take no writes", s.binds},
		{"users inside may become root by a set-user-ID program", s.setUID},
		{"files carry user attributes", s.attributes},
		{"processes run on terminals", s.terminals},
		{"wait returns when the sandbox exits", s.wait},
		{"pause stops it and resume continues it", s.pause},
		{"a checkpoint keeps memory and files and takes a new network", s.checkpoint},
		{"a checkpoint can leave the sandbox running and be restored many times", s.clones},
		{"a checkpoint of a paused sandbox leaves it paused, and restored it runs", s.checkpointPaused},
		{"a checkpoint that does not fit on the disk leaves the sandbox as it was", s.checkpointFull},
		{"connections outlast a checkpoint that leaves the sandbox running", s.checkpointConnected},
		{"a restore without a checkpoint leaves nothing", s.restoreNothing},
		{"a later runtime adopts what an earlier one left", s.adopt},
		{"destroy is idempotent and interrupts", s.destroy},
		{"a sandbox that does not exist is not found", s.unknown},
		{"a step in the wrong state is a conflict", s.wrongState},
		{"a specification that cannot be is invalid and leaves nothing", s.invalid},
		{"a create that fails or is cancelled leaves nothing", s.failedCreate},
		{"the disk quota ends writes, not the sandbox", s.diskLimit},
		{"files in memory have a limit too", s.sharedMemoryLimit},
		{"the memory limit ends the sandbox and nothing else", s.memoryLimit},
		{"the limit of processes refuses more", s.processLimit},
		{"the CPU limit slows it down", s.cpuLimit},
		{"many start at once", s.concurrent},
		{"a spare takes its limits along to its owner", s.assign},
		{"owners get the same CPU time whatever they run", s.ownersCPU},
		{"what an owner may not hold ends one of its own", s.ownersMemory},
	} {
		t.Run(c.name, c.test)
	}
}

// spec is a sandbox in a slot of its own.
func (s *suite) spec(slot *Slot) sandbox.RuntimeSpec {
	return sandbox.RuntimeSpec{
		ID: sandboxid.New(), Rootfs: s.rootfs, Hostname: "sandbox", Args: GuestArgs(), Env: []string{"PATH=/"}, NetNS: slot.NetNS,
		Resources: sandbox.Resources{CPUs: 1, MemoryMB: 192, DiskMB: 32, Processes: 64},
	}
}

// sandbox starts a sandbox, which is gone when the test ends.
func (s *suite) sandbox(t *testing.T, r sandbox.Runtime, change func(*sandbox.RuntimeSpec)) (sandbox.ID, *Slot) {
	t.Helper()
	slot := NewSlot(t, 1)
	spec := s.spec(slot)
	if change != nil {
		change(&spec)
	}
	destroyed(t, r, spec.ID)
	must(t, r.Create(t.Context(), spec))
	must(t, r.Start(t.Context(), spec.ID))
	if got := ask(t, slot, "hello"); got != "hello" {
		t.Fatalf("the guest says %q", got)
	}
	return spec.ID, slot
}

// destroyed makes sure a sandbox does not outlive its test.
func destroyed(t *testing.T, r sandbox.Runtime, id sandbox.ID) {
	t.Cleanup(func() {
		if err := r.Destroy(context.Background(), id); err != nil {
			t.Errorf("destroy: %v", err)
		}
	})
}

func ask(t *testing.T, slot *Slot, do string, args ...string) string {
	t.Helper()
	out, err := slot.Ask(t.Context(), do, args...)
	if err != nil {
		t.Fatalf("guest, %s %q: %v", do, args, err)
	}
	return out
}

func kind(t *testing.T, what string, err error, want errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(err) != want {
		t.Errorf("%s: got error %v (%v), want %v", what, err, errs.KindOf(err), want)
	}
}

// silent fails when the guest answers within a moment.
func silent(t *testing.T, slot *Slot, when string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	if out, err := slot.Ask(ctx, "hello"); err == nil {
		t.Errorf("%s: the guest says %q, want silence", when, out)
	}
}

func listed(t *testing.T, r sandbox.Runtime, id sandbox.ID) bool {
	t.Helper()
	ids, err := r.List(t.Context())
	must(t, err)
	return slices.Contains(ids, id)
}

func (s *suite) createdRunsNothing(t *testing.T) {
	r, slot := s.open(t), NewSlot(t, 1)
	spec := s.spec(slot)
	destroyed(t, r, spec.ID)
	must(t, r.Create(t.Context(), spec))
	if !listed(t, r, spec.ID) {
		t.Error("a created sandbox is not listed")
	}
	silent(t, slot, "created")
	must(t, r.Start(t.Context(), spec.ID))
	ask(t, slot, "hello")
}

func (s *suite) identity(t *testing.T) {
	t.Setenv("CORDON_SECRET_OF_THE_SERVER", "leaked")
	_, slot := s.sandbox(t, s.open(t), func(spec *sandbox.RuntimeSpec) {
		spec.Hostname, spec.Env = "i-am-it", []string{"PATH=/", "GREETING=good morning"}
	})
	env := strings.Split(ask(t, slot, "env"), "\n")
	slices.Sort(env)
	if diff := cmp.Diff([]string{"GREETING=good morning", "HOME=/", "PATH=/"}, env); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	if got := ask(t, slot, "hostname"); got != "i-am-it" {
		t.Errorf("host name: got %q, want %q", got, "i-am-it")
	}
	if got, want := ask(t, slot, "addresses"), slot.Guest.String()+"/30"; !strings.Contains(got, want) {
		t.Errorf("addresses: got %s, want %s", got, want)
	}
}

func (s *suite) privateWrites(t *testing.T) {
	r := s.open(t)
	_, one := s.sandbox(t, r, nil)
	_, two := s.sandbox(t, r, nil)
	ask(t, one, "write", "/etc/image", "changed")
	ask(t, one, "write", "/tmp/new", "new")
	if got := ask(t, one, "cat", "/etc/image"); got != "changed" {
		t.Errorf("the writer reads %q", got)
	}
	if got := ask(t, two, "cat", "/etc/image"); got != "from the image" {
		t.Errorf("another sandbox reads %q", got)
	}
	if _, err := two.Ask(t.Context(), "cat", "/tmp/new"); err == nil {
		t.Error("another sandbox sees the new file")
	}
	b, err := os.ReadFile(filepath.Join(s.rootfs, "etc", "image"))
	must(t, err)
	if string(b) != "from the image" {
		t.Errorf("the image now says %q", b)
	}
	if _, err := os.Stat(filepath.Join(s.rootfs, "tmp", "new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the image has the new file: %v", err)
	}
}

func (s *suite) binds(t *testing.T) {
	host := folder(t)
	file, dir := filepath.Join(host, "file"), filepath.Join(host, "dir")
	must(t, os.WriteFile(file, []byte("a file"), 0o644))
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "inside"), []byte("inside"), 0o644))
	_, slot := s.sandbox(t, s.open(t), func(spec *sandbox.RuntimeSpec) {
		spec.Binds = []sandbox.Bind{{Host: file, Guest: "/etc/hosts"}, {Host: dir, Guest: "/usr/share/tools"}}
	})
	for path, want := range map[string]string{"/etc/hosts": "a file", "/usr/share/tools/inside": "inside"} {
		if got := ask(t, slot, "cat", path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
		ask(t, slot, "write", path, "changed")
		if got := ask(t, slot, "cat", path); got != "changed" {
			t.Errorf("%s after a write: got %q", path, got)
		}
	}
	ask(t, slot, "write", "/usr/share/tools/new", "new")
	for path, want := range map[string]string{file: "a file", filepath.Join(dir, "inside"): "inside"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("on the host %s: got %q, %v; want %q", path, b, err, want)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the new file is on the host: %v", err)
	}
}

func (s *suite) setUID(t *testing.T) {
	_, slot := s.sandbox(t, s.open(t), nil)
	if got := ask(t, slot, "as", "1000", GuestPath, "ids"); got != "1000 1000" {
		t.Errorf("an ordinary program of user 1000 runs as %s", got)
	}
	if got := ask(t, slot, "as", "1000", "/suid", "ids"); got != "1000 0" {
		t.Errorf("a set-user-ID program of user 1000 runs as %s, want 1000 0", got)
	}
}

func (s *suite) attributes(t *testing.T) {
	_, slot := s.sandbox(t, s.open(t), nil)
	ask(t, slot, "write", "/home/user/new", "")
	for _, path := range []string{"/home/user/new", "/home/user", "/etc/image"} {
		ask(t, slot, "setxattr", path, "user.key", "value")
		if got := ask(t, slot, "getxattr", path, "user.key"); got != "value" {
			t.Errorf("%s: got %q", path, got)
		}
	}
}

func (s *suite) terminals(t *testing.T) {
	_, slot := s.sandbox(t, s.open(t), nil)
	if got := ask(t, slot, "terminal"); got != "hello" {
		t.Errorf("through the terminal: got %q", got)
	}
}

func (s *suite) wait(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := r.Wait(ctx, id); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it runs: got %v, want the context's error", err)
	}
	other := s.open(t) // also one that did not start it learns of the exit
	done := make(chan error, 2)
	go func() { done <- r.Wait(t.Context(), id) }()
	go func() { done <- other.Wait(t.Context(), id) }()
	ask(t, slot, "exit", "3")
	for range 2 {
		select {
		case err := <-done:
			must(t, err)
		case <-time.After(5 * time.Second):
			t.Fatal("it exited and Wait does not return")
		}
	}
	must(t, r.Wait(t.Context(), id))
}

func (s *suite) pause(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	must(t, r.Pause(t.Context(), id))
	silent(t, slot, "paused")
	must(t, r.Resume(t.Context(), id))
	ask(t, slot, "hello")
}

func (s *suite) checkpoint(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	ask(t, slot, "remember", "a word")
	ask(t, slot, "write", "/home/user/file", "kept")
	dir := filepath.Join(t.TempDir(), "image")
	must(t, r.Checkpoint(t.Context(), id, dir))
	must(t, r.Destroy(t.Context(), id))

	next := NewSlot(t, 2)
	spec := s.spec(next)
	spec.Hostname = "another"
	destroyed(t, r, spec.ID)
	must(t, s.open(t).Restore(t.Context(), spec, dir))
	for _, c := range []struct{ want, do, arg string }{
		{"a word", "recall", ""},
		{"kept", "cat", "/home/user/file"},
		{"another", "hostname", ""},
	} {
		if got := ask(t, next, c.do, c.arg); got != c.want {
			t.Errorf("%s %s: got %q, want %q", c.do, c.arg, got, c.want)
		}
	}
	if got, want := ask(t, next, "addresses"), next.Guest.String(); !strings.Contains(got, want) || strings.Contains(got, slot.Guest.String()) {
		t.Errorf("addresses: got %s, want %s", got, want)
	}
	kind(t, "a second checkpoint in the same folder", r.Checkpoint(t.Context(), spec.ID, dir), errs.Conflict)
}

func (s *suite) clones(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	ask(t, slot, "remember", "before")
	dir := filepath.Join(t.TempDir(), "image")
	must(t, r.Checkpoint(t.Context(), id, dir))
	ask(t, slot, "remember", "after")
	for n := range 2 {
		next := NewSlot(t, n+2)
		spec := s.spec(next)
		destroyed(t, r, spec.ID)
		must(t, r.Restore(t.Context(), spec, dir))
		if got := ask(t, next, "recall"); got != "before" {
			t.Errorf("clone %d recalls %q", n, got)
		}
	}
	if got := ask(t, slot, "recall"); got != "after" {
		t.Errorf("the original recalls %q", got)
	}
}

func (s *suite) checkpointPaused(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	ask(t, slot, "remember", "a word")
	must(t, r.Pause(t.Context(), id))
	dir := filepath.Join(t.TempDir(), "image")
	must(t, r.Checkpoint(t.Context(), id, dir))
	silent(t, slot, "paused and checkpointed")
	must(t, r.Restorable(dir))
	next := NewSlot(t, 2)
	spec := s.spec(next)
	spec.Args = []string{"/another/program"} // the checkpoint's goes on
	destroyed(t, r, spec.ID)
	must(t, r.Restore(t.Context(), spec, dir))
	if got := ask(t, next, "recall"); got != "a word" {
		t.Errorf("restored, it recalls %q", got)
	}
	must(t, s.open(t).Resume(t.Context(), id)) // as a server does that started again
	if got := ask(t, slot, "recall"); got != "a word" {
		t.Errorf("the original recalls %q", got)
	}
}

func (s *suite) checkpointFull(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	ask(t, slot, "fill", "/home/user/large", "24")
	ask(t, slot, "remember", "a word")
	small := folder(t)
	must(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=8m"))
	t.Cleanup(func() { must(t, unix.Unmount(small, unix.MNT_DETACH)) })
	dir := filepath.Join(small, "image")
	if err := r.Checkpoint(t.Context(), id, dir); err == nil {
		t.Error("checkpointed 24 MiB into 8")
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	ask(t, slot, "hello")
	must(t, r.Pause(t.Context(), id))
	if err := r.Checkpoint(t.Context(), id, dir); err == nil {
		t.Error("paused, checkpointed 24 MiB into 8")
	}
	must(t, r.Resume(t.Context(), id))
	if got := ask(t, slot, "recall"); got != "a word" {
		t.Errorf("it recalls %q", got)
	}
	must(t, r.Checkpoint(t.Context(), id, filepath.Join(t.TempDir(), "image")))
}

func (s *suite) checkpointConnected(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	conn, err := slot.dial(t.Context())
	must(t, err)
	defer conn.Close()
	must(t, r.Checkpoint(t.Context(), id, filepath.Join(t.TempDir(), "image")))
	must(t, conn.SetDeadline(time.Now().Add(guestTimeout)))
	if out, err := exchange(conn, "hello"); err != nil || out != "hello" {
		t.Errorf("over the connection from before: got %q, %v", out, err)
	}
}

func (s *suite) restoreNothing(t *testing.T) {
	r, slot := s.open(t), NewSlot(t, 1)
	spec := s.spec(slot)
	destroyed(t, r, spec.ID)
	kind(t, "an empty folder", r.Restore(t.Context(), spec, t.TempDir()), errs.NotFound)
	if listed(t, r, spec.ID) {
		t.Error("it is listed")
	}
}

func (s *suite) adopt(t *testing.T) {
	id, slot := s.sandbox(t, s.open(t), nil)
	r := s.open(t)
	if !listed(t, r, id) {
		t.Fatal("not listed")
	}
	st, err := r.Stats(t.Context(), id)
	must(t, err)
	if st.CPUTime <= 0 || st.MemoryBytes < 1<<20 || st.DiskBytes < 0 {
		t.Errorf("stats: got %+v", st)
	}
	must(t, r.Pause(t.Context(), id))
	must(t, r.Resume(t.Context(), id))
	ask(t, slot, "hello")
	must(t, r.Destroy(t.Context(), id))
	silent(t, slot, "destroyed")
}

func (s *suite) destroy(t *testing.T) {
	r := s.open(t)
	must(t, r.Destroy(t.Context(), sandboxid.New()))
	id, slot := s.sandbox(t, r, nil)
	waiting := make(chan error, 1)
	go func() { waiting <- r.Wait(t.Context(), id) }()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := r.Destroy(t.Context(), id); err != nil {
				t.Errorf("at the same time: %v", err)
			}
		})
	}
	wg.Wait()
	must(t, r.Destroy(t.Context(), id))
	if listed(t, r, id) {
		t.Error("still listed")
	}
	silent(t, slot, "destroyed")
	select {
	case err := <-waiting:
		if err != nil && errs.KindOf(err) != errs.NotFound { // Destroy may come first
			t.Errorf("wait: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Wait does not return")
	}
	slot.Rearm(t)
	spec := s.spec(slot) // and the ID may be used again, as a resumed sandbox's is
	spec.ID = id
	must(t, r.Create(t.Context(), spec))
	must(t, r.Start(t.Context(), id))
	ask(t, slot, "hello")
}

func (s *suite) unknown(t *testing.T) {
	r, id := s.open(t), sandboxid.New()
	ctx := t.Context()
	_, stats := r.Stats(ctx, id)
	for what, err := range map[string]error{
		"start": r.Start(ctx, id), "pause": r.Pause(ctx, id), "resume": r.Resume(ctx, id), "wait": r.Wait(ctx, id),
		"checkpoint": r.Checkpoint(ctx, id, t.TempDir()), "stats": stats,
	} {
		kind(t, what, err, errs.NotFound)
	}
	kind(t, "an ID that is a path", r.Destroy(ctx, "../../../../../etc"), errs.Invalid)
	kind(t, "starting an ID that is a path", r.Start(ctx, "../../../../../etc"), errs.Invalid)
}

func (s *suite) wrongState(t *testing.T) {
	r, slot := s.open(t), NewSlot(t, 1)
	spec := s.spec(slot)
	destroyed(t, r, spec.ID)
	must(t, r.Create(t.Context(), spec))
	kind(t, "create again", r.Create(t.Context(), spec), errs.Conflict)
	kind(t, "checkpoint before start", r.Checkpoint(t.Context(), spec.ID, t.TempDir()), errs.Conflict)
	must(t, r.Start(t.Context(), spec.ID))
	ask(t, slot, "hello")
	kind(t, "start again", r.Start(t.Context(), spec.ID), errs.Conflict)
	kind(t, "resume what runs", r.Resume(t.Context(), spec.ID), errs.Conflict)
	must(t, r.Pause(t.Context(), spec.ID))
	kind(t, "pause again", r.Pause(t.Context(), spec.ID), errs.Conflict)
	must(t, r.Resume(t.Context(), spec.ID))
	ask(t, slot, "hello")
}

func (s *suite) invalid(t *testing.T) {
	r, slot := s.open(t), NewSlot(t, 1)
	for name, change := range map[string]func(*sandbox.RuntimeSpec){
		"ID":              func(s *sandbox.RuntimeSpec) { s.ID = "i/../../../../etc/passwd" },
		"relative rootfs": func(s *sandbox.RuntimeSpec) { s.Rootfs = "rootfs" },
		"no args":         func(s *sandbox.RuntimeSpec) { s.Args = nil },
		"no CPU":          func(s *sandbox.RuntimeSpec) { s.Resources.CPUs = 0 },
		"no memory":       func(s *sandbox.RuntimeSpec) { s.Resources.MemoryMB = 0 },
		"no disk":         func(s *sandbox.RuntimeSpec) { s.Resources.DiskMB = -1 },
		"no processes":    func(s *sandbox.RuntimeSpec) { s.Resources.Processes = 0 },
		"relative bind":   func(s *sandbox.RuntimeSpec) { s.Binds = []sandbox.Bind{{Host: "etc", Guest: "/etc"}} },
		"bind over /":     func(s *sandbox.RuntimeSpec) { s.Binds = []sandbox.Bind{{Host: "/etc", Guest: "/etc/.."}} },
	} {
		spec := s.spec(slot)
		change(&spec)
		kind(t, name, r.Create(t.Context(), spec), errs.Invalid)
		if listed(t, r, spec.ID) {
			t.Errorf("%s: it is listed", name)
		}
	}
}

func (s *suite) failedCreate(t *testing.T) {
	r, slot := s.open(t), NewSlot(t, 1)
	for name, change := range map[string]func(*sandbox.RuntimeSpec){
		"a bind of nothing":       func(s *sandbox.RuntimeSpec) { s.Binds = []sandbox.Bind{{Host: "/does/not/exist", Guest: "/x"}} },
		"a namespace that is not": func(s *sandbox.RuntimeSpec) { s.NetNS = "/does/not/exist" },
		"an image that is not":    func(s *sandbox.RuntimeSpec) { s.Rootfs = "/does/not/exist" },
	} {
		spec := s.spec(slot)
		change(&spec)
		if err := r.Create(t.Context(), spec); err == nil {
			t.Errorf("%s: created", name)
		}
		if listed(t, r, spec.ID) {
			t.Errorf("%s: it is listed", name)
		}
	}
	for _, after := range []time.Duration{0, 10 * time.Millisecond, 40 * time.Millisecond} {
		spec := s.spec(slot)
		ctx, cancel := context.WithTimeout(t.Context(), after)
		err := r.Create(ctx, spec)
		cancel()
		if err == nil {
			t.Logf("created within %v", after)
			must(t, r.Destroy(t.Context(), spec.ID))
		}
		if listed(t, r, spec.ID) {
			t.Errorf("cancelled after %v: it is listed", after)
		}
	}
	spec := s.spec(slot)
	spec.Args = []string{"/does/not/exist"}
	destroyed(t, r, spec.ID)
	must(t, r.Create(t.Context(), spec))
	if err := r.Start(t.Context(), spec.ID); err == nil {
		t.Error("started a program that does not exist")
	}
	must(t, r.Destroy(t.Context(), spec.ID))
}

func (s *suite) diskLimit(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	out, err := slot.Ask(t.Context(), "fill", "/home/user/large", "64")
	if err == nil || !strings.Contains(err.Error(), "no space") {
		t.Errorf("filling the disk: got %v after %s MiB, want no space", err, out)
	}
	if n, _ := strconv.Atoi(out); n < 28 || n > 32 {
		t.Errorf("wrote %s MiB of 32", out)
	}
	st, err := r.Stats(t.Context(), id)
	must(t, err)
	if st.DiskBytes < 28<<20 || st.DiskBytes > 40<<20 {
		t.Errorf("disk in use: got %d MiB, want 32", st.DiskBytes>>20)
	}
	if out, err := slot.Ask(t.Context(), "fill", "/tmp/large", "4"); err == nil {
		t.Errorf("/tmp took %s MiB more: it is not under the quota", out)
	}
	ask(t, slot, "remove", "/home/user/large")
	ask(t, slot, "fill", "/tmp/large", "16")
}

func (s *suite) sharedMemoryLimit(t *testing.T) {
	_, slot := s.sandbox(t, s.open(t), nil)
	out, err := slot.Ask(t.Context(), "fill", "/dev/shm/large", "192")
	if err == nil || !strings.Contains(err.Error(), "no space") {
		t.Errorf("filling /dev/shm: got %v after %s MiB, want no space", err, out)
	}
	ask(t, slot, "hello")
}

func (s *suite) memoryLimit(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	_, other := s.sandbox(t, r, nil)
	ask(t, slot, "allocate", "100") // within the plan
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	asked, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { // nobody answers for a sandbox that is gone, so it does not return by itself
		if _, err := slot.Ask(asked, "allocate", "400"); err == nil {
			t.Error("allocated 500 MiB of 192")
		}
	})
	if err := r.Wait(ctx, id); !errors.Is(err, sandbox.ErrOutOfMemory) {
		t.Errorf("after it used more memory than it has: got %v, want %v", err, sandbox.ErrOutOfMemory)
	}
	stop()
	wg.Wait()
	ask(t, other, "hello")
	must(t, r.Destroy(t.Context(), id))
}

func (s *suite) processLimit(t *testing.T) {
	_, slot := s.sandbox(t, s.open(t), nil)
	// Of a user: root may have more, and the agent limits its commands itself.
	out, err := slot.Ask(t.Context(), "userforks", "100")
	if err == nil {
		t.Errorf("started %s processes, with a limit of 64", out)
	}
	ask(t, slot, "hello")
}

func (s *suite) cpuLimit(t *testing.T) {
	r := s.open(t)
	id, slot := s.sandbox(t, r, nil)
	before, err := r.Stats(t.Context(), id)
	must(t, err)
	start := time.Now()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { _, _ = slot.Ask(t.Context(), "burn", "600") })
	}
	wg.Wait()
	took := time.Since(start)
	after, err := r.Stats(t.Context(), id)
	must(t, err)
	used := after.CPUTime - before.CPUTime
	if used > took*5/4+200*time.Millisecond {
		t.Errorf("used %v of CPU in %v, with a limit of one", used, took)
	}
}

func (s *suite) concurrent(t *testing.T) {
	const n = 8
	r := s.open(t)
	slots := make([]*Slot, n)
	for i := range slots {
		slots[i] = NewSlot(t, i+1)
	}
	var wg sync.WaitGroup
	for i, slot := range slots {
		spec := s.spec(slot)
		spec.Hostname = fmt.Sprint("sandbox", i)
		destroyed(t, r, spec.ID)
		wg.Go(func() {
			if err := r.Create(t.Context(), spec); err != nil {
				t.Errorf("create: %v", err)
				return
			}
			if err := r.Start(t.Context(), spec.ID); err != nil {
				t.Errorf("start: %v", err)
				return
			}
			if got, err := slot.Ask(t.Context(), "hostname"); err != nil || got != spec.Hostname {
				t.Errorf("sandbox %d says it is %q, %v", i, got, err)
			}
		})
	}
	wg.Wait()
}
