package agent

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

	limit int // of processes and threads
	// barren runs a function while no process can have children, if that can be had.
	barren func(func())

	mu      sync.Mutex // guards what follows
	most    int        // processes at once so far
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
	// Processes is how many were killed: more than one when a command's many
	// processes together were the biggest; then PID and Command are one's.
	Processes int `json:"processes"`
}

func (k kill) String() string {
	if k.Processes > 1 {
		return fmt.Sprintf("out of memory: the %d processes of a command, one of them %d (%s), were the biggest and were killed", k.Processes, k.PID, k.Command)
	}
	return fmt.Sprintf("out of memory: process %d (%s) was the biggest, with %d MiB, and was killed", k.PID, k.Command, k.Bytes>>20)
}

const (
	maxKills = 64 // remembered for the host
	// spareProcesses is how many below the limit the guard acts, so that commands
	// can still be started.
	spareProcesses = 16
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

func newGuard(proc string, log *slog.Logger) *guard {
	g := &guard{proc: proc, log: log, self: os.Getpid(), doom: func(kill) {}, barren: func(f func()) { f() }, changed: make(chan struct{}), limit: math.MaxInt32}
	var most unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &most); err == nil && most.Max < math.MaxInt32 {
		g.limit = int(most.Max)
	}
	return g
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

// hidden is what the sandbox's processes cost that does not show as memory in
// here: beside each, the runtime keeps a process of the host for it, and keeps
// some of that when it has ended, for the next. Measured with gVisor's systrap.
func hidden(now, most int) uint64 {
	const (
		ofLiving = 256 << 10
		ofMost   = 512 << 10
	)
	return uint64(now)*ofLiving + uint64(most)*ofMost
}

// unhidden is how much of that the runtime's limit has room for: its own share
// and half of what it has for bursts.
func unhidden(total uint64) uint64 { return 64<<20 + max(64<<20, total/4)/2 }

// check looks once, acts if it must, and returns when to look again.
func (g *guard) check() time.Duration {
	mem, err := readMeminfo(g.proc)
	if err != nil {
		g.log.Warn("memory not guarded", "err", err)
		return lookLate
	}
	pids := g.pids()
	g.mu.Lock()
	g.most = max(g.most, len(pids))
	cost := hidden(len(pids), g.most)
	g.mu.Unlock()
	total, left := mem["MemTotal"], available(mem)
	left -= min(left, cost-min(cost, unhidden(total)))
	low := floor(total)
	full := len(pids) > g.limit-spareProcesses
	if left >= low && !full {
		return min(max(time.Duration(float64(left-low)/growth*float64(time.Second)), lookSoon), lookLate)
	}
	victim, members := g.biggest(pids, full)
	if len(members) == 0 {
		return lookLate
	}
	victim.Left = left
	g.doom(victim) // now: once it is dead, its session is not to be found
	if len(members) > 1 {
		g.barren(func() { g.killAll(members) })
	} else if syscall.Kill(victim.PID, syscall.SIGKILL) != nil {
		return lookSoon // gone by itself
	}
	g.log.Warn("process killed, memory is short", "pid", victim.PID, "command", victim.Command, "bytes", victim.Bytes, "processes", victim.Processes)
	g.record(victim)
	return settle
}

// killAll kills processes, and those of their sessions that were born since they
// were listed.
func (g *guard) killAll(pids []int) {
	sessions := map[int]bool{}
	for _, pid := range pids {
		if sid, err := unix.Getsid(pid); err == nil {
			sessions[sid] = true
		}
	}
	g.killSessions(sessions)
}

// killSession kills the processes of a session. Those that made sessions of their
// own, as daemons do, are in it no more.
func (g *guard) killSession(leader int) { g.killSessions(map[int]bool{leader: true}) }

func (g *guard) killSessions(sessions map[int]bool) {
	const rounds = 20 // some take a while to be born, or to die
	for range rounds {
		alive := 0
		for _, pid := range g.pids() {
			if sid, err := unix.Getsid(pid); err == nil && sessions[sid] && g.resident(pid) > 0 {
				alive++
				_ = syscall.Kill(pid, syscall.SIGKILL) // it may be gone
			}
		}
		if alive == 0 {
			return
		}
		time.Sleep(lookSoon)
	}
}

// forget is called when the runtime's own memory begins anew, as after a restore.
func (g *guard) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.most = 0
}

// pids are all processes but the agent and the first.
func (g *guard) pids() []int {
	dir, err := os.Open(g.proc)
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	var out []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid != g.self && pid != 1 {
			out = append(out, pid)
		}
	}
	return out
}

// crowd is how many processes make a command a crowd, which is killed as a whole:
// one by one, they would be born faster.
const crowd = 64

// biggest finds the process with the most memory, or the session of a command
// whose many processes together have more, and whom to kill for it: where the
// number of processes is full and no session has many, all.
func (g *guard) biggest(pids []int, full bool) (victim kill, members []int) {
	sessions := map[int][]int{}
	bytes := map[int]uint64{}
	for _, pid := range pids {
		rss := g.resident(pid)
		if rss > victim.Bytes || victim.PID == 0 {
			victim.PID, victim.Bytes = pid, rss
		}
		if sid, err := unix.Getsid(pid); err == nil {
			sessions[sid] = append(sessions[sid], pid)
			bytes[sid] += rss + hidden(1, 1)
		}
	}
	if victim.PID == 0 {
		return victim, nil
	}
	members = []int{victim.PID}
	for sid, of := range sessions {
		if len(of) >= crowd && bytes[sid] > victim.Bytes {
			victim.PID, victim.Bytes, members = of[0], bytes[sid], of
		}
	}
	if full && len(members) == 1 {
		members = pids // each in a session of its own
	}
	victim.Time, victim.Processes = time.Now().UTC(), len(members)
	victim.Command = utf8(strings.TrimSpace(g.read(victim.PID, "comm")))
	return victim, members
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
