package sdk

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/proving/stand"
)

// TestProgramsInExamples runs every program in examples as a user does, and compares
// its output with what the comment at its top says that it prints, where "…" is
// any text.
func TestProgramsInExamples(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	s := stand.New(t, stand.Options{Spares: 1})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	scenarios := map[string]int{}
	for _, language := range []struct {
		pattern string
		comment string
		command func(t *testing.T, file string) []string
	}{
		{"js/*.mjs", "// ", func(t *testing.T, file string) []string { return []string{node(t), beside(t, file, "js/node_modules")} }},
		{"python/*.py", "# ", func(t *testing.T, file string) []string { return []string{python(t), file} }},
		{"go/*/main.go", "//\t", func(t *testing.T, file string) []string { return []string{compiled(t, filepath.Dir(file))} }},
	} {
		files, err := filepath.Glob("../../examples/" + language.pattern)
		must(t, err)
		for _, file := range files {
			scenarios[scenario(file)]++
			t.Run(strings.TrimPrefix(file, "../../examples/"), func(t *testing.T) {
				text, err := os.ReadFile(file)
				must(t, err)
				path, err := filepath.Abs(file)
				must(t, err)
				command := language.command(t, path)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				cmd := s.Lab.HostCommand(ctx, command[0], command[1:]...)
				cmd.Env, cmd.Dir = s.Environ(t), t.TempDir()
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if want := printed(t, string(text), language.comment); !want.Match(out) {
					t.Errorf("it printed\n%s\nwant a match of\n%s", out, want)
				}
			})
		}
	}
	for name, n := range scenarios {
		if n != 3 {
			t.Errorf("%s is there in %d languages, want 3", name, n)
		}
	}
	if len(scenarios) < 6 {
		t.Errorf("%d scenarios were found", len(scenarios))
	}
}

// scenario is an example's name without its language: create-and-run.
func scenario(file string) string {
	if filepath.Base(file) == "main.go" {
		return filepath.Base(filepath.Dir(file))
	}
	name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	return strings.ReplaceAll(name, "_", "-")
}

// printed is what the comment at the top of a program says that it prints.
func printed(t *testing.T, text, comment string) *regexp.Regexp {
	t.Helper()
	_, after, ok := strings.Cut(text, "It prints:\n")
	var want strings.Builder
	for line := range strings.Lines(after) {
		said, isComment := strings.CutPrefix(line, comment)
		if !isComment && strings.TrimSpace(line) != "//" {
			break
		}
		if isComment {
			want.WriteString(strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(said)), "…", ".*") + "\n")
		}
	}
	if !ok || want.Len() == 0 {
		t.Fatal("no comment says what it prints")
	}
	return regexp.MustCompile(`\A` + want.String() + `\z`)
}

// beside copies a program to a folder where Node finds the packages.
func beside(t *testing.T, file, modules string) string {
	t.Helper()
	dir := t.TempDir()
	modules, err := filepath.Abs(modules)
	must(t, err)
	must(t, os.Symlink(modules, filepath.Join(dir, "node_modules")))
	text, err := os.ReadFile(file)
	must(t, err)
	to := filepath.Join(dir, filepath.Base(file))
	must(t, os.WriteFile(to, text, 0o600))
	return to
}

// compiled builds a Go program.
func compiled(t *testing.T, dir string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "example")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, dir).CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}
