// Package life shows that what sandboxes hold of the machine ends with them.
package life

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// TestKilledSandboxLeavesNothing compares everything that the server holds of the
// kernel and the disk before and after a sandbox lived.
func TestKilledSandboxLeavesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and a sandbox")
	}
	s := stand.New(t, stand.Options{})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	first := liveOnce(t, s) // what the first sandbox starts for all, such as the worker
	before := settled(t, s)
	second := liveOnce(t, s)
	same(t, s, before)
	for _, line := range look(t, s) {
		if strings.Contains(line, first) || strings.Contains(line, second) {
			t.Errorf("the sandbox is gone and this is left: %s", line)
		}
	}
}

// TestStoppedServerLeavesWhatTheNextOneTakesOver is what docs/operations.md says of
// stopping: the table, its routing and the ready slots stay, so that sandboxes
// would have gone on; no process does, and the next start ends where the first did.
func TestStoppedServerLeavesWhatTheNextOneTakesOver(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and a sandbox")
	}
	s := stand.New(t, stand.Options{})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	liveOnce(t, s)
	before := settled(t, s)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		s.Stop(t, sig)
		for _, line := range settled(t, s) {
			if strings.HasPrefix(line, "process ") && strings.Contains(line, "cordon") {
				t.Errorf("after %v this runs on: %s", sig, line)
			}
		}
		if err := s.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		liveOnce(t, s)
		same(t, s, before)
	}
}

// same waits until the server holds what it held before, and says what differs if
// it never does. Slots are replaced by new ones in the background.
func same(t *testing.T, s *stand.Stand, before []string) {
	t.Helper()
	want := plain(s, before)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		diff := cmp.Diff(want, plain(s, look(t, s)))
		if diff == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind (+) or missing (-):\n%s", diff)
		}
	}
}

// settled looks until nothing changes for a while.
func settled(t *testing.T, s *stand.Stand) []string {
	t.Helper()
	last := look(t, s)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		time.Sleep(500 * time.Millisecond)
		now := look(t, s)
		if slices.Equal(last, now) {
			return now
		}
		last = now
	}
	t.Fatal("what the server holds changes all the time")
	return nil
}

// look lists what the server holds, each thing as a line that begins with its kind.
func look(t *testing.T, s *stand.Stand) []string {
	t.Helper()
	var all []string
	add := func(kind string, lines []string) {
		for _, l := range lines {
			if l = strings.TrimSpace(l); l != "" {
				all = append(all, kind+" "+l)
			}
		}
	}
	for _, ask := range []struct{ kind, script string }{
		{"link", "ip -o link | cut -d' ' -f2"},
		{"route", "ip route show table all; ip -6 route show table all; ip rule; ip -6 rule"},
		{"mount", "cut -d' ' -f2,3 /proc/self/mounts"},
		{"process", `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done 2>/dev/null`},
		{"nft", "nft -s list ruleset"},
		{"reserved ports", "cat /proc/sys/net/ipv4/ip_local_reserved_ports"},
	} {
		out, err := s.Lab.HostCommand(t.Context(), "bash", "-c", ask.script).Output()
		if err != nil {
			t.Fatalf("%s: %v", ask.script, err)
		}
		lines := strings.Split(string(out), "\n")
		if ask.kind == "process" { // the shell that looks
			lines = slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "bash -c") || strings.HasPrefix(l, "tr ") })
		}
		add(ask.kind, lines)
	}
	add("run", tree(t, filepath.Join(s.Dir, "run")))
	add("state", tree(t, filepath.Join(s.Dir, "state")))
	for _, pattern := range []string{"/sys/fs/cgroup/cordon/", "/sys/fs/cgroup/*/cordon/"} {
		roots, err := filepath.Glob(pattern + s.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, root := range roots {
			add("cgroup", folders(tree(t, root)))
		}
	}
	slices.Sort(all)
	return all
}

// tree lists what is below root; folders end in a slash.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case os.IsNotExist(err): // removed while we look
			return nil
		case err != nil:
			return err
		case path == root: // cgroups are made with the first sandbox, and stay
			return nil
		case d.IsDir():
			path += "/"
		}
		out = append(out, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func folders(paths []string) []string {
	return slices.DeleteFunc(paths, func(p string) bool { return !strings.HasSuffix(p, "/") })
}

var (
	address = regexp.MustCompile(`\b10\.223\.\d+\.\d+\b|\bfd[0-9a-f:]+\b|\bfe80::[0-9a-f:]+\b`)
	mac     = regexp.MustCompile(`\b02(:[0-9a-f]{2}){5}\b`)
	ifindex = regexp.MustCompile(`@if\d+`)
	// The log's rate limiter forgets a link a minute after its last denial, and the
	// counter of its flows with the last of them.
	limiter = regexp.MustCompile(`^nft (elements = \{ )?\S+ (limit rate|ct count over)`)
)

// plain makes one slot look like another, and leaves out the events of sandboxes,
// which the store keeps by design.
func plain(s *stand.Stand, lines []string) []string {
	slot := regexp.MustCompile(`\bcd` + s.Name + `-\d+`)
	var out []string
	for _, l := range lines {
		theirs := strings.Contains(l, " dev uplink ") || // the lab's, whose IPv6 address takes a while
			strings.HasPrefix(l, "mount /run/netns/") // ip netns makes those; cordon's are in its run folder
		if strings.HasPrefix(l, "state "+filepath.Join(s.Dir, "state/store")) || limiter.MatchString(l) || theirs {
			continue
		}
		l = strings.NewReplacer("elements = { ", "", " }", "").Replace(l)
		l = strings.TrimRight(l, ", ")
		l = slot.ReplaceAllString(l, "slot")
		l = mac.ReplaceAllString(l, "mac") // first: its end may look like the beginning of an address
		l = address.ReplaceAllString(l, "address")
		out = append(out, ifindex.ReplaceAllString(l, ""))
	}
	slices.Sort(out)
	return out
}

// liveOnce creates a sandbox, uses all it has, and kills it: names, addresses and
// pins, files, a background service with a request to it, a pause and a resumption.
func liveOnce(t *testing.T, s *stand.Stand) (id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	c := s.User(t)
	sandbox, err := c.Create(ctx, client.CreateOptions{Network: client.Network{
		DenyOut: []string{client.AllTraffic}, AllowOut: []string{"example.com", "example.com:8443", "1.1.1.1"},
	}})
	must(t, err)
	run(ctx, t, sandbox, "curl -sS https://example.com && curl -ksS https://1.1.1.1 && curl -ksS https://example.com:8443")
	run(ctx, t, sandbox, "dd if=/dev/zero of=big bs=1M count=20 status=none")
	_, err = sandbox.Commands.Start(ctx, "python -m http.server 3000", client.RunOptions{})
	must(t, err)
	run(ctx, t, sandbox, `for i in $(seq 200); do (: </dev/tcp/127.0.0.1/3000) 2>/dev/null && exit; sleep 0.02; done; exit 1`)
	req, err := sandbox.NewRequest(ctx, http.MethodGet, 3000, "/", nil)
	must(t, err)
	res, err := sandbox.Do(req)
	must(t, err)
	_, err = io.Copy(io.Discard, res.Body)
	must(t, err)
	res.Body.Close()
	must(t, sandbox.Pause(ctx))
	sandbox, err = c.Connect(ctx, sandbox.ID, time.Minute)
	must(t, err)
	run(ctx, t, sandbox, "test -s big")
	must(t, sandbox.SetNetwork(ctx, client.Network{DenyOut: []string{client.AllTraffic}}))
	must(t, sandbox.Kill(ctx))
	return sandbox.ID
}

func run(ctx context.Context, t *testing.T, s *client.Sandbox, command string) {
	t.Helper()
	res, err := s.Commands.Run(ctx, command, client.RunOptions{})
	must(t, err)
	if res.ExitCode != 0 {
		t.Fatalf("%s: %s\n%s", command, res.Status, res.Stderr)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestUninstallRemovesEverything runs cordon uninstall with a sandbox that runs, one that
// is paused and a snapshot.
func TestUninstallRemovesEverything(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	s := stand.New(t, stand.Options{})
	must(t, s.Lab.HostCommand(t.Context(), "sh", "-c", "echo 8080,52100 >/proc/sys/net/ipv4/ip_local_reserved_ports").Run())
	before := look(t, s)
	must(t, s.Start(t.Context()))
	user := s.User(t)
	paused, err := user.Create(t.Context(), client.CreateOptions{Timeout: 10 * time.Minute})
	must(t, err)
	_, err = paused.Snapshot(t.Context(), "")
	must(t, err)
	must(t, paused.Pause(t.Context()))
	_, err = user.Create(t.Context(), client.CreateOptions{Timeout: 10 * time.Minute})
	must(t, err)

	cache := filepath.Join(s.Dir, "cache") // not the machine's, which other tests use
	must(t, os.MkdirAll(filepath.Join(cache, "images"), 0o755))
	uninstall := func(args ...string) (string, error) {
		cmd := s.Command(t.Context(), append([]string{"uninstall"}, args...)...)
		cmd.Env = append(os.Environ(), "CORDON_CACHE_DIR="+cache)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := uninstall("--yes"); err == nil || !strings.Contains(out, "the server "+s.Name+" runs: stop it first") {
		t.Fatalf("with the server running: %v\n%s", err, out)
	}
	other := s.Command(t.Context(), "uninstall", "--yes") // the same folders under another name
	other.Env = append(os.Environ(), "CORDON_CACHE_DIR="+cache, "CORDON_NAME=two")
	if out, err := other.CombinedOutput(); err == nil || !strings.Contains(string(out), "is in use by another cordon server") {
		t.Fatalf("with the folders of a running server: %v\n%s", err, out)
	}
	s.Stop(t, syscall.SIGTERM)
	running := look(t, s)
	if out, err := uninstall(); err != nil || !strings.Contains(out, "Add --yes") {
		t.Fatalf("without --yes: %v\n%s", err, out)
	}
	if now := look(t, s); !slices.Equal(now, running) {
		t.Errorf("without --yes it changed\n%s\nto\n%s", strings.Join(running, "\n"), strings.Join(now, "\n"))
	}
	if out, err := uninstall("--yes", "--keep-data"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, dir := range []string{filepath.Join(s.Dir, "state", "store"), filepath.Join(s.Dir, "state", "snapshots"), filepath.Join(cache, "images")} {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("with --keep-data: %v", err)
		}
	}
	if out, err := uninstall("--yes"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	same(t, s, before)
	for _, dir := range []string{filepath.Join(s.Dir, "state"), filepath.Join(s.Dir, "run")} {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/cordon/", "/sys/fs/cgroup/*/cordon/"} {
		if left, err := filepath.Glob(pattern + s.Name); err != nil || len(left) > 0 {
			t.Errorf("cgroups are left: %v %v", left, err)
		}
	}
}
