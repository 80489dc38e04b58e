package interpreter

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"time"
)

// How long a kernel is asked to give up a cell before it is ended, and how often.
const (
	interruptPatience = 3 * time.Second
	interruptEvery    = time.Second
	startPatience     = 60 * time.Second
	warmPatience      = 150 * time.Second // the first to load Matplotlib looks for all fonts
)

// kernel runs the cells of one context, one at a time.
type kernel interface {
	// run executes a cell and emits its lines, but not the last. It returns when
	// the kernel is free for the next cell. When ctx ends the cell is interrupted.
	// errEnded says that the kernel is gone, errExited that the cell meant it to go,
	// errStuck that it does not obey; then it must be closed.
	run(ctx context.Context, c cell, emit func(line)) error
	// close ends the kernel and what it started.
	close()
}

var (
	errEnded  = errors.New("the kernel ended")
	errExited = errors.New("the cell ended the kernel")
	errStuck  = errors.New("the kernel did not obey an interrupt")
)

// cell is code and what it is run with. In the environments, nil removes a variable.
type cell struct {
	code    string
	count   int                // of the context's executions, with this one
	sandbox map[string]*string // changes that stay: the sandbox's own variables
	env     map[string]*string // for this cell only
	reseed  bool               // the process was copied: draw other random numbers than its twins
}

// process is a kernel's process with what it started, a process group.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when the first process is gone
	state string        // how it ended; written before ended is closed
}

// start begins a process, and a goroutine that waits for its end.
func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &process{cmd: cmd, ended: make(chan struct{})}
	go p.wait()
	return p, nil
}

// wait reaps the process. It ends with the process, which close kills.
func (p *process) wait() {
	_ = p.cmd.Wait() // the state says it
	p.state = p.cmd.ProcessState.String()
	close(p.ended)
}

// interrupt sends what a terminal sends on Control-C.
func (p *process) interrupt() { _ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGINT) }

// kill ends the group and waits until the first process is gone.
func (p *process) kill() {
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.ended
}

// stop interrupts a cell again and again until it is over, and drops its output.
func (p *process) stop(over func(within time.Duration) bool) error {
	for end := time.Now().Add(interruptPatience); time.Now().Before(end); {
		p.interrupt()
		if over(interruptEvery) {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%w: %s", errEnded, p.state)
		default:
		}
	}
	return errStuck
}
