package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// sentry returns the sandbox's sentry, or 0 when it has ended. Its ID is in
// gVisor's state, but only a process in the sandbox's cgroup is it.
func (r *Runtime) sentry(id sandbox.ID) (int, error) {
	c, _, err := r.load(id)
	if err != nil {
		return 0, err
	}
	if c.Sandbox == nil {
		return 0, nil
	}
	pid := c.Sandbox.Pid.Load()
	if pid <= 0 || !r.groups.holds(id, pid) {
		return 0, nil
	}
	return pid, nil
}

// Wait implements sandbox.Runtime. It costs a file descriptor and no thread.
func (r *Runtime) Wait(ctx context.Context, id sandbox.ID) error {
	pid, err := r.sentry(id)
	if err != nil {
		return err
	}
	if pid == 0 {
		return r.whyEnded(id)
	}
	// Without PIDFD_NONBLOCK, package os would not hand the descriptor to the
	// runtime's poller.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return r.whyEnded(id)
	} else if err != nil {
		return fmt.Errorf("watch the sandbox's process: %w", err)
	}
	f := os.NewFile(uintptr(fd), "sentry")
	defer f.Close()
	if !r.groups.holds(id, pid) { // the descriptor is another process's
		return r.whyEnded(id)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch the sandbox's process: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	err = raw.Read(func(fd uintptr) bool { return exited(int(fd)) })
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("watch the sandbox's process: %w", err)
	}
	return r.whyEnded(id)
}

// whyEnded is what Wait returns of a sandbox that has ended.
func (r *Runtime) whyEnded(id sandbox.ID) error {
	if r.groups.starved(id) {
		return sandbox.ErrOutOfMemory
	}
	return nil
}

// reapExited collects the sandbox's processes that ended by themselves, where
// that falls to this process; see killed.reap.
func (r *Runtime) reapExited(id sandbox.ID) {
	c, err := loadContainer(r.root(), string(id))
	if err != nil {
		return // nothing is known of it
	}
	pids := []int{c.GoferPid.Load()}
	if c.Sandbox != nil {
		pids = append(pids, c.Sandbox.Pid.Load())
	}
	for _, pid := range pids {
		// One that has left its cgroup takes a moment until it can be collected, and on a
		// busy machine a longer one.
		for end := time.Now().Add(killTimeout); pid > 0 && time.Now().Before(end); time.Sleep(time.Millisecond) {
			got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
			if got != 0 || err != nil || !exiting(pid) { // ECHILD: another process's
				break
			}
		}
	}
}

// exiting reports whether a process is on its way out or gone. One that is not has
// only got the number of one that was.
func exiting(pid int) bool {
	const flag = 0x4 // PF_EXITING of the kernel's sched.h
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	text := string(b)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]) // from the state on; see proc_pid_stat(5)
	if len(fields) < 7 {
		return true
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	return err != nil || flags&flag != 0
}

// exited reports whether the process of a descriptor has ended.
func exited(pidfd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
	return err == nil && n > 0
}

// Stats implements sandbox.Runtime.
func (r *Runtime) Stats(_ context.Context, id sandbox.ID) (sandbox.Stats, error) {
	pid, err := r.sentry(id)
	if err != nil {
		return sandbox.Stats{}, err
	}
	if pid == 0 {
		return sandbox.Stats{}, errs.New(errs.Conflict, "sandbox %s has exited", id)
	}
	var s sandbox.Stats
	if s.CPUTime, err = r.groups.cpuTime(id); err != nil {
		return sandbox.Stats{}, fmt.Errorf("read the CPU time: %w", err)
	}
	if s.MemoryBytes, err = r.groups.memory(id); err != nil {
		return sandbox.Stats{}, fmt.Errorf("read the memory in use: %w", err)
	}
	if s.DiskBytes, err = layerBytes(pid); err != nil {
		return sandbox.Stats{}, fmt.Errorf("read the size of the writable layer: %w", err)
	}
	return s, nil
}

// layerPrefix begins the names of the files that back writable layers.
const layerPrefix = "runsc-filestore-"

// layerBytes adds up the space of the files that back the writable layer. They
// have no names: the sentry's descriptors are all there is.
func layerBytes(pid int) (int64, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	seen := map[uint64]bool{} // by inode: a descriptor may be duplicated
	var sum int64
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		name, err := os.Readlink(path)
		if err != nil || !strings.Contains(name, layerPrefix) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || seen[st.Ino] {
			continue
		}
		seen[st.Ino] = true
		sum += st.Blocks * 512
	}
	return sum, nil
}
