package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDoctorFailsOnImagesOpenToOtherUsers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "images")
	if f := checkImages(dir); !f.ok {
		t.Errorf("before the first start: %+v, want ok", f)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		mode os.FileMode
		ok   bool
	}{{0o700, true}, {0o755, false}, {0o711, false}, {0o750, false}} {
		if err := os.Chmod(dir, c.mode); err != nil {
			t.Fatal(err)
		}
		f := checkImages(dir)
		if f.ok != c.ok && os.Geteuid() == 0 || f.warn {
			t.Errorf("mode %v: %+v, want ok %v", c.mode, f, c.ok)
		}
		if !c.ok && !strings.Contains(f.mend, "chmod 700 "+dir) {
			t.Errorf("mode %v: the way to mend it is %q", c.mode, f.mend)
		}
	}
}

func TestTheCacheFolderIsClosedUnlessOthersUseIt(t *testing.T) {
	for _, c := range []struct {
		name    string
		entries []string
		want    os.FileMode
	}{
		{"empty", nil, 0o700},
		{"images only", []string{"images"}, 0o700},
		{"another program's folder", []string{"images", "apt"}, 0o755},
	} {
		cfg := config{CacheDir: filepath.Join(t.TempDir(), "cache")}
		for _, e := range append(c.entries, ".") {
			if err := os.MkdirAll(filepath.Join(cfg.CacheDir, e), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(cfg.CacheDir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := cfg.closeCache(); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(cfg.CacheDir)
		if err != nil || fi.Mode().Perm() != c.want {
			t.Errorf("%s: mode %v (%v), want %v", c.name, fi.Mode().Perm(), err, c.want)
		}
	}
}
