package server

import (
	"os"
	"path/filepath"
	"testing"
)

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
		cfg := Config{CacheDir: filepath.Join(t.TempDir(), "cache")}
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
