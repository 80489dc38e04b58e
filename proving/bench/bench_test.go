package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/proving/lab"
)

// processArg starts this test binary as one of the bench's processes.
const processArg = "bench-process"

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == processArg {
		if err := Process(context.Background(), os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func quick(t *testing.T, table string, versus ...string) string {
	t.Helper()
	lab.Privileged(t)
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	o := Options{
		Tables: []string{table}, Rounds: 1, Each: 20 * time.Millisecond, Sandboxes: 3, CIDRs: 100, Flows: 20, Starts: 1, Burst: 2,
		Self: []string{os.Args[0], processArg}, Server: []string{server}, Template: "host", CacheDir: t.TempDir(), Versus: versus,
	}
	if os.Getenv("REQUIRE_PRIVILEGED") != "" { // make test has built it
		o.Interpreter, o.CacheDir = "code-interpreter-v1", "/var/cache/cordon"
	}
	if err := Run(ctx, o, &out, os.Stderr); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	t.Log(out.String())
	return out.String()
}

// server is what make build makes.
const server = "../../bin/cordon"

// TestEveryMeasurementWorks asserts nothing about speed.
func TestEveryMeasurementWorks(t *testing.T) {
	for _, table := range Tables() {
		t.Run(table, func(t *testing.T) {
			t.Parallel()
			if _, err := os.Stat(server); err != nil && table == "start" {
				t.Skip("run make build first: ", err)
			}
			for line := range strings.Lines(quick(t, table)) {
				if strings.Contains(line, "not measured") && !strings.Contains(line, "not installed") {
					t.Error(line)
				}
			}
		})
	}
}

// TestAnotherBuildIsCompared compares the build with itself.
func TestAnotherBuildIsCompared(t *testing.T) {
	t.Parallel()
	out := quick(t, "egress", os.Args[0], processArg)
	if strings.Contains(out, "not measured") {
		t.Error("a row was not measured")
	}
	if strings.Contains(out, "path: ") || strings.Contains(out, "reset: ") {
		t.Error("a row repeats the name of a table")
	}
	for _, title := range []string{"kernel path", "kernel path, 3 sandboxes, 100 CIDRs", "proxy path", "proxy path, onDeny reset", "proxy path, onDeny explain"} {
		if !strings.Contains(out, "\n"+title+"  ") {
			t.Errorf("no table %q", title)
		}
	}
}

func TestRowsAreChosenByAPartOfTheirNames(t *testing.T) {
	all := []measure{row("new TLS connections, 32 at a time", perSecond, Load{}), row("up", gigabits, Load{})}
	o := Options{Rows: []string{"TLS connections, 32"}}
	if got := o.chosen(all); len(got) != 1 || got[0].reads[0].name != all[0].reads[0].name {
		t.Errorf("chosen: %v", got)
	}
	if got := (&Options{}).chosen(all); len(got) != len(all) {
		t.Errorf("chosen without a choice: %v", got)
	}
}

func TestRatioIsOfMedians(t *testing.T) {
	got := ratioCells(medianUsec, []float64{100, 100, 100, 100, 100}, []float64{50, 150, 75, 200, 75})
	if want := "100 µs\t75 µs\t0.75\t0.75–1.50"; got != want {
		t.Errorf("cells %q, want %q", got, want)
	}
}
