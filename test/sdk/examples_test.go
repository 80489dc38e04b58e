package sdk

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/cordonhq/cordon/proving/stand"
)

// example is a program in README.md or docs.
type example struct {
	file, language, code string
}

var fence = regexp.MustCompile("(?ms)^```(js|python)\n(.*?)^```$")

func examples(t *testing.T) []example {
	t.Helper()
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []example
	for _, file := range append([]string{"../../README.md"}, files...) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
			out = append(out, example{file: filepath.Base(file), language: m[1], code: m[2]})
		}
	}
	if len(out) < 2 {
		t.Fatal("README.md has no examples")
	}
	return out
}

// TestExamples runs every JavaScript and Python example of README.md and docs as a
// user would, after eval "$(cordon env)". In the lab's internet there is a package
// index of the test's own.
func TestExamples(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	s := stand.New(t, stand.Options{Spares: 1})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	index := serveIndex(t, s)
	for i, e := range examples(t) {
		t.Run(fmt.Sprintf("%s %d %s", e.file, i, e.language), func(t *testing.T) {
			mark, fetched := s.Lab.Recorder().Mark(), index.Load()
			out := e.run(t, s)
			if e.file != "README.md" {
				return
			}
			if index.Load() == fetched {
				t.Errorf("the package index was not asked:\n%s", out)
			}
			seen := s.Lab.Recorder().Since(mark)
			if err := seen.Err(); err != nil {
				t.Fatal(err)
			}
			if seen.AskedFor("example.com") || seen.Contains([]byte("example.com")) {
				t.Error("a name that no rule allows left the machine")
			}
			want := map[string]string{"js": "https://3000-", "python": "Successfully downloaded six"}[e.language]
			if !strings.Contains(out, want) {
				t.Errorf("it did not print %q:\n%s", want, out)
			}
		})
	}
}

// run runs the example where a user's program would run, and wants it to succeed.
func (e example) run(t *testing.T, s *stand.Stand) string {
	t.Helper()
	dir := t.TempDir()
	program, file := "", ""
	switch e.language {
	case "js":
		program, file = node(t), filepath.Join(dir, "example.mjs")
		modules, err := filepath.Abs("js/node_modules")
		if err == nil {
			err = os.Symlink(modules, filepath.Join(dir, "node_modules"))
		}
		must(t, err)
	case "python":
		program, file = python(t), filepath.Join(dir, "example.py")
	}
	must(t, os.WriteFile(file, []byte(e.code), 0o600))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := s.Lab.HostCommand(ctx, program, file)
	cmd.Env, cmd.Dir = s.Environ(t), dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// serveIndex puts a package index with one package in place of the lab's web
// server at pypi.org's address, and counts the requests it answers.
func serveIndex(t *testing.T, s *stand.Stand) *atomic.Int64 {
	t.Helper()
	const port = 9443
	l, err := s.Lab.Internet().Listen(t.Context(), "tcp", fmt.Sprintf("0.0.0.0:%d", port))
	must(t, err)
	rules := fmt.Sprintf(`table ip examples { chain pre { type nat hook prerouting priority dstnat;
		ip daddr %s tcp dport 443 redirect to :%d; }; }`, s.Lab.Lookup("pypi.org")[0], port)
	must(t, s.Lab.Internet().Do(func() error {
		nft := exec.CommandContext(t.Context(), "nft", rules)
		if out, err := nft.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	}))
	const wheel = "six-1.17.0-py2.py3-none-any.whl"
	requests := new(atomic.Int64)
	mux := http.NewServeMux()
	mux.HandleFunc("/simple/six/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<a href="https://files.pythonhosted.org/packages/%s">%s</a>`, wheel, wheel)
	})
	mux.HandleFunc("/packages/"+wheel, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(newWheel(t)) })
	server := &http.Server{
		ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests.Add(1)
			mux.ServeHTTP(w, r)
		}),
	}
	config := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) { return s.Lab.CA().Leaf(hello.ServerName) },
	}
	go func() {
		if err := server.Serve(tls.NewListener(l, config)); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("package index: %v", err)
		}
	}()
	t.Cleanup(func() { server.Close() })
	return requests
}

// newWheel makes the smallest package that pip takes (PEP 427).
func newWheel(t *testing.T) []byte {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for name, content := range map[string]string{
		"six.py":                        "",
		"six-1.17.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: six\nVersion: 1.17.0\n",
		"six-1.17.0.dist-info/WHEEL":    "Wheel-Version: 1.0\nGenerator: cordon\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n",
		"six-1.17.0.dist-info/RECORD":   "",
	} {
		f, err := z.Create(name)
		if err == nil {
			_, err = f.Write([]byte(content))
		}
		if err != nil {
			t.Error(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Error(err)
	}
	return b.Bytes()
}

var (
	linked  = regexp.MustCompile(`\]\(([^)#: "]*)(?:#([^) "]*))?(?: "[^"]*")?\)`) // with or without a title
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
)

// TestLinksLeadSomewhere follows the links between README.md, docs and the code, as
// a reader on a code host would.
func TestLinksLeadSomewhere(t *testing.T) {
	var files []string
	for _, pattern := range []string{"../../*.md", "../../docs/*.md", "../../docs/*/*.md", "../../examples/*.md"} {
		found, err := filepath.Glob(pattern)
		must(t, err)
		files = append(files, found...)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		must(t, err)
		for _, m := range linked.FindAllStringSubmatch(string(text), -1) {
			to := file
			if m[1] != "" {
				to = filepath.Join(filepath.Dir(file), m[1])
			}
			if m[2] == "" {
				if _, err := os.Stat(to); err != nil {
					t.Errorf("%s: %v", file, err)
				}
				continue
			}
			target, err := os.ReadFile(to)
			if err != nil {
				t.Errorf("%s: %v", file, err)
			}
			if !slices.Contains(anchors(string(target)), m[2]) {
				t.Errorf("%s: %s has no heading #%s", file, to, m[2])
			}
		}
	}
}

// anchors are the headings of a page as links name them.
func anchors(text string) []string {
	var out []string
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		out = append(out, strings.ReplaceAll(strings.Map(func(r rune) rune {
			if r == ' ' || r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r) {
				return unicode.ToLower(r)
			}
			return -1
		}, m[1]), " ", "-"))
	}
	return out
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
