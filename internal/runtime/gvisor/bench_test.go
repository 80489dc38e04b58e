package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/runtime/runtimetest"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// quantiles reports p50 and p90 of a step under its name.
func quantiles(b *testing.B, name string, d []time.Duration) {
	b.Helper()
	slices.Sort(d)
	b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, name+"-p50-ms")
	b.ReportMetric(float64(d[len(d)*9/10].Microseconds())/1000, name+"-p90-ms")
}

func check1(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkStart measures the steps of a cold start, up to the first answer
// over the network, and of a kill.
func BenchmarkStart(b *testing.B) {
	r := open(b, testConfig(b))
	rootfs, slot := runtimetest.Rootfs(b), runtimetest.NewSlot(b, 1)
	var create, start, cold, kill []time.Duration
	for b.Loop() {
		slot.Rearm(b)
		time.Sleep(150 * time.Millisecond) // as between requests, not back to back
		s := spec(rootfs, slot)
		t0 := time.Now()
		check1(b, r.Create(b.Context(), s))
		t1 := time.Now()
		check1(b, r.Start(b.Context(), s.ID))
		_, err := slot.Ask(b.Context(), "hello")
		check1(b, err)
		t2 := time.Now()
		check1(b, r.Destroy(b.Context(), s.ID))
		create, start, cold, kill = append(create, t1.Sub(t0)), append(start, t2.Sub(t1)), append(cold, t2.Sub(t0)), append(kill, time.Since(t2))
	}
	quantiles(b, "create", create)
	quantiles(b, "start", start)
	quantiles(b, "cold", cold)
	quantiles(b, "destroy", kill)
}

// BenchmarkCheckpoint measures a pause to disk and a restore of a sandbox with
// 20 and 200 MB of memory in use.
func BenchmarkCheckpoint(b *testing.B) {
	for _, mb := range []int{0, 20, 200} {
		b.Run(fmt.Sprint(mb, "MB"), func(b *testing.B) {
			r := open(b, testConfig(b))
			rootfs, slot := runtimetest.Rootfs(b), runtimetest.NewSlot(b, 1)
			dir := b.TempDir()
			var save, restore []time.Duration
			var n int
			for b.Loop() {
				n++
				slot.Rearm(b)
				s := spec(rootfs, slot)
				s.Resources.MemoryMB = 512
				check1(b, r.Create(b.Context(), s))
				check1(b, r.Start(b.Context(), s.ID))
				_, err := slot.Ask(b.Context(), "allocate", strconv.Itoa(mb))
				check1(b, err)
				image := filepath.Join(dir, strconv.Itoa(n))
				t0 := time.Now()
				check1(b, r.Checkpoint(b.Context(), s.ID, image))
				save = append(save, time.Since(t0))
				check1(b, r.Destroy(b.Context(), s.ID))
				slot.Rearm(b)
				t0 = time.Now()
				check1(b, r.Restore(b.Context(), s, image))
				_, err = slot.Ask(b.Context(), "hello")
				check1(b, err)
				restore = append(restore, time.Since(t0))
				check1(b, r.Destroy(b.Context(), s.ID))
				check1(b, os.RemoveAll(image))
			}
			quantiles(b, "checkpoint", save)
			quantiles(b, "restore", restore)
		})
	}
}

// BenchmarkIdleMemory measures what an idle sandbox costs: the proportional set
// size of its processes, and what its cgroup is charged.
func BenchmarkIdleMemory(b *testing.B) {
	r := open(b, testConfig(b))
	rootfs, slot := runtimetest.Rootfs(b), runtimetest.NewSlot(b, 1)
	for b.Loop() {
		slot.Rearm(b)
		s := spec(rootfs, slot)
		check1(b, r.Create(b.Context(), s))
		check1(b, r.Start(b.Context(), s.ID))
		_, err := slot.Ask(b.Context(), "hello")
		check1(b, err)
		time.Sleep(time.Second)
		b.ReportMetric(float64(pss(b, r, s.ID))/1024, "PSS-MB")
		st, err := r.Stats(b.Context(), s.ID)
		check1(b, err)
		b.ReportMetric(float64(st.MemoryBytes)/1e6, "charged-MB")
		b.ReportMetric(float64(len(threadIDs(r, s.ID))), "threads")
		check1(b, r.Destroy(b.Context(), s.ID))
	}
}

// pss adds up the proportional set sizes of a sandbox's processes, in kB.
func pss(tb testing.TB, r *Runtime, id sandbox.ID) int {
	tb.Helper()
	var sum int
	for _, pid := range r.groups.pids(id) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			tb.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss:" {
				n, _ := strconv.Atoi(f[1])
				sum += n
			}
		}
	}
	return sum
}

// threadIDs are the host's threads of a sandbox.
func threadIDs(r *Runtime, id sandbox.ID) []string {
	var out []string
	for _, pid := range r.groups.pids(id) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		out = append(out, tasks...)
	}
	return out
}
