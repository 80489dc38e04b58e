// Command gotest runs `go test` and judges what fails. A failed test is run again
// alone many times, and its rate is printed. The run passes only when each test that
// failed is in the list of known flaky tests and passed at least once when it was alone;
// a package that does not build, crashes or fails outside its tests fails the run.
// No test of a good run runs twice.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

// runner is one invocation of gotest.
type runner struct {
	goCommand string
	dir       string   // where go runs; empty means here
	flags     []string // for go test
	flakes    string   // the file of known flaky tests
	times     int      // how often a failed test is run again
	each, all time.Duration
	out       io.Writer
}

func main() {
	r := runner{out: os.Stdout}
	flag.StringVar(&r.goCommand, "go", "go", "the go `command`")
	flag.StringVar(&r.flakes, "flakes", "test/flakes", "`file` of known flaky tests")
	flag.IntVar(&r.times, "times", 20, "how often a failed test is run again")
	flag.DurationVar(&r.each, "each", 5*time.Minute, "after this time a failed test is not run again")
	flag.DurationVar(&r.all, "all", 20*time.Minute, "after this time no failed test is run again")
	flags := flag.String("flags", "", "`flags` for go test, separated by spaces")
	flag.Parse()
	r.flags = strings.Fields(*flags)
	if err := r.run(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// failure is a test that failed and has no subtest that failed.
type failure struct{ pkg, test string }

// run tests the packages, runs what failed again, and returns an error unless all
// passed or what failed is known to be flaky.
func (r *runner) run(packages []string) error {
	known, err := r.known()
	if err != nil {
		return err
	}
	results, err := r.test(r.out, append(slices.Clone(r.flags), packages...)...)
	if err != nil {
		return err
	}
	var failed []failure
	var broken []string
	for _, p := range results {
		if p.broken() {
			broken = append(broken, p.name)
		}
		for _, test := range p.failed() {
			failed = append(failed, failure{p.name, test})
		}
	}
	bad := r.again(failed, known)
	for _, name := range broken {
		fmt.Fprintf(r.out, "%s: it did not build, crashed, or failed outside its tests\n", name)
		bad = true
	}
	if bad {
		return errors.New("the tests failed")
	}
	return nil
}

// again runs the failed tests again, prints how often each failed, and reports
// whether one of them fails the run.
func (r *runner) again(failed []failure, known map[failure]bool) (bad bool) {
	if len(failed) == 0 {
		return false
	}
	fmt.Fprintln(r.out, "\nfailed tests, each run again alone:")
	end := time.Now().Add(r.all)
	for len(failed) > 0 {
		// Subtests may need those before them: the whole test is run again.
		pkg, top := failed[0].pkg, topOf(failed[0].test)
		var these []failure
		for len(failed) > 0 && failed[0].pkg == pkg && topOf(failed[0].test) == top {
			these, failed = append(these, failed[0]), failed[1:]
		}
		runs, counts := r.alone(pkg, top, end)
		for _, f := range these {
			verdict := "known to be flaky"
			switch n := counts[f.test]; {
			case runs == 0:
				verdict, bad = "no time to run it again", true
			case n == runs:
				verdict, bad = "it fails every time", true
			case !known[f]:
				verdict, bad = "a new flaky test: find the cause; it is not in "+r.flakes, true
			}
			fmt.Fprintf(r.out, "%s %s: failed %d of %d: %s\n", f.pkg, f.test, counts[f.test], runs, verdict)
			delete(counts, f.test)
		}
		for _, test := range sortedKeys(counts) { // what only failed now
			f := failure{pkg, test}
			fmt.Fprintf(r.out, "%s %s: failed %d of %d when run again\n", pkg, test, counts[test], runs)
			bad = bad || !known[f]
		}
	}
	return bad
}

// alone runs a test as often as there is time for, and counts for each test or
// subtest how many runs it failed. A run that crashes fails the test.
func (r *runner) alone(pkg, top string, end time.Time) (runs int, counts map[string]int) {
	counts = map[string]int{}
	if own := time.Now().Add(r.each); own.Before(end) {
		end = own
	}
	for runs < r.times && time.Now().Before(end) {
		args := append(slices.Clone(r.flags), "-count=1", "-run", "^"+regexp.QuoteMeta(top)+"$", pkg)
		results, err := r.test(io.Discard, args...)
		runs++
		seen := map[string]bool{}
		for _, p := range results {
			for _, test := range p.failed() {
				seen[test] = true
			}
			if p.broken() {
				seen[top] = true
			}
		}
		if err != nil {
			seen[top] = true
		}
		if seen[top] { // nothing is known of its subtests
			for test := range counts {
				seen[test] = true
			}
		}
		for test := range seen {
			counts[test]++
		}
	}
	return runs, counts
}

// event is a line of `go test -json`; see `go doc test2json`.
type event struct {
	Action, Package, ImportPath, Test, Output, FailedBuild string
}

// pkg is what is known of a package's run.
type pkg struct {
	name    string
	result  string // pass, fail or skip; empty when it did not end
	order   []string
	tests   map[string]string // their results; empty when they did not end
	printed []event
	built   bool
}

// failed are the tests that failed, or did not end in a package that failed, without
// those that failed by their subtests only.
func (p *pkg) failed() (out []string) {
	for _, test := range p.order {
		if p.did(test) != "fail" {
			continue
		}
		if !slices.ContainsFunc(p.order, func(sub string) bool { return strings.HasPrefix(sub, test+"/") && p.did(sub) == "fail" }) {
			out = append(out, test)
		}
	}
	return out
}

func (p *pkg) did(test string) string {
	if p.result == "pass" || p.result == "skip" {
		return "pass"
	}
	return cmp.Or(p.tests[test], "fail")
}

// broken reports whether the package failed other than by tests that ended.
func (p *pkg) broken() bool {
	if p.result == "pass" || p.result == "skip" {
		return false
	}
	unfinished := false
	for _, result := range p.tests {
		unfinished = unfinished || result == ""
	}
	return p.result == "" || !p.built || unfinished || len(p.failed()) == 0
}

// test runs go test and prints what it would print, without the output of tests
// that passed. Its error says that go test itself failed.
func (r *runner) test(out io.Writer, args ...string) ([]*pkg, error) {
	//nolint:noctx // go test has a timeout of its own, and ends with what ends us
	cmd := exec.Command(r.goCommand, append([]string{"test", "-json"}, args...)...)
	cmd.Dir = r.dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	lines, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	verbose := slices.Contains(args, "-v")
	byName := map[string]*pkg{}
	var all []*pkg
	reader := bufio.NewReaderSize(lines, 1<<20)
	for {
		line, err := reader.ReadBytes('\n')
		if err != nil {
			break // Wait says why
		}
		var e event
		if json.Unmarshal(line, &e) != nil || e.Action == "build-output" {
			fmt.Fprint(out, cmp.Or(e.Output, string(line)))
			continue
		}
		if e.Package == "" {
			continue
		}
		p := byName[e.Package]
		if p == nil {
			p = &pkg{name: e.Package, tests: map[string]string{}, built: true}
			byName[e.Package] = p
			all = append(all, p)
		}
		if p.take(e) {
			p.print(out, verbose)
		}
	}
	err = cmd.Wait()
	fmt.Fprint(out, &stderr)
	var exit *exec.ExitError
	passed := !slices.ContainsFunc(all, func(p *pkg) bool { return p.result != "pass" && p.result != "skip" })
	if err != nil && (passed || !errors.As(err, &exit)) {
		return all, fmt.Errorf("go test: %w", err)
	}
	if len(all) == 0 {
		return nil, errors.New("go test tested no package")
	}
	return all, nil
}

// take notes an event, and reports whether it was the package's last.
func (p *pkg) take(e event) (last bool) {
	switch e.Action {
	case "output":
		p.printed = append(p.printed, e)
	case "run":
		p.order = append(p.order, e.Test)
		p.tests[e.Test] = ""
	case "pass", "fail", "skip":
		if e.Test != "" {
			p.tests[e.Test] = e.Action
			return false
		}
		p.result = e.Action
		p.built = e.FailedBuild == ""
		return true
	}
	return false
}

// print shows what go test says of the package: one line when it passed, with what
// its failed tests printed when not.
func (p *pkg) print(out io.Writer, verbose bool) {
	tops := map[string]bool{"": true}
	for _, test := range p.order {
		if p.did(test) == "fail" {
			tops[topOf(test)] = true
		}
	}
	for _, e := range p.printed {
		said := strings.HasPrefix(e.Output, "ok  \t") || strings.HasPrefix(e.Output, "?   \t") || strings.HasPrefix(e.Output, "\t")
		switch {
		case verbose, p.result == "fail" && tops[topOf(e.Test)] && !strings.HasPrefix(e.Output, "=== "), said && e.Test == "":
			fmt.Fprint(out, e.Output)
		}
	}
	p.printed = nil
}

// known reads the list of flaky tests: a package and a test a line, as they are
// printed; what follows # is a remark.
func (r *runner) known() (map[failure]bool, error) {
	text, err := os.ReadFile(r.flakes)
	if err != nil {
		return nil, fmt.Errorf("read the list of flaky tests: %w", err)
	}
	out := map[failure]bool{}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line, _, _ = strings.Cut(line, "#")
		switch f := strings.Fields(line); len(f) {
		case 0:
		case 2:
			out[failure{f[0], f[1]}] = true
		default:
			return nil, fmt.Errorf("%s:%d: want a package and a test, got %q", r.flakes, n, strings.TrimSpace(line))
		}
	}
	return out, nil
}

// topOf is the test that a subtest belongs to.
func topOf(test string) string {
	top, _, _ := strings.Cut(test, "/")
	return top
}

func sortedKeys(m map[string]int) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
