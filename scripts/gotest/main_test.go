package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const fake = "example.test/fake/"

// TestFailedTestsAreJudged runs the packages of a small module, whose tests fail in
// all ways, and compares what is said and how often each ran.
func TestFailedTestsAreJudged(t *testing.T) {
	for name, c := range map[string]struct {
		packages []string
		known    string
		fails    bool
		says     []string
		runs     map[string]int // of each test, by its name
	}{
		"a good run runs each test once": {
			packages: []string{"./good"}, says: []string{"ok  \t" + fake + "good"}, runs: map[string]int{"TestGood": 1},
		},
		"a new flaky test fails the run": {
			packages: []string{"./good", "./flaky"}, fails: true,
			says: []string{"it failed the first time", fake + "flaky TestFlaky/at_first: failed 0 of 2: a new flaky test"},
			runs: map[string]int{"TestGood": 1, "TestFlaky": 3, "TestBeside": 1},
		},
		"a known one does not": {
			packages: []string{"./flaky"}, known: "# remark\n" + fake + "flaky TestFlaky/at_first # since ever\n",
			says: []string{fake + "flaky TestFlaky/at_first: failed 0 of 2: known to be flaky"}, runs: map[string]int{"TestFlaky": 3},
		},
		"a known one that fails every time does": {
			packages: []string{"./broken"}, known: fake + "broken TestBroken\n", fails: true,
			says: []string{fake + "broken TestBroken: failed 2 of 2: it fails every time"}, runs: map[string]int{"TestBroken": 3},
		},
		"a crash fails the run, whatever is known": {
			packages: []string{"./crash"}, known: fake + "crash TestCrash\n", fails: true,
			says: []string{"panic: at first", fake + "crash: it did not build, crashed"}, runs: map[string]int{"TestAfter": 0},
		},
		"a package that does not build fails the run": {
			packages: []string{"./unbuilt", "./good"}, fails: true,
			says: []string{"undefined: missing", fake + "unbuilt: it did not build"}, runs: map[string]int{"TestGood": 1},
		},
		"a package that fails outside its tests fails the run": {
			packages: []string{"./outside"}, fails: true, says: []string{fake + "outside: it did not build, crashed, or failed outside"},
		},
		"no package fails the run":       {packages: []string{"./none"}, fails: true},
		"a list that is none is refused": {packages: []string{"./good"}, known: "TestX\n", fails: true, runs: map[string]int{"TestGood": 0}},
	} {
		t.Run(name, func(t *testing.T) {
			counts := t.TempDir()
			t.Setenv("FAKE_COUNTS", counts)
			list := filepath.Join(t.TempDir(), "flakes")
			if err := os.WriteFile(list, []byte(c.known), 0o600); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			r := runner{goCommand: "go", dir: "testdata/fake", flags: []string{"-count=1"}, flakes: list, times: 2, each: time.Minute, all: time.Minute, out: &out}
			err := r.run(c.packages)
			if (err != nil) != c.fails {
				t.Errorf("got error %v, want one: %v", err, c.fails)
			}
			for _, says := range c.says {
				if !strings.Contains(out.String(), says) {
					t.Errorf("it does not say %q", says)
				}
			}
			for test, want := range c.runs {
				b, _ := os.ReadFile(filepath.Join(counts, test)) // it is missing when the test never ran
				if len(b) != want {
					t.Errorf("%s ran %d times, want %d", test, len(b), want)
				}
			}
			if strings.Contains(out.String(), "said by a test that passes") {
				t.Error("it shows what a test that passes printed")
			}
			if t.Failed() {
				t.Logf("%v\n%s", err, &out)
			}
		})
	}
}

func TestNoTestIsRunAgainForEver(t *testing.T) {
	t.Setenv("FAKE_COUNTS", t.TempDir())
	var out bytes.Buffer
	list := filepath.Join(t.TempDir(), "flakes")
	if err := os.WriteFile(list, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := runner{goCommand: "go", dir: "testdata/fake", flakes: list, times: 1000, each: time.Nanosecond, all: time.Minute, out: &out}
	if err := r.run([]string{"./flaky"}); err == nil || !strings.Contains(out.String(), "failed 0 of 0: no time") {
		t.Errorf("%v\n%s", err, &out)
	}
}
