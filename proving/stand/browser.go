package stand

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Chromium is Debian's; scripts/setup installs it.
const Chromium = "/usr/bin/chromium"

// TrustInBrowser gives the browser of a home folder these CAs, in the store that Chromium
// reads on Linux.
func TrustInBrowser(t testing.TB, home string, files ...string) {
	t.Helper()
	db := filepath.Join(home, ".pki/nssdb")
	if err := os.MkdirAll(db, 0o700); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) {
		if out, err := exec.CommandContext(t.Context(), "certutil", append([]string{"-d", "sql:" + db}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("certutil %v: %v\n%s", args, err, out)
		}
	}
	run("-N", "--empty-password")
	for _, file := range files {
		run("-A", "-t", "C,,", "-n", file, "-i", file)
	}
}
