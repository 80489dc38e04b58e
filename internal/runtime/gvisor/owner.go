package gvisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// The cgroups of all sandboxes form a tree of three levels:
//
//	<parent>                 all sandboxes; leaves the host a reserve of memory
//	<parent>/<owner>         the sandboxes of one API key; all owners weigh the same
//	<parent>/<owner>/<id>    one sandbox
//
// The kernel divides CPU time and disk I/O between the owners first and between the
// sandboxes of one owner then. So the number of sandboxes that a key runs does not
// change what another key gets.
//
// A sandbox without an owner, a spare, is in the group spareGroup. When it is claimed,
// its processes move. The memory that it has by then, some 15 MB, stays charged to the
// tree and no longer to a group: the kernel does not move charges.

// spareGroup holds sandboxes without an owner. An owner's group has another name:
// see groupOf.
const spareGroup = "spares"

// ownerForm is what may stand in a path as it is. Keys have such IDs.
var ownerForm = regexp.MustCompile(`^k[0-9a-f]{16}$`)

// groupOf names an owner's group.
func groupOf(owner string) string {
	switch {
	case owner == "":
		return spareGroup
	case ownerForm.MatchString(owner):
		return owner
	}
	sum := sha256.Sum256([]byte(owner))
	return "x" + hex.EncodeToString(sum[:8])
}

// path is where the cgroup of an owner's sandbox is made.
func (g cgroups) path(id sandbox.ID, owner string) string {
	return filepath.Join(g.parent, groupOf(owner), string(id))
}

// places says in which groups sandboxes are.
type places struct {
	mu sync.Mutex // guards the rest, and the making and removing of groups
	// at are the groups that have a cgroup of the sandbox, the latest first. There are
	// two while a sandbox moves, or when a server was killed while one moved. The group
	// "" is the parent itself, where earlier versions had all sandboxes.
	at map[sandbox.ID][]string
	// members counts the sandboxes of each group.
	members map[string]int
}

func newPlaces() *places { return &places{at: map[sandbox.ID][]string{}, members: map[string]int{}} }

// groupsOf returns the groups that the sandbox is in, the latest first.
func (g cgroups) groupsOf(id sandbox.ID) []string {
	g.places.mu.Lock()
	defer g.places.mu.Unlock()
	return slices.Clone(g.known(id))
}

// known needs places.mu. It looks on the host for a sandbox that another Runtime made.
func (g cgroups) known(id sandbox.ID) []string {
	if at, ok := g.places.at[id]; ok {
		return at
	}
	for _, m := range g.mounts {
		root := filepath.Join(m, g.parent)
		for _, pattern := range []string{filepath.Join(root, "*", string(id)), filepath.Join(root, string(id))} {
			found, _ := filepath.Glob(pattern) // the pattern is well-formed
			for _, dir := range found {
				group := filepath.Base(filepath.Dir(dir))
				if filepath.Dir(dir) == root {
					group = ""
				}
				g.note(id, group)
			}
		}
	}
	return g.places.at[id]
}

// note needs places.mu.
func (g cgroups) note(id sandbox.ID, group string) {
	p := g.places
	i := slices.Index(p.at[id], group)
	if i < 0 {
		p.members[group]++
	} else {
		p.at[id] = slices.Delete(p.at[id], i, i+1)
	}
	p.at[id] = append([]string{group}, p.at[id]...)
}

// enter makes the owner's group, which stays until the sandbox leaves, and says that
// the sandbox is in it from now on.
func (g cgroups) enter(id sandbox.ID, owner string) error {
	p := g.places
	p.mu.Lock()
	defer p.mu.Unlock()
	g.known(id)
	group := groupOf(owner)
	g.note(id, group)
	return g.makeGroup(group)
}

// leave says that no cgroup of the sandbox is left in these groups, and removes those
// groups that are empty.
func (g cgroups) leave(id sandbox.ID, groups []string) {
	p := g.places
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, group := range groups {
		i := slices.Index(p.at[id], group)
		if i < 0 {
			continue
		}
		p.at[id] = slices.Delete(p.at[id], i, i+1)
		if p.members[group]--; p.members[group] > 0 {
			continue
		}
		delete(p.members, group)
		g.removeGroup(group)
	}
	if len(p.at[id]) == 0 {
		delete(p.at, id)
	}
}

// removeGroup needs places.mu. A group that is in use by another Runtime stays.
func (g cgroups) removeGroup(group string) {
	if group == "" {
		return
	}
	for _, m := range g.mounts {
		_ = unix.Rmdir(filepath.Join(m, g.parent, group))
	}
}

// sweepGroups removes groups that a server left empty.
func (g cgroups) sweepGroups() {
	g.places.mu.Lock()
	defer g.places.mu.Unlock()
	for _, m := range g.mounts {
		entries, err := os.ReadDir(filepath.Join(m, g.parent))
		if err != nil {
			continue // no sandbox was made yet
		}
		for _, e := range entries {
			if e.IsDir() && !sandbox.ID(e.Name()).Valid() && g.places.members[e.Name()] == 0 {
				_ = unix.Rmdir(filepath.Join(m, g.parent, e.Name())) // refused while it has sandboxes
			}
		}
	}
}

// removeEmpty removes the groups without a sandbox, then the parent and those above it as
// far as they are empty: a server that leaves no sandbox leaves no cgroup.
func (g cgroups) removeEmpty() {
	g.sweepGroups()
	g.places.mu.Lock()
	defer g.places.mu.Unlock()
	for _, m := range g.mounts {
		for dir := filepath.Join(m, g.parent); dir != m; dir = filepath.Dir(dir) {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				break // in use
			}
		}
	}
}

// weights are what each group gets of CPU time and of disk I/O, relative to the others.
// They are the kernel's defaults, written down; where a file is missing, the kernel
// lacks the controller or does not weigh.
var weights = []struct{ file, value string }{
	{"cpu.shares", "1024"}, {"blkio.weight", "500"}, {"blkio.bfq.weight", "100"}, // version 1
	{"cpu.weight", "100"}, {"io.weight", "default 100"}, {"io.bfq.weight", "default 100"},
}

// makeGroup makes a group of the parent and those above it, in each hierarchy, ready
// for cgroups below it. It needs places.mu.
func (g cgroups) makeGroup(group string) error {
	for _, m := range g.mounts {
		dir := m
		g.control(dir)
		for part := range strings.SplitSeq(strings.Trim(filepath.Join(g.parent, group), "/"), "/") {
			dir = filepath.Join(dir, part)
			if err := g.makeDir(dir); err != nil {
				return err
			}
			g.control(dir)
		}
		for _, w := range weights {
			_ = writeExisting(filepath.Join(dir, w.file), w.value)
		}
	}
	return nil
}

// makeCgroup is how cgroups are made but in tests.
func makeCgroup(dir string) error { return os.Mkdir(dir, 0o755) }

// makeDir makes a cgroup that processes may enter.
func (g cgroups) makeDir(dir string) error {
	if err := g.mkdir(dir); errors.Is(err, os.ErrExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("make a cgroup: %w", err)
	}
	if g.unified {
		return nil
	}
	// cpuset of version 1 begins without CPUs and takes no process before it has some.
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err != nil {
			continue // another controller's
		}
		if err := writeExisting(filepath.Join(dir, name), strings.TrimSpace(string(b))); err != nil {
			return fmt.Errorf("give a cgroup its CPUs: %w", err)
		}
	}
	// Before Linux 5.11, a group of version 1 limits those below it only on demand.
	_ = writeExisting(filepath.Join(dir, "memory.use_hierarchy"), "1")
	return nil
}

// control hands the controllers of a group of version 2 to the groups below it.
func (g cgroups) control(dir string) {
	if !g.unified {
		return
	}
	for _, c := range []string{"cpu", "memory", "pids", "io"} {
		_ = writeExisting(filepath.Join(dir, "cgroup.subtree_control"), "+"+c) // findCgroups has looked for those that must be there
	}
}

// limitFiles are those that limit one sandbox, each after what it depends on.
var limitFiles = []string{
	"cpu.cfs_period_us", "cpu.cfs_quota_us", "pids.max", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", // version 1
	"cpu.max", "memory.max", noSwap,
}

// move takes a sandbox that runs, with its limits, to its owner's group.
func (g cgroups) move(ctx context.Context, id sandbox.ID, owner string) error {
	to := groupOf(owner)
	from := g.groupsOf(id)
	if len(from) == 1 && from[0] == to {
		return nil
	}
	if len(from) == 0 {
		return fmt.Errorf("sandbox %s has no cgroup", id)
	}
	if err := g.enter(id, owner); err != nil {
		return err
	}
	from = slices.DeleteFunc(from, func(group string) bool { return group == to })
	for _, group := range from {
		for _, m := range g.mounts {
			src, dst := filepath.Join(m, g.parent, group, string(id)), filepath.Join(m, g.parent, to, string(id))
			if _, err := os.Stat(src); err != nil {
				continue // this hierarchy never had it, or it moved before a crash
			}
			if err := g.makeDir(dst); err != nil {
				return err
			}
			if err := copyLimits(src, dst); err != nil {
				return err
			}
			if err := moveAll(ctx, src, dst); err != nil {
				return err
			}
		}
	}
	g.leave(id, from)
	return nil
}

// copyLimits gives one cgroup the limits of another.
func copyLimits(src, dst string) error {
	for _, name := range limitFiles {
		b, err := os.ReadFile(filepath.Join(src, name))
		if err != nil {
			continue // another controller's
		}
		if err := writeExisting(filepath.Join(dst, name), strings.TrimSpace(string(b))); err != nil {
			return fmt.Errorf("limit the sandbox in its owner's group: %w", err)
		}
	}
	return nil
}

// moveTimeout bounds how long a sandbox may make processes faster than they move.
const moveTimeout = 10 * time.Second

// moveAll moves every process from one cgroup to another and removes the first. A
// process that is moving may have just made another, so it looks again until none is
// left. Its ID is read and written within microseconds; the kernel gives IDs out in
// turn, so none is another process's by then.
func moveAll(ctx context.Context, src, dst string) error {
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	for {
		b, err := os.ReadFile(filepath.Join(src, "cgroup.procs"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			err := writeExisting(filepath.Join(dst, "cgroup.procs"), strings.TrimSpace(line))
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("move a process to its owner's group: %w", err)
			}
		}
		err = unix.Rmdir(src)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), fmt.Errorf("remove %s: %w", src, err))
		case <-time.After(time.Millisecond):
		}
	}
}

// writeExisting writes to a file that is there.
func writeExisting(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// Assign implements sandbox.Runtime.
func (r *Runtime) Assign(ctx context.Context, id sandbox.ID, owner string) error {
	defer r.locks.lock(id)()
	if err := r.groups.move(ctx, id, owner); err != nil {
		return fmt.Errorf("assign sandbox %s: %w", id, err)
	}
	return nil
}

// Use implements sandbox.Runtime.
func (r *Runtime) Use(_ context.Context, owner string) (sandbox.Use, error) {
	return r.groups.use(groupOf(owner))
}

// UseOfAll implements sandbox.Runtime.
func (r *Runtime) UseOfAll(context.Context) (sandbox.Use, error) { return r.groups.use("") }

// Limit implements sandbox.Runtime.
func (r *Runtime) Limit(_ context.Context, owner string, most sandbox.Use) error {
	g := r.groups
	g.places.mu.Lock() // the group may be removed meanwhile
	defer g.places.mu.Unlock()
	group := groupOf(owner)
	if g.places.members[group] == 0 {
		return nil
	}
	return g.limit(group, most)
}

// use reads what a group holds, "" being all of them.
func (g cgroups) use(group string) (u sandbox.Use, err error) {
	dirs := g.groupDirs(group)
	if u.Memory, err = g.memoryIn(dirs); err == nil {
		u.Threads, err = valueIn(dirs, "pids.current", "")
	}
	if errors.Is(err, os.ErrNotExist) {
		return sandbox.Use{}, nil // it has no sandboxes
	}
	return u, err
}

// limit sets the limits of a group, "" being all of them. 0 leaves one as it is.
// The kernel refuses to go below what version 1 cannot free (EBUSY): then the former
// limit stays.
func (g cgroups) limit(group string, most sandbox.Use) error {
	for _, l := range []struct {
		file  string
		value int64
	}{{"memory.limit_in_bytes", most.Memory}, {"memory.max", most.Memory}, {"pids.max", most.Threads}} {
		if l.value <= 0 {
			continue
		}
		for _, dir := range g.groupDirs(group) {
			err := writeExisting(filepath.Join(dir, l.file), strconv.FormatInt(l.value, 10))
			if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("limit the sandboxes of a key: %w", err)
			}
		}
	}
	return nil
}

func (g cgroups) groupDirs(group string) []string {
	out := make([]string, len(g.mounts))
	for i, m := range g.mounts {
		out[i] = filepath.Join(m, g.parent, group)
	}
	return out
}

// limitAll makes the group of all sandboxes, with its limits.
func (g cgroups) limitAll(most sandbox.Use) error {
	if most == (sandbox.Use{}) {
		return nil
	}
	g.places.mu.Lock()
	defer g.places.mu.Unlock()
	if err := g.makeGroup(""); err != nil {
		return err
	}
	now, err := g.use("")
	if err != nil {
		return err
	}
	if now.Memory+now.Memory/16 > most.Memory && most.Memory > 0 { // version 2 would end sandboxes at once
		most.Memory = now.Memory + now.Memory/16
	}
	return g.limit("", most)
}

// All is what sandboxes may hold of this machine when reserve bytes of its memory are left
// to the machine and the server; 0 is an eighth, at least 512 MiB and at most 4 GiB. Of
// the threads that the machine may have, a quarter is left.
func All(reserve int64) (sandbox.Use, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return sandbox.Use{}, fmt.Errorf("read the size of the memory: %w", err)
	}
	memory := int64(info.Totalram) * int64(info.Unit)
	// A container has less than its machine.
	for _, path := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		if n, err := readInt(path); err == nil && n > 0 {
			memory = min(memory, n)
		}
	}
	if reserve == 0 {
		reserve = Reserve(memory)
	}
	if reserve >= memory {
		return sandbox.Use{}, errs.New(errs.Invalid, "sandboxes.reserve_memory_mb is %d, the machine has %d MiB: use less", reserve>>20, memory>>20)
	}
	threads, err := readInt("/proc/sys/kernel/pid_max")
	if err != nil {
		return sandbox.Use{}, fmt.Errorf("read how many threads the machine may have: %w", err)
	}
	if n, err := readInt("/proc/sys/kernel/threads-max"); err == nil {
		threads = min(threads, n)
	}
	return sandbox.Use{Memory: memory - reserve, Threads: threads - threads/4}, nil
}

// Reserve is what is left to a machine of that much memory, in bytes.
func Reserve(memory int64) int64 { return max(512<<20, min(memory/8, 4<<30)) }

func readInt(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}
