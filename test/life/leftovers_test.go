// Package life shows that what sandboxes hold of the machine ends with them.
package life

import (
	"context"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
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

// uninstallScript is the commands of docs/operations.md, without the line that says
// where the server is.
func uninstallScript(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operations.md")
	must(t, err)
	_, section, _ := strings.Cut(string(text), "\n## Uninstall\n")
	_, script, _ := strings.Cut(section, "\n```sh\nname=0 ")
	_, script, found := strings.Cut(script, "\n")
	script, _, closed := strings.Cut(script, "\n```")
	if !found || !closed {
		t.Fatal("docs/operations.md says nothing of how to uninstall")
	}
	return script
}

// TestUninstallRemovesTheCgroups runs the commands that are about cgroups on a tree of
// plain folders: the machine's own is shared with other servers.
func TestUninstallRemovesTheCgroups(t *testing.T) {
	script := uninstallScript(t)
	i := strings.Index(script, "find /sys/fs/cgroup ")
	if i < 0 {
		t.Fatal("docs/operations.md says nothing of cgroups")
	}
	for _, c := range []struct {
		name        string
		before, end []string
	}{
		{"version 2", []string{"cordon/0/spares/i1", "cordon/0/k1", "system.slice"}, []string{"system.slice"}},
		{"version 1", []string{"cpu/cordon/0/k1/i1", "memory/cordon/0/k1/i1", "pids/cordon/0"}, []string{"cpu", "memory", "pids"}},
		{"another server with a longer name", []string{"cordon/0/k1", "cordon/0x/k1/i1"}, []string{"cordon", "cordon/0x", "cordon/0x/k1", "cordon/0x/k1/i1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for _, dir := range c.before {
				must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
			}
			cmd := exec.CommandContext(t.Context(), "bash", "-eu", "-c", strings.ReplaceAll(script[i:], "/sys/fs/cgroup", root))
			cmd.Env = append(os.Environ(), "name=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			var left []string
			must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
				if path != root {
					left = append(left, strings.TrimPrefix(path, root+"/"))
				}
				return err
			}))
			if !slices.Equal(left, c.end) {
				t.Errorf("left: %v, want %v", left, c.end)
			}
		})
	}
}

// TestUninstallRemovesEverything runs the commands of docs/operations.md.
func TestUninstallRemovesEverything(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and a sandbox")
	}
	script := uninstallScript(t)
	s := stand.New(t, stand.Options{})
	must(t, s.Lab.HostCommand(t.Context(), "sh", "-c", "echo 8080,52100 >/proc/sys/net/ipv4/ip_local_reserved_ports").Run())
	before := look(t, s)
	must(t, s.Start(t.Context()))
	liveOnce(t, s)
	s.Stop(t, syscall.SIGTERM)
	cmd := s.Lab.HostCommand(t.Context(), "bash", "-eu", "-c", script)
	cmd.Env = append(os.Environ(), "name="+s.Name, "state="+filepath.Join(s.Dir, "state"), "run="+filepath.Join(s.Dir, "run"), "cache="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	same(t, s, before)
}
