package gvisor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/runtime/runtimetest"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

const owner = "k0123456789abcdef"

func TestAnOwnersGroupHasANameThatIsNoOthers(t *testing.T) {
	names := map[string]string{}
	for _, o := range []string{"", owner, "spares", "../../x", "i0123456789abcdefghij", "k0123456789ABCDEF", "xe3b0c44298fc1c14", ".", "a/b"} {
		name := groupOf(o)
		if strings.ContainsAny(name, "/.") || sandbox.ID(name).Valid() || name == "" {
			t.Errorf("owner %q has the group %q", o, name)
		}
		if before, taken := names[name]; taken {
			t.Errorf("owners %q and %q have the same group %q", before, o, name)
		}
		names[name] = o
	}
}

// fakeTree is a hierarchy of files that takes what is written to it, and says which files
// a new cgroup has.
func fakeTree(t *testing.T, unified bool, files map[string]string) cgroups {
	t.Helper()
	root := t.TempDir()
	fill := func(dir string) error {
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				return err
			}
		}
		return nil
	}
	must(t, fill(root))
	return cgroups{unified: unified, mounts: []string{root}, parent: "/cordon/test", places: newPlaces(), mkdir: func(dir string) error {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		return fill(dir)
	}}
}

func read(t *testing.T, g cgroups, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(append([]string{g.mounts[0], g.parent}, path...)...))
	must(t, err)
	return string(b)
}

func TestGroupsOfVersion2HandTheirControllersOnAndWeighTheSame(t *testing.T) {
	g := fakeTree(t, true, map[string]string{
		"cgroup.subtree_control": "", "cpu.weight": "", "io.weight": "", "memory.max": "max", "pids.max": "max",
		"memory.current": "700", "memory.stat": "anon 1\ninactive_file 200\n", "pids.current": "3\n",
	})
	must(t, g.limitAll(sandbox.Use{Memory: 1 << 30, Threads: 1000}))
	id := sandboxid.New()
	must(t, g.enter(id, owner))
	must(t, g.limit(groupOf(owner), sandbox.Use{Memory: 1 << 20}))
	for path, want := range map[string]string{
		"memory.max": "1073741824", "pids.max": "1000", "cpu.weight": "100", "io.weight": "default 100",
		owner + "/cpu.weight": "100", owner + "/io.weight": "default 100", owner + "/memory.max": "1048576", owner + "/pids.max": "max",
		owner + "/cgroup.subtree_control": "+io", "cgroup.subtree_control": "+io", // the last that was written
		"../cgroup.subtree_control": "+io", "../../cgroup.subtree_control": "+io",
	} {
		if got := read(t, g, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if u, err := g.use(groupOf(owner)); err != nil || u != (sandbox.Use{Memory: 500, Threads: 3}) {
		t.Errorf("the owner holds %+v, %v", u, err)
	}
	if got, want := g.path(id, owner), "/cordon/test/"+owner+"/"+string(id); got != want || !slices.Equal(g.paths(id), []string{want}) {
		t.Errorf("the sandbox is made in %s and looked for in %s, want %s", got, g.paths(id), want)
	}
}

func TestAGroupOfVersion1HasCPUsAndLimitsWhatIsBelow(t *testing.T) {
	g := fakeTree(t, false, map[string]string{
		"cpu.shares": "", "cpuset.cpus": "0-1", "cpuset.mems": "0", "memory.use_hierarchy": "0", "memory.limit_in_bytes": "9",
	})
	must(t, g.enter(sandboxid.New(), ""))
	must(t, g.limit(spareGroup, sandbox.Use{Memory: 4096, Threads: 5}))
	for path, want := range map[string]string{
		"spares/cpu.shares": "1024", "spares/cpuset.cpus": "0-1", "spares/cpuset.mems": "0",
		"spares/memory.use_hierarchy": "1", "spares/memory.limit_in_bytes": "4096",
	} {
		if got := read(t, g, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestASandboxThatMovesKeepsItsLimits(t *testing.T) {
	files := map[string]string{"cpu.max": "max", "memory.max": "max", "memory.swap.max": "max", "pids.max": "max"}
	g := fakeTree(t, true, files)
	src, dst := filepath.Join(g.mounts[0], "src"), filepath.Join(g.mounts[0], "dst")
	must(t, g.makeDir(src))
	must(t, g.makeDir(dst))
	limits := map[string]string{"cpu.max": "200000 100000", "memory.max": "1234", "memory.swap.max": "0", "pids.max": "99"}
	for name, text := range limits {
		must(t, os.WriteFile(filepath.Join(src, name), []byte(text+"\n"), 0o600))
	}
	must(t, copyLimits(src, dst))
	for name, want := range limits {
		b, err := os.ReadFile(filepath.Join(dst, name))
		must(t, err)
		if string(b) != want {
			t.Errorf("%s is %q, want %q", name, b, want)
		}
	}
}

// TestNoSandboxSwaps looks at the files of a machine without swap, and of a server that
// finds sandboxes which an earlier one left without that limit.
func TestNoSandboxSwaps(t *testing.T) {
	for _, c := range []struct {
		name    string
		unified bool
		files   map[string]string
		want    map[string]string
	}{
		{"version 2", true, map[string]string{"memory.max": "max", noSwap: "max"}, map[string]string{"memory.max": "4096", noSwap: "0"}},
		{"version 2 that does not count swap", true, map[string]string{"memory.max": "max"}, map[string]string{"memory.max": "4096"}},
		{"version 1", false, map[string]string{"memory.limit_in_bytes": "1", "memory.memsw.limit_in_bytes": "1"},
			map[string]string{"memory.limit_in_bytes": "4096", "memory.memsw.limit_in_bytes": "4096"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := fakeTree(t, c.unified, c.files)
			id := sandboxid.New()
			must(t, g.enter(id, ""))
			must(t, g.makeDir(g.dirs(id)[0]))
			must(t, g.limitMemory(id, 4096))
			for name, want := range c.want {
				if got := read(t, g, spareGroup, string(id), name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestSandboxesOfAnEarlierServerAreDeniedSwap(t *testing.T) {
	g := fakeTree(t, true, map[string]string{"memory.max": "max", noSwap: "max"})
	id, older := sandboxid.New(), sandboxid.New()
	must(t, g.enter(id, "an owner"))
	must(t, g.makeDir(g.dirs(id)[0]))
	must(t, g.makeDir(filepath.Join(g.mounts[0], g.parent, string(older)))) // where earlier versions had them
	must(t, g.denySwap())
	for path, want := range map[string]string{
		filepath.Join(groupOf("an owner"), string(id), noSwap): "0", filepath.Join(string(older), noSwap): "0",
		filepath.Join(groupOf("an owner"), noSwap): "max",
	} {
		if got := read(t, g, path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
}

// version2 is the machine's hierarchy of version 2, maybe without controllers.
func version2(t *testing.T) cgroups {
	t.Helper()
	runtimetest.Privileged(t)
	root := t.TempDir()
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		t.Skipf("this kernel mounts no cgroups of version 2: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(root, unix.MNT_DETACH)) })
	g := cgroups{unified: true, mounts: []string{root}, parent: "/cordontest-" + strings.ToLower(string(sandboxid.New())) + "/runtime", places: newPlaces(), mkdir: makeCgroup}
	t.Cleanup(func() {
		_ = unix.Rmdir(filepath.Join(root, g.parent))
		must(t, unix.Rmdir(filepath.Join(root, filepath.Dir(g.parent))))
	})
	return g
}

func TestASandboxMovesInAHierarchyOfVersion2(t *testing.T) {
	g := version2(t)
	id := sandboxid.New()
	must(t, g.enter(id, ""))
	must(t, g.makeDir(g.dirs(id)[0]))
	cmd := exec.CommandContext(t.Context(), "sleep", "60")
	must(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	pid := cmd.Process.Pid
	must(t, writeExisting(filepath.Join(g.dirs(id)[0], "cgroup.procs"), strconv.Itoa(pid)))
	for range 2 {
		must(t, g.move(t.Context(), id, owner))
		if at := g.groupsOf(id); !slices.Equal(at, []string{owner}) || !g.holds(id, pid) || !slices.Equal(g.pids(id), []int{pid}) {
			t.Fatalf("after the move the sandbox is in %q with the processes %v", at, g.pids(id))
		}
	}
	if _, err := os.Stat(filepath.Join(g.mounts[0], g.parent, spareGroup)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the empty group of spares is left: %v", err)
	}
	g.places = newPlaces() // another server's
	if at := g.groupsOf(id); !slices.Equal(at, []string{owner}) {
		t.Errorf("another server finds the sandbox in %q", at)
	}
	must(t, g.remove(t.Context(), id))
	if _, err := os.Stat(filepath.Join(g.mounts[0], g.parent, owner)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the owner's empty group is left: %v", err)
	}
}

// TestAProcessIsFoundWhileItMoves looks for a sandbox's process all the time while the
// sandbox goes back and forth between owners: a look that misses it would be taken for
// the sandbox's end.
func TestAProcessIsFoundWhileItMoves(t *testing.T) {
	g := version2(t)
	id := sandboxid.New()
	must(t, g.enter(id, ""))
	must(t, g.makeDir(g.dirs(id)[0]))
	cmd := exec.CommandContext(t.Context(), "sleep", "60")
	must(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	pid := cmd.Process.Pid
	must(t, writeExisting(filepath.Join(g.dirs(id)[0], "cgroup.procs"), strconv.Itoa(pid)))
	stop := make(chan struct{})
	var looks sync.WaitGroup
	var missed, looked atomic.Int64
	for range 2 {
		looks.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				looked.Add(1)
				if !g.holds(id, pid) {
					missed.Add(1)
				}
			}
		})
	}
	for i := range 100 {
		must(t, g.move(t.Context(), id, []string{owner, ""}[i%2]))
	}
	close(stop)
	looks.Wait()
	if missed.Load() > 0 {
		t.Errorf("%d of %d looks missed a process that was there", missed.Load(), looked.Load())
	}
	must(t, g.remove(t.Context(), id))
}

// TestASandboxOfTheFormerLayoutIsAdopted puts a sandbox where earlier versions had all.
func TestASandboxOfTheFormerLayoutIsAdopted(t *testing.T) {
	cfg := testConfig(t)
	first, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, first, s, slot)
	for _, m := range first.groups.mounts {
		src, dst := filepath.Join(m, first.groups.path(s.ID, "")), filepath.Join(m, cfg.CgroupParent, string(s.ID))
		if _, err := os.Stat(src); err != nil {
			continue
		}
		must(t, first.groups.makeDir(dst))
		must(t, copyLimits(src, dst))
		must(t, moveAll(t.Context(), src, dst))
		must(t, unix.Rmdir(filepath.Dir(src)))
	}
	r := open(t, cfg)
	if _, err := r.Stats(t.Context(), s.ID); err != nil {
		t.Errorf("before it is assigned: %v", err)
	}
	must(t, r.Assign(t.Context(), s.ID, owner))
	if at := r.groups.groupsOf(s.ID); !slices.Equal(at, []string{owner}) {
		t.Errorf("the sandbox is in %q", at)
	}
	hello, err := slot.Ask(t.Context(), "hello")
	if err != nil || hello != "hello" {
		t.Errorf("the sandbox says %q, %v", hello, err)
	}
	must(t, r.Destroy(t.Context(), s.ID))
	clean(t, r, cfg, s.ID)
}

// TestAMoveThatWasBrokenOffIsFinished has processes in both groups, as after the server
// was killed.
func TestAMoveThatWasBrokenOffIsFinished(t *testing.T) {
	cfg := testConfig(t)
	first, slot := open(t, cfg), runtimetest.NewSlot(t, 1)
	s := spec(runtimetest.Rootfs(t), slot)
	started(t, first, s, slot)
	g := first.groups
	must(t, g.enter(s.ID, owner))
	m := g.mounts[0]
	must(t, g.makeDir(filepath.Join(m, g.path(s.ID, owner))))
	must(t, writeExisting(filepath.Join(m, g.path(s.ID, owner), "cgroup.procs"), strconv.Itoa(g.pids(s.ID)[0])))
	r := open(t, cfg)
	must(t, r.Assign(t.Context(), s.ID, owner))
	if at := r.groups.groupsOf(s.ID); !slices.Equal(at, []string{owner}) {
		t.Errorf("the sandbox is in %q", at)
	}
	must(t, r.Destroy(t.Context(), s.ID))
	clean(t, r, cfg, s.ID)
}

func TestTheMachineKeepsAReserve(t *testing.T) {
	for memory, want := range map[int64]int64{2 << 30: 512 << 20, 8 << 30: 1 << 30, 256 << 30: 4 << 30} {
		if got := Reserve(memory); got != want {
			t.Errorf("of %d MiB %d stay, want %d", memory>>20, got>>20, want>>20)
		}
	}
	all, err := All(100 << 20)
	must(t, err)
	more, err := All(200 << 20)
	must(t, err)
	if all.Memory-more.Memory != 100<<20 || all.Threads < 100 {
		t.Errorf("with a reserve of 100 MiB %+v, with 200 MiB %+v", all, more)
	}
	if _, err := All(1 << 60); err == nil || !strings.Contains(err.Error(), "reserve_memory_mb") {
		t.Errorf("a reserve of more than there is: %v", err)
	}
}
