package network

import (
	"context"
	"flag"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestTheTableAsTheKernelListsIt compares what nft(8) prints, so that a change of
// the rules is seen in a review as an administrator would see it.
func TestTheTableAsTheKernelListsIt(t *testing.T) {
	w := start(t)
	for len(w.ready) < cap(w.ready) { // slots come in order from the pool
		time.Sleep(time.Millisecond)
	}
	full, names := w.lease(), w.lease()
	op := &policy.Operator{FloorOpen: []string{"10.20.0.0/16:5432", "db.internal.example"}, AlwaysDeny: []string{"198.51.100.128/25"}}
	in := policy.Input{DenyOut: []string{"198.51.100.0/24", "203.0.112.0/24", "2001:db8:5::/48"}, AllowOut: []string{"198.51.7.7", "198.51.8.0/24:8443", "[2001:db8:7::1]:22"}}
	if err := w.Apply(context.Background(), full, compiled(t, in, op)); err != nil {
		t.Fatal(err)
	}
	w.apply(names, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com", "db.example.com:5432"}})
	if err := w.Pin(names.Sandbox, "db.example.com", public4, []uint16{5432}, maxPinLife); err != nil {
		t.Fatal(err)
	}
	got := w.list(t)
	for _, r := range []struct{ from, to string }{
		{`packets \d+ bytes \d+`, "packets N bytes N"},
		{`expires \S+`, "expires N"},
		{`(?s)(set own[46] \{.*?elements = \{).*?\}`, "$1 … }"}, // slots of the pool come and go
		{`(?s)(set logs \{.*?timeout \S+\n)\t\telements = .*?\}\n`, "$1"},
	} {
		got = regexp.MustCompile(r.from).ReplaceAllString(got, r.to)
	}
	const file = "testdata/table.golden"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the table differs from %s (go test -update writes it anew):\n%s", file, got)
	}
}
