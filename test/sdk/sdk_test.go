package sdk

import (
	"os"
	"path/filepath"
	"testing"
)

// node and python return the interpreters with the SDKs installed; scripts/test
// installs them. Without them the test is skipped, and fails in CI.
func node(t *testing.T) string {
	t.Helper()
	installed(t, "js/node_modules/novita-sandbox", "js/node_modules/e2b")
	return "node"
}

func python(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../../.cache/python/bin/python")
	if err != nil {
		t.Fatal(err)
	}
	installed(t, path)
	return path
}

func installed(t *testing.T, paths ...string) {
	t.Helper()
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" || os.Getenv("REQUIRE_SDK") != "" {
			t.Fatalf("%s is missing: scripts/test installs it", p)
		}
		t.Skipf("%s is missing: the registry could not be reached", p)
	}
}

func TestScenarios(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	s := newStand(t)
	for _, sdk := range []string{"novita", "e2b"} {
		t.Run("JavaScript "+sdk, func(t *testing.T) { s.runScenarios(t, node(t), "js/scenarios.mjs", sdk) })
		t.Run("Python "+sdk, func(t *testing.T) { s.runScenarios(t, python(t), "python/scenarios.py", sdk) })
	}
}

func TestInside(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	s := newStand(t)
	for _, sdk := range []string{"novita", "e2b"} {
		t.Run("JavaScript "+sdk, func(t *testing.T) { s.runScenarios(t, node(t), "js/inside.mjs", sdk) })
		t.Run("Python "+sdk, func(t *testing.T) { s.runScenarios(t, python(t), "python/inside.py", sdk) })
	}
}
