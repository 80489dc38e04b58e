package cli

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
