package sdk

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// table is where it is written, method by method, what works with which SDK.
const table = "../../docs/compatibility.md"

// columns are the packages, in the order of the table.
var columns = []string{"novita-sandbox, JS", "e2b, JS", "novita-sandbox, Python", "e2b, Python"}

// TestMethods runs every public method of the packages against a live server,
// and holds docs/compatibility.md to what it saw. UPDATE_DOCS=1 writes the page.
func TestMethods(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	s := newStand(t)
	seen := surface{}
	for i, sdk := range []string{"novita", "e2b"} {
		t.Run("JavaScript "+sdk, func(t *testing.T) {
			seen.add(columns[i], s.runScenarios(t, node(t), "js/methods.mjs", sdk))
		})
		t.Run("JavaScript "+sdk+" code", func(t *testing.T) {
			seen.add(columns[i], s.runScenarios(t, node(t), "js/interpreter.mjs", sdk))
		})
		t.Run("Python "+sdk+" code", func(t *testing.T) {
			seen.add(columns[2+i], s.runScenarios(t, python(t), "python/interpreter.py", sdk))
		})
		for _, flavour := range []string{"sync", "async"} {
			t.Run("Python "+sdk+" "+flavour, func(t *testing.T) {
				seen.add(columns[2+i], s.runScenarios(t, python(t), "python/methods.py", sdk, flavour))
			})
		}
	}
	if t.Failed() || t.Skipped() || os.Getenv("SCENARIO") != "" || len(seen) < len(columns) {
		return
	}
	for _, missing := range seen.unshown() {
		t.Errorf("%s: no test shows it to work, and compatibility_test.go does not say why", missing)
	}
	checkTable(t, seen)
}

// checkTable compares the page with what was seen, or writes it.
func checkTable(t *testing.T, seen surface) {
	t.Helper()
	want := seen.page()
	if os.Getenv("UPDATE_DOCS") != "" {
		if err := os.WriteFile(table, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(table)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("docs/compatibility.md is not what the tests show: run UPDATE_DOCS=1 go test ./test/sdk -run TestMethods")
	}
}

// shown is a test that shows a method to work.
type shown struct{ file, sentence string }

// surface is, by package and method, the first test that showed it; the zero
// shown for a method no test did.
type surface map[string]map[string]shown

var result = regexp.MustCompile(`^ok (.+) \[(.*)\] (\S+) \d+$`)

// add takes what a program of methods printed: the methods there are, and the
// tests that passed.
func (s surface) add(column, out string) {
	methods := s[column]
	if methods == nil {
		methods = map[string]shown{}
		s[column] = methods
	}
	tests := map[string]shown{}
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "method "); ok && methods[name] == (shown{}) {
			methods[name] = shown{}
		}
		if m := result.FindStringSubmatch(line); m != nil {
			for name := range strings.FieldsSeq(m[2]) {
				if tests[name] == (shown{}) {
					tests[name] = shown{m[3], m[1]}
				}
			}
		}
	}
	for name := range methods {
		methods[name] = cmp.Or(methods[name], tests[name])
	}
}

// unshown lists the methods that neither a test nor a reason accounts for.
func (s surface) unshown() []string {
	var out []string
	for column, methods := range s {
		for name, by := range methods {
			if by == (shown{}) && notYet[name] == "" {
				out = append(out, column+": "+name)
			}
		}
	}
	slices.Sort(out)
	return out
}

// page renders the table.
func (s surface) page() []byte {
	var b bytes.Buffer
	b.WriteString(preface)
	all := map[string]bool{}
	for _, methods := range s {
		for name := range methods {
			all[name] = true
		}
	}
	for _, area := range areas {
		fmt.Fprintf(&b, "\n## %s\n\n| method | %s |\n|---|---|---|---|---|\n", area.title, strings.Join(columns, " | "))
		for _, name := range slices.Sorted(maps.Keys(all)) {
			prefix, method, _ := strings.Cut(name, ".")
			if prefix != area.prefix {
				continue
			}
			fmt.Fprintf(&b, "| `%s` |", method)
			for _, column := range columns {
				fmt.Fprintf(&b, " %s |", s.cell(column, name))
			}
			b.WriteString("\n")
		}
	}
	b.WriteString(remainder)
	return b.Bytes()
}

// cell says what a package's method does here.
func (s surface) cell(column, name string) string {
	by, has := s[column][name]
	switch {
	case !has:
		return "–"
	case notYet[name] != "":
		return "not yet: " + notYet[name]
	case differs[name] != "":
		return fmt.Sprintf("[differs](../test/sdk/%s %q): %s", by.file, by.sentence, differs[name])
	}
	return fmt.Sprintf("[works](../test/sdk/%s %q)", by.file, by.sentence)
}
