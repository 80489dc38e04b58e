package cordon

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/cordonhq/cordon"

// allowed is the import map: which of our packages each of our packages may
// import. A new arrow is a deliberate edit here. Packages under test and scripts see
// everything; api/gen, errs and sandboxid are importable by all.
var allowed = map[string][]string{
	"internal/errs":                {},
	"internal/policy":              {},
	"internal/auth":                {},
	"internal/share":               {},
	"internal/sandboxid":           {},
	"internal/statefile":           {},
	"internal/checkpoint":          {"internal/share"},
	"internal/sandbox":             {"internal/share", "internal/policy", "internal/checkpoint"},
	"internal/flowlog":             {"internal/share", "internal/policy"},
	"internal/egress":              {"internal/share", "internal/policy", "internal/flowlog"},
	"internal/resolver":            {"internal/share", "internal/policy", "internal/flowlog"},
	"internal/network":             {"internal/share", "internal/sandbox", "internal/policy", "internal/flowlog"},
	"internal/network/conntrack":   {"internal/policy"},
	"internal/network/failclosed":  {"internal/network/slot"},
	"internal/network/nft":         {"internal/policy"},
	"internal/network/slot":        {"internal/network/sysctl", "internal/sandbox"},
	"internal/network/sysctl":      {},
	"internal/runtime/gvisor":      {"internal/share", "internal/sandbox"},
	"internal/runtime/runtimetest": {"internal/sandbox"},
	"internal/image":               {"internal/statefile", "internal/sandbox"},
	"internal/store":               {"internal/statefile", "internal/share", "internal/sandbox", "internal/auth"},
	"internal/agent":               {},
	"internal/interpreter":         {},
	"internal/agent/agentctl":      {"internal/agent/proof", "internal/agent/wire", "internal/sandbox"},
	"internal/ingress":             {"internal/statefile", "internal/share", "internal/auth", "internal/tunnel"},
	"internal/api":                 {"internal/share", "internal/sandbox", "internal/policy", "internal/flowlog", "internal/auth"},
	"internal/tunnel":              {},
	"internal/server":              {"internal/share", "internal/statefile", "internal/auth", "internal/policy", "internal/sandbox", "internal/store", "internal/image", "internal/network", "internal/runtime/gvisor", "internal/agent", "internal/agent/agentctl", "internal/flowlog", "internal/resolver", "internal/egress", "internal/ingress", "internal/ingress/tlsconf", "internal/api"},
	"internal/cli/usage":           {},
	"internal/cli":                 {"internal/server", "internal/statefile", "internal/policy", "internal/image", "internal/network", "internal/runtime/gvisor", "client"},
	"client":                       {"internal/tunnel"},
	"cmd/cordon":                   {"internal/cli", "internal/runtime/gvisor"},
	"cmd/cordon-agent":             {"internal/agent", "internal/agent/proof", "internal/interpreter"},
	"cmd/cordon-lab":               {"internal/cli/usage", "internal/image", "proving/demo", "proving/conformance", "proving/bench"},
	"packaging/man":                {"internal/cli"},
	"examples/go":                  {"client"},
	"proving/lab":                  {},
	"proving/stand":                {"proving/lab", "client"},
	"proving/demo":                 {"proving/lab", "client"},
	"proving/conformance":          {"proving/lab", "client"},
	"proving/bench":                {"proving/lab", "internal/network", "internal/egress", "internal/resolver", "internal/ingress", "internal/policy", "internal/flowlog", "internal/sandbox", "client"},
}

// TestProductLeavesProvingAlone demands that only the proving ground's own program and
// tests import it, so that no server ships it.
func TestProductLeavesProvingAlone(t *testing.T) {
	for dir, files := range packages(t) {
		if dir == "cmd/cordon-lab" || strings.HasPrefix(dir, "proving/") || strings.HasPrefix(dir, "test/") {
			continue
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue // resolver's and others' have the lab
			}
			for _, imported := range ours(t, file) {
				if strings.HasPrefix(imported, "proving/") {
					t.Errorf("%s imports %s", file, imported)
				}
			}
		}
	}
}

// TestImportsPointInward walks every package and checks its imports against the map.
func TestImportsPointInward(t *testing.T) {
	for dir, files := range packages(t) {
		if strings.HasPrefix(dir, "test/") || strings.HasPrefix(dir, "scripts/") || strings.HasPrefix(dir, "api/gen") {
			continue
		}
		may, known := lookup(dir)
		if !known {
			t.Errorf("package %s is not in the import map of arch_test.go", dir)
			continue
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue // tests may build what they need
			}
			for _, imported := range ours(t, file) {
				if imported == "internal/errs" || imported == "internal/sandboxid" || strings.HasPrefix(imported, "api/gen") || strings.HasPrefix(imported, dir+"/") {
					continue
				}
				if !slices.Contains(may, imported) && !within(dir, imported) {
					t.Errorf("%s imports %s: not in the import map of arch_test.go", file, imported)
				}
			}
		}
	}
}

// TestPackagesSayWhatTheyDo demands a package comment that begins with the package's
// name, as go doc shows it.
func TestPackagesSayWhatTheyDo(t *testing.T) {
	for dir, files := range packages(t) {
		if strings.HasPrefix(dir, "test/") || strings.HasPrefix(dir, "api/gen") {
			continue
		}
		begins, code := false, false
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			code = true
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			name := "Package " + f.Name.Name + " "
			if f.Name.Name == "main" {
				name = "Command " + filepath.Base(dir) + " "
			}
			begins = begins || f.Doc != nil && strings.HasPrefix(f.Doc.Text(), name)
		}
		if code && !begins {
			t.Errorf("package %s: no comment that begins with its name and says what it does", dir)
		}
	}
}

// lookup finds dir in the map, or the nearest parent package there: a package's
// own subpackages follow its rules.
func lookup(dir string) ([]string, bool) {
	for d := dir; d != "."; d = filepath.Dir(d) {
		if may, ok := allowed[d]; ok {
			return may, true
		}
	}
	return nil, false
}

// within reports whether both belong to one top package of the map, e.g.
// internal/ingress and internal/ingress/relay.
func within(dir, imported string) bool {
	for d := dir; d != "."; d = filepath.Dir(d) {
		if _, ok := allowed[d]; ok {
			return imported == d || strings.HasPrefix(imported, d+"/")
		}
	}
	return false
}

// ours returns the imports of file that belong to this module, without its prefix.
func ours(t *testing.T, file string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, imp := range f.Imports {
		path, err := strconv.Unquote(imp.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		if rest, ok := strings.CutPrefix(path, module+"/"); ok {
			out = append(out, rest)
		}
	}
	return out
}

// packages maps each directory with Go files to those files.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if path != "." && (strings.HasPrefix(name, ".") || name == "node_modules" || name == "tools" || name == "bin" || name == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(path, ".go") && filepath.Dir(path) != "." {
			out[filepath.Dir(path)] = append(out[filepath.Dir(path)], path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) == 0 {
		wd, _ := os.Getwd()
		t.Fatalf("no packages found below %s", wd)
	}
	return out
}
