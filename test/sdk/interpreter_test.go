package sdk

import (
	"testing"

	"github.com/cordonhq/cordon/test/stand"
)

// TestCodeInterpreter runs code with the code-interpreter packages, in kernels of
// sandboxes that a live server restores warm.
func TestCodeInterpreter(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	s := &live{Stand: stand.New(t, stand.Options{})}
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	for _, sdk := range []string{"novita", "e2b"} {
		t.Run("JavaScript "+sdk, func(t *testing.T) { s.runScenarios(t, node(t), "js/interpreter.mjs", sdk) })
		t.Run("Python "+sdk, func(t *testing.T) { s.runScenarios(t, python(t), "python/interpreter.py", sdk) })
	}
}
