// Package browser shows applications at their public URLs in a real browser.
package browser

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cordonhq/cordon/proving/stand"
)

func TestBrowser(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server, its sandboxes and a browser")
	}
	for _, path := range []string{stand.Chromium, "/usr/bin/certutil", "node_modules/playwright-core", "app/node_modules/vite"} {
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
	stand.TrustInBrowser(t, home, filepath.Join(s.Dir, "state/ca/ca.pem"), s.Lab.CAFile())
	shots := os.Getenv("SHOTS")
	if shots == "" {
		shots = t.TempDir()
	}
	env := append(s.Environ(t), "HOME="+home, "TMPDIR="+t.TempDir(), "CHROMIUM="+stand.Chromium, "SHOTS="+shots,
		"CORDON="+stand.Binary(), "CORDON_CONFIG="+s.Config, "OTHER_SITE=allowed.test")
	if _, err := os.Stat("../../.cache/notebook.tgz"); err == nil {
		env = append(env, "NOTEBOOK=../../.cache/notebook.tgz")
	}
	s.Scenarios(t, env, "node", "browser.mjs")
}
