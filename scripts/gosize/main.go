// Command gosize prints how large the module in a folder is: lines by package, the
// length of functions, the methods of types, and each go:linkname with its reason.
package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

func main() {
	dir := "."
	if len(os.Args) > 1 {
		dir = os.Args[1]
	}
	if err := report(os.Stdout, dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// The kinds of code.
const (
	product = iota
	proving
	tests
	generated
	kinds
)

var kindNames = [kinds]string{"product", "proving", "tests", "generated"}

// provingGround are the folders of the code that shows what the product does, and of
// what helps to build and test it.
var provingGround = []string{
	"proving", "cmd/cordon-lab", "examples", "scripts", "findings",
	"internal/lab", "internal/bench", "internal/conformance", "internal/runtime/runtimetest", "internal/api/apitest",
}

// lines are counted twice: those with code, and all, with comments and blanks.
type lines struct{ code, raw int }

func (l *lines) add(more lines) { l.code, l.raw = l.code+more.code, l.raw+more.raw }

// function is a function of the product.
type function struct {
	name  string
	lines int
}

// tree is what was counted.
type tree struct {
	packages  map[string]*[kinds]lines // by folder
	functions []function
	methods   map[string]int // by type, with its package
	links     []string       // go:linkname directives
}

// report counts the Go files below dir and prints the figures.
func report(out io.Writer, dir string) error {
	t := tree{packages: map[string]*[kinds]lines{}, methods: map[string]int{}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "node_modules") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return t.count(filepath.ToSlash(name), text)
	})
	if err != nil {
		return err
	}
	t.print(out)
	return nil
}

// count adds a file.
func (t *tree) count(name string, text []byte) error {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, text, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	dir := filepath.Dir(name)
	kind := kindOf(name, file)
	if t.packages[dir] == nil {
		t.packages[dir] = new([kinds]lines)
	}
	t.packages[dir][kind].add(linesOf(text))
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || kind != product {
			continue
		}
		full := f.Name.Name
		if f.Recv != nil && len(f.Recv.List) == 1 {
			of := within(dir, typeName(f.Recv.List[0].Type))
			t.methods[of]++
			full = typeName(f.Recv.List[0].Type) + "." + full
		}
		t.functions = append(t.functions, function{within(dir, full), set.Position(f.End()).Line - set.Position(f.Pos()).Line + 1})
	}
	if kind != generated {
		t.links = append(t.links, linksOf(set, file)...)
	}
	return nil
}

func kindOf(name string, file *ast.File) int {
	in := func(dir string) bool { return strings.HasPrefix(name, dir+"/") }
	switch {
	case ast.IsGenerated(file):
		return generated
	case strings.HasSuffix(name, "_test.go") || in("test") || strings.Contains(name, "testdata/"):
		return tests
	case slices.ContainsFunc(provingGround, in):
		return proving
	}
	return product
}

// within is a name with its package's folder.
func within(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "." + name
}

// linesOf counts the lines on which there is more than comments and blanks.
func linesOf(text []byte) lines {
	set := token.NewFileSet()
	f := set.AddFile("", set.Base(), len(text))
	var s scanner.Scanner
	s.Init(f, text, nil, 0) // without comments
	code := map[int]bool{}
	for {
		pos, tok, literal := s.Scan()
		if tok == token.EOF {
			return lines{len(code), f.LineCount()}
		}
		if tok == token.SEMICOLON && literal == "\n" {
			continue // the scanner's own, at the end of a line
		}
		first := f.Line(pos)
		for i := range strings.Count(literal, "\n") + 1 {
			code[first+i] = true
		}
	}
}

// typeName is the name of a receiver's type, without pointer and type parameters.
func typeName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return typeName(e.X)
	case *ast.IndexExpr:
		return typeName(e.X)
	case *ast.IndexListExpr:
		return typeName(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}

// linksOf finds the go:linkname directives. The reason of one is the rest of its
// comment, or of the comment above it.
func linksOf(set *token.FileSet, file *ast.File) (out []string) {
	const directive = "//go:linkname "
	for i, group := range file.Comments {
		reason := strings.Join(strings.Fields(group.Text()), " ") // without directives
		for _, c := range group.List {
			link, ok := strings.CutPrefix(c.Text, directive)
			if !ok {
				continue
			}
			if reason == "" && i > 0 && set.Position(file.Comments[i-1].End()).Line >= set.Position(group.Pos()).Line-2 {
				reason = strings.Join(strings.Fields(file.Comments[i-1].Text()), " ")
			}
			at := set.Position(c.Pos())
			out = append(out, fmt.Sprintf("%s:%d: %s\n    %s", at.Filename, at.Line, link, cmp.Or(reason, "NO REASON GIVEN")))
		}
	}
	return out
}

func (t *tree) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "lines of code / all lines")
	for _, kind := range kindNames {
		fmt.Fprintf(w, "\t%s\t", kind)
	}
	fmt.Fprint(w, "\t\n")
	var sum [kinds]lines
	row := func(counts *[kinds]lines, name string) {
		for _, l := range counts {
			if l.raw == 0 {
				fmt.Fprint(w, "\t\t")
				continue
			}
			fmt.Fprintf(w, "\t%d\t%d", l.code, l.raw)
		}
		fmt.Fprintf(w, "\t  %s\n", name)
	}
	for _, dir := range slices.Sorted(maps.Keys(t.packages)) {
		row(t.packages[dir], dir)
		for kind, l := range t.packages[dir] {
			sum[kind].add(l)
		}
	}
	row(&sum, "all")
	w.Flush()

	slices.SortFunc(t.functions, func(a, b function) int {
		return cmp.Or(cmp.Compare(b.lines, a.lines), cmp.Compare(a.name, b.name))
	})
	if n := len(t.functions); n > 0 {
		at := func(percent int) int { return t.functions[n-1-(n-1)*percent/100].lines }
		fmt.Fprintf(out, "\nfunctions of the product: %d; lines of one: p50 %d, p90 %d, max %d\n", n, at(50), at(90), at(100))
		for _, f := range t.functions[:min(n, 10)] {
			fmt.Fprintf(out, "%6d  %s\n", f.lines, f.name)
		}
	}
	types := slices.SortedFunc(maps.Keys(t.methods), func(a, b string) int {
		return cmp.Or(cmp.Compare(t.methods[b], t.methods[a]), cmp.Compare(a, b))
	})
	fmt.Fprintf(out, "\nmethods of types of the product\n")
	for _, name := range types[:min(len(types), 10)] {
		fmt.Fprintf(out, "%6d  %s\n", t.methods[name], name)
	}
	fmt.Fprintf(out, "\ngo:linkname\n")
	for _, link := range t.links {
		fmt.Fprintln(out, link)
	}
}
