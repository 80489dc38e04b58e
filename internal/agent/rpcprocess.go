package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
	"github.com/cordonhq/cordon/api/gen/agent/process/processconnect"
)

var _ processconnect.ProcessHandler = processService{}

// processService is process.Process.
type processService struct{ a *Agent }

func (s processService) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	return connect.NewResponse(&pb.ListResponse{Processes: s.a.procs.list()}), nil
}

func (s processService) Start(ctx context.Context, req *connect.Request[pb.StartRequest], out *connect.ServerStream[pb.StartResponse]) error {
	c, err := s.a.command(req.Header(), req.Msg)
	if err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok { // from Connect-Timeout-Ms
		c.limit = max(time.Until(deadline), 1)
	}
	p, sub, err := s.a.procs.start(c)
	if err != nil {
		return startError(err)
	}
	defer p.unsubscribe(sub)
	send := func(ev *pb.ProcessEvent) error { return out.Send(&pb.StartResponse{Event: ev}) }
	err = stream(ctx, p, sub, events{send: send, silence: keepalive(req.Header())})
	switch {
	case err != nil:
		return err
	case p.expired.Load(): // the kill of the deadline must not look like a command's own end
		return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
	default:
		return send(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: p.end}})
	}
}

func (s processService) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest], out *connect.ServerStream[pb.ConnectResponse]) error {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	sub := p.subscribe()
	defer p.unsubscribe(sub)
	send := func(ev *pb.ProcessEvent) error { return out.Send(&pb.ConnectResponse{Event: ev}) }
	err = stream(ctx, p, sub, events{send: send, silence: keepalive(req.Header())})
	if err == nil {
		err = send(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: p.end}})
	}
	return err
}

// events is where a stream's events go and how often it must show life.
type events struct {
	send    func(*pb.ProcessEvent) error
	silence time.Duration
}

// stream sends the start and all output of p; it returns nil once p has ended
// and everything is sent.
func stream(ctx context.Context, p *process, sub *subscriber, out events) error {
	if err := out.send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: &pb.ProcessEvent_StartEvent{Pid: uint32(p.pid)}}}); err != nil {
		return err
	}
	data := func(d *pb.ProcessEvent_DataEvent) error {
		return out.send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: d}})
	}
	idle := time.NewTimer(out.silence)
	defer idle.Stop()
	for {
		var err error
		select {
		case d := <-sub.data:
			err = data(d)
		case <-idle.C:
			err = out.send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}})
		case <-ctx.Done():
			return ctx.Err()
		case <-p.done:
			return rest(sub, data)
		}
		if err != nil {
			return err
		}
		idle.Reset(out.silence)
	}
}

// rest sends what is queued; nothing is published after the end.
func rest(sub *subscriber, send func(*pb.ProcessEvent_DataEvent) error) error {
	for {
		select {
		case d := <-sub.data:
			if err := send(d); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// keepalive is the silence after which a stream must send something.
func keepalive(h http.Header) time.Duration {
	const standard = 90
	s, err := strconv.Atoi(h.Get("Keepalive-Ping-Interval"))
	if err != nil || s < 1 || s > 3600 {
		s = standard
	}
	return time.Duration(s) * time.Second
}

func (s processService) Update(_ context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if size := req.Msg.GetPty().GetSize(); size != nil {
		if p.pty == nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no terminal to resize"))
		}
		if err := p.resize(size); err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	return connect.NewResponse(&pb.UpdateResponse{}), nil
}

func (s processService) SendInput(ctx context.Context, req *connect.Request[pb.SendInputRequest]) (*connect.Response[pb.SendInputResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.write(ctx, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SendInputResponse{}), nil
}

func (s processService) StreamInput(ctx context.Context, in *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	var p *process
	for in.Receive() {
		switch ev := in.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			found, err := s.find(ev.Start.GetProcess())
			if err != nil {
				return nil, err
			}
			p = found
		case *pb.StreamInputRequest_Data:
			if p == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the first event of StreamInput must be start"))
			}
			if err := p.write(ctx, ev.Data.GetInput()); err != nil {
				return nil, err
			}
		}
	}
	if err := in.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), nil
}

// write gives input to the process's standard input or terminal.
func (p *process) write(ctx context.Context, in *pb.ProcessInput) error {
	var b []byte
	switch v := in.GetInput().(type) {
	case *pb.ProcessInput_Pty:
		if p.pty == nil {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no terminal: write to its stdin"))
		}
		b = v.Pty
	case *pb.ProcessInput_Stdin:
		if p.pty != nil {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has a terminal: write to its pty"))
		}
		b = v.Stdin
	default:
		return connect.NewError(connect.CodeInvalidArgument, errors.New("input has neither stdin nor pty"))
	}
	if p.stdin == nil {
		return errNoStdin()
	}
	err := p.stdin.write(ctx, b)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrClosed), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.EIO):
		return errNoStdin()
	default:
		return connect.NewError(connect.CodeInternal, fmt.Errorf("write input: %w", err))
	}
}

// errNoStdin carries the text SDK users know.
func errNoStdin() error {
	return connect.NewError(connect.CodeInternal, errors.New("stdin not enabled or closed"))
}

func (s processService) CloseStdin(_ context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	switch {
	case p.pty != nil:
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("a terminal's input is not closed: send Ctrl+D (0x04)"))
	case p.stdin == nil:
		return nil, errNoStdin()
	}
	p.stdin.close() // closing twice is closed
	return connect.NewResponse(&pb.CloseStdinResponse{}), nil
}

func (s processService) SendSignal(ctx context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	switch sig := req.Msg.GetSignal(); sig {
	case pb.Signal_SIGNAL_SIGKILL, pb.Signal_SIGNAL_SIGTERM:
		err = p.signal(ctx, syscall.Signal(sig))
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("signal %d: only SIGNAL_SIGTERM and SIGNAL_SIGKILL can be sent", sig))
	}
	switch {
	case errors.Is(err, os.ErrProcessDone):
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", p.pid))
	case err != nil:
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("signal process %d: %w", p.pid, err))
	}
	return connect.NewResponse(&pb.SendSignalResponse{}), nil
}

func (s processService) find(sel *pb.ProcessSelector) (*process, error) {
	p, err := s.a.procs.find(sel)
	switch {
	case err == nil:
		return p, nil
	case errors.Is(err, os.ErrProcessDone):
		return nil, connect.NewError(connect.CodeNotFound, err)
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
}

// startError classifies a failed start: running out of something may pass,
// anything else is the request's fault.
func startError(err error) error {
	code := connect.CodeInvalidArgument
	for _, full := range []error{errTooMany, syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ENOSPC} {
		if errors.Is(err, full) {
			code = connect.CodeResourceExhausted
		}
	}
	return connect.NewError(code, err)
}

// caller returns whom an RPC acts as, and the claim it acts under.
func (a *Agent) caller(h http.Header) (user, *claim, error) {
	c := a.claim.Load() // not nil: private saw to it
	name, err := basicUser(h)
	if err != nil {
		return user{}, nil, connect.NewError(connect.CodeUnauthenticated, err)
	}
	u, err := a.userOrDefault(c, name)
	var unknown unknownUser
	switch {
	case errors.As(err, &unknown):
		return user{}, nil, connect.NewError(connect.CodeUnauthenticated, err)
	case err != nil:
		return user{}, nil, connect.NewError(connect.CodeInternal, err)
	}
	return u, c, nil
}

func (a *Agent) userOrDefault(c *claim, name string) (user, error) {
	if name == "" {
		name = c.DefaultUser
	}
	return a.users.lookup(name)
}

// command checks a start request and completes it with user, directory and
// environment.
func (a *Agent) command(h http.Header, req *pb.StartRequest) (command, error) {
	u, c, err := a.caller(h)
	if err != nil {
		return command{}, err
	}
	cfg := req.GetProcess()
	if cfg == nil {
		return command{}, connect.NewError(connect.CodeInvalidArgument, errors.New("process is missing: name a command"))
	}
	cmd := command{
		config: cfg, tag: req.Tag, user: u,
		stdin: req.Stdin == nil || req.GetStdin(),
		env:   a.environment(c, u, cfg.GetEnvs()),
	}
	if req.Pty != nil {
		cmd.size = &pb.PTY_Size{Cols: 80, Rows: 24}
		if s := req.GetPty().GetSize(); s.GetCols() > 0 && s.GetRows() > 0 {
			cmd.size = s
		}
	}
	for k, v := range cfg.GetEnvs() {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return command{}, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("process.envs: %q is not a variable's name or its value has a NUL byte", k))
		}
	}
	if cmd.dir, err = directory(c, u, cfg); err == nil {
		cmd.path, err = findProgram(cfg.GetCmd(), cmd.dir, cmd.env)
	}
	if err != nil {
		return command{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return cmd, nil
}

// directory returns where a command starts. The directory it asks for must
// exist; a missing default becomes the home, a missing home the root.
func directory(c *claim, u user, cfg *pb.ProcessConfig) (string, error) {
	isDir := func(p string) bool {
		return u.as(func() error {
			fi, err := os.Stat(p)
			if err == nil && !fi.IsDir() {
				err = syscall.ENOTDIR
			}
			return err
		}) == nil
	}
	dir, err := resolve(cfg.GetCwd(), u, c.DefaultWorkdir)
	if err != nil {
		return "", err
	}
	switch {
	case isDir(dir):
		return dir, nil
	case cfg.GetCwd() != "":
		return "", fmt.Errorf("cwd '%s' does not exist", dir)
	case isDir(u.Home):
		return u.Home, nil
	default:
		return "/", nil
	}
}

// environment is a command's whole environment: nothing of the agent's own but
// PATH reaches it.
func (a *Agent) environment(c *claim, u user, asked map[string]string) []string {
	env := map[string]string{"PATH": a.cfg.Path, "HOME": u.Home, "USER": u.Name, "LOGNAME": u.Name}
	maps.Copy(env, c.env)
	maps.Copy(env, asked)
	out := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		out = append(out, k+"="+env[k])
	}
	return out
}
