package atomicfile

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAFileIsReplacedWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, c := range []struct {
		data string
		mode os.FileMode
	}{{"long and open", 0o644}, {"short", 0o600}} {
		if err := Write(path, []byte(c.data), c.mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		fi, statErr := os.Stat(path)
		if err != nil || statErr != nil || string(b) != c.data || fi.Mode().Perm() != c.mode {
			t.Errorf("%q with mode %v (%v, %v), want %q with %v", b, fi.Mode(), err, statErr, c.data, c.mode)
		}
	}
}

func TestAFileThatCannotBeReplacedStays(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "file"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Write(filepath.Join(dir, "file"), []byte("x"), 0o644); err == nil {
		t.Error("a folder was replaced by a file")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v (%v), want the folder only", left, err)
	}
}
