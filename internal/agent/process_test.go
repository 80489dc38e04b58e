package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
)

// result is a process's whole stream.
type result struct {
	pid    uint32
	out    string // standard output or terminal
	errOut string
	end    *pb.ProcessEvent_EndEvent
	alive  int // keepalives
	err    error
}

func bash(script string) *pb.StartRequest {
	no := false
	return &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}, Stdin: &no}
}

// received is a stream of either kind.
type received interface {
	Receive() bool
	Err() error
	Close() error
}

func collect(s received, event func() *pb.ProcessEvent, r *result) {
	// Builders, because a string that grows by each event is copied with each: a reader
	// so slow that it measures itself.
	var out, errOut strings.Builder
	defer func() { r.out, r.errOut = r.out+out.String(), r.errOut+errOut.String() }()
	for s.Receive() {
		switch ev := event().GetEvent().(type) {
		case *pb.ProcessEvent_Start:
			r.pid = ev.Start.GetPid()
		case *pb.ProcessEvent_Data:
			out.Write(ev.Data.GetStdout())
			out.Write(ev.Data.GetPty())
			errOut.Write(ev.Data.GetStderr())
		case *pb.ProcessEvent_End:
			r.end = ev.End
		case *pb.ProcessEvent_Keepalive:
			r.alive++
		}
	}
	r.err = s.Err()
	s.Close()
}

// begin starts a process and returns once it runs.
func (h *harness) begin(ctx context.Context, req *pb.StartRequest, headers ...string) (uint32, *connect.ServerStreamForClient[pb.StartResponse]) {
	h.t.Helper()
	r := connect.NewRequest(req)
	for i := 0; i < len(headers); i += 2 {
		r.Header().Set(headers[i], headers[i+1])
	}
	s, err := h.process().Start(ctx, r)
	if err != nil {
		h.t.Fatal(err)
	}
	if !s.Receive() {
		s.Close()
		return 0, s
	}
	pid := s.Msg().GetEvent().GetStart().GetPid()
	if pid == 0 {
		h.t.Fatalf("the first event is %v, want start", s.Msg())
	}
	return pid, s
}

func (h *harness) run(ctx context.Context, req *pb.StartRequest, headers ...string) result {
	h.t.Helper()
	var r result
	var s *connect.ServerStreamForClient[pb.StartResponse]
	r.pid, s = h.begin(ctx, req, headers...)
	collect(s, func() *pb.ProcessEvent { return s.Msg().GetEvent() }, &r)
	return r
}

func byPID(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}

func (h *harness) signal(pid uint32, sig pb.Signal) error {
	_, err := h.process().SendSignal(h.t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid), Signal: sig}))
	return err
}

func TestProcessesRunAndEnd(t *testing.T) {
	h := claimed(t)
	msg := "signal: killed"
	three := "exit status 3"
	for name, c := range map[string]struct {
		script string
		want   result
	}{
		"output of both kinds and success": {"echo out; echo err >&2", result{out: "out\n", errOut: "err\n", end: &pb.ProcessEvent_EndEvent{Exited: true, Status: "exit status 0"}}},
		"an exit status":                   {"exit 3", result{end: &pb.ProcessEvent_EndEvent{ExitCode: 3, Exited: true, Status: three, Error: &three}}},
		"a death by signal":                {"kill -9 $$", result{end: &pb.ProcessEvent_EndEvent{ExitCode: -1, Status: msg, Error: &msg}}},
		"no standard input":                {"cat; echo end", result{out: "end\n", end: &pb.ProcessEvent_EndEvent{Exited: true, Status: "exit status 0"}}},
		"a session of its own": {"kill 0 2>/dev/null; echo no", result{end: func() *pb.ProcessEvent_EndEvent {
			s := "signal: terminated"
			return &pb.ProcessEvent_EndEvent{ExitCode: -1, Status: s, Error: &s}
		}()}},
	} {
		t.Run(name, func(t *testing.T) {
			got := h.run(t.Context(), bash(c.script))
			if got.err != nil || got.out != c.want.out || got.errOut != c.want.errOut || got.end.String() != c.want.end.String() {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestTheEnvironmentIsTheUsersAndNothingElse(t *testing.T) {
	t.Setenv("AGENTS_OWN", "secret")
	h := claimed(t)
	req := &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "env", Envs: map[string]string{"ASKED": "2", "E2B_TEMPLATE_ID": "mine"}}}
	got := map[string]string{}
	for line := range strings.Lines(h.run(t.Context(), req).out) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		got[k] = v
	}
	want := map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME": h.home, "USER": "tester", "LOGNAME": "tester", "FROM_INIT": "1", "ASKED": "2",
		"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": "i1", "E2B_TEMPLATE_ID": "mine",
		"NOVITA_SANDBOX": "true", "NOVITA_SANDBOX_ID": "i1", "NOVITA_TEMPLATE_ID": "base",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestProcessesRunAsTheNamedUser(t *testing.T) {
	needRoot(t)
	h := claimed(t)
	for name, c := range map[string]struct{ auth, want, code string }{
		"nobody named is the default user": {"", "4242 4242 4242 4243 " + h.home, ""},
		"root":                             {"Basic cm9vdDo=", "0 0 0 /root", ""},
		"a user without an account":        {"Basic bm9ib2R5aGVyZTo=", "", "unauthenticated"},
		"garbage":                          {"Basic !!!", "", "unauthenticated"},
	} {
		t.Run(name, func(t *testing.T) {
			got := h.run(t.Context(), bash("echo $(id -u) $(id -g) $(id -G) $PWD"), "Authorization", c.auth)
			if strings.TrimSpace(got.out) != c.want || code(got.err) != c.code {
				t.Errorf("got %q %v, want %q %s", got.out, got.err, c.want, c.code)
			}
			if c.auth == "Basic bm9ib2R5aGVyZTo=" && !strings.Contains(got.err.Error(), "invalid username: 'nobodyhere'") {
				t.Errorf("got %v", got.err)
			}
		})
	}
}

func TestBadStartsSayWhy(t *testing.T) {
	h := claimed(t)
	dir := func(d string) *pb.StartRequest {
		r := bash("pwd")
		r.Process.Cwd = &d
		return r
	}
	for name, c := range map[string]struct {
		req        *pb.StartRequest
		code, text string
	}{
		"no process":                {&pb.StartRequest{}, "invalid_argument", "process is missing"},
		"no command":                {&pb.StartRequest{Process: &pb.ProcessConfig{}}, "invalid_argument", "process.cmd is empty"},
		"a program not in the PATH": {&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "no-such-program"}}, "invalid_argument", "executable file not found in $PATH"},
		"a program that is missing": {&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/no/such"}}, "invalid_argument", "no such file"},
		"a directory as program":    {&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/tmp"}}, "invalid_argument", "permission denied"},
		"a missing cwd":             {dir("/no/such"), "invalid_argument", "cwd '/no/such' does not exist"},
		"a file as cwd":             {dir("/etc/passwd"), "invalid_argument", "cwd '/etc/passwd' does not exist"},
		"another user's home":       {dir("~root"), "invalid_argument", "only ~ itself is expanded"},
		"a NUL in an argument":      {&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/true", Args: []string{"a\x00b"}}}, "invalid_argument", "invalid argument"},
		"an equals sign in a name":  {&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/true", Envs: map[string]string{"A=B": ""}}}, "invalid_argument", "not a variable's name"},
	} {
		t.Run(name, func(t *testing.T) {
			got := h.run(t.Context(), c.req)
			if code(got.err) != c.code || !strings.Contains(got.err.Error(), c.text) {
				t.Errorf("got %v, want %s with %q", got.err, c.code, c.text)
			}
		})
	}
}

func TestRelativeDirectoriesStartAtHome(t *testing.T) {
	h := claimed(t)
	for _, cwd := range []string{"", "~", ".", "sub", "~/sub"} {
		if err := os.MkdirAll(h.home+"/sub", 0o755); err != nil {
			t.Fatal(err)
		}
		want := h.home
		if strings.Contains(cwd, "sub") {
			want += "/sub"
		}
		req := bash("pwd -P")
		req.Process.Cwd = &cwd
		if got := strings.TrimSpace(h.run(t.Context(), req).out); got != want {
			t.Errorf("cwd %q: ran in %q, want %q", cwd, got, want)
		}
	}
}

// frame is one message of a Connect stream as it travels.
type frame struct {
	flags byte
	text  string
}

func readFrames(t *testing.T, r io.Reader) []frame {
	t.Helper()
	var out []frame
	for {
		var head [5]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return out
			}
			t.Fatal(err)
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:]))
		if _, err := io.ReadFull(r, body); err != nil {
			t.Fatal(err)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, body); err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		out = append(out, frame{head[0], compact.String()})
	}
}

func envelope(text string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(text))), text...)
}

func TestTheStreamIsWhatTheSDKsRead(t *testing.T) {
	h := claimed(t)
	post := func(path, body string) answer {
		return h.do("POST", path, bytes.NewReader(envelope(body)),
			"Content-Type", "application/connect+json", "Connect-Protocol-Version", "1", "Connect-Timeout-Ms", "60000", "Keepalive-Ping-Interval", "50")
	}
	got := post("/process.Process/Start", `{"process":{"cmd":"/bin/bash","args":["-l","-c","echo hi; exit 2"],"unknownField":1},"stdin":false}`)
	if got.StatusCode != 200 || got.Header.Get("Content-Type") != "application/connect+json" {
		t.Fatalf("%d %v", got.StatusCode, got.Header)
	}
	frames := readFrames(t, strings.NewReader(got.body))
	var pid struct {
		Event struct{ Start struct{ Pid int } }
	}
	if err := json.Unmarshal([]byte(frames[0].text), &pid); err != nil || pid.Event.Start.Pid == 0 {
		t.Fatalf("first frame %v: %v", frames[0], err)
	}
	want := []frame{
		{0, fmt.Sprintf(`{"event":{"start":{"pid":%d}}}`, pid.Event.Start.Pid)},
		{0, `{"event":{"data":{"stdout":"aGkK"}}}`},
		{0, `{"event":{"end":{"exitCode":2,"exited":true,"status":"exit status 2","error":"exit status 2"}}}`},
		{2, `{}`},
	}
	if diff := cmp.Diff(want, frames, cmp.AllowUnexported(frame{})); diff != "" {
		t.Error(diff)
	}

	got = post("/process.Process/Connect", `{"process":{"pid":1}}`)
	want = []frame{{2, `{"error":{"code":"not_found","message":"process with pid 1 not found: os: process already finished"}}`}}
	if diff := cmp.Diff(want, readFrames(t, strings.NewReader(got.body)), cmp.AllowUnexported(frame{})); got.StatusCode != 200 || diff != "" {
		t.Errorf("%d %s", got.StatusCode, diff)
	}

	unary := h.do("POST", "/process.Process/SendSignal", strings.NewReader(`{"process":{"pid":1},"signal":"SIGNAL_SIGKILL"}`), "Content-Type", "application/json", "Connect-Protocol-Version", "1")
	if unary.StatusCode != 404 || !strings.Contains(unary.body, `"code":"not_found"`) {
		t.Errorf("%d %s", unary.StatusCode, unary.body)
	}
}

func TestTheDeadlineKillsAndADisconnectDoesNot(t *testing.T) {
	h := claimed(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	got := h.run(ctx, bash("echo here; sleep 100 & wait"))
	if code(got.err) != "deadline_exceeded" || got.end != nil || got.out != "here\n" {
		t.Errorf("at the deadline: %+v", got)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the deadline of 300 ms took %v", took)
	}
	eventually(t, "the process is killed at its deadline", func() bool { return len(h.agent.procs.list()) == 0 })

	// The deadline counts even though the client has left before it.
	gone, leave := context.WithTimeout(t.Context(), time.Second)
	pid, s := h.begin(gone, bash("sleep 100"))
	leave()
	s.Close()
	time.Sleep(100 * time.Millisecond)
	if syscall.Kill(int(pid), 0) != nil {
		t.Error("the process died with its client")
	}
	eventually(t, "the process is killed at its deadline without a client", func() bool { return syscall.Kill(int(pid), 0) != nil })
}

func TestKillingEndsTheOutputThoughChildrenHoldIt(t *testing.T) {
	h := claimed(t)
	for name, pty := range map[string]*pb.PTY{"pipes": nil, "a terminal": {Size: &pb.PTY_Size{Cols: 80, Rows: 24}}} {
		t.Run(name, func(t *testing.T) {
			req := bash("trap '' HUP; sleep 6 & echo started; wait")
			req.Pty = pty
			pid, s := h.begin(t.Context(), req)
			if !s.Receive() {
				t.Fatal(s.Err())
			}
			began := time.Now()
			if err := h.signal(pid, pb.Signal_SIGNAL_SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := h.signal(pid, pb.Signal_SIGNAL_SIGKILL); code(err) != "not_found" {
				t.Errorf("killing the dead: %v, want not_found", err)
			}
			var r result
			collect(s, func() *pb.ProcessEvent { return s.Msg().GetEvent() }, &r)
			if r.end.GetStatus() != "signal: killed" || r.end.GetExitCode() != -1 || time.Since(began) > 4*time.Second {
				t.Errorf("got %+v after %v", r, time.Since(began))
			}
			if syscall.Kill(int(pid), 0) == nil {
				t.Error("the killed process was not reaped")
			}
		})
	}
}

func TestTermIsPassedOn(t *testing.T) {
	h := claimed(t)
	pid, s := h.begin(t.Context(), bash("trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.01; done"))
	if !s.Receive() {
		t.Fatal(s.Err())
	}
	if err := h.signal(pid, pb.Signal_SIGNAL_SIGTERM); err != nil {
		t.Fatal(err)
	}
	var r result
	collect(s, func() *pb.ProcessEvent { return s.Msg().GetEvent() }, &r)
	if r.out != "asked\n" || r.end.GetExitCode() != 7 {
		t.Errorf("got %+v", r)
	}
	if err := h.signal(pid, pb.Signal_SIGNAL_UNSPECIFIED); code(err) != "invalid_argument" {
		t.Errorf("no signal: %v", err)
	}
}

func TestConnectFollowsFromNowOnAndServesTheEnd(t *testing.T) {
	h := claimed(t)
	tag := "mine"
	yes := true
	pid, s := h.begin(t.Context(), &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", "echo before; read x; echo after $x; exit 4"}}, Tag: &tag, Stdin: &yes})
	if !s.Receive() || string(s.Msg().GetEvent().GetData().GetStdout()) != "before\n" {
		t.Fatalf("got %v %v", s.Msg(), s.Err())
	}
	s.Close()
	c, err := h.process().Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}}))
	if err != nil {
		t.Fatal(err)
	}
	if !c.Receive() || c.Msg().GetEvent().GetStart().GetPid() != pid {
		t.Fatalf("got %v %v", c.Msg(), c.Err())
	}
	h.input(pid, "it\n")
	var r result
	collect(c, func() *pb.ProcessEvent { return c.Msg().GetEvent() }, &r)
	if r.out != "after it\n" || r.end.GetExitCode() != 4 {
		t.Errorf("connected: %+v", r)
	}
	late, err := h.process().Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
	if err != nil {
		t.Fatal(err)
	}
	r = result{}
	collect(late, func() *pb.ProcessEvent { return late.Msg().GetEvent() }, &r)
	if r.out != "" || r.pid != pid || r.end.GetExitCode() != 4 {
		t.Errorf("after the end: %+v", r)
	}
}

func TestTheEndIsServedForHalfAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newProcesses(newChildren(false), func(int) {})
		p := &process{pid: 77}
		table.retire(p)
		time.Sleep(afterEnd - time.Millisecond)
		if got, err := table.find(byPID(77)); got != p || err != nil {
			t.Errorf("just before 30 s: %v", err)
		}
		time.Sleep(2 * time.Millisecond)
		if _, err := table.find(byPID(77)); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("after 30 s: %v, want not found", err)
		}
		for range maxEnded + 10 {
			table.retire(&process{pid: 78})
		}
		if n := len(table.ended); n != maxEnded {
			t.Errorf("%d ends are remembered, want %d", n, maxEnded)
		}
	})
}

func TestADeadlineCountsTheTimeTheSandboxRan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		fired := make(chan time.Duration, 2)
		fire := func() { fired <- time.Since(began) }
		newCountdown(2500*time.Millisecond, fire)
		if got := <-fired; got != 2500*time.Millisecond {
			t.Errorf("fired after %v, want 2.5 s", got)
		}
		stopped := newCountdown(time.Second, fire)
		stopped.stop()
		time.Sleep(time.Minute)

		began = time.Now()
		paused := newCountdown(10*time.Second, fire)
		paused.mu.Lock()
		paused.since = paused.since.Add(-time.Hour) // the clocks went on while the sandbox did not run
		paused.mu.Unlock()
		if got := <-fired; got != 10*time.Second {
			t.Errorf("after a pause of an hour: fired after %v of running, want 10 s", got)
		}
	})
}

func (h *harness) input(pid uint32, text string) {
	h.t.Helper()
	if err := h.tryInput(pid, text); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) tryInput(pid uint32, text string) error {
	_, err := h.process().SendInput(h.t.Context(), connect.NewRequest(&pb.SendInputRequest{
		Process: byPID(pid), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(text)}}}))
	return err
}

func TestInputReachesTheProcessInOrder(t *testing.T) {
	h := claimed(t)
	yes := true
	pid, s := h.begin(t.Context(), &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Stdin: &yes})
	h.input(pid, "one ")
	in := h.process().StreamInput(t.Context())
	send := func(r *pb.StreamInputRequest) {
		if err := in.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: byPID(pid)}}})
	for _, word := range []string{"two ", "three "} {
		send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(word)}}}}})
		send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}})
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 1<<20)
	go func() { _ = h.tryInput(pid, big+"end") }() // blocks until cat has read it all
	var r result
	for !strings.HasSuffix(r.out, "end") && s.Receive() {
		r.out += string(s.Msg().GetEvent().GetData().GetStdout())
	}
	if _, err := h.process().CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)})); err != nil {
		t.Fatal(err)
	}
	collect(s, func() *pb.ProcessEvent { return s.Msg().GetEvent() }, &r)
	if want := "one two three " + big + "end"; r.out != want || r.end.GetExitCode() != 0 {
		t.Errorf("got %d bytes and %v, want %d bytes", len(r.out), r.end, len(want))
	}
}

func TestInputThatCannotArriveIsRefused(t *testing.T) {
	h := claimed(t)
	yes := true
	null, s1 := h.begin(t.Context(), bash("sleep 100"))
	defer s1.Close()
	full, s2 := h.begin(t.Context(), &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "sleep", Args: []string{"100"}}, Stdin: &yes})
	defer s2.Close()
	for name, c := range map[string]struct {
		call       func() error
		code, text string
	}{
		"stdin is /dev/null": {func() error { return h.tryInput(null, "x") }, "internal", "stdin not enabled or closed"},
		"closing /dev/null": {func() error {
			_, err := h.process().CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(null)}))
			return err
		}, "internal", "stdin not enabled or closed"},
		"a terminal's input to a process without one": {func() error {
			_, err := h.process().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(full), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}}))
			return err
		}, "failed_precondition", "no terminal"},
		"resizing what has no terminal": {func() error {
			_, err := h.process().Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: byPID(full), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 1, Rows: 1}}}))
			return err
		}, "failed_precondition", "no terminal"},
		"no input at all": {func() error {
			_, err := h.process().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(full)}))
			return err
		}, "invalid_argument", "neither stdin nor pty"},
		"an unknown process": {func() error { return h.tryInput(1, "x") }, "not_found", "pid 1"},
		"no process named": {func() error {
			_, err := h.process().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{}))
			return err
		}, "invalid_argument", "neither a pid nor a tag"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.call(); code(err) != c.code || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %s with %q", err, c.code, c.text)
			}
		})
	}
	// A process that does not read blocks the writer, but only as long as it wants,
	// and the next writer gets its turn.
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		_, err := h.process().SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(full), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}}))
		cancel()
		if code(err) != "deadline_exceeded" {
			t.Errorf("writing to a process that does not read: %v", err)
		}
	}
}

func TestATerminal(t *testing.T) {
	h := claimed(t)
	req := &pb.StartRequest{
		Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"--norc", "-i"}, Envs: map[string]string{"TERM": "xterm", "PS1": ""}},
		Pty:     &pb.PTY{Size: &pb.PTY_Size{Cols: 100, Rows: 33}},
	}
	pid, s := h.begin(t.Context(), req)
	var mu sync.Mutex
	var r result
	done := make(chan struct{})
	seen := func() string { mu.Lock(); defer mu.Unlock(); return r.out }
	go func() {
		defer close(done)
		for s.Receive() {
			mu.Lock()
			r.out += string(s.Msg().GetEvent().GetData().GetPty())
			if end := s.Msg().GetEvent().GetEnd(); end != nil {
				r.end = end
			}
			mu.Unlock()
		}
	}()
	typed := func(text string) {
		_, err := h.process().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte(text)}}}))
		if err != nil {
			t.Fatal(err)
		}
	}
	typed("stty size; test -O $(tty) && echo o''wn\n")
	eventually(t, "the size asked for", func() bool { return strings.Contains(seen(), "33 100\r\n") })
	eventually(t, "the terminal belongs to the user", func() bool { return strings.Contains(seen(), "own\r\n") })
	if _, err := h.process().Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 70, Rows: 20}}})); err != nil {
		t.Fatal(err)
	}
	typed("stty size\n")
	eventually(t, "the new size", func() bool { return strings.Contains(seen(), "20 70\r\n") })
	if _, err := h.process().CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)})); code(err) != "failed_precondition" {
		t.Errorf("closing a terminal's input: %v", err)
	}
	typed(`bash -c 'trap "echo inter""rupted; exit" INT; echo re""ady; while :; do sleep 0.02; done'` + "\n")
	eventually(t, "a foreground process", func() bool { return strings.Contains(seen(), "ready\r\n") })
	typed("\x03") // interrupts it, if the terminal controls the session
	eventually(t, "the interruption", func() bool { return strings.Contains(seen(), "interrupted\r\n") })
	typed("exit 5\n")
	<-done
	if r.end.GetExitCode() != 5 {
		t.Errorf("end %v, output %q", r.end, r.out)
	}
}

func TestSilenceIsFilledWithKeepalives(t *testing.T) {
	h := claimed(t)
	got := h.run(t.Context(), bash("sleep 1.5; echo end"), "Keepalive-Ping-Interval", "1")
	if got.alive != 1 || got.out != "end\n" {
		t.Errorf("got %+v, want one keepalive", got)
	}
}

func TestAReaderThatStallsHoldsTheProcessAndLittleMemory(t *testing.T) {
	h := claimed(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body := envelope(`{"process":{"cmd":"yes"},"stdin":false}`)
	fmt.Fprintf(conn, "POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nX-Access-Token: %s\r\nContent-Type: application/connect+json\r\nContent-Length: %d\r\n\r\n%s", testToken, len(body), body)
	if _, err := bufio.NewReaderSize(conn, 16).ReadByte(); err != nil {
		t.Fatal(err)
	}
	list := h.agent.procs.list()
	if len(list) != 1 {
		t.Fatalf("%d processes, want 1", len(list))
	}
	pid := list[0].GetPid()
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	stuck := func() bool {
		n := bytesWritten(t, pid)
		time.Sleep(100 * time.Millisecond)
		return n == bytesWritten(t, pid)
	}
	before := heap()
	eventually(t, "the process waits for its reader", stuck)
	if grown := heap() - before; grown > 4<<20 {
		t.Errorf("the heap grew by %d bytes for a reader that does not read", grown)
	}
	conn.Close()
	eventually(t, "the process runs on when its reader has gone", func() bool { return !stuck() })
	if err := h.signal(pid, pb.Signal_SIGNAL_SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// bytesWritten is how many bytes a process has written so far.
func bytesWritten(t *testing.T, pid uint32) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), "wchar: ")
	line, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestWithoutAReaderTheProcessRunsOn(t *testing.T) {
	h := claimed(t)
	_, s := h.begin(t.Context(), bash("sleep 0.2; head -c 10000000 /dev/zero; touch "+h.home+"/through"))
	s.Close()
	eventually(t, "10 MB written without a reader", func() bool { _, err := os.Stat(h.home + "/through"); return err == nil })
}

func TestManyAtOnceAndNoneLeft(t *testing.T) {
	h := claimed(t)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			if got := h.run(t.Context(), bash(fmt.Sprintf("echo %d", i))); got.out != fmt.Sprintf("%d\n", i) || got.end.GetExitCode() != 0 {
				t.Errorf("process %d: %+v", i, got)
			}
		})
	}
	wg.Wait()
	resp, err := h.process().List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil || len(resp.Msg.GetProcesses()) != 0 {
		t.Errorf("left: %v %v", resp, err)
	}
}

func TestTooManyProcessesAreRefused(t *testing.T) {
	h := claimed(t)
	h.agent.procs.mu.Lock()
	h.agent.procs.opening = maxProcesses
	h.agent.procs.mu.Unlock()
	got := h.run(t.Context(), bash("true"))
	if code(got.err) != "resource_exhausted" || !strings.Contains(got.err.Error(), "512 processes are running already") {
		t.Errorf("got %v", got.err)
	}
}

func TestListNamesWhatRuns(t *testing.T) {
	h := claimed(t)
	tag := "t1"
	req := bash("sleep 100")
	req.Tag = &tag
	pid, s := h.begin(t.Context(), req)
	defer s.Close()
	got := h.do("POST", "/process.Process/List", strings.NewReader("{}"), "Content-Type", "application/json")
	want := fmt.Sprintf(`{"processes":[{"config":{"cmd":"/bin/bash","args":["-c","sleep 100"]},"pid":%d,"tag":"t1"}]}`, pid)
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(got.body)); err != nil || compact.String() != want {
		t.Errorf("got %s, want %s", compact.String(), want)
	}
}

func TestAnOversizedMessageIsRefused(t *testing.T) {
	h := claimed(t)
	body := io.MultiReader(bytes.NewReader(binary.BigEndian.AppendUint32([]byte{0}, maxMessage+1)), strings.NewReader("{}"))
	got := h.do("POST", "/process.Process/Start", body, "Content-Type", "application/connect+json")
	if !strings.Contains(got.body, "resource_exhausted") || got.StatusCode != http.StatusOK {
		t.Errorf("%d %s", got.StatusCode, got.body)
	}
}

func TestTheEndSaysThatMemoryWasShort(t *testing.T) {
	k := &kill{PID: 17, Command: "python3", Bytes: 480 << 20, Processes: 1}
	killed := endEvent(syscall.WaitStatus(syscall.SIGKILL), k)
	if killed.GetStatus() != "signal: killed" || killed.GetExitCode() != -1 || killed.GetError() != "signal: killed: out of memory: process 17 (python3) was the biggest, with 480 MiB, and was killed" {
		t.Errorf("%v", killed)
	}
	if failed := endEvent(syscall.WaitStatus(137<<8), k); !strings.HasPrefix(failed.GetError(), "exit status 137: out of memory") {
		t.Errorf("%v", failed)
	}
	if well := endEvent(0, k); well.Error != nil {
		t.Errorf("%v", well)
	}
}
