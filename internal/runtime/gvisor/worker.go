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

	"github.com/cordonhq/cordon/internal/sandbox"
)

// A worker is a process that creates and starts one sandbox and ends. It exists
// because the library that does both takes its own process for granted: it moves
// the whole caller into the sandbox's cgroup for a while, hands the caller's
// standard files to the sandbox and its environment to the gofer, enters the
// sandbox's network namespace and leaves a raw socket of it open, which every
// later child would inherit. None of that may be the server's.
//
// It reads requests from requestFD and answers each on resultFD. When the server
// ends, it does too.
type worker struct {
	cmd  *exec.Cmd
	in   *os.File
	out  *os.File
	read *json.Decoder // of out
}

// request is one step of a worker's.
type request struct {
	Step   string   // one of the following
	Flags  []string // runsc's
	Bundle string
	ID     string
	Image  string // folder of the checkpoint
}

const (
	stepCreate  = "create"
	stepStart   = "start"
	stepRestore = "restore"
	stepFreeze  = "freeze"
)

// result is the answer to a request.
type result struct{ Err string }

// A worker's files besides the standard ones.
const (
	resultFD  = 3
	requestFD = 4
)

// startWorker starts a worker, which takes some 20 ms until it can read.
func startWorker() (*worker, error) {
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
	cmd.Args = []string{workerArg0}
	cmd.Env = []string{} // nil would be the server's
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{outW, inR} // standard files are the null device
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start a worker: %w", err), inW.Close(), outR.Close())
	}
	return &worker{cmd: cmd, in: inW, out: outR, read: json.NewDecoder(io.LimitReader(outR, 1<<20))}, nil
}

// do has the worker take one step. When the context ends first, the worker is
// killed and leaves the step half done.
func (w *worker) do(ctx context.Context, req request) error {
	stop := context.AfterFunc(ctx, func() { _ = w.cmd.Process.Kill() })
	defer stop()
	var res result
	err := json.NewEncoder(w.in).Encode(req)
	if err == nil {
		err = w.read.Decode(&res)
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("the worker ended: %w", err)
	case res.Err != "":
		return errors.New(res.Err)
	}
	return nil
}

// end ends the worker, which has nothing to lose.
func (w *worker) end() {
	w.in.Close()
	w.out.Close()
	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait()
}

// workers are those of one Runtime: each created sandbox keeps the one that
// created it until it is started, and one waits for the next sandbox, so that
// its creation need not wait for a process to start.
type workers struct {
	mu     sync.Mutex // guards the others
	held   map[sandbox.ID]*worker
	spare  *worker
	closed bool
}

// take returns the sandbox's worker, or the one that waits, or a new one.
func (p *workers) take(id sandbox.ID) (*worker, error) {
	p.mu.Lock()
	w := p.held[id]
	delete(p.held, id)
	if w == nil {
		w, p.spare = p.spare, nil
	}
	p.mu.Unlock()
	if w != nil {
		return w, nil
	}
	return startWorker()
}

// keep holds a worker for the sandbox's start.
func (p *workers) keep(id sandbox.ID, w *worker) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		w.end()
		return
	}
	if p.held == nil {
		p.held = map[sandbox.ID]*worker{}
	}
	p.held[id] = w
}

// forget ends the sandbox's worker if it has one.
func (p *workers) forget(id sandbox.ID) {
	p.mu.Lock()
	w := p.held[id]
	delete(p.held, id)
	p.mu.Unlock()
	if w != nil {
		w.end()
	}
}

// refill has a worker wait. A failure is not one: take starts its own.
func (p *workers) refill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.spare != nil || p.closed {
		return
	}
	if w, err := startWorker(); err == nil {
		p.spare = w
	}
}

// close ends all workers; no more will wait.
func (p *workers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.spare != nil {
		p.spare.end()
		p.spare = nil
	}
	for id, w := range p.held {
		w.end()
		delete(p.held, id)
	}
}

// runWorker is a worker's main. It returns its exit code.
func runWorker() int {
	runscVersion = version()
	silence(io.Discard)
	unix.CloseOnExec(resultFD)
	unix.CloseOnExec(requestFD)
	in := json.NewDecoder(os.NewFile(requestFD, "requests"))
	out := json.NewEncoder(os.NewFile(resultFD, "results"))
	ready := errors.Join(holdTable(resultFD), limitProcesses())
	for {
		var req request
		if in.Decode(&req) != nil {
			return 0 // the server does not need us any more
		}
		var res result
		if err := ready; err != nil {
			res.Err = err.Error()
		} else if err := req.run(); err != nil {
			res.Err = err.Error()
		}
		if out.Encode(res) != nil {
			return 1
		}
	}
}

// run takes the step, in the worker.
func (q *request) run() error {
	conf, err := parseFlags(q.Flags)
	if err != nil {
		return err
	}
	if q.Step == stepCreate {
		spec, err := specutils.ReadSpec(q.Bundle, conf)
		if err != nil {
			return fmt.Errorf("read the bundle: %w", err)
		}
		_, err = container.New(conf, container.Args{ID: q.ID, Spec: spec, BundleDir: q.Bundle})
		return err
	}
	c, err := loadContainer(conf.RootDir, q.ID)
	if err != nil {
		return err
	}
	switch q.Step {
	case stepStart:
		return c.Start(conf)
	case stepRestore:
		return c.Restore(conf, q.Image, directRestore, backgroundRestore, nil)
	case stepFreeze:
		return c.Pause()
	default:
		return fmt.Errorf("no step is called %q", q.Step)
	}
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
