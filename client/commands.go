package client

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/cordonhq/cordon/api/gen/agent/process"
	"github.com/cordonhq/cordon/api/gen/agent/process/processconnect"
)

// Commands runs commands in a sandbox.
type Commands struct {
	rpc processconnect.ProcessClient
}

// RunOptions say how a command runs. The zero value is fine.
type RunOptions struct {
	Env  map[string]string // on top of the sandbox's
	Dir  string            // empty: the template's
	User string            // empty: the template's
	// Timeout ends the command with SIGKILL; 0: none but the context's.
	Timeout time.Duration
	// Stdout and Stderr receive output as it comes, besides the Result.
	Stdout, Stderr io.Writer
	// Stdin keeps the command's input open for Process.Send; without it the
	// input is /dev/null.
	Stdin bool
	// MaxOutput is how many octets of each stream the Result keeps; 0: 16 MiB.
	// The rest is received and dropped, and Truncated set.
	MaxOutput int
}

const defaultMaxOutput = 16 << 20

// Result is how a command ended.
type Result struct {
	Stdout, Stderr string
	ExitCode       int    // -1 when a signal ended it
	Status         string // "exit status 0", "signal: killed"
	Truncated      bool   // output beyond RunOptions.MaxOutput was dropped
}

// Run runs a shell command and waits for its end. An exit code other than 0 is
// not an error; err says that the command could not be run or watched. When ctx
// ends the command is killed.
func (c *Commands) Run(ctx context.Context, command string, o RunOptions) (*Result, error) {
	p, err := c.Start(ctx, command, o)
	if err != nil {
		return nil, err
	}
	return p.Wait(ctx)
}

// Process is a command that was started.
type Process struct {
	PID uint32 // inside the sandbox

	rpc    processconnect.ProcessClient
	user   string
	cancel context.CancelFunc // of the stream, not of the command
	done   chan struct{}      // closed when result and err are set
	result Result
	err    error
}

// Start starts a shell command in the background. ctx bounds the start only;
// call Wait, or Close to leave the command alone.
func (c *Commands) Start(ctx context.Context, command string, o RunOptions) (*Process, error) {
	req := connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-l", "-c", command}, Envs: o.Env},
		Stdin:   &o.Stdin,
	})
	if o.Dir != "" {
		req.Msg.Process.Cwd = &o.Dir
	}
	asUser(req.Header(), o.User)
	// The agent kills the command at the deadline of the stream's context, which
	// the RPC carries along; so it is the command's timeout and nothing else.
	streamCtx, cancel := withTimeout(context.WithoutCancel(ctx), o.Timeout)
	stop := context.AfterFunc(ctx, cancel)
	stream, err := c.rpc.Start(streamCtx, req)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start command: %w", rpcError(err))
	}
	p := &Process{rpc: c.rpc, user: o.User, cancel: cancel, done: make(chan struct{})}
	if !stream.Receive() || stream.Msg().GetEvent().GetStart() == nil {
		cancel()
		err := cmp.Or(stream.Err(), errors.New("the agent's first event is not the start"))
		return nil, errors.Join(fmt.Errorf("start command: %w", rpcError(err)), stream.Close())
	}
	stop()
	p.PID = stream.Msg().GetEvent().GetStart().GetPid()
	go p.watch(stream, o)
	return p, nil
}

// withTimeout is context.WithTimeout where 0 is none.
func withTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d > 0 {
		return context.WithTimeout(ctx, d)
	}
	return context.WithCancel(ctx)
}

// watch receives until the command ends or the stream does.
func (p *Process) watch(stream *connect.ServerStreamForClient[process.StartResponse], o RunOptions) {
	defer close(p.done)
	defer p.cancel()
	limit := cmp.Or(o.MaxOutput, defaultMaxOutput)
	stdout, stderr := output{limit: limit, tee: o.Stdout}, output{limit: limit, tee: o.Stderr}
	ended := false
	for !ended && stream.Receive() {
		switch event := stream.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Data:
			stdout.take(event.Data.GetStdout())
			stderr.take(event.Data.GetStderr())
		case *process.ProcessEvent_End:
			p.result.ExitCode, p.result.Status = int(event.End.GetExitCode()), event.End.GetStatus()
			ended = true
		}
	}
	p.result.Stdout, p.result.Stderr = stdout.kept.String(), stderr.kept.String()
	p.result.Truncated = stdout.dropped || stderr.dropped
	p.err = errors.Join(stdout.err, stderr.err)
	if !ended {
		p.err = rpcError(cmp.Or(stream.Err(), io.ErrUnexpectedEOF))
	}
	if err := stream.Close(); err != nil && ended {
		p.err = errors.Join(p.err, rpcError(err))
	}
}

// output keeps the beginning of a stream and passes all of it on.
type output struct {
	kept    bytes.Buffer
	limit   int
	dropped bool
	tee     io.Writer
	err     error // of tee, which then gets nothing more
}

func (o *output) take(b []byte) {
	room := max(0, o.limit-o.kept.Len())
	o.kept.Write(b[:min(len(b), room)])
	o.dropped = o.dropped || len(b) > room
	if o.tee != nil && o.err == nil {
		_, o.err = o.tee.Write(b)
	}
}

// Wait returns when the command has ended. When ctx ends first it kills the
// command.
func (p *Process) Wait(ctx context.Context) (*Result, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		killCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		err := errors.Join(ctx.Err(), p.Kill(killCtx))
		p.Close()
		return nil, fmt.Errorf("wait for command: %w", err)
	}
	if p.err != nil {
		return nil, fmt.Errorf("wait for command: %w", p.err)
	}
	return &p.result, nil
}

// Close stops watching; the command goes on.
func (p *Process) Close() {
	p.cancel()
	<-p.done
}

// Kill sends SIGKILL. A command that has ended already is no error.
func (p *Process) Kill(ctx context.Context) error {
	return p.signal(ctx, process.Signal_SIGNAL_SIGKILL)
}

// Terminate sends SIGTERM. A command that has ended already is no error.
func (p *Process) Terminate(ctx context.Context) error {
	return p.signal(ctx, process.Signal_SIGNAL_SIGTERM)
}

func (p *Process) signal(ctx context.Context, s process.Signal) error {
	req := connect.NewRequest(&process.SendSignalRequest{Process: p.selector(), Signal: s})
	asUser(req.Header(), p.user)
	if _, err := p.rpc.SendSignal(ctx, req); err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		return fmt.Errorf("signal command: %w", rpcError(err))
	}
	return nil
}

// Send writes to the command's input, which RunOptions.Stdin opens.
func (p *Process) Send(ctx context.Context, input []byte) error {
	req := connect.NewRequest(&process.SendInputRequest{
		Process: p.selector(), Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: input}},
	})
	asUser(req.Header(), p.user)
	if _, err := p.rpc.SendInput(ctx, req); err != nil {
		return fmt.Errorf("send input: %w", rpcError(err))
	}
	return nil
}

// CloseStdin ends the command's input.
func (p *Process) CloseStdin(ctx context.Context) error {
	req := connect.NewRequest(&process.CloseStdinRequest{Process: p.selector()})
	asUser(req.Header(), p.user)
	if _, err := p.rpc.CloseStdin(ctx, req); err != nil {
		return fmt.Errorf("close input: %w", rpcError(err))
	}
	return nil
}

func (p *Process) selector() *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: p.PID}}
}

// rpcStatus is the HTTP status that means what a code of the agent's does.
var rpcStatus = map[connect.Code]int{
	connect.CodeInvalidArgument:    http.StatusBadRequest,
	connect.CodeFailedPrecondition: http.StatusBadRequest,
	connect.CodeUnauthenticated:    http.StatusUnauthorized,
	connect.CodePermissionDenied:   http.StatusForbidden,
	connect.CodeNotFound:           http.StatusNotFound,
	connect.CodeAlreadyExists:      http.StatusConflict,
	connect.CodeResourceExhausted:  http.StatusTooManyRequests,
	connect.CodeUnavailable:        http.StatusServiceUnavailable,
	connect.CodeUnimplemented:      http.StatusNotImplemented,
}

// rpcError turns what the agent or the server before it said into an Error, and
// a passed deadline into the context's. What was never said stays as it is.
func rpcError(err error) error {
	var rpc *connect.Error
	if !errors.As(err, &rpc) {
		return err
	}
	if rpc.Code() == connect.CodeDeadlineExceeded {
		return fmt.Errorf("%s: %w", rpc.Message(), context.DeadlineExceeded)
	}
	var unsaid *noAnswer
	if status, ok := rpcStatus[rpc.Code()]; ok && !errors.As(err, &unsaid) {
		return &Error{Status: status, Message: rpc.Message()}
	}
	return err
}
