package agent

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
)

// onTerminal is a script in an interactive shell's place.
func onTerminal(script string) *pb.StartRequest {
	req := bash(script)
	req.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}
	return req
}

func TestACommandEndsWithItsFirstProcess(t *testing.T) {
	h := claimed(t)
	for name, c := range map[string]struct {
		req  *pb.StartRequest
		code int32
		out  string
	}{
		"a child holds both pipes":             {bash("sleep 60 & echo ok; exit 7"), 7, "ok\n"},
		"a child in a session of its own":      {bash("setsid sleep 60 & echo ok"), 0, "ok\n"},
		"a child goes on writing":              {bash("(while :; do echo more; sleep 0.01; done) & sleep 0.1; exit 3"), 3, "more\n"},
		"a child goes on writing all it can":   {bash("yes & sleep 0.1; exit 3"), 3, "y\n"},
		"a terminal with a child on it":        {onTerminal("sleep 60 & exit 7"), 7, ""},
		"a terminal with a child that ignores": {onTerminal("trap '' HUP TERM; sleep 60 & echo ok; exit 7"), 7, "ok\r\n"},
		"what is written shortly after":        {bash("exec > >(sleep 0.1; cat); echo late"), 0, "late\n"},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			got := h.run(t.Context(), c.req)
			if took := time.Since(began); took > 3*time.Second || got.err != nil || got.end.GetExitCode() != c.code || !strings.Contains(got.out, c.out) {
				t.Errorf("after %v: end %v, %v, output %.100q, want %d and %q", took, got.end, got.err, got.out, c.code, c.out)
			}
		})
	}
}

func TestAllThatTheFirstProcessWroteArrives(t *testing.T) {
	h := claimed(t)
	// More than the pipe and the agent hold, to a reader that is late.
	const size = 3 << 20
	_, s := h.begin(t.Context(), bash(fmt.Sprintf("sleep 60 & head -c %d /dev/zero", size)))
	time.Sleep(settleOutput + 300*time.Millisecond)
	total := 0
	for s.Receive() {
		total += len(s.Msg().GetEvent().GetData().GetStdout())
	}
	if total != size || s.Err() != nil {
		t.Errorf("%d octets of %d, %v", total, size, s.Err())
	}
}

// TestASlowReaderIsToldTheEnd has a child that writes all it can. The reader takes
// nothing until the command is over, so it gets what the buffers on the way hold.
func TestASlowReaderIsToldTheEnd(t *testing.T) {
	h := claimed(t)
	for name, start := range map[string]func(string) *pb.StartRequest{"pipes": bash, "a terminal": onTerminal} {
		t.Run(name, func(t *testing.T) {
			pid, s := h.begin(t.Context(), start("trap '' HUP; yes & sleep 0.1; exit 3"))
			eventually(t, "the first process ended", func() bool { return !alive(int(pid)) })
			time.Sleep(2 * settleOutput)
			const limit = 1 << 30 // octets: without an end, they come for ever
			total := 0
			var end *pb.ProcessEvent_EndEvent
			for end == nil && total < limit && s.Receive() {
				ev := s.Msg().GetEvent()
				total += len(ev.GetData().GetStdout()) + len(ev.GetData().GetPty())
				end = ev.GetEnd()
			}
			if end.GetExitCode() != 3 {
				t.Errorf("after %d octets: end %v, %v", total, end, s.Err())
			}
		})
	}
}

func TestAChildThatLivesOnMayWrite(t *testing.T) {
	h := claimed(t)
	at := h.home + "/alive"
	got := h.run(t.Context(), bash("(sleep 1; for i in $(seq 20000); do echo line $i; done && echo yes >"+at+") & exit 0"))
	if got.end.GetExitCode() != 0 {
		t.Fatal(got)
	}
	eventually(t, "the child wrote more than a pipe holds", func() bool { raw, _ := os.ReadFile(at); return string(raw) == "yes\n" })
}

func TestKillingEndsTheSession(t *testing.T) {
	h := claimed(t)
	for name, start := range map[string]func(string) *pb.StartRequest{"pipes": bash, "a terminal": onTerminal} {
		t.Run(name, func(t *testing.T) {
			dir := h.dir("kill-" + strings.ReplaceAll(name, " ", ""))
			script := fmt.Sprintf(`cd %s; set -m; trap '' HUP
				(sleep 100 & echo $! >grandchild; echo $BASHPID >child; wait) &
				setsid sh -c 'echo $$ >daemon; exec sleep 100' </dev/null >/dev/null 2>&1 &
				while ! test -s daemon || ! test -s grandchild || ! test -s child; do sleep 0.02; done; echo started; wait`, dir)
			pid, s := h.begin(t.Context(), start(script))
			// A shell on a terminal may say before that setsid, which forks, is done.
			for said := ""; !strings.Contains(said, "started"); {
				if !s.Receive() {
					t.Fatalf("the command said %q, then %v", said, s.Err())
				}
				data := s.Msg().GetEvent().GetData()
				said += string(data.GetStdout()) + string(data.GetPty())
			}
			id := func(file string) (n int) {
				raw, err := os.ReadFile(dir + "/" + file)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Sscan(string(raw), &n)
				return n
			}
			daemon := id("daemon")
			t.Cleanup(func() { _ = syscall.Kill(daemon, syscall.SIGKILL) })
			began := time.Now()
			if err := h.signal(pid, pb.Signal_SIGNAL_SIGKILL); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("it took %v", took)
			}
			for _, file := range []string{"child", "grandchild"} {
				if n := id(file); alive(n) {
					t.Errorf("the %s lives on", file)
				}
			}
			if !alive(daemon) {
				t.Error("the process in a session of its own is dead too")
			}
		})
	}
}

// alive reports whether a process is there and no zombie.
func alive(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(raw), ") ")
	return err == nil && !strings.HasPrefix(state, "Z")
}

func TestADeadlineEndsTheSession(t *testing.T) {
	h := claimed(t)
	dir := h.dir("deadline")
	req := connect.NewRequest(bash("sleep 100 & echo $! >" + dir + "/child; wait"))
	req.Header().Set("Connect-Timeout-Ms", "700")
	s, err := h.process().Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for s.Receive() {
	}
	eventually(t, "the child is dead", func() bool {
		raw, err := os.ReadFile(dir + "/child")
		var pid int
		fmt.Sscan(string(raw), &pid)
		return err == nil && pid > 0 && !alive(pid)
	})
}
