package programs_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Where the page has what is measured, between these lines.
const (
	page      = "../../docs/denials.md"
	pageBegin = "<!-- measured: TEST_PROGRAMS=1 go test ./test/programs -->\n"
	pageEnd   = "<!-- end of what is measured -->\n"
)

// before is the label of results of the last release that answered REFUSED and reset HTTP.
const before = "before"

// slower are the rows that take longer than before, by program and form.
var slower = map[string]exception{
	"yarn 1, name": {20, "takes \"no such host\" for a connection that comes back, and tries five times, 3 seconds apart; it has no setting for that, " +
		"and each DNS answer that it takes as final (`REFUSED`, `SERVFAIL`) makes programs with musl wait 5 seconds for every name"},
}

// silent are the rows that exit 0 and did not before: with an answer of HTTP, whatever it
// says, these programs have done what they were asked for.
var silent = []string{"curl, HTTP"}

// exception says how long a row may take all the same, and why it takes longer.
type exception struct {
	seconds float64
	why     string
}

type results map[string]map[string]outcome // by form and program

// resultsFile is where results are kept. Those of the earlier release are part of the
// tree: its binary is not always at hand.
func resultsFile(label string) string {
	if label == before {
		return "before.json"
	}
	return filepath.Join("..", "..", ".cache", "denials", label+".json")
}

func writeResults(t *testing.T, label string, r results) {
	t.Helper()
	if label == before {
		for _, list := range r {
			for name, o := range list {
				o.Output = ""
				list[name] = o
			}
		}
	}
	data, err := json.MarshalIndent(r, "", " ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(resultsFile(label)), 0o755)
	}
	if err == nil {
		err = os.WriteFile(resultsFile(label), append(data, '\n'), 0o644) //nolint:gosec // a part of the tree, or of a cache
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

// TestDenialsPage compares what TestDenials measured with what an earlier release did,
// and rewrites the tables of the page: no program takes longer but those that are listed,
// each for its reason, and all of them together half as long at most.
func TestDenialsPage(t *testing.T) {
	if os.Getenv("TEST_PROGRAMS") == "" {
		t.Skip("rewrites a page of the documentation: set TEST_PROGRAMS=1")
	}
	was, is := readResults(t, before), readResults(t, "now")
	if was == nil || is == nil {
		t.Skip("run TestDenials first")
	}
	for _, fault := range worse(was, is) {
		t.Error(fault)
	}
	t.Log(sums(was, is))
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), pageBegin)
	_, tail, ok2 := strings.Cut(rest, pageEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the tables", page)
	}
	if err := os.WriteFile(page, []byte(head+pageBegin+tables(was, is)+pageEnd+tail), 0o644); err != nil { //nolint:gosec // a page for all to read
		t.Fatal(err)
	}
}

// worse says what is worse than before. Programs that sleep between tries add up to a
// third by chance.
func worse(before, now results) []string {
	var faults []string
	for form, list := range now {
		for name, n := range list {
			b, ok := before[form][name]
			if !ok {
				continue
			}
			e, listed := slower[name+", "+form]
			switch longer := n.Seconds > b.Seconds*1.3+2; {
			case longer && !listed:
				faults = append(faults, fmt.Sprintf("%s, %s: %.1f s, before %.1f s", name, form, n.Seconds, b.Seconds))
			case longer && n.Seconds > e.seconds:
				faults = append(faults, fmt.Sprintf("%s, %s: %.1f s, and it may take %.0f s", name, form, n.Seconds, e.seconds))
			case listed && !longer:
				faults = append(faults, fmt.Sprintf("%s, %s: %.1f s, before %.1f s: it is no exception any more", name, form, n.Seconds, b.Seconds))
			}
			if n.Exit == 0 && b.Exit != 0 && !slices.Contains(silent, name+", "+form) {
				faults = append(faults, fmt.Sprintf("%s, %s: exits 0, before %d", name, form, b.Exit))
			}
		}
	}
	var was, is float64
	for _, f := range forms() {
		w, i := sum(before, now, f.Name)
		was, is = was+w, is+i
	}
	if is > was/2 {
		faults = append(faults, fmt.Sprintf("all together: %.0f s, more than half of the %.0f s before", is, was))
	}
	slices.Sort(faults)
	return faults
}

// sum adds up the programs that were measured on both, for one form.
func sum(before, now results, form string) (was, is float64) {
	for name, n := range now[form] {
		if b, ok := before[form][name]; ok {
			was, is = was+b.Seconds, is+n.Seconds
		}
	}
	return was, is
}

// sums says what sum is for each form.
func sums(before, now results) string {
	var parts []string
	var allWas, allIs float64
	for _, f := range forms() {
		was, is := sum(before, now, f.Name)
		allWas, allIs = allWas+was, allIs+is
		parts = append(parts, fmt.Sprintf("%s %.0f s before, %.0f s now", f.Name, was, is))
	}
	return fmt.Sprintf("Added up over the programs that were measured on both: %s; together %.0f s before, %.0f s now.", strings.Join(parts, "; "), allWas, allIs)
}

// tables are what TestDenialsPage writes.
func tables(before, now results) string {
	var b strings.Builder
	b.WriteString("\n| program | name denied | address denied | TLS denied | HTTP denied | before: name | address | TLS | HTTP |\n|---|---|---|---|---|---|---|---|---|\n")
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
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", p.name, cell(now, "name", p.name), cell(now, "address", p.name),
			cell(now, "TLS", p.name), cell(now, "HTTP", p.name),
			cell(before, "name", p.name), cell(before, "address", p.name), cell(before, "TLS", p.name), cell(before, "HTTP", p.name))
	}
	b.WriteString("\n" + sums(before, now) + "\n")
	for _, row := range slices.Sorted(maps.Keys(slower)) {
		at := strings.LastIndex(row, ", ")
		name, form := row[:at], row[at+2:]
		fmt.Fprintf(&b, "Slower than before: %s at a denied %s, %.1f s instead of %.1f s. It %s.\n", name, form, now[form][name].Seconds, before[form][name].Seconds, slower[row].why)
	}
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

// TestWorse sees that each way to be worse than before is found, and nothing else.
func TestWorse(t *testing.T) {
	was := results{"name": {"npm": {Seconds: 70, Exit: 1}, "curl": {Seconds: 0.1, Exit: 6}, "yarn 1": {Seconds: 0.8, Exit: 1}}, "HTTP": {"curl": {Seconds: 0.1, Exit: 56}}}
	is := func(change func(results)) results {
		r := results{"name": {"npm": {Seconds: 7, Exit: 1}, "curl": {Seconds: 0.2, Exit: 6}, "yarn 1": {Seconds: 14, Exit: 1}, "new": {Seconds: 500, Exit: 1}}, "HTTP": {"curl": {Seconds: 0.1}}}
		change(r)
		return r
	}
	for what, c := range map[string]struct {
		change func(results)
		want   string
	}{
		"as it is":                  {func(results) {}, ""},
		"a row takes longer":        {func(r results) { r["name"]["curl"] = outcome{Seconds: 3, Exit: 6} }, "curl, name: 3.0 s, before 0.1 s"},
		"an exception takes longer": {func(r results) { r["name"]["yarn 1"] = outcome{Seconds: 21, Exit: 1} }, "yarn 1, name: 21.0 s, and it may take 20 s"},
		"an exception is none":      {func(r results) { r["name"]["yarn 1"] = outcome{Seconds: 1, Exit: 1} }, "yarn 1, name: 1.0 s, before 0.8 s: it is no exception any more"},
		"a row says nothing":        {func(r results) { r["name"]["curl"] = outcome{Seconds: 0.2} }, "curl, name: exits 0, before 6"},
		"the sum":                   {func(r results) { r["name"]["npm"] = outcome{Seconds: 60, Exit: 1} }, "all together: 74 s, more than half of the 71 s before"},
	} {
		if got := strings.Join(worse(was, is(c.change)), "; "); got != c.want {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
}
