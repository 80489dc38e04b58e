package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
)

// group is the cgroup of all commands, in a hierarchy of version 1 that counts
// processes and threads. The agent stays outside: it must be able to answer, and
// to start a thread, when a fork bomb has used up the limit. Within gVisor this is
// the only limit a sandbox's processes meet, RLIMIT_NPROC is not one.
type group struct {
	enter *os.File // moves the writing thread into the group
	leave *os.File // and back
	most  string   // file of the limit
	limit int

	mu sync.RWMutex // held for writing while the group is barren
}

// newGroup makes a group of at most limit processes and threads below the
// hierarchy's directory.
func newGroup(hierarchy string, limit int) (*group, error) {
	dir := filepath.Join(hierarchy, "commands")
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		return nil, fmt.Errorf("make the commands' cgroup: %w", err)
	}
	g := &group{most: filepath.Join(dir, "pids.max"), limit: limit}
	if err := g.set(limit); err != nil {
		return nil, err
	}
	var err error
	g.enter, err = os.OpenFile(filepath.Join(dir, "tasks"), os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the commands' cgroup: %w", err)
	}
	g.leave, err = os.OpenFile(filepath.Join(hierarchy, "tasks"), os.O_WRONLY, 0)
	if err != nil {
		g.enter.Close()
		return nil, fmt.Errorf("open the agent's cgroup: %w", err)
	}
	return g, nil
}

func (g *group) set(limit int) error {
	if err := os.WriteFile(g.most, strconv.AppendInt(nil, int64(limit), 10), 0); err != nil {
		return fmt.Errorf("limit the commands' cgroup: %w", err)
	}
	return nil
}

// barren runs f while no process of the group can have children.
func (g *group) barren(f func()) {
	if g == nil {
		f()
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.set(0) != nil {
		f()
		return
	}
	f()
	for range 3 {
		if g.set(g.limit) == nil {
			return
		}
	}
}

// within runs fork on a thread that is in the group, so that the child is from its
// first instruction. Its error is EAGAIN while the group is full or barren. A nil
// group runs fork anywhere.
func (g *group) within(fork func() error) error {
	if g == nil {
		return fork()
	}
	if !g.mu.TryRLock() {
		return syscall.EAGAIN
	}
	defer g.mu.RUnlock()
	self := []byte("0") // the writing thread
	runtime.LockOSThread()
	if _, err := g.enter.WriteAt(self, 0); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the commands' cgroup: %w", err)
	}
	forked := fork()
	if _, err := g.leave.WriteAt(self, 0); err == nil {
		runtime.UnlockOSThread() // else the thread ends with its goroutine
	}
	return forked
}
