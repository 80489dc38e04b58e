package programs_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Where the page has what is measured, between these lines.
const (
	page      = "../../docs/denials.md"
	pageBegin = "<!-- measured: TEST_PROGRAMS=1 go test ./test/programs -->\n"
	pageEnd   = "<!-- end of what is measured -->\n"
)

type results map[string]map[string]outcome // by form and program

func resultsFile(label string) string {
	return filepath.Join("..", "..", ".cache", "denials", label+".json")
}

func writeResults(t *testing.T, label string, r results) {
	t.Helper()
	data, err := json.MarshalIndent(r, "", " ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(resultsFile(label)), 0o755)
	}
	if err == nil {
		err = os.WriteFile(resultsFile(label), append(data, '\n'), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func readResults(t *testing.T, label string) results {
	t.Helper()
	data, err := os.ReadFile(resultsFile(label))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var r results
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestDenialsPage compares what TestDenials measured with what it measured on an
// earlier release, and rewrites the tables of the page.
func TestDenialsPage(t *testing.T) {
	if os.Getenv("TEST_PROGRAMS") == "" {
		t.Skip("rewrites a page of the documentation: set TEST_PROGRAMS=1")
	}
	before, now := readResults(t, "before"), readResults(t, "now")
	if before == nil || now == nil {
		t.Skip("run TestDenials twice first: with TEST_LABEL=before and TEST_BINARY of an earlier release, and without")
	}
	for form, list := range now {
		for name, n := range list {
			// Programs that sleep between tries add up to a fifth by chance.
			if b, ok := before[form][name]; ok && n.Seconds > b.Seconds*1.3+2 {
				t.Errorf("%s, %s: %.1f s, before %.1f s", form, name, n.Seconds, b.Seconds)
			}
		}
	}
	t.Log(sums(before, now))
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), pageBegin)
	_, tail, ok2 := strings.Cut(rest, pageEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the tables", page)
	}
	if err := os.WriteFile(page, []byte(head+pageBegin+tables(before, now)+pageEnd+tail), 0o644); err != nil { //nolint:gosec // a page for all to read
		t.Fatal(err)
	}
}

// sums adds up the programs that were measured on both.
func sums(before, now results) string {
	var parts []string
	for _, f := range forms() {
		var was, is float64
		for name, n := range now[f.Name] {
			if b, ok := before[f.Name][name]; ok {
				was, is = was+b.Seconds, is+n.Seconds
			}
		}
		parts = append(parts, fmt.Sprintf("%s %.0f s before, %.0f s now", f.Name, was, is))
	}
	return "Added up over the programs that were measured on both: " + strings.Join(parts, "; ") + "."
}

// tables are what TestDenialsPage writes.
func tables(before, now results) string {
	var b strings.Builder
	b.WriteString("\n| program | name denied | address denied | TLS denied | HTTP denied | before: name | before: HTTP |\n|---|---|---|---|---|---|---|\n")
	programs := append(managers(), clients()...)
	// A repeated question is no event of its own, so that names have no count.
	cell := func(r results, form, name string) string {
		o, ok := r[form][name]
		if !ok {
			return "–"
		}
		seconds := fmt.Sprintf("%.1f s", o.Seconds)
		switch {
		case o.Exit == 124:
			seconds = fmt.Sprintf("over %.0f s", limit.Seconds())
		case o.Seconds < 0.1:
			seconds = "<0.1 s"
		}
		if o.Tries > 0 && form != "name" {
			seconds += fmt.Sprintf(" / %d", o.Tries)
		}
		if o.Exit == 0 {
			seconds += ", exit 0"
		}
		return seconds
	}
	for _, p := range programs {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", p.name, cell(now, "name", p.name), cell(now, "address", p.name),
			cell(now, "TLS", p.name), cell(now, "HTTP", p.name), cell(before, "name", p.name), cell(before, "HTTP", p.name))
	}
	b.WriteString("\n" + sums(before, now) + "\n")
	b.WriteString("\n| resolver | name denied | says | before | said |\n|---|---|---|---|---|\n")
	for _, p := range lookups() {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", p.name, cell(now, "name", p.name), quote(now["name"][p.name].Words), cell(before, "name", p.name), quote(before["name"][p.name].Words))
	}
	b.WriteString("\n| program | name denied | TLS denied | HTTP denied |\n|---|---|---|---|\n")
	for _, p := range programs {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", p.name, quote(now["name"][p.name].Words), quote(now["TLS"][p.name].Words), quote(now["HTTP"][p.name].Words))
	}
	b.WriteString("\n")
	return b.String()
}

// quote is a program's words inside a table.
func quote(words string) string {
	if words == "" {
		return "–"
	}
	return "`" + strings.NewReplacer("|", "¦", "`", "'").Replace(words) + "`"
}
