package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	bootfilter "gvisor.dev/gvisor/runsc/boot/filter"
	goferfilter "gvisor.dev/gvisor/runsc/fsgofer/filter"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/runtime/gvisor/filters"
	"github.com/cordonhq/cordon/internal/runtime/runtimetest"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// started is a running sandbox that answers.
func started(t *testing.T, r *Runtime, s sandbox.RuntimeSpec, slot *runtimetest.Slot) {
	t.Helper()
	t.Cleanup(func() {
		if err := r.Destroy(context.Background(), s.ID); err != nil {
			t.Errorf("destroy: %v", err)
		}
	})
	must(t, r.Create(t.Context(), s))
	must(t, r.Start(t.Context(), s.ID))
	if _, err := slot.Ask(t.Context(), "hello"); err != nil {
		t.Fatal(err)
	}
}

func TestTheVersionIsTheOneInGoMod(t *testing.T) {
	b, err := os.ReadFile("../../../go.mod")
	must(t, err)
	m := regexp.MustCompile(regexp.QuoteMeta(module) + ` (v\S+)`).FindSubmatch(b)
	if m == nil || string(m[1]) != pinned {
		t.Errorf("go.mod has %q, dispatch.go %q: change it and run go generate", m, pinned)
	}
}

// The keys say which configuration a filter is for; that the processes of a
// sandbox ask for these keys is TestNoFilterIsCompiledAtStart's.
func TestPrecompiledFiltersAreFound(t *testing.T) {
	filters.RegisterSentry()
	filters.RegisterGofer()
	opt, err := filters.SentryOptions()
	must(t, err)
	for name, find := range map[string]func() (precompiledseccomp.Program, bool){
		"sentry": func() (precompiledseccomp.Program, bool) { return bootfilter.GetPrecompiled(opt.ConfigKey()) },
		"gofer": func() (precompiledseccomp.Program, bool) {
			return goferfilter.GetPrecompiled(filters.GoferOptions().ConfigKey())
		},
	} {
		if p, ok := find(); !ok || len(p.Bytecode32) < 100 {
			t.Errorf("%s: found %v, %d words: run go generate", name, ok, len(p.Bytecode32))
		}
	}
}

// A filter that no longer fits its gVisor would be a hole or a crash.
func TestCommittedFiltersAreWhatTheGeneratorMakes(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "run", "./gen", dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("generate: %v\n%s", err, out)
	}
	made, err := filepath.Glob(filepath.Join(dir, "*.go"))
	must(t, err)
	if len(made) != 1 {
		t.Fatalf("generated %q", made)
	}
	want, err := os.ReadFile(made[0])
	must(t, err)
	got, err := os.ReadFile(filepath.Join("filters", filepath.Base(made[0])))
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs: run go generate ./internal/runtime/gvisor/...", filepath.Base(made[0]))
	}
}

func TestNoFilterIsCompiledAtStart(t *testing.T) {
	cfg := testConfig(t)
	cfg.Debug, cfg.LogDir = true, t.TempDir()
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	logs, err := filepath.Glob(filepath.Join(cfg.LogDir, string(s.ID), "*"))
	must(t, err)
	var loaded int
	for _, path := range logs {
		b, err := os.ReadFile(path)
		must(t, err)
		if i := bytes.Index(b, []byte("No precompiled program found")); i >= 0 {
			t.Errorf("%s: %s", filepath.Base(path), b[i:min(i+500, len(b))])
		}
		loaded += bytes.Count(b, []byte("Loaded precompiled seccomp instructions"))
	}
	if loaded != 2 {
		t.Errorf("%d programs loaded (from %d logs), want the sentry's and the gofer's", loaded, len(logs))
	}
}

// TestNothingOfTheServerReachesASandbox looks at the host's side of a sandbox:
// its processes hold no file, no environment and no standard file of the server.
func TestNothingOfTheServerReachesASandbox(t *testing.T) {
	const secret = "CORDON_SECRET=do-not-leak"
	t.Setenv("CORDON_SECRET", "do-not-leak")
	canary := filepath.Join(t.TempDir(), "canary")
	fd, err := unix.Open(canary, unix.O_CREAT|unix.O_RDWR, 0o600) // without O_CLOEXEC
	must(t, err)
	defer unix.Close(fd)

	r, slot := open(t, testConfig(t)), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	own, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	pids := r.groups.pids(s.ID)
	if len(pids) < 2 {
		t.Fatalf("%d processes, want a sentry and a gofer at least", len(pids))
	}
	for _, pid := range pids {
		proc := fmt.Sprintf("/proc/%d", pid)
		env, err := os.ReadFile(proc + "/environ")
		must(t, err)
		if bytes.Contains(env, []byte(secret)) {
			t.Errorf("process %d has the server's environment", pid)
		}
		fds, err := filepath.Glob(proc + "/fd/*")
		must(t, err)
		for _, fd := range fds {
			name, _ := os.Readlink(fd)
			if name == canary {
				t.Errorf("process %d has the server's file", pid)
			}
			if n := filepath.Base(fd); len(n) == 1 && n < "3" && name != "/dev/null" && name != "/null" {
				t.Errorf("process %d has %s as standard file %s", pid, name, n)
			}
		}
		if ns, _ := os.Readlink(proc + "/ns/net"); ns == own || ns == "" {
			t.Errorf("process %d is in network namespace %q, the server's is %q", pid, ns, own)
		}
		status, err := os.ReadFile(proc + "/status")
		must(t, err)
		limits, err := os.ReadFile(proc + "/limits")
		must(t, err)
		if !regexp.MustCompile(`Max core file size +0 +0 `).Match(limits) {
			t.Errorf("process %d may dump core: %s", pid, limits)
		}
		mounts, err := os.ReadFile(proc + "/mountinfo")
		must(t, err)
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); !strings.HasPrefix(f[5], "ro") {
				t.Errorf("process %d could write to %q", pid, line)
			}
		}
		if !bytes.Contains(status, []byte("\nSeccomp:\t2\n")) {
			t.Errorf("process %d has no seccomp filter", pid)
		}
		if link("/proc/self/ns/user") == link(proc+"/ns/user") {
			t.Errorf("process %d is in the server's user namespace", pid)
		}
		if sid, err := unix.Getsid(pid); err == nil {
			if mine, _ := unix.Getsid(0); sid == mine {
				t.Errorf("process %d is in the server's session", pid)
			}
		}
	}
}

func link(path string) string {
	s, _ := os.Readlink(path)
	return s
}

// TestTheHostIsInvisibleInside reads every file of /proc, /sys and /dev inside.
func TestTheHostIsInvisibleInside(t *testing.T) {
	cfg := testConfig(t)
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	rootfs := runtimetest.Rootfs(t)
	s := spec(rootfs, slot)
	started(t, r, s, slot)
	var uts unix.Utsname
	must(t, unix.Uname(&uts))
	secrets := map[string]string{
		"the host's kernel":      unix.ByteSliceToString(uts.Release[:]),
		"the state's folder":     cfg.StateDir,
		"the data's folder":      cfg.DataDir,
		"the image's folder":     rootfs,
		"the cgroup":             cfg.CgroupParent,
		"the namespace's folder": slot.NetNS,
	} // the sandbox knows its own ID, also from /proc/self/cgroup
	for _, root := range []string{"/proc", "/sys"} {
		text, err := slot.Ask(t.Context(), "walk", root)
		must(t, err)
		if len(text) < 100 {
			t.Errorf("%s: only %d bytes to read", root, len(text))
		}
		for what, secret := range secrets {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s shows %s: %q", root, what, text[max(0, i-200):min(len(text), i+100)])
			}
		}
	}
	name, err := slot.Ask(t.Context(), "cat", "/proc/sys/kernel/hostname")
	if err == nil && strings.TrimSpace(name) != s.Hostname {
		t.Errorf("host name: %q", name)
	}
	devices, err := slot.Ask(t.Context(), "ls", "/dev")
	must(t, err)
	for _, d := range []string{"kvm", "sda", "vda", "nvme0n1", "mem", "kmsg"} {
		if slices.Contains(strings.Split(devices, "\n"), d) {
			t.Errorf("/dev has the host's %s", d)
		}
	}
}

// TestRootInsideIsNotRootOfTheHost tries what a root of the host could.
func TestRootInsideIsNotRootOfTheHost(t *testing.T) {
	r, slot := open(t, testConfig(t)), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	for _, c := range [][]string{
		{"rawsocket"}, {"write", "/proc/sys/kernel/core_pattern", "|/x"},
		{"write", "/proc/sysrq-trigger", "b"}, {"write", "/sys/kernel/uevent_helper", "/x"}, {"ls", "/proc/1/root/../../../../host"},
	} {
		if out, err := slot.Ask(t.Context(), c[0], c[1:]...); err == nil {
			t.Errorf("%q succeeded: %q", c, out)
		}
	}
	// A mount is the sandbox's own.
	if out, err := slot.Ask(t.Context(), "mount", "/home"); err != nil {
		t.Errorf("mount: %q, %v", out, err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(b), " / /home ") {
		t.Error("a mount inside shows on the host")
	}
	// A block device made inside is a name, not the host's disk.
	if _, err := slot.Ask(t.Context(), "mknod", "/home/disk", "8", "0"); err == nil {
		if out, err := slot.Ask(t.Context(), "cat", "/home/disk"); err == nil {
			t.Errorf("read %d bytes from a block device", len(out))
		}
	}
	// What a process sees as its own program is the image's file.
	if out, err := slot.Ask(t.Context(), "ls", "/proc/1/map_files"); err == nil {
		t.Errorf("map_files: %q", out)
	}
}

// TestSandboxesOutliveTheServer starts a sandbox from a process that is then
// killed, and adopts it.
func TestSandboxesOutliveTheServer(t *testing.T) {
	const key = "CORDON_TEST_SERVER"
	if args := os.Getenv(key); args != "" {
		f := strings.Split(args, "|")
		r, err := New(Config{StateDir: f[0], DataDir: f[1], CgroupParent: f[2]})
		must(t, err)
		s := spec(f[3], nil)
		s.NetNS, s.ID = f[4], sandbox.ID(f[5])
		must(t, r.Create(t.Context(), s))
		must(t, r.Start(t.Context(), s.ID))
		must(t, unix.Kill(os.Getpid(), unix.SIGKILL))
	}
	cfg := testConfig(t)
	rootfs, slot, id := runtimetest.Rootfs(t), runtimetest.NewSlot(t, 1), sandboxid.New()
	server := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestSandboxesOutliveTheServer$")
	server.Args[0] = os.Args[0]
	server.Env = append(os.Environ(), key+"="+strings.Join([]string{cfg.StateDir, cfg.DataDir, cfg.CgroupParent, rootfs, slot.NetNS, string(id)}, "|"))
	out, err := server.CombinedOutput()
	if ws, ok := server.ProcessState.Sys().(interface{ Signal() unix.Signal }); !ok || ws.Signal() != unix.SIGKILL {
		t.Fatalf("the server ended by %v\n%s", err, out)
	}
	r := open(t, cfg)
	if _, err := slot.Ask(t.Context(), "hello"); err != nil {
		t.Fatalf("after the server's end: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Wait(ctx, id); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	must(t, r.Destroy(t.Context(), id))
	clean(t, r, cfg, id)
}

// clean fails when anything of a sandbox is left on the host.
func clean(t *testing.T, r *Runtime, cfg Config, id sandbox.ID) {
	t.Helper()
	for _, m := range r.groups.mounts {
		for _, pattern := range []string{"*", "*/" + string(id)} { // groups without sandboxes go, too
			left, err := filepath.Glob(filepath.Join(m, cfg.CgroupParent, pattern))
			must(t, err)
			for _, dir := range left {
				inside, _ := filepath.Glob(filepath.Join(dir, "i*")) // other sandboxes of the test
				if fi, err := os.Stat(dir); err == nil && fi.IsDir() && len(inside) == 0 {
					t.Errorf("left the cgroup %s", dir)
				}
			}
		}
	}
	for _, dir := range []string{cfg.StateDir, cfg.DataDir} {
		must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if strings.Contains(path, string(id)) {
				t.Errorf("left the file %s", path)
			}
			return err
		}))
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(b), string(id)) {
		t.Error("left a mount")
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, path := range cmdlines {
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(id)) && !strings.HasPrefix(path, fmt.Sprintf("/proc/%d/", os.Getpid())) {
			t.Errorf("left the process %s: %q", path, b)
		}
	}
}

func TestDestroyLeavesNothing(t *testing.T) {
	cfg := testConfig(t)
	rootfs := runtimetest.Rootfs(t)
	r := open(t, cfg)
	state := func(id sandbox.ID) string {
		return filepath.Join(r.root(), string(id)+"_sandbox:"+string(id)+".state")
	}
	for name, damage := range map[string]func(*testing.T, sandbox.ID){
		"a running sandbox":                  func(*testing.T, sandbox.ID) {},
		"a sandbox whose state file is lost": func(t *testing.T, id sandbox.ID) { must(t, os.Remove(state(id))) },
		"a sandbox whose state file is cut":  func(t *testing.T, id sandbox.ID) { must(t, os.Truncate(state(id), 10)) },
		"a sandbox whose bundle is lost":     func(t *testing.T, id sandbox.ID) { must(t, os.RemoveAll(r.bundle(id))) },
		"a sandbox whose sentry was killed": func(t *testing.T, id sandbox.ID) {
			pid, err := r.sentry(id)
			must(t, err)
			must(t, unix.Kill(pid, unix.SIGKILL))
		},
		"a sandbox whose sentry hangs": func(t *testing.T, id sandbox.ID) {
			pid, err := r.sentry(id)
			must(t, err)
			must(t, unix.Kill(pid, unix.SIGSTOP))
		},
		"a paused sandbox": func(t *testing.T, id sandbox.ID) { must(t, r.Pause(t.Context(), id)) },
		"a sandbox that is looked at all the time": func(t *testing.T, id sandbox.ID) {
			for range 4 {
				go func() {
					for {
						if _, err := r.sentry(id); errs.KindOf(err) == errs.NotFound {
							return
						}
					}
				}()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			slot := runtimetest.NewSlot(t, 1)
			s := spec(rootfs, slot)
			started(t, r, s, slot)
			damage(t, s.ID)
			must(t, r.Destroy(t.Context(), s.ID))
			clean(t, r, cfg, s.ID)
		})
	}
	t.Run("a sandbox that was never started", func(t *testing.T) {
		slot := runtimetest.NewSlot(t, 1)
		s := spec(rootfs, slot)
		must(t, r.Create(t.Context(), s))
		must(t, r.Destroy(t.Context(), s.ID))
		clean(t, r, cfg, s.ID)
	})
}

// TestAHangingStepDoesNotKeepDestroyWaiting stops the sentry, so that a pause
// never gets an answer.
func TestAHangingStepDoesNotKeepDestroyWaiting(t *testing.T) {
	cfg := testConfig(t)
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	pid, err := r.sentry(s.ID)
	must(t, err)
	must(t, unix.Kill(pid, unix.SIGSTOP))
	paused := make(chan error, 1)
	go func() { paused <- r.Pause(t.Context(), s.ID) }()
	time.Sleep(100 * time.Millisecond)
	begin := time.Now()
	must(t, r.Destroy(t.Context(), s.ID))
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("destroy took %v", took)
	}
	if err := <-paused; err == nil {
		t.Error("paused a sandbox that hangs")
	}
	clean(t, r, cfg, s.ID)
}

// TestAStrangersProcessIsLeftAlone plays a host where the sentry's process ID
// was given to somebody else while the server was away.
func TestAStrangersProcessIsLeftAlone(t *testing.T) {
	cfg := testConfig(t)
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	pid, err := r.sentry(s.ID)
	must(t, err)
	stranger := exec.Command("sleep", "60")
	must(t, stranger.Start())
	defer func() { _ = stranger.Process.Kill(); _ = stranger.Wait() }()
	path := filepath.Join(r.root(), string(s.ID)+"_sandbox:"+string(s.ID)+".state")
	b, err := os.ReadFile(path)
	must(t, err)
	old, wrong := fmt.Sprintf(`"pid":%d`, pid), fmt.Sprintf(`"pid":%d`, stranger.Process.Pid)
	if !strings.Contains(string(b), old) {
		t.Fatalf("no %s in the state", old)
	}
	must(t, os.WriteFile(path, []byte(strings.Replace(string(b), old, wrong, 1)), 0o600))
	must(t, r.Wait(t.Context(), s.ID)) // it has ended, as far as anybody can know
	must(t, r.Destroy(t.Context(), s.ID))
	if err := stranger.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the stranger is gone: %v", err)
	}
	clean(t, r, cfg, s.ID)
}

// TestManyUsersDoNotMakeManyProcesses tries to get around the limit of processes,
// which on Linux is per user. If that worked, the host's limit of threads must hold.
func TestManyUsersDoNotMakeManyProcesses(t *testing.T) {
	cfg := testConfig(t)
	r := open(t, cfg)
	rootfs, slot, other := runtimetest.Rootfs(t), runtimetest.NewSlot(t, 1), runtimetest.NewSlot(t, 2)
	s, neighbour := spec(rootfs, slot), spec(rootfs, other)
	s.Resources.Processes, s.Resources.MemoryMB = 16, 1024
	started(t, r, s, slot)
	started(t, r, neighbour, other)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	out, err := slot.Ask(ctx, "crowd", "100", "4")
	t.Logf("started %s processes, %v; %d threads on the host, limit %d", out, err, len(threadIDs(r, s.ID)), threads(s.Resources))
	if n := len(threadIDs(r, s.ID)); n > int(threads(s.Resources)) {
		t.Errorf("%d threads on the host, with a limit of %d", n, threads(s.Resources))
	}
	if _, err := other.Ask(t.Context(), "hello"); err != nil {
		t.Errorf("the neighbour: %v", err)
	}
	must(t, r.Destroy(t.Context(), s.ID))
	clean(t, r, cfg, s.ID)
}

// TestBoundDirectoriesShareTheDisk fills every layer there is.
func TestBoundDirectoriesShareTheDisk(t *testing.T) {
	r, slot := open(t, testConfig(t)), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o644))
	s.Binds = []sandbox.Bind{{Host: t.TempDir(), Guest: "/one"}, {Host: t.TempDir(), Guest: "/two"}, {Host: file, Guest: "/etc/file"}}
	started(t, r, s, slot)
	for _, path := range []string{"/one/x", "/two/x", "/home/x", "/etc/file"} {
		if out, err := slot.Ask(t.Context(), "fill", path, "100"); err == nil {
			t.Errorf("%s took %s MiB", path, out)
		}
	}
	st, err := r.Stats(t.Context(), s.ID)
	must(t, err)
	if most := (s.Resources.DiskMB + 2) << 20; st.DiskBytes > most || st.DiskBytes < most*3/4 {
		t.Errorf("%d MiB in use, want %d", st.DiskBytes>>20, s.Resources.DiskMB)
	}
}

func TestLastWordsAreNotLinesOfALog(t *testing.T) {
	const info = "I1201 14:29:26.886697       1 rate_limited.go:36] A process tried what it may not\n"
	const crash = "panic: runtime error: index out of range\n\ngoroutine 1 [running]:\nmain.main()\n"
	for name, c := range map[string]struct{ said, want string }{
		"nothing":                  {"", ""},
		"a line":                   {info, ""},
		"many lines":               {strings.Repeat(info, 1000), ""},
		"a crash":                  {crash, strings.ReplaceAll(crash, "\n\n", "\n")},
		"a crash after many lines": {strings.Repeat(info, 1000) + crash, strings.ReplaceAll(crash, "\n\n", "\n")},
		"a fatal error":            {info + "fatal error: all goroutines are asleep\n", "fatal error: all goroutines are asleep\n"},
	} {
		if got := lastWords([]byte(c.said)); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if got := lastWords(bytes.Repeat([]byte("goroutine\n"), panicText)); len(got) != panicText {
		t.Errorf("%d octets of a long one, want %d", len(got), panicText)
	}
}

// TestASentrysLastWordsAreLogged puts the words where the sentry has its own, in the
// folder that it was started with.
func TestASentrysLastWordsAreLogged(t *testing.T) {
	cfg := testConfig(t)
	var log bytes.Buffer
	cfg.Log, cfg.LogDir = slog.New(slog.NewTextHandler(&log, nil)), t.TempDir()
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	files, err := filepath.Glob(filepath.Join(r.logDir(s.ID), "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("the sentry has no file for its last words: %v", err)
	}
	words := strings.Repeat("I1201 14:29:26.886697       1 x.go:1] a line\n", 1000) +
		"panic: out of ideas\n\ngoroutine 1 [running]:\n" + strings.Repeat("main.main()\n", 10*panicText)
	must(t, os.WriteFile(files[0], []byte(words), 0o600))
	must(t, r.Destroy(t.Context(), s.ID))
	if got := log.String(); !strings.Contains(got, "sentry panicked") || !strings.Contains(got, "goroutine") || len(got) > 4*panicText {
		t.Errorf("log of %d bytes: %.300s", len(got), got)
	}
	if left, _ := filepath.Glob(filepath.Join(cfg.LogDir, "*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

func TestRunCLIIsGVisorsOwnCommandLine(t *testing.T) {
	const key = "CORDON_TEST_CLI"
	if dir := os.Getenv(key); dir != "" {
		t.Fatal(RunCLI(dir, []string{"list", "-quiet"}, nil))
	}
	cfg := testConfig(t)
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestRunCLIIsGVisorsOwnCommandLine$")
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), key+"="+cfg.StateDir)
	if out, err := cmd.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != string(s.ID) {
		t.Errorf("runsc list says %q, %v; want %s", out, err, s.ID)
	}
}

// TestACheckpointThatIsNotOneLeavesNothing restores what was cut short, and what
// another version made.
func TestACheckpointThatIsNotOneLeavesNothing(t *testing.T) {
	cfg := testConfig(t)
	r, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, r, s, slot)
	for name, c := range map[string]struct {
		damage func(dir string) error
		want   errs.Kind
	}{
		"memory cut short": {func(dir string) error { return os.Truncate(filepath.Join(dir, "pages.img"), 4096) }, errs.Internal},
		"state cut short":  {func(dir string) error { return os.Truncate(filepath.Join(dir, "checkpoint.img"), 100) }, errs.Internal},
		"another version": {func(dir string) error {
			return writeJSON(filepath.Join(dir, metaFile), checkpointMeta{Runtime: "gvisor/v0.0.0-20200101000000-000000000000"})
		}, errs.Conflict},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "image")
			must(t, r.Checkpoint(t.Context(), s.ID, dir))
			must(t, c.damage(dir))
			next := runtimetest.NewSlot(t, 2)
			clone := spec(s.Rootfs, next)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := r.Restore(ctx, clone, dir); err == nil || errs.KindOf(err) != c.want {
				t.Errorf("got %v, want %v", err, c.want)
			}
			clean(t, r, cfg, clone.ID)
		})
	}
}

// TestTheServerLosesNothingToSandboxes counts what is left in this process.
func TestTheServerLosesNothingToSandboxes(t *testing.T) {
	r := open(t, testConfig(t))
	rootfs, slot := runtimetest.Rootfs(t), runtimetest.NewSlot(t, 1)
	cycle := func() {
		slot.Rearm(t)
		s := spec(rootfs, slot)
		must(t, r.Create(t.Context(), s))
		must(t, r.Start(t.Context(), s.ID))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_ = r.Wait(ctx, s.ID)
		cancel()
		must(t, r.Pause(t.Context(), s.ID))
		must(t, r.Resume(t.Context(), s.ID))
		must(t, r.Destroy(t.Context(), s.ID))
	}
	count := func() (files, goroutines int) {
		r.workers.refill() // the one that waits may have been taken for a pause
		fds, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(fds), runtime.NumGoroutine()
	}
	// As init in a container, it inherits the sandboxes' processes.
	must(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
	defer func() { must(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)) }()
	cycle()
	files, goroutines := count()
	for range 3 {
		cycle()
	}
	slot.Rearm(t)
	s := spec(rootfs, slot)
	must(t, r.Create(t.Context(), s))
	must(t, r.Start(t.Context(), s.ID))
	_, err := slot.Ask(t.Context(), "exit", "0") // and one ends by itself
	must(t, err)
	must(t, r.Wait(t.Context(), s.ID))
	must(t, r.Destroy(t.Context(), s.ID))
	if f, g := count(); f > files || g > goroutines {
		t.Errorf("after three sandboxes %d files and %d goroutines, before %d and %d", f, g, files, goroutines)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
	must(t, err)
	if n := len(strings.Fields(string(children))); n > 1 { // the waiting worker
		out, _ := exec.Command("ps", "--ppid", fmt.Sprint(os.Getpid()), "-o", "pid,stat,args").Output()
		t.Errorf("%d children left:\n%s", n, out)
	}
}

// TestAnUpgradeKeepsVersionsApart plays a server with another gVisor than the one
// that a sandbox runs on.
func TestAnUpgradeKeepsVersionsApart(t *testing.T) {
	r, slot := open(t, testConfig(t)), runtimetest.NewSlot(t, 1)
	rootfs := runtimetest.Rootfs(t)
	s := spec(rootfs, slot)
	started(t, r, s, slot)
	waiting := spec(rootfs, nil)
	must(t, r.Create(t.Context(), waiting))
	old := r.name
	r.name = "gvisor/v9"
	dir := filepath.Join(t.TempDir(), "image")
	must(t, r.Checkpoint(t.Context(), s.ID, dir)) // still works, and says who wrote it
	if err := r.Restore(t.Context(), spec(rootfs, nil), dir); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), old) {
		t.Errorf("restore: %v", err)
	}
	if err := r.Start(t.Context(), waiting.ID); !errs.Is(err, errs.Conflict) {
		t.Errorf("start: %v", err)
	}
	must(t, r.Destroy(t.Context(), waiting.ID))
}
