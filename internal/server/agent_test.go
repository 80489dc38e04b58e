package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// TestAgentOfAnOlderServerStays: sandboxes that run have the folder of the agent they
// were started with mounted.
func TestAgentOfAnOlderServerStays(t *testing.T) {
	state := t.TempDir()
	dirs := map[string]string{}
	for _, text := range []string{"old", "new", "old"} {
		dir, err := installAgent(fstest.MapFS{"cordon-agent": {Data: []byte(text)}}, state, certificates{})
		if err != nil {
			t.Fatal(err)
		}
		if before, ok := dirs[text]; ok && before != dir {
			t.Errorf("the same agent is in %s and %s", before, dir)
		}
		dirs[text] = dir
	}
	for text, dir := range dirs {
		path := filepath.Join(dir, "cordon-agent")
		b, err := os.ReadFile(path)
		fi, statErr := os.Stat(path)
		if err != nil || statErr != nil || string(b) != text || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: %q (%v, %v), want %q, executable", path, b, err, statErr, text)
		}
	}
	if _, err := installAgent(fstest.MapFS{}, state, certificates{}); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("without an agent: %v, want the fix", err)
	}
}
