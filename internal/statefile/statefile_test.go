package statefile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReplaceLeavesTheNewFileOrTheOld(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	for _, c := range []struct {
		text string
		mode os.FileMode
	}{{"first", 0o600}, {"second, and longer", 0o644}, {"", 0o666}} {
		if err := Replace(path, []byte(c.text), c.mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		fi, statErr := os.Stat(path)
		if err != nil || statErr != nil || string(b) != c.text || fi.Mode() != c.mode {
			t.Errorf("%q with %v, %v, %v; want %q with %v", b, fi.Mode(), err, statErr, c.text, c.mode)
		}
	}
	taken := filepath.Join(dir, "taken")
	if err := os.MkdirAll(filepath.Join(taken, "file"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Replace(taken, []byte("x"), 0o600); err == nil || !strings.Contains(err.Error(), taken) {
		t.Errorf("over a folder: %v", err)
	}
	if err := Replace(filepath.Join(dir, "missing", "file"), nil, 0o600); err == nil {
		t.Error("written into a folder that is not there")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left %v, %v; want the file and the folder", entries, err)
	}
}

func TestALockIsHeldOnceOrShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	try := func(shared, want bool) *os.File {
		t.Helper()
		f, err := TryLock(path, shared)
		if err != nil {
			t.Fatal(err)
		}
		if (f != nil) != want {
			t.Errorf("shared %v: locked %v, want %v", shared, f != nil, want)
		}
		return f
	}
	alone := try(false, true)
	try(false, false)
	try(true, false)
	alone.Close()
	one, two := try(true, true), try(true, true)
	try(false, false)
	one.Close()
	two.Close()
	try(false, true).Close()
	if _, err := TryLock(filepath.Join(path, "below"), false); err == nil {
		t.Error("locked below a file")
	}
}
