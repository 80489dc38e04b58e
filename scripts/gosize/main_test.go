package main

import (
	"bytes"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestReport compares what is said of a small module with testdata/tiny.txt, which
// UPDATE=1 writes.
func TestReport(t *testing.T) {
	var out bytes.Buffer
	if err := report(&out, "testdata/tiny"); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/tiny.txt"
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Error(diff)
	}
}
