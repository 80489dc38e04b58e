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

	mu     sync.Mutex // guards events
	events []event
}

// event is something the host should know about.
type event struct {
	Time    time.Time `json:"time"`
	Kind    string    `json:"kind"` // "out of memory"
	PID     int       `json:"pid"`
	Command string    `json:"command"`
	Bytes   uint64    `json:"bytes"`     // resident
	Left    uint64    `json:"available"` // of the sandbox's memory
}

const (
	maxEvents = 64
	// growth is the fastest a sandbox is assumed to fill memory, in bytes per
	// second: it says how soon the guard must look again.
	growth   = 1 << 30
	lookSoon = 5 * time.Millisecond
	lookLate = 250 * time.Millisecond
	// settle is how long a killed process gets to free its memory before the next
	// one is chosen.
	settle = 100 * time.Millisecond
)

func newGuard(proc string, log *slog.Logger) *guard {
	return &guard{proc: proc, log: log, self: os.Getpid()}
}

// floor is the available memory below which a process is killed. The runtime's
// limit is the sandbox's plan and 64 MiB, all of which shows as memory in here,
// but the sandbox's own kernel lives in it too, unseen: it keeps those 64 MiB,
// and 16 more for what is allocated between a look and the kill.
func floor(total uint64) uint64 { return min(80<<20, total/4) }

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
	if err := syscall.Kill(victim.PID, syscall.SIGKILL); err != nil {
		return lookSoon // gone by itself
	}
	g.log.Warn("process killed, memory is short", "pid", victim.PID, "command", victim.Command, "bytes", victim.Bytes)
	g.record(victim)
	return settle
}

// biggest finds the process with the most resident memory.
func (g *guard) biggest() (event, bool) {
	dirs, err := os.ReadDir(g.proc)
	if err != nil {
		return event{}, false
	}
	var best event
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == g.self || pid == 1 {
			continue
		}
		if rss := g.resident(pid); rss > best.Bytes {
			best = event{PID: pid, Bytes: rss}
		}
	}
	if best.PID == 0 {
		return best, false
	}
	best.Kind, best.Time = "out of memory", time.Now().UTC()
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

func (g *guard) record(e event) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.events) == maxEvents {
		g.events = append(g.events[:0], g.events[1:]...)
	}
	g.events = append(g.events, e)
}

// getEvents tells the host what the guard did, oldest first.
func (a *Agent) getEvents(w http.ResponseWriter, _ *http.Request) {
	a.guard.mu.Lock()
	events := append([]event{}, a.guard.events...)
	a.guard.mu.Unlock()
	writeJSON(w, http.StatusOK, map[string]any{"events": events})
}
