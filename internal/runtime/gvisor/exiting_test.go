package gvisor

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestOnlyWhatEndsIsWaitedFor(t *testing.T) {
	if exiting(os.Getpid()) {
		t.Error("this process is not ending")
	}
	cmd := exec.CommandContext(t.Context(), "/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); !exiting(cmd.Process.Pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a process that has ended and is not collected counts as running")
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
