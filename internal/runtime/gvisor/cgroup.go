package gvisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// cgroups finds what belongs to a sandbox on the host. A sandbox's cgroup is
// its identity there: every process of it is in it from its first instruction
// and cannot leave, so neither a recycled process ID nor a lost state file makes
// Destroy kill too much or too little.
type cgroups struct {
	unified bool     // version 2
	mounts  []string // of each hierarchy that has a controller we use
	parent  string   // from the root of each hierarchy
	places  *places  // where in it sandboxes are
	mkdir   func(dir string) error
}

// findCgroups looks for the hierarchies that are mounted: one of version 2, or
// those of version 1.
func findCgroups(parent string) (cgroups, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return cgroups{}, fmt.Errorf("find cgroups: %w", err)
	}
	defer f.Close()
	g := cgroups{parent: filepath.Clean(parent), places: newPlaces(), mkdir: makeCgroup}
	var v2 string
	has := map[string]bool{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// 36 35 98:0 /root /mount/point options ... - type source superoptions: proc(5).
		before, after, ok := strings.Cut(sc.Text(), " - ")
		point, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(point) < 5 || len(super) < 3 {
			continue
		}
		switch super[0] {
		case "cgroup2":
			v2 = point[4]
		case "cgroup":
			g.mounts = append(g.mounts, point[4])
			for o := range strings.SplitSeq(super[2], ",") {
				has[o] = true
			}
		}
	}
	if has["memory"] && has["cpu"] && has["pids"] {
		return g, nil
	}
	if v2 == "" || len(g.mounts) > 0 {
		return cgroups{}, errors.New("cgroups: want the controllers cpu, memory and pids, of version 2 or of version 1: without them sandboxes would have no limits")
	}
	b, err := os.ReadFile(filepath.Join(v2, "cgroup.controllers"))
	if err != nil {
		return cgroups{}, fmt.Errorf("read the controllers of cgroup version 2: %w", err)
	}
	for _, want := range []string{"cpu", "memory", "pids"} {
		if !strings.Contains(" "+strings.TrimSpace(string(b))+" ", " "+want+" ") {
			return cgroups{}, fmt.Errorf("cgroups: version 2 lacks controller %s (has %s): without it sandboxes would have no limits", want, strings.TrimSpace(string(b)))
		}
	}
	g.unified, g.mounts = true, []string{v2}
	return g, nil
}

// paths are a sandbox's cgroups from the root of each hierarchy, the latest first:
// one, or two while it moves.
func (g cgroups) paths(id sandbox.ID) []string {
	groups := g.groupsOf(id)
	out := make([]string, len(groups))
	for i, group := range groups {
		out[i] = filepath.Join(g.parent, group, string(id))
	}
	return out
}

// dirs are the directories of a sandbox's cgroups.
func (g cgroups) dirs(id sandbox.ID) []string {
	var out []string
	for _, path := range g.paths(id) {
		for _, m := range g.mounts {
			out = append(out, filepath.Join(m, path))
		}
	}
	return out
}

// pids are the processes in a sandbox's cgroup, as this process sees them.
func (g cgroups) pids(id sandbox.ID) []int {
	seen := map[int]bool{}
	var out []int
	for _, dir := range g.dirs(id) {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			continue // no such cgroup: nothing in it
		}
		for line := range strings.Lines(string(b)) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 && !seen[pid] {
				seen[pid] = true
				out = append(out, pid)
			}
		}
	}
	return out
}

// holds reports whether pid is in the sandbox's cgroup. While the sandbox moves, what
// was read of one of the two sides may be old: then it looks again.
func (g cgroups) holds(id sandbox.ID, pid int) bool {
	for paths := g.paths(id); ; {
		in := within(pid, paths)
		now := g.paths(id)
		if in || slices.Equal(paths, now) {
			return in
		}
		paths = now
	}
}

// within reports whether the process is in one of these cgroups.
func within(pid int, paths []string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		// Inside a container the line may have the container's own path in front.
		if slices.ContainsFunc(paths, func(path string) bool { return strings.HasSuffix(strings.TrimSpace(line), path) }) {
			return true
		}
	}
	return false
}

// killed are processes that were sent SIGKILL, each with a descriptor of it.
type killed map[int]int

// reap collects the processes where that falls to this one: a server that is
// init, as in a container, inherits the processes of its sandboxes.
func (k killed) reap() {
	for _, fd := range k {
		_ = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED, nil) // ECHILD: somebody else's
	}
}

func (k killed) close() {
	for _, fd := range k {
		unix.Close(fd)
	}
}

// kill sends SIGKILL to every process in the sandbox's cgroup.
func (g cgroups) kill(id sandbox.ID, k killed) {
	for _, pid := range g.pids(id) {
		if _, done := k[pid]; done {
			continue
		}
		// Between reading and killing, a process of ours may end and its ID be
		// taken; a descriptor settles which process is meant.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if !g.holds(id, pid) {
			unix.Close(fd)
			continue
		}
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		k[pid] = fd
	}
}

// killTimeout bounds how long a killed process may take to go. Freeing many
// gigabytes takes seconds.
const killTimeout = 30 * time.Second

// remove ends everything in the sandbox's cgroup and removes it. What does not
// exist is removed already.
func (g cgroups) remove(ctx context.Context, id sandbox.ID) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	k := killed{}
	defer k.close()
	for wait := 500 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		g.kill(id, k)
		err := g.rmdir(id)
		if err == nil {
			k.reap() // they have left their cgroup: next to nothing is left to wait for
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d processes to end: %w", len(k), errors.Join(ctx.Err(), err))
		case <-time.After(wait):
		}
	}
}

func (g cgroups) rmdir(id sandbox.ID) error {
	groups := g.groupsOf(id)
	for _, group := range groups {
		for _, m := range g.mounts {
			dir := filepath.Join(m, g.parent, group, string(id))
			if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
				return fmt.Errorf("remove %s: %w", dir, err)
			}
		}
	}
	g.leave(id, groups)
	return nil
}

// value reads a number from a file of the sandbox's cgroup; see valueIn.
func (g cgroups) value(id sandbox.ID, file, key string) (int64, error) {
	return valueIn(g.dirs(id), file, key)
}

// valueIn reads a number from the first of some directories that has the file: the
// whole file when key is "", otherwise the line that begins with key.
func valueIn(dirs []string, file, key string) (int64, error) {
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			text := strings.TrimSpace(line)
			if key != "" {
				var ok bool
				if text, ok = strings.CutPrefix(text, key+" "); !ok {
					continue
				}
			}
			return strconv.ParseInt(text, 10, 64)
		}
	}
	return 0, fmt.Errorf("cgroups %s: no file %s: %w", strings.Join(dirs, ", "), file, os.ErrNotExist)
}

// noSwap is the file that limits what a cgroup of version 2 may swap. It is set
// whenever it is there: a machine without swap today may get some tomorrow.
const noSwap = "memory.swap.max"

// limitMemory changes how many bytes of memory a sandbox may use, and that it may not
// swap any of them.
func (g cgroups) limitMemory(id sandbox.ID, bytes int64) error {
	limit := strconv.FormatInt(bytes, 10)
	type setting struct{ name, value string }
	// Version 1 limits memory and swap together; the greater limit is first.
	settings := []setting{{"memory.memsw.limit_in_bytes", limit}, {"memory.limit_in_bytes", limit}}
	if g.unified {
		settings = []setting{{noSwap, "0"}, {"memory.max", limit}}
	}
	set := ""
	for _, s := range settings {
		for _, dir := range g.dirs(id) {
			err := writeExisting(filepath.Join(dir, s.name), s.value)
			if errors.Is(err, os.ErrNotExist) {
				continue // another controller's, or a kernel that does not count swap
			}
			if err != nil {
				return err
			}
			set = s.name
		}
	}
	if last := settings[len(settings)-1].name; set != last {
		return fmt.Errorf("cgroup %s: no file %s", strings.Join(g.paths(id), ", "), last)
	}
	return nil
}

// denySwap takes swap from sandboxes that an earlier server made while the machine had
// none.
func (g cgroups) denySwap() error {
	if !g.unified {
		return nil // limited at their creation
	}
	var failed []error
	for _, m := range g.mounts {
		for _, pattern := range []string{"*", filepath.Join("*", "*")} {
			dirs, _ := filepath.Glob(filepath.Join(m, g.parent, pattern)) // the pattern is well-formed
			for _, dir := range dirs {
				if !sandbox.ID(filepath.Base(dir)).Valid() {
					continue
				}
				if err := writeExisting(filepath.Join(dir, noSwap), "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
					failed = append(failed, fmt.Errorf("deny swap: %w", err))
				}
			}
		}
	}
	return errors.Join(failed...)
}

// starved reports whether the kernel killed a process of the sandbox because the
// limit of its memory was reached.
func (g cgroups) starved(id sandbox.ID) bool {
	file := "memory.oom_control"
	if g.unified {
		file = "memory.events"
	}
	n, err := g.value(id, file, "oom_kill")
	return err == nil && n > 0
}

// cpuTime is the CPU time used by all processes of the sandbox.
func (g cgroups) cpuTime(id sandbox.ID) (time.Duration, error) { return g.cpuTimeIn(g.dirs(id)) }

func (g cgroups) cpuTimeIn(dirs []string) (time.Duration, error) {
	if g.unified {
		us, err := valueIn(dirs, "cpu.stat", "usage_usec")
		return time.Duration(us) * time.Microsecond, err
	}
	ns, err := valueIn(dirs, "cpuacct.usage", "")
	return time.Duration(ns), err
}

// memory is what the sandbox uses, less the page cache the kernel can drop.
func (g cgroups) memory(id sandbox.ID) (int64, error) { return g.memoryIn(g.dirs(id)) }

func (g cgroups) memoryIn(dirs []string) (int64, error) {
	file, key := "memory.usage_in_bytes", "total_inactive_file"
	if g.unified {
		file, key = "memory.current", "inactive_file"
	}
	used, err := valueIn(dirs, file, "")
	if err != nil {
		return 0, err
	}
	cache, err := valueIn(dirs, "memory.stat", key)
	if err != nil {
		return 0, err
	}
	return max(used-cache, 0), nil
}
