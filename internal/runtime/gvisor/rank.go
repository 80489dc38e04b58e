package gvisor

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// All owners weigh the same, but weights divide CPU time over many milliseconds: a task
// that wakes waits until the tasks that run have had their turns, and again for each step
// of its work. So a group that uses more than its part of the CPUs runs behind the others
// (cpu.idle): the kernel lets a task of any other group preempt it at once, and gives it
// what the others leave. The others use less than their parts, so what they leave is at
// least its own part.
//
// The rank is one among the groups of sandboxes. The server and the kernel's own threads,
// which carry packets and end the grace periods that each change of network rules waits
// for, are outside, and work for all owners: beside a group that kept every CPU busy, they
// were traced to wait for up to 380 ms. So while a group is behind, all sandboxes together
// weigh a tenth of what they do otherwise, towards the rest of the machine.

const (
	// rankEvery is how often the ranks follow what is used; with many groups less often,
	// by rankCost for each, so that reading takes a small part of a CPU.
	rankEvery = 100 * time.Millisecond
	rankCost  = time.Millisecond
	// rankActive is the use, in CPUs, from which on a group counts as one that wants some.
	rankActive = 0.05
	// A group falls behind when it uses more than its part times rankOver, and comes back
	// when for rankCalm looks in a row it used less than its part times rankUnder. Groups
	// that are all behind divide what there is evenly, so they stay where they are.
	rankOver, rankUnder = 1.1, 0.9
	rankCalm            = 10
)

// rank is what is known of a group's use of the CPUs.
type rank struct {
	use    float64 // CPUs, of late
	calm   int     // looks in a row with little use
	behind bool
}

// rerank returns the ranks of groups, which used so many CPUs since the last look.
func rerank(was map[string]rank, used map[string]float64, cpus float64) map[string]rank {
	now := make(map[string]rank, len(used))
	// Another group may begin at any moment, and its first task is to find the group that
	// takes everything behind: so a part is half of the CPUs at most.
	active := 0
	for group, n := range used {
		r := was[group]
		r.use = (r.use + n) / 2
		now[group] = r
		if r.use > rankActive {
			active++
		}
	}
	part := cpus / float64(max(active, 2))
	for group, r := range now {
		if r.use < part*rankUnder {
			r.calm++
		} else {
			r.calm = 0
		}
		r.behind = r.use > part*rankOver || r.behind && r.calm < rankCalm
		now[group] = r
	}
	return now
}

// ranker keeps the ranks of the groups of all owners.
type ranker struct {
	groups cgroups
	ranks  map[string]rank
	total  map[string]time.Duration // CPU time at the last look
	light  bool                     // whether all sandboxes together weigh little
	looked time.Time
}

// run ranks until ctx ends. Then all groups are equal again: nothing follows what they use
// while no server runs.
func (k *ranker) run(ctx context.Context) {
	k.groups.weighAll(false) // a server that was killed may have left it
	t := time.NewTimer(rankEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			for group := range k.ranks {
				k.groups.background(group, false)
			}
			if k.light {
				k.groups.weighAll(false)
			}
			return
		case now := <-t.C:
			k.look(now, float64(runtime.NumCPU()))
			t.Reset(rankEvery + time.Duration(len(k.ranks))*rankCost)
		}
	}
}

// look reads what the groups have used since it was last called and sets their ranks.
func (k *ranker) look(now time.Time, cpus float64) {
	passed := now.Sub(k.looked).Seconds()
	k.looked = now
	total, used := map[string]time.Duration{}, map[string]float64{}
	for _, group := range k.groups.ofOwners() {
		n, err := k.groups.cpuTimeIn(k.groups.groupDirs(group))
		if err != nil {
			continue // its last sandbox has left
		}
		before, known := k.total[group]
		if !known || n < before { // new, or made anew since
			delete(k.ranks, group)
			before = n
		}
		total[group], used[group] = n, (n-before).Seconds()/passed
	}
	was := k.ranks
	k.total, k.ranks = total, rerank(was, used, cpus)
	light := false
	for group, r := range k.ranks {
		before, known := was[group]
		if !known || before.behind != r.behind {
			k.groups.background(group, r.behind)
		}
		light = light || r.behind
	}
	if light || k.light { // again and again: another server of this machine may have ended it
		k.groups.weighAll(light)
	}
	k.light = light
}

// ofOwners are the groups that have sandboxes now, but those that wait for an owner.
func (g cgroups) ofOwners() (groups []string) {
	g.places.mu.Lock()
	defer g.places.mu.Unlock()
	for group, n := range g.places.members {
		if n > 0 && group != "" && group != spareGroup {
			groups = append(groups, group)
		}
	}
	return groups
}

// background puts a group behind all that are not, or among them again. A kernel before
// 5.15 has weights only.
func (g cgroups) background(group string, behind bool) {
	value := "0"
	if behind {
		value = "1"
	}
	g.places.mu.Lock() // the group may be removed meanwhile
	defer g.places.mu.Unlock()
	for _, dir := range g.groupDirs(group) {
		writeOther(filepath.Join(dir, "cpu.idle"), value)
	}
}

// weighAll sets what all sandboxes weigh together: the kernel's default for a group, or
// about a tenth of it.
func (g cgroups) weighAll(light bool) {
	shares, weight := "1024", "100" // of version 1, of version 2
	if light {
		shares, weight = "102", "10"
	}
	top, _, _ := strings.Cut(strings.Trim(g.parent, "/"), "/")
	for _, m := range g.mounts {
		writeOther(filepath.Join(m, top, "cpu.shares"), shares)
		writeOther(filepath.Join(m, top, "cpu.weight"), weight)
	}
}

// writeOther writes to a file that is there and says something else.
func writeOther(path, value string) {
	if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) != value {
		_ = writeExisting(path, value)
	}
}
