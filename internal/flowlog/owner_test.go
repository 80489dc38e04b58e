package flowlog

import (
	"fmt"
	"testing"
)

// TestAKeyWithManySandboxesLeavesAnothersEvents has one key flood from a hundred
// sandboxes, each with no more events than the other key's only one.
func TestAKeyWithManySandboxesLeavesAnothersEvents(t *testing.T) {
	known := false
	l, err := New(Config{Total: 1000, PerSandbox: 400, Owner: func(sandbox string) string {
		switch {
		case sandbox == "quiet":
			return "a"
		case known:
			return "b"
		}
		return "" // it is being created
	}})
	if err != nil {
		t.Fatal(err)
	}
	for range 400 {
		l.Record(Event{Sandbox: "quiet"})
	}
	for i := range 400 * 100 {
		known = known || i > 50
		l.Record(Event{Sandbox: fmt.Sprint("noisy", i%100)})
	}
	if got := len(l.Events(Filter{Sandbox: "quiet"})); got != 400 {
		t.Errorf("%d of 400 events are left of a key with one sandbox", got)
	}
	if got := len(l.Events(Filter{Limit: 5000})); got != 1000 {
		t.Errorf("%d events in all, want 1000", got)
	}
	for i := range 100 {
		l.Forget(fmt.Sprint("noisy", i))
	}
	l.Forget("quiet")
	if len(l.owners) != 0 || l.kept != 0 {
		t.Errorf("left: %d keys, %d events", len(l.owners), l.kept)
	}
}
