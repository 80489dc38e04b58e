// Package devservers opens the development servers that people run in sandboxes at
// their public URLs in a real browser: with no option, with a masked Host, and with
// the setting that docs/ingress.md names for each.
//
// The servers come from npm and PyPI, some 1.5 GB, so the test runs on demand:
//
//	make devservers
//
// SCENARIO=vite chooses one server, SITUATION=mask one kind of URL.
package devservers

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/proving/stand"
)

// npm and pip list what each project needs, pinned.
var (
	npm = map[string]string{
		"vite":    "vite@8.4.0",
		"next":    "next@16.4.3 react@19.2.0 react-dom@19.2.0",
		"webpack": "webpack@5.113.0 webpack-dev-server@5.2.7 webpack-cli@6.0.1 html-webpack-plugin@5.6.4",
	}
	pip = map[string]string{
		"django":    "django==5.2.19",
		"flask":     "flask==3.1.3",
		"fastapi":   "fastapi==0.165.0 uvicorn==0.54.0 websockets python-multipart",
		"streamlit": "streamlit==1.67.0",
		"gradio":    "gradio==6.31.0",
		"jupyter":   "jupyterlab==4.6.6 jupyter-server==2.21.1 ipykernel",
		"bokeh":     "bokeh==3.9.2",
	}
)

// localDomain is what a server on a user's own machine has by default.
const localDomain = "cordon.localhost"

func TestDevelopmentServers(t *testing.T) {
	if os.Getenv("DEVSERVERS") == "" {
		t.Skip("installs some 1.5 GB of packages: run make devservers")
	}
	only := os.Getenv("SCENARIO")
	cache, err := filepath.Abs("../../.cache/devservers")
	if err != nil {
		t.Fatal(err)
	}
	install(t, cache, only)
	s := stand.New(t, stand.Options{Sandboxes: "  memory_mb: 2048", Domains: []string{localDomain}})
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	home := t.TempDir()
	stand.TrustInBrowser(t, home, filepath.Join(s.Dir, "state/ca/ca.pem"), s.Lab.CAFile())
	env := append(s.Environ(t), "HOME="+home, "TMPDIR="+t.TempDir(), "CHROMIUM="+stand.Chromium, "PACKAGES="+cache,
		"LOCAL_DOMAIN="+localDomain, "OWN_DOMAIN="+stand.Domain)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Minute)
	defer cancel()
	cmd := s.Lab.HostCommand(ctx, "node", "devservers.mjs", only, os.Getenv("SITUATION"))
	cmd.Env = env
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(&out, os.Stdout) // row by row: all of them take half an hour
	cmd.Stderr = os.Stderr
	err = cmd.Run()
	if err != nil || !strings.Contains(out.String(), "| ") {
		t.Errorf("devservers.mjs: %v", err)
	}
}

// install puts the packages of each project into an archive in the cache.
func install(t *testing.T, cache, only string) {
	t.Helper()
	pack := func(name, want, script string) {
		archive := filepath.Join(cache, name+".tgz")
		have, _ := os.ReadFile(archive + ".has")
		if string(have) == want || name != "node" && !strings.Contains(name, only) {
			return
		}
		t.Logf("installing %s", want)
		dir := t.TempDir()
		cmd := exec.CommandContext(t.Context(), "bash", "-euc", script+"\ntar -C "+dir+" -czf "+archive+" .")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("install %s: %v\n%s", want, err, out)
		}
		if err := os.WriteFile(archive+".has", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, want := range npm {
		pack(name, want, "npm install --prefix . --no-audit --no-fund --loglevel=error "+want)
	}
	for name, want := range pip {
		pack(name, want, "python3 -m venv v\nv/bin/pip install --quiet --disable-pip-version-check --no-compile --target site --python-version 3.11"+
			" --only-binary=:all: --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 "+want+"\nrm -rf v")
	}
	// The templates' Node is Debian's, which some of these servers find too old.
	pack("node", "the machine's", "cp \"$(readlink -f \"$(command -v node)\")\" node")
}
