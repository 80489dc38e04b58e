package share

import (
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the table into docs/operations.md")

// Where the table stands in docs/operations.md.
const (
	tableBegins = "<!-- written by go test ./internal/share -update -->\n"
	tableEnds   = "<!-- end -->\n"
)

// TestTheDocumentationHasTheTable compares docs/operations.md with the resources that
// some package counts.
func TestTheDocumentationHasTheTable(t *testing.T) {
	const file = "../../docs/operations.md"
	used := usedResources(t)
	var resources []Resource
	for _, r := range All() {
		if used[variables(t)[r.Name]] {
			resources = append(resources, r)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begins := strings.Cut(string(b), tableBegins)
	got, after, ends := strings.Cut(rest, tableEnds)
	if !begins || !ends {
		t.Fatalf("%s has no place for the table", file)
	}
	want := Table(resources)
	if *update && got != want {
		if err := os.WriteFile(file, []byte(before+tableBegins+want+tableEnds+after), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != want {
		t.Errorf("the table in %s is not that of the resources: run go test ./internal/share -run Table -update\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

func TestEveryResourceSaysItsSize(t *testing.T) {
	for _, r := range All() {
		if sizes[r.Name].whole == "" {
			t.Errorf("table.go says nothing of %s", r.Name)
		}
		if variables(t)[r.Name] == "" {
			t.Errorf("%s is not defined in resources.go", r.Name)
		}
	}
	if len(sizes) != len(All()) {
		t.Errorf("table.go speaks of %d resources, there are %d", len(sizes), len(All()))
	}
}

// variables are the names of the variables of resources.go, by the resource's name.
func variables(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "resources.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		lit, ok := spec.Values[0].(*ast.CompositeLit)
		if !ok {
			return true
		}
		for _, e := range lit.Elts {
			kv, ok := e.(*ast.KeyValueExpr)
			if !ok {
				continue
			}
			if k, ok := kv.Key.(*ast.Ident); ok && k.Name == "Name" {
				out[strings.Trim(kv.Value.(*ast.BasicLit).Value, `"`)] = spec.Names[0].Name
			}
		}
		return true
	})
	return out
}

// usedResources are the variables that some package but this one uses outside its tests.
func usedResources(t *testing.T) map[string]bool {
	t.Helper()
	used := map[string]bool{}
	for _, root := range []string{"..", "../../cmd"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "../share/") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(f, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "share" {
						used[sel.Sel.Name] = true
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return used
}
