package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// guard kills the biggest process before the sandbox's memory is used up: the
// host's kernel would otherwise kill the sandbox's own kernel, and everything
// with it.
type guard struct {
	proc string
	log  *slog.Logger
	self int
	// doom is told of a process before it is killed.
	doom func(kill)

	mu      sync.Mutex // guards what follows
	kills   []kill
	changed chan struct{} // closed and replaced at each kill
}

// kill is one process the guard killed.
type kill struct {
	Number  int64     `json:"number"` // counted from 1
	Time    time.Time `json:"time"`
	PID     int       `json:"pid"`
	Command string    `json:"command"`
	Bytes   uint64    `json:"bytes"`     // resident
	Left    uint64    `json:"available"` // of the sandbox's memory
}

func (k kill) String() string {
	return fmt.Sprintf("out of memory: process %d (%s) was the biggest, with %d MiB, and was killed", k.PID, k.Command, k.Bytes>>20)
}

const (
	maxKills = 64 // remembered for the host
	// maxKillWait bounds how long the host's question waits for a kill.
	maxKillWait = time.Hour
	// growth is the fastest a sandbox is assumed to fill memory, in bytes per
	// second: it says how soon the guard must look again.
	growth   = 1 << 30
	lookSoon = 5 * time.Millisecond
	lookLate = 250 * time.Millisecond
	// settle is how long a killed process gets to free its memory before the next
	// one is chosen.
	settle = 100 * time.Millisecond
)

func newGuard(proc string, log *slog.Logger, doom func(kill)) *guard {
	return &guard{proc: proc, log: log, self: os.Getpid(), doom: doom, changed: make(chan struct{})}
}

// floor is the available memory below which a process is killed. The runtime
// gives the sandbox's own kernel memory besides what shows in here, and some for
// what is allocated between a look and the kill.
func floor(total uint64) uint64 { return min(16<<20, total/16) }

// run guards from the first process on: an idle sandbox costs nothing.
func (g *guard) run(ctx context.Context, used <-chan struct{}) error {
	select {
	case <-used:
	case <-ctx.Done():
		return nil
	}
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			t.Reset(g.check())
		case <-ctx.Done():
			return nil
		}
	}
}

// check looks once, acts if it must, and returns when to look again.
func (g *guard) check() time.Duration {
	mem, err := readMeminfo(g.proc)
	if err != nil {
		g.log.Warn("memory not guarded", "err", err)
		return lookLate
	}
	left, low := available(mem), floor(mem["MemTotal"])
	if left >= low {
		return min(max(time.Duration(float64(left-low)/growth*float64(time.Second)), lookSoon), lookLate)
	}
	victim, ok := g.biggest()
	if !ok {
		return lookLate
	}
	victim.Left = left
	g.doom(victim) // now: once it is dead, its session is not to be found
	if err := syscall.Kill(victim.PID, syscall.SIGKILL); err != nil {
		return lookSoon // gone by itself
	}
	g.log.Warn("process killed, memory is short", "pid", victim.PID, "command", victim.Command, "bytes", victim.Bytes)
	g.record(victim)
	return settle
}

// biggest finds the process with the most resident memory.
func (g *guard) biggest() (kill, bool) {
	dirs, err := os.ReadDir(g.proc)
	if err != nil {
		return kill{}, false
	}
	var best kill
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == g.self || pid == 1 {
			continue
		}
		if rss := g.resident(pid); rss > best.Bytes {
			best = kill{PID: pid, Bytes: rss}
		}
	}
	if best.PID == 0 {
		return best, false
	}
	best.Time = time.Now().UTC()
	best.Command = utf8(strings.TrimSpace(g.read(best.PID, "comm")))
	return best, true
}

// resident reads the second field of statm, in pages (proc_pid_statm(5)).
func (g *guard) resident(pid int) uint64 {
	fields := strings.Fields(g.read(pid, "statm"))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 48)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}

func (g *guard) read(pid int, file string) string {
	b, err := os.ReadFile(filepath.Join(g.proc, fmt.Sprint(pid), file))
	if err != nil {
		return "" // it has ended meanwhile
	}
	return string(b)
}

func (g *guard) record(k kill) {
	g.mu.Lock()
	defer g.mu.Unlock()
	k.Number = g.latest() + 1
	if len(g.kills) == maxKills {
		g.kills = append(g.kills[:0], g.kills[1:]...)
	}
	g.kills = append(g.kills, k)
	close(g.changed)
	g.changed = make(chan struct{})
}

// latest is the number of the latest kill; mu is held.
func (g *guard) latest() int64 {
	if len(g.kills) == 0 {
		return 0
	}
	return g.kills[len(g.kills)-1].Number
}

// since returns the kills after a number, oldest first, the latest's number, and
// what is closed at the next one.
func (g *guard) since(number int64) (found []kill, latest int64, next <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, k := range g.kills {
		if k.Number > number {
			found = append(found, k)
		}
	}
	return found, g.latest(), g.changed
}

// getKills tells the host what the guard did after the kill numbered "after", and
// waits up to "wait" seconds for it. A number below 0 asks for the latest's only.
func (a *Agent) getKills(w http.ResponseWriter, r *http.Request) {
	after, errA := strconv.ParseInt(r.FormValue("after"), 10, 64)
	wait, errW := strconv.ParseUint(r.FormValue("wait"), 10, 16)
	if errA != nil || errW != nil {
		writeError(w, http.StatusBadRequest, "after and wait must be numbers")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), min(time.Duration(wait)*time.Second, maxKillWait))
	defer cancel()
	for {
		found, latest, next := a.guard.since(after)
		if after < 0 {
			found = nil
		}
		if len(found) > 0 || after < 0 {
			writeJSON(w, http.StatusOK, map[string]any{"kills": found, "latest": latest})
			return
		}
		select {
		case <-next:
		case <-ctx.Done():
			writeJSON(w, http.StatusOK, map[string]any{"latest": latest})
			return
		}
	}
}
