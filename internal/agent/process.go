package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	runes "unicode/utf8" // utf8 is ours

	"golang.org/x/sys/unix"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
)

const (
	pipeChunk = 32 << 10 // bytes of one output event
	ptyChunk  = 16 << 10
	// queued is how many output events wait for a slow reader before the process
	// does.
	queued = 8
	// afterEnd is how long Connect still answers a process's end.
	afterEnd = 30 * time.Second
	// settleOutput is how long output is still awaited when a process has ended by
	// itself: its children may hold the pipe for ever, but what is behind a pipe of
	// its own, such as tee(1), may need a moment.
	settleOutput = 500 * time.Millisecond
	// drain is how long a killed process's output is still read: what it wrote is
	// there already.
	drain = 20 * time.Millisecond
	// maxSpilling is how many pipes of ended commands are kept open for the children
	// that still write to them.
	maxSpilling = 1024
)

// command is a request to start a process, resolved and checked.
type command struct {
	config *pb.ProcessConfig
	tag    *string
	user   user
	path   string
	dir    string
	env    []string
	size   *pb.PTY_Size // nil: pipes
	stdin  bool
	limit  time.Duration // after which it is killed; zero: never
}

// process is one the agent started.
type process struct {
	config *pb.ProcessConfig
	tag    *string
	pid    int
	stdin  *input   // nil for /dev/null
	pty    *os.File // nil without a terminal

	kids    *children
	session func(leader int) // kills the processes of a session
	outputs []*os.File
	killed  chan struct{} // closed when we kill it: its output ends at once
	once    sync.Once
	expired atomic.Bool          // killed by its deadline
	limit   *countdown           // the deadline; nil without
	doomed  atomic.Pointer[kill] // the last process of its session that memory was too short for

	done chan struct{} // closed when end is set
	end  *pb.ProcessEvent_EndEvent

	mu   sync.Mutex // guards subs
	subs map[*subscriber]struct{}
}

// subscriber is one stream following a process.
type subscriber struct {
	data chan *pb.ProcessEvent_DataEvent
	gone chan struct{} // closed when the stream leaves
}

// processes is the table of live and recently ended processes.
type processes struct {
	kids    *children
	session func(leader int)
	wg      sync.WaitGroup // the goroutines of live processes
	quit    chan struct{}  // closed by abandon
	used    chan struct{}  // gets one element when the first process starts

	mu      sync.Mutex // guards what follows
	quitted bool
	live    map[int]*process
	opening int // starts under way
	ended   []*process
	spilled map[*os.File]struct{} // read by nobody but spill
}

func newProcesses(kids *children, session func(leader int)) *processes {
	return &processes{kids: kids, session: session, live: map[int]*process{}, spilled: map[*os.File]struct{}{}, quit: make(chan struct{}), used: make(chan struct{}, 1)}
}

// errTooMany is the error of start at the limit.
var errTooMany = fmt.Errorf("%d processes are running already: end some first", maxProcesses)

// start runs a command; first is subscribed before its first output.
func (t *processes) start(c command) (*process, *subscriber, error) {
	t.mu.Lock()
	if len(t.live)+t.opening >= maxProcesses {
		t.mu.Unlock()
		return nil, nil, errTooMany
	}
	t.opening++
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.opening--
		t.mu.Unlock()
	}()

	p := &process{
		config: c.config, tag: c.tag, kids: t.kids, session: t.session,
		killed: make(chan struct{}), done: make(chan struct{}), subs: map[*subscriber]struct{}{},
	}
	exit, err := p.launch(c)
	if err != nil {
		return nil, nil, err
	}
	first := p.subscribe()
	select {
	case t.used <- struct{}{}:
	default:
	}
	t.mu.Lock()
	t.live[p.pid] = p
	t.wg.Add(1)
	t.mu.Unlock()
	if c.limit > 0 {
		p.limit = newCountdown(c.limit, func() {
			p.expired.Store(true)
			p.kill()
		})
	}
	go t.follow(p, exit)
	return p, first, nil
}

// launch opens the process's files and forks.
func (p *process) launch(c command) (exit <-chan syscall.WaitStatus, err error) {
	var theirs []*os.File // the child's ends, closed here after the fork
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
		if err != nil {
			p.closeFiles()
		}
	}()
	attr := &syscall.ProcAttr{
		Dir: c.dir,
		Env: c.env,
		// A session of its own: "kill 0" in a command must not reach the agent.
		Sys: &syscall.SysProcAttr{Setsid: true},
	}
	if os.Geteuid() == 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: c.user.UID, Gid: c.user.GID, Groups: c.user.Groups}
	}
	if c.size != nil {
		theirs, err = p.openPTY(c)
		attr.Sys.Setctty = true
	} else {
		theirs, err = p.openPipes(c.stdin)
	}
	if err != nil {
		return nil, err
	}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd())
	}
	argv := append([]string{c.config.GetCmd()}, c.config.GetArgs()...)
	p.pid, exit, err = p.kids.start(c.path, argv, attr)
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", c.path, err)
	}
	return exit, nil
}

// openPipes opens the three standard files and returns the child's ends.
func (p *process) openPipes(stdin bool) (theirs []*os.File, err error) {
	if stdin {
		r, w, err := pipe(toChild)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, r)
		p.stdin = newInput(w)
	} else {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, null)
	}
	for range 2 {
		r, w, err := pipe(fromChild)
		if err != nil {
			return theirs, err
		}
		theirs = append(theirs, w)
		p.outputs = append(p.outputs, r)
	}
	return theirs, nil
}

// direction says which end of a pipe stays with us.
type direction int

const (
	toChild direction = iota
	fromChild
)

// pipe makes our end non-blocking, so that deadlines work, and leaves the
// child's end blocking, as programs expect.
func pipe(d direction) (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	ours := fds[0]
	if d == toChild {
		ours = fds[1]
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, os.NewSyscallError("set non-blocking", err)
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe"), nil
}

func (p *process) closeFiles() {
	if p.stdin != nil {
		p.stdin.close()
	}
	for _, f := range p.outputs {
		f.Close()
	}
	if p.pty != nil {
		p.pty.Close()
	}
}

// follow pumps a process's output until it ended, then serves its end. A process
// ends when it exits, not when its output does: children that it left behind may
// hold that for ever.
func (t *processes) follow(p *process, exit <-chan syscall.WaitStatus) {
	defer t.wg.Done()
	var pumps sync.WaitGroup
	switch {
	case p.pty != nil:
		pumps.Go(func() { p.pump(p.pty, ptyChunk, nothing, asPTY) })
	default:
		pumps.Go(func() { p.pump(p.outputs[0], pipeChunk, unfinished, asStdout) })
		pumps.Go(func() { p.pump(p.outputs[1], pipeChunk, unfinished, asStderr) })
	}
	pumped := make(chan struct{})
	go func() { pumps.Wait(); close(pumped) }()

	var status syscall.WaitStatus
	select {
	case status = <-exit:
	case <-t.quit: // the agent stops and reaps no more
		status = syscall.WaitStatus(syscall.SIGKILL)
	}
	if status.Signaled() && status.Signal() == syscall.SIGKILL {
		p.release() // whoever killed it
	}
	p.cutOutputs(settleOutput)
	select {
	case <-pumped: // every holder of the pipe closed it, or it is cut
	case <-p.killed:
		p.cutOutputs(drain)
		<-pumped
	case <-t.quit:
		p.release()
		p.cutOutputs(drain)
		<-pumped
	}
	if p.limit != nil {
		p.limit.stop()
	}
	select {
	case <-p.killed:
	default:
		t.spill(p)
	}
	p.closeFiles()
	p.end = endEvent(status, p.doomed.Load())
	t.retire(p)
	close(p.done)
}

// spill keeps the pipes that children of an ended process may still write to, and
// drops what comes: a server that was started in the background must not be ended
// by its next line of log. A terminal is hung up, as when its first process exits.
func (t *processes) spill(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.quitted {
		return
	}
	for _, f := range p.outputs {
		if len(t.spilled) >= maxSpilling || f.SetReadDeadline(time.Time{}) != nil {
			f.Close()
			continue
		}
		t.spilled[f] = struct{}{}
		t.wg.Go(func() {
			_, _ = io.Copy(discarded{}, f) // it ends with the last child, or with the agent
			t.mu.Lock()
			defer t.mu.Unlock()
			f.Close()
			delete(t.spilled, f)
		})
	}
	p.outputs = nil
}

// discarded is io.Discard with little to read into.
type discarded struct{}

func (discarded) Write(b []byte) (int, error) { return len(b), nil }

func (discarded) ReadFrom(r io.Reader) (n int64, err error) {
	buf := make([]byte, 4<<10)
	for err == nil {
		var m int
		m, err = r.Read(buf)
		n += int64(m)
	}
	return n, err
}

// cutOutputs ends the pumps after a while, even if children still hold the pipe.
func (p *process) cutOutputs(after time.Duration) {
	by := time.Now().Add(after)
	for _, f := range p.outputs {
		_ = f.SetReadDeadline(by) // closed already is as good
	}
	if p.pty != nil {
		_ = p.pty.SetReadDeadline(by)
	}
}

func asStdout(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stdout{Stdout: b}}
}

func asStderr(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stderr{Stderr: b}}
}

func asPTY(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Pty{Pty: b}}
}

// pump reads one output until its end. A terminal ends with EIO. Text is cut between
// characters where hold says so: clients decode each piece by itself.
func (p *process) pump(f *os.File, chunk int, hold func([]byte) int, event func([]byte) *pb.ProcessEvent_DataEvent) {
	buf := make([]byte, chunk)
	held := 0 // octets at the start of buf that were not published yet
	in := tail{f: f, left: -1}
	for {
		n, err := in.Read(buf[held:])
		have := buf[:held+n]
		if n > 0 && err == nil {
			held = hold(have)
		} else {
			held = 0
		}
		if out := have[:len(have)-held]; len(out) > 0 {
			p.publish(out, event)
		}
		if err != nil {
			return
		}
		copy(buf, have[len(have)-held:])
	}
}

// tail reads a pipe to its deadline, and then what was in it: a reader who is slow
// loses nothing that the process wrote before it ended.
type tail struct {
	f    *os.File
	left int // octets that were in it at the deadline; below 0 before
}

func (r *tail) Read(b []byte) (int, error) {
	n, err := 0, os.ErrDeadlineExceeded
	if r.left < 0 {
		n, err = r.f.Read(b)
	}
	if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	if r.left < 0 {
		r.left = waiting(r.f)
	}
	if r.left == 0 || r.f.SetReadDeadline(time.Now().Add(drain)) != nil {
		return 0, err
	}
	n, err = r.f.Read(b[:min(len(b), r.left)])
	r.left -= n
	return n, err
}

// waiting is how many octets can be read at once.
func waiting(f *os.File) int {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	err = raw.Control(func(fd uintptr) {
		if got, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ); err == nil {
			n = got
		}
	})
	if err != nil {
		return 0
	}
	return n
}

// unfinished is how many octets at b's end begin a UTF-8 character of which more
// must come: 0 to 3.
func unfinished(b []byte) int {
	for n := 1; n < runes.UTFMax && n <= len(b); n++ {
		if c := b[len(b)-n:]; runes.RuneStart(c[0]) {
			if runes.FullRune(c) {
				return 0 // complete, or no character whatever comes
			}
			return n
		}
	}
	return 0
}

// nothing holds back no octets: what a terminal shows is decoded as a stream.
func nothing([]byte) int { return 0 }

// publish hands output to every subscriber. Without one it is dropped; a full
// subscriber is waited for, which in turn makes the process wait, until its
// stream gives up (see steady) or the process is killed.
func (p *process) publish(b []byte, event func([]byte) *pb.ProcessEvent_DataEvent) {
	p.mu.Lock()
	subs := make([]*subscriber, 0, len(p.subs))
	for s := range p.subs {
		subs = append(subs, s)
	}
	p.mu.Unlock()
	if len(subs) == 0 {
		return
	}
	ev := event(slices.Clone(b))
	for _, s := range subs {
		select {
		case s.data <- ev:
			continue
		default:
		}
		select {
		case s.data <- ev:
		case <-s.gone:
		case <-p.killed:
		}
	}
}

func (p *process) subscribe() *subscriber {
	s := &subscriber{data: make(chan *pb.ProcessEvent_DataEvent, queued), gone: make(chan struct{})}
	p.mu.Lock()
	p.subs[s] = struct{}{}
	p.mu.Unlock()
	return s
}

func (p *process) unsubscribe(s *subscriber) {
	p.mu.Lock()
	delete(p.subs, s)
	p.mu.Unlock()
	close(s.gone)
}

// release ends the process's output without waiting for its children.
func (p *process) release() { p.once.Do(func() { close(p.killed) }) }

// kill ends the process, all of its session and its output at once.
func (p *process) kill() {
	err := p.kids.signal(p.pid, syscall.SIGKILL)
	if err == nil { // otherwise the number may be another's by now
		p.session(p.pid)
	}
	p.release()
}

// signal sends sig; os.ErrProcessDone when it is dead and, for SIGKILL, its
// output has ended too. After a SIGKILL the process is gone and reaped, so that
// whoever killed it finds no trace of it.
func (p *process) signal(ctx context.Context, sig syscall.Signal) error {
	if sig != syscall.SIGKILL {
		return p.kids.signal(p.pid, sig)
	}
	select {
	case <-p.done:
		return os.ErrProcessDone
	default:
	}
	p.kill()
	const patience = 2 * time.Second // a process in an uninterruptible sleep dies later
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-p.done:
	case <-ctx.Done():
	}
	return nil
}

// doom notes that a process is about to be killed for its memory with the command
// it belongs to, whose end then says so.
func (t *processes) doom(k kill) {
	leader, err := unix.Getsid(k.PID)
	if err != nil {
		return // gone by itself
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.live[leader]; ok {
		p.doomed.Store(&k)
	}
}

// endEvent words an exit as Go's os.ProcessState does, which clients parse. The
// error of a command that failed after one of its processes was killed for its
// memory goes on to say so.
func endEvent(s syscall.WaitStatus, doomed *kill) *pb.ProcessEvent_EndEvent {
	ev := &pb.ProcessEvent_EndEvent{ExitCode: int32(s.ExitStatus()), Exited: s.Exited()}
	switch {
	case s.Exited():
		ev.Status = fmt.Sprintf("exit status %d", s.ExitStatus())
	case s.Signaled():
		ev.Status = "signal: " + s.Signal().String()
		if s.CoreDump() {
			ev.Status += " (core dumped)"
		}
	default:
		ev.Status = "unknown status"
	}
	if !s.Exited() || s.ExitStatus() != 0 {
		ev.Error = &ev.Status
		if doomed != nil {
			text := ev.Status + ": " + doomed.String()
			ev.Error = &text
		}
	}
	return ev
}

// retire moves a process from the live to the ended ones and forgets old ends.
func (t *processes) retire(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, p.pid)
	p.config = nil // may be large; nobody lists the dead
	if t.quitted {
		return
	}
	if len(t.ended) >= maxEnded {
		t.ended = slices.Delete(t.ended, 0, 1)
	}
	t.ended = append(t.ended, p)
	time.AfterFunc(afterEnd, func() { t.forget(p) })
}

func (t *processes) forget(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = slices.DeleteFunc(t.ended, func(q *process) bool { return q == p })
}

// find returns the live process a selector names, or an ended one, the latest first.
func (t *processes) find(sel *pb.ProcessSelector) (*process, error) {
	match := func(p *process) bool { return uint32(p.pid) == sel.GetPid() }
	text := fmt.Sprintf("process with pid %d not found", sel.GetPid())
	switch s := sel.GetSelector().(type) {
	case nil:
		return nil, errors.New("the selector names neither a pid nor a tag")
	case *pb.ProcessSelector_Tag:
		match = func(p *process) bool { return p.tag != nil && *p.tag == s.Tag }
		text = fmt.Sprintf("process with tag %s not found", s.Tag)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, byPID := sel.GetSelector().(*pb.ProcessSelector_Pid); byPID {
		if p, ok := t.live[int(sel.GetPid())]; ok {
			return p, nil
		}
	}
	for _, p := range t.live {
		if match(p) {
			return p, nil
		}
	}
	for _, p := range slices.Backward(t.ended) {
		if match(p) {
			return p, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", text, os.ErrProcessDone)
}

// list returns the live processes by pid.
func (t *processes) list() []*pb.ProcessInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*pb.ProcessInfo, 0, len(t.live))
	for _, p := range t.live {
		out = append(out, &pb.ProcessInfo{Config: p.config, Pid: uint32(p.pid), Tag: p.tag})
	}
	slices.SortFunc(out, func(x, y *pb.ProcessInfo) int { return int(x.Pid) - int(y.Pid) })
	return out
}

// abandon stops following all processes and waits until nothing follows them.
func (t *processes) abandon() {
	t.mu.Lock()
	if !t.quitted {
		t.quitted = true
		close(t.quit)
		for f := range t.spilled {
			f.Close()
		}
	}
	t.mu.Unlock()
	t.wg.Wait()
}

// input writes to a process, one writer at a time.
type input struct {
	turn chan struct{} // holds one element while nobody writes
	f    *os.File
}

func newInput(f *os.File) *input {
	in := &input{turn: make(chan struct{}, 1), f: f}
	in.turn <- struct{}{}
	return in
}

// write blocks while the process does not read, until ctx ends.
func (in *input) write(ctx context.Context, b []byte) error {
	select {
	case <-in.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { in.turn <- struct{}{} }()
	stop := context.AfterFunc(ctx, func() { _ = in.f.SetWriteDeadline(time.Unix(1, 0)) })
	_, err := in.f.Write(b)
	if !stop() {
		_ = in.f.SetWriteDeadline(time.Time{})
		if err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return err
}

func (in *input) close() { in.f.Close() }

// findProgram searches as execvp(3) does, in the PATH of the process's environment.
func findProgram(cmd, dir string, env []string) (string, error) {
	if cmd == "" {
		return "", errors.New("process.cmd is empty: name a program")
	}
	if strings.Contains(cmd, "/") {
		if !filepath.IsAbs(cmd) {
			cmd = filepath.Join(dir, cmd)
		}
		return cmd, nil
	}
	search := ""
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			search = v
		}
	}
	for _, d := range filepath.SplitList(search) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		p := filepath.Join(d, cmd)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("exec: %q: executable file not found in $PATH", cmd)
}
