package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hostSide is the machine a lab pretends to be: one mount namespace and one
// process namespace around the host's network namespace.
//
// Both are held by a first process (pid 1 of the process namespace) that waits
// for its standard input to end. This process holds the other end of that pipe,
// so however it ends, killed without warning too, the kernel closes the pipe,
// pid 1 ends, the kernel kills everything else in the process namespace, daemons
// included, and the mount namespace goes with the last of them. Programs are
// started by one thread that is parked inside the namespaces: exec.Cmd offers no
// way to join namespaces, and a thread's are inherited by what it starts.
type hostSide struct {
	starts chan func()
	stop   chan struct{} // closed to end the parked thread
	parked chan struct{} // closed when the parked thread has ended
	first  *exec.Cmd
	hold   io.Closer // closing it ends pid 1

	mu      sync.Mutex // guards started
	started map[*Cmd]struct{}
}

// hostFiles are the files that programs in the host see instead of the machine's:
// path below /etc → content.
type hostFiles map[string]string

// newHostSide makes the namespaces and starts pid 1.
func newHostSide(net *Netns, files hostFiles) (*hostSide, error) {
	h := &hostSide{starts: make(chan func()), stop: make(chan struct{}), parked: make(chan struct{}), started: map[*Cmd]struct{}{}}
	ready := make(chan error, 1)
	go h.park(net, files, ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return h, nil
}

// park runs on the thread that starts programs until stop is closed. The
// thread ends with it: it cannot share its file system view again.
func (h *hostSide) park(net *Netns, files hostFiles, ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread cannot end and stands for the whole process in /proc:
		// keep it locked, and so out of the way, until another goroutine has
		// surely been put on another thread.
		moved := make(chan struct{})
		go func() {
			close(moved)
			h.park(net, files, ready)
		}()
		<-moved
		runtime.UnlockOSThread()
		return
	}
	defer close(h.parked)
	if err := h.setUp(net, files); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for {
		select {
		case start := <-h.starts:
			start()
		case <-h.stop:
			return
		}
	}
}

func (h *hostSide) setUp(net *Netns, files hostFiles) error {
	if err := unix.Setns(net.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the host's network namespace: %w", err)
	}
	// Package os starts a trial child the first time it deals with a process. As
	// the first process of the new namespace it would be its pid 1, and its end
	// the namespace's end: have it now.
	if p, err := os.FindProcess(os.Getpid()); err == nil {
		_ = p.Release()
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWPID); err != nil {
		return fmt.Errorf("unshare mount and process namespaces: %w", err)
	}
	// Slave: what the machine unmounts later goes here as well, and nothing that
	// is mounted here is ever seen by the machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := mountFiles(files); err != nil {
		return err
	}
	return h.startFirst()
}

// mountFiles gives the mount namespace an empty /run (named namespaces, sockets
// and pid files of the machine are none of the lab's business) and lays files
// over /etc. An overlay rather than bind mounts: it also covers paths that are
// missing or symbolic links, as /etc/resolv.conf often is.
func mountFiles(files hostFiles) error {
	if err := unix.Mount("lab", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=256m"); err != nil {
		return fmt.Errorf("mount a temporary /run: %w", err)
	}
	const upper, work = "/run/lab/etc", "/run/lab/work"
	for _, dir := range []string{upper, work, "/run/netns", "/run/lock"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("create %s: %w", dir, err)
		}
	}
	for name, content := range files {
		path := filepath.Join(upper, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("create the folder of %s: %w", path, err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	opts := "lowerdir=/etc,upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("lab", "/etc", "overlay", 0, opts); err != nil {
		return fmt.Errorf("lay the lab's files over /etc (needs overlayfs, Linux 3.18): %w", err)
	}
	return nil
}

// firstProgram is pid 1: it mounts the /proc of its process namespace, which only
// a process inside can do, lets the kernel reap orphans (an ignored SIGCHLD is
// kept across exec), and waits for the end of its input.
const firstProgram = `mount -t proc proc /proc && trap '' CHLD && echo ready && exec cat >/dev/null`

func (h *hostSide) startFirst() error {
	var stderr bytes.Buffer
	c := exec.Command("/bin/sh", "-c", firstProgram) //nolint:noctx // it lives as long as the lab, and ends by its input
	c.Dir = "/"
	c.Stderr = &stderr
	hold, err := c.StdinPipe()
	if err != nil {
		return fmt.Errorf("pipe to pid 1: %w", err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return errors.Join(fmt.Errorf("pipe from pid 1: %w", err), hold.Close())
	}
	if err := c.Start(); err != nil {
		return fmt.Errorf("start pid 1: %w", err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		return errors.Join(fmt.Errorf("pid 1 did not get ready: %q %s", line, strings.TrimSpace(stderr.String())),
			err, hold.Close(), c.Wait())
	}
	h.first, h.hold = c, hold
	return nil
}

// close ends every process in the process namespace and waits for them.
func (h *hostSide) close() error {
	close(h.stop)
	<-h.parked
	err := h.hold.Close()
	// The kernel reports pid 1 as ended only when the last process of its
	// namespace has been killed and reaped, and those started here are reaped here.
	h.mu.Lock()
	started := slices.Collect(maps.Keys(h.started))
	h.mu.Unlock()
	for _, c := range started {
		_ = c.Wait() // killed, and whoever started it is told the same
	}
	if werr := h.first.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("end pid 1: %w", werr))
	}
	return err
}

// Cmd is a program to run in the host. It is an exec.Cmd in everything but how it
// starts: only the methods of Cmd itself start it, and the embedded exec.Cmd
// refuses to, so that a program never runs outside the lab by mistake.
type Cmd struct {
	*exec.Cmd
	host    *hostSide
	wait    sync.Once
	waitErr error
}

var errOutside = errors.New("a lab command is started by lab.Cmd, not by the exec.Cmd in it")

// HostCommand returns a program to be run in the host namespace, where the names
// of the lab resolve and its certificates are trusted (the system bundle,
// SSL_CERT_FILE and NODE_EXTRA_CA_CERTS). All programs of one lab share one
// mount namespace and one process namespace: a mount or a daemon left by one is
// seen by the next, and none outlives the lab. ctx kills the program.
func (l *Lab) HostCommand(ctx context.Context, name string, args ...string) *Cmd {
	c := &Cmd{Cmd: exec.CommandContext(ctx, name, args...), host: l.hostSide}
	c.WaitDelay = 5 * time.Second // a daemon that inherited stdout must not block Wait
	c.Env = append(c.Environ(),
		"SSL_CERT_FILE="+l.BundleFile(),
		"REQUESTS_CA_BUNDLE="+l.BundleFile(),
		"NODE_EXTRA_CA_CERTS="+l.CAFile(),
	)
	if c.Err == nil {
		c.Err = errOutside
	}
	return c
}

// Start starts the program; see exec.Cmd.Start.
func (c *Cmd) Start() error {
	if !errors.Is(c.Err, errOutside) {
		return c.Cmd.Start() // it reports what exec.Command found wrong
	}
	if c.Dir == "" {
		wd, err := os.Getwd()
		if err != nil {
			return fmt.Errorf("start %s in the lab: %w", c.Path, err)
		}
		c.Dir = wd // the parked thread has its own working directory
	}
	c.Err = nil
	started := make(chan error, 1)
	select {
	case c.host.starts <- func() { started <- c.Cmd.Start() }:
		if err := <-started; err != nil {
			return err
		}
		c.host.mu.Lock()
		defer c.host.mu.Unlock()
		c.host.started[c] = struct{}{}
		return nil
	case <-c.host.parked:
		return fmt.Errorf("start %s: the lab is closed", c.Path)
	}
}

// Wait waits for the program to end; see exec.Cmd.Wait. It may be called more
// than once. Closing the lab ends the program and waits for it as well.
func (c *Cmd) Wait() error {
	c.wait.Do(func() {
		c.waitErr = c.Cmd.Wait()
		c.host.mu.Lock()
		defer c.host.mu.Unlock()
		delete(c.host.started, c)
	})
	return c.waitErr
}

// Run starts the program and waits for it; see exec.Cmd.Run.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns its standard output; see exec.Cmd.Output.
func (c *Cmd) Output() ([]byte, error) {
	var out, errOut bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &errOut
	}
	err := c.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		exit.Stderr = errOut.Bytes()
	}
	return out.Bytes(), err
}

// CombinedOutput runs the program and returns its standard output and error
// together; see exec.Cmd.CombinedOutput.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var both bytes.Buffer
	c.Stdout, c.Stderr = &both, &both
	err := c.Run()
	return both.Bytes(), err
}
