package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/specutils"
)

// A creator is a process that makes the processes of one sandbox and ends. It
// exists because the library that does it takes its own process for granted: it
// moves the whole caller into the sandbox's cgroup for a while, hands the
// caller's standard files to the sandbox and its environment to the gofer. None
// of that may be the server's.
//
// It reads one request from its standard input and reports failure on resultFD;
// when the server ends first, it does too.
type creator struct {
	cmd    *exec.Cmd
	in     *os.File
	result *os.File
}

// request is what a creator is asked for.
type request struct {
	Flags  []string // runsc's
	Bundle string
	ID     string
}

// resultFD is where a creator says why it failed.
const resultFD = 3

// startCreator starts a creator, which takes some 20 ms until it can read.
func startCreator() (*creator, error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("open a pipe: %w", err)
	}
	defer inR.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a pipe: %w", err), inW.Close())
	}
	defer outW.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{createArg0}
	cmd.Env = []string{} // nil would be the server's
	cmd.Dir = "/"
	cmd.Stdin, cmd.ExtraFiles = inR, []*os.File{outW}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the create process: %w", err), inW.Close(), outR.Close())
	}
	return &creator{cmd: cmd, in: inW, result: outR}, nil
}

// create has the creator do its work and waits for its end.
func (c *creator) create(ctx context.Context, req request) error {
	defer c.result.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.cmd.Process.Kill() })
	defer stop()
	sent := json.NewEncoder(c.in).Encode(req)
	sent = errors.Join(sent, c.in.Close())
	// The pipe is at its end when the creator is: nobody inherits it.
	why, _ := io.ReadAll(io.LimitReader(c.result, 64<<10))
	ended := c.cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case len(why) > 0:
		return errors.New(string(why))
	default:
		return errors.Join(sent, ended)
	}
}

// discard ends a creator that is not needed.
func (c *creator) discard() {
	c.in.Close()
	c.result.Close()
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// spare keeps one creator waiting, so that a sandbox's creation need not wait
// for a process to start.
type spare struct {
	mu      sync.Mutex // guards the others
	waiting *creator
	closed  bool
}

// take returns a creator, the one that waits if there is one.
func (s *spare) take() (*creator, error) {
	s.mu.Lock()
	c := s.waiting
	s.waiting = nil
	s.mu.Unlock()
	if c != nil {
		return c, nil
	}
	return startCreator()
}

// refill has a creator wait. A failure is not one: the next take starts its own.
func (s *spare) refill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting != nil || s.closed {
		return
	}
	if c, err := startCreator(); err == nil {
		s.waiting = c
	}
}

// close ends the creator that waits; there will be no other.
func (s *spare) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.waiting != nil {
		s.waiting.discard()
		s.waiting = nil
	}
}

// runCreator is a creator's main. It returns its exit code.
func runCreator() int {
	runscVersion = version()
	silence(io.Discard)
	unix.CloseOnExec(resultFD)
	result := os.NewFile(resultFD, "result")
	if err := createOne(); errors.Is(err, io.EOF) {
		return 0 // the server does not need us
	} else if err != nil {
		fmt.Fprint(result, err)
		return 1
	}
	return 0
}

func createOne() error {
	if err := holdTable(resultFD); err != nil {
		return err
	}
	var req request
	if err := json.NewDecoder(os.Stdin).Decode(&req); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	// Standard output and error are the null device since we were started.
	if err := unix.Dup3(int(null.Fd()), 0, 0); err != nil {
		return fmt.Errorf("let go of standard input: %w", err)
	}
	if err := limitProcesses(); err != nil {
		return err
	}
	conf, err := parseFlags(req.Flags)
	if err != nil {
		return err
	}
	spec, err := specutils.ReadSpec(req.Bundle, conf)
	if err != nil {
		return fmt.Errorf("read the bundle: %w", err)
	}
	_, err = container.New(conf, container.Args{ID: req.ID, Spec: spec, BundleDir: req.Bundle})
	return err
}

// limitProcesses sets what the sentry and the gofer inherit: no core dumps, which
// would be files on the host as large as a sandbox's memory, and as many open
// files as the host allows, for each file of the image that is open inside is
// one of the sentry's.
func limitProcesses() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: openFiles, Max: openFiles}) == nil {
		return nil
	}
	var now unix.Rlimit // without CAP_SYS_RESOURCE, the hard limit has to do
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	now.Cur = now.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return nil
}
