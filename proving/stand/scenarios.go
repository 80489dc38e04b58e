package stand

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Scenarios runs a program of scenarios in the lab's host with an environment,
// turns each result it prints ("ok <name> <ms>", or "not ok <name> <ms>" and the
// error below it) into a subtest, and returns what it printed. SCENARIO chooses
// those whose name holds it.
func (s *Stand) Scenarios(t *testing.T, env []string, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if only := os.Getenv("SCENARIO"); only != "" {
		args = append(args, only)
	}
	cmd := s.Lab.HostCommand(ctx, program, args...)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	ran := 0
	for _, block := range splitResults(string(out)) {
		head, detail, _ := strings.Cut(block, "\n")
		name, failed := strings.CutPrefix(head, "not ok ")
		if !failed {
			name = strings.TrimPrefix(head, "ok ")
		}
		ran++
		t.Run(name[:max(0, strings.LastIndex(name, " "))], func(t *testing.T) {
			t.Log(head)
			if failed {
				t.Errorf("%s", detail)
			}
		})
	}
	var exit *exec.ExitError
	if ran == 0 || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s ran %d scenarios: %v\n%s", program, ran, err, out)
	}
	if err != nil {
		t.Errorf("%s: %v", program, err)
	}
	return string(out)
}

// splitResults cuts a program's output into one block a scenario; what comes
// before the first is dropped.
func splitResults(out string) []string {
	var blocks []string
	for line := range strings.Lines(out) {
		switch {
		case strings.HasPrefix(line, "ok ") || strings.HasPrefix(line, "not ok "):
			blocks = append(blocks, line)
		case len(blocks) > 0:
			blocks[len(blocks)-1] += line
		}
	}
	for i := range blocks {
		blocks[i] = strings.TrimRight(blocks[i], "\n")
	}
	return blocks
}
