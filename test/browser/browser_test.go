// Package browser shows applications at their public URLs in a real browser.
package browser

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cordonhq/cordon/test/stand"
)

// chromium is Debian's; scripts/setup installs it.
const chromium = "/usr/bin/chromium"

func TestBrowser(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server, its sandboxes and a browser")
	}
	for _, path := range []string{chromium, "/usr/bin/certutil", "node_modules/playwright-core", "app/node_modules/vite"} {
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" || os.Getenv("REQUIRE_SDK") != "" {
			t.Fatalf("%s is missing: scripts/setup and scripts/test install it", path)
		}
		t.Skipf("%s is missing: the registry could not be reached", path)
	}
	s := stand.New(t, stand.Options{})
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	home := t.TempDir()
	trust(t, home, filepath.Join(s.Dir, "state/ca/ca.pem"), s.Lab.CAFile())
	shots := os.Getenv("SHOTS")
	if shots == "" {
		shots = t.TempDir()
	}
	env := append(s.Environ(t), "HOME="+home, "TMPDIR="+t.TempDir(), "CHROMIUM="+chromium, "SHOTS="+shots,
		"CORDON="+stand.Binary(), "CORDON_CONFIG="+s.Config, "OTHER_SITE=allowed.test")
	if _, err := os.Stat("../../.cache/notebook.tgz"); err == nil {
		env = append(env, "NOTEBOOK=../../.cache/notebook.tgz")
	}
	s.Scenarios(t, env, "node", "browser.mjs")
}

// trust gives the browser of a home folder these CAs, in the store that Chromium
// reads on Linux.
func trust(t *testing.T, home string, files ...string) {
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
