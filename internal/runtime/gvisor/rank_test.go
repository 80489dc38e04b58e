package gvisor

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/runtime/runtimetest"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// fair divides CPUs among demands: those who want less than an equal part get it.
func fair(demand map[string]float64, cpus float64) map[string]float64 {
	got, left := map[string]float64{}, maps.Clone(demand)
	for len(left) > 0 {
		part, settled := cpus/float64(len(left)), false
		for who, want := range left {
			if want <= part {
				got[who], settled = want, true
				cpus -= want
				delete(left, who)
				break
			}
		}
		if !settled {
			for who := range left {
				got[who] = part
			}
			return got
		}
	}
	return got
}

// played is what a number of looks at groups that want so much come to. The kernel is
// modelled: the groups that are behind get what the others leave.
type played struct {
	got    map[string]float64 // CPUs, on average
	hungry map[string]int     // the most looks in a row with less than half of what a fair division gives
	ranks  map[string]rank
}

func play(looks int, cpus float64, demand func(look int) map[string]float64) played {
	p := played{got: map[string]float64{}, hungry: map[string]int{}, ranks: map[string]rank{}}
	row := map[string]int{}
	for i := range looks {
		want := demand(i)
		front, back := map[string]float64{}, map[string]float64{}
		left := cpus
		for who, n := range want {
			if p.ranks[who].behind {
				back[who] = n
			} else {
				front[who] = n
			}
		}
		used := fair(front, cpus)
		for _, n := range used {
			left -= n
		}
		maps.Copy(used, fair(back, max(left, 0)))
		should := fair(want, cpus)
		for who, n := range used {
			p.got[who] += n / float64(looks)
			if n < should[who]/2 {
				row[who]++
			} else {
				row[who] = 0
			}
			p.hungry[who] = max(p.hungry[who], row[who])
		}
		p.ranks = rerank(p.ranks, used, cpus)
	}
	return p
}

func TestWhatUsesMoreThanItsPartRunsBehind(t *testing.T) {
	p := play(100, 2, func(int) map[string]float64 { return map[string]float64{"hog": 8, "modest": 0.3} })
	if !p.ranks["hog"].behind || p.ranks["modest"].behind {
		t.Errorf("%+v", p.ranks)
	}
	// Alone it is behind as well: the next group that begins finds it there.
	p = play(5, 2, func(int) map[string]float64 { return map[string]float64{"hog": 8, "asleep": 0} })
	if !p.ranks["hog"].behind || p.got["hog"] != 2 {
		t.Errorf("alone: %+v", p)
	}
	p = play(100, 16, func(look int) map[string]float64 {
		want := map[string]float64{"hog": 100}
		for i := range 50 { // some of them now and then
			want[strconv.Itoa(i)] = float64((look+i)%10/9) * 0.5
		}
		return want
	})
	for who, r := range p.ranks {
		if r.behind != (who == "hog") {
			t.Errorf("of 51 groups, %s: %+v", who, r)
		}
	}
}

func TestASpellOfWorkIsForgotten(t *testing.T) {
	ranks := map[string]rank{}
	back := 0
	for i := range 30 {
		used := map[string]float64{"a": 2}
		if i >= 10 {
			used["a"] = 0
		}
		ranks = rerank(ranks, used, 2)
		if i == 9 && !ranks["a"].behind {
			t.Fatal("it is not behind after a second of both CPUs")
		}
		if i >= 10 && !ranks["a"].behind && back == 0 {
			back = i - 9
		}
	}
	if back < 8 || back > 12 { // a second, so that a group that does not rest does not flap
		t.Errorf("it is back after %d looks", back)
	}
}

// Whatever groups want, each gets about what a fair division gives it, and none waits for
// long.
func TestRanksStarveNoGroup(t *testing.T) {
	for name, demand := range map[string]func(look int) map[string]float64{
		"two that want all": func(int) map[string]float64 { return map[string]float64{"a": 8, "b": 8} },
		"the second comes later": func(look int) map[string]float64 {
			return map[string]float64{"a": 8, "b": float64(look/20) * 8}
		},
		"just above and just below the part": func(int) map[string]float64 { return map[string]float64{"a": 1.05, "b": 0.95, "c": 0.5} },
		"one in spells": func(look int) map[string]float64 {
			return map[string]float64{"a": 8, "b": float64(look/7%2) * 8}
		},
		"many at their part and one above": func(int) map[string]float64 {
			want := map[string]float64{"hog": 8}
			for i := range 12 {
				want[fmt.Sprint(i)] = 2.0 / 13 * 1.09
			}
			return want
		},
		"twenty that want all": func(int) map[string]float64 {
			want := map[string]float64{}
			for i := range 20 {
				want[fmt.Sprint(i)] = 1
			}
			return want
		},
	} {
		const looks = 600
		p := play(looks, 2, demand)
		should := map[string]float64{}
		for i := range looks {
			for who, n := range fair(demand(i), 2) {
				should[who] += n / looks
			}
		}
		for who, n := range should {
			if p.got[who] < 0.7*n || p.hungry[who] > 2*rankCalm {
				t.Errorf("%s: %s got %.2f CPUs, a fair division gives %.2f; it waited for %d looks", name, who, p.got[who], n, p.hungry[who])
			}
		}
	}
}

func TestTheKernelIsToldOfRanksAndOfTheirEnd(t *testing.T) {
	for _, unified := range []bool{false, true} {
		files := map[string]string{"cpu.idle": "0\n", "cpuacct.usage": "0\n", "cpu.stat": "usage_usec 0\n", "cpu.shares": "1024\n", "cpu.weight": "100\n", "cgroup.subtree_control": ""}
		g := fakeTree(t, unified, files)
		const other = "kfedcba9876543210"
		ids := map[string]sandbox.ID{owner: sandboxid.New(), other: sandboxid.New(), "": sandboxid.New()}
		for o, id := range ids {
			must(t, g.enter(id, o))
		}
		use := func(o string, d time.Duration) {
			t.Helper()
			name, text := "cpuacct.usage", strconv.FormatInt(d.Nanoseconds(), 10)
			if unified {
				name, text = "cpu.stat", fmt.Sprintf("user_usec 1\nusage_usec %d\n", d.Microseconds())
			}
			must(t, os.WriteFile(filepath.Join(g.mounts[0], g.parent, groupOf(o), name), []byte(text), 0o600))
		}
		idle := func(o string) string { return strings.TrimSpace(read(t, g, groupOf(o), "cpu.idle")) }
		k := &ranker{groups: g}
		now := time.Now()
		look := func() {
			k.look(now, 2)
			now = now.Add(rankEvery)
		}
		look()
		for i := range 5 {
			use(owner, time.Duration(i)*2*rankEvery)
			use(other, time.Duration(i)*rankEvery/10)
			use("", time.Duration(i)*2*rankEvery) // spares have no rank
			look()
		}
		if idle(owner) != "1" || idle(other) != "0" || idle("") != "0" {
			t.Errorf("version 2 %t: cpu.idle is %q of the busy owner, %q of the other, %q of spares", unified, idle(owner), idle(other), idle(""))
		}
		if all := read(t, g, "..", "cpu.shares") + " " + read(t, g, "..", "cpu.weight"); all != "102 10" {
			t.Errorf("version 2 %t: all sandboxes weigh %q beside a busy owner", unified, all)
		}
		// A group that was made anew begins in front.
		use(owner, 0)
		look()
		if all := read(t, g, "..", "cpu.shares"); idle(owner) != "0" || all != "1024" {
			t.Errorf("version 2 %t: cpu.idle of a group made anew is %q, all sandboxes weigh %q", unified, idle(owner), all)
		}
		for i := range 5 {
			use(owner, time.Duration(i)*2*rankEvery)
			look()
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		k.run(ended)
		if idle(owner) != "0" || read(t, g, "..", "cpu.weight") != "100" {
			t.Errorf("version 2 %t: a group is behind when its server has ended", unified)
		}
	}
}

// TestABusyGroupIsBehindInThisKernel has a process in a cgroup of this machine's version
// use a CPU, and then rest.
func TestABusyGroupIsBehindInThisKernel(t *testing.T) {
	runtimetest.Privileged(t)
	g, err := findCgroups(fmt.Sprintf("/cordon-rank-%d/test", os.Getpid()))
	must(t, err)
	id := sandboxid.New()
	t.Cleanup(func() {
		_ = g.remove(context.Background(), id)
		g.removeEmpty()
	})
	must(t, g.enter(id, owner))
	for _, dir := range g.dirs(id) {
		must(t, g.makeDir(dir))
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
	must(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	for _, dir := range g.dirs(id) {
		must(t, writeExisting(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid)))
	}
	valueOf := func(group, v1, v2 string) string {
		t.Helper()
		for _, dir := range g.groupDirs(group) {
			for _, name := range []string{v1, v2} {
				if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
					return strings.TrimSpace(string(b))
				}
			}
		}
		t.Skip("this kernel has no " + v1)
		return ""
	}
	k := &ranker{groups: g}
	until := func(idle, shares, weight string) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			k.look(time.Now(), 0.2) // so that one process on a busy machine is above its part
			now, all := valueOf(owner, "cpu.idle", "cpu.idle"), valueOf("..", "cpu.shares", "cpu.weight")
			if now == idle && (all == shares || all == weight) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("cpu.idle is %s, want %s; all sandboxes weigh %s, want %s or %s", now, idle, all, shares, weight)
			}
		}
	}
	until("1", "102", "10")
	must(t, cmd.Process.Signal(syscall.SIGSTOP))
	until("0", "1024", "100")
}
