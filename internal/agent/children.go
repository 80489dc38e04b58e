package agent

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// children starts processes and is the only one to wait for them. PID 1 must
// reap orphans it never started, with wait4(-1), which would steal the exits
// that os/exec waits for; so os/exec and os.Process are not used at all.
type children struct {
	all   bool   // reap every child, not only our own
	group *group // what children are counted in; nil: they are not

	// mu is held from before fork until the pid is in waiting, and while reaping:
	// so no exit is collected before its owner is known, and no signal is sent to
	// a pid that is already free for others.
	mu      sync.Mutex
	waiting map[int]chan<- syscall.WaitStatus
}

func newChildren(all bool) *children {
	return &children{all: all, waiting: map[int]chan<- syscall.WaitStatus{}}
}

const (
	// crowded is how long a start waits for room among the processes: the guard is
	// about to make some where there is none, and needs a few looks for it.
	crowded = 5 * time.Second
	// crowdedPause is how long it waits between two attempts.
	crowdedPause = 20 * time.Millisecond
)

// start runs a program. Its exit arrives once on the channel.
func (c *children) start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	for deadline := time.Now().Add(crowded); ; time.Sleep(crowdedPause) {
		pid, exit, err := c.tryStart(path, argv, attr)
		if !errors.Is(err, syscall.EAGAIN) || time.Now().After(deadline) {
			return pid, exit, err
		}
	}
}

func (c *children) tryStart(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	exit := make(chan syscall.WaitStatus, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	var pid int
	err := c.group.within(func() (err error) {
		pid, err = syscall.ForkExec(path, argv, attr)
		return err
	})
	if err != nil {
		return 0, nil, err
	}
	c.waiting[pid] = exit
	return pid, exit, nil
}

// signal sends sig to a child of ours that has not been reaped.
func (c *children) signal(pid int, sig syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.waiting[pid]; !ok {
		return os.ErrProcessDone
	}
	return syscall.Kill(pid, sig)
}

// run reaps until ctx ends.
func (c *children) run(ctx context.Context) error {
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	defer signal.Stop(died)
	for {
		c.reap() // also what died before we listened
		select {
		case <-died:
		case <-ctx.Done():
			return nil
		}
	}
}

// reap collects all exits there are.
func (c *children) reap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all {
		for {
			if pid := c.collect(-1); pid <= 0 {
				return
			}
		}
	}
	for pid := range c.waiting {
		c.collect(pid)
	}
}

// collect waits for pid (-1: any) without blocking and tells its owner.
func (c *children) collect(pid int) int {
	var status syscall.WaitStatus
	for {
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || got <= 0 {
			return 0
		}
		if exit, ours := c.waiting[got]; ours {
			delete(c.waiting, got)
			exit <- status
		}
		return got
	}
}
