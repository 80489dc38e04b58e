// Package programs_test runs the programs that users run in sandboxes, package
// managers and HTTP clients, against what cordon answers them: installs with a
// preset, and denials in each form.
//
// It is outside the gate, since it installs programs (scripts/programs) and some of
// them wait for minutes when they are denied: TEST_PROGRAMS=1 runs it.
package programs_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
	"github.com/cordonhq/cordon/proving/stand"
)

// tools is where the programs are in a sandbox.
const tools = "/home/user/p"

// machine is a sandbox with the programs in it.
type machine struct {
	*client.Sandbox
	t   *testing.T
	lab *lab.Lab
}

// newMachine starts a server and one sandbox of the host template, and brings the
// programs into it.
func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getenv("TEST_PROGRAMS") == "" {
		t.Skip("runs real programs for minutes: set TEST_PROGRAMS=1")
	}
	if out, err := exec.CommandContext(t.Context(), "../../scripts/programs").CombinedOutput(); err != nil {
		t.Fatalf("install the programs: %v\n%s", err, out)
	}
	s := stand.New(t, stand.Options{LogLevel: "info", Sandboxes: "  memory_mb: 3072"})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	sb, err := s.User(t).Create(ctx, client.CreateOptions{Template: "host", Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := sb.Kill(ctx); err != nil && !errors.Is(err, client.ErrNotFound) {
			t.Errorf("kill: %v", err)
		}
	})
	m := &machine{Sandbox: sb, t: t, lab: s.Lab}
	f, err := os.Open(filepath.Join("..", "..", ".cache", "programs.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := sb.Files.Write(ctx, "/home/user/p.tar", f); err != nil {
		t.Fatal(err)
	}
	// The programs' own folders in /etc come with them: a sandbox of the host template has few.
	m.must("root", "mkdir -p "+tools+" && tar -C "+tools+" -xf /home/user/p.tar && rm /home/user/p.tar && cp -r "+tools+"/etc/. /etc/ && mkdir -p /run1 && chmod 1777 /run1")
	return m
}

// must runs a command that has to succeed.
func (m *machine) must(user, command string) string {
	m.t.Helper()
	r, err := m.Commands.Run(m.t.Context(), command, client.RunOptions{User: user, Timeout: 2 * time.Minute})
	if err != nil || r.ExitCode != 0 {
		m.t.Fatalf("%s: %v %s\n%s%s", command, err, r.Status, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// outcome is how a program's run ended.
type outcome struct {
	Seconds float64 `json:"seconds"` // measured inside the sandbox
	Exit    int     `json:"exit"`    // 124: it was ended after the limit
	Words   string  `json:"words"`   // the line that tells most
	Tries   int     `json:"tries"`   // questions, connections or requests that were denied
	Output  string  `json:"output"`  // the end of it
	host    string
}

// environment is what each program gets besides its own: a home of its own, and
// roots that know the lab.
const environment = `export PATH=` + tools + `/rust/bin:` + tools + `/go/bin:/usr/bin:/bin GOROOT=` + tools + `/go HOME=$PWD CARGO_HOME=$PWD/cargo GOPATH=$PWD/gopath ` +
	`GOCACHE=$PWD/gocache GOTOOLCHAIN=local GOFLAGS=-mod=mod PIP_DISABLE_PIP_VERSION_CHECK=1 npm_config_update_notifier=false npm_config_audit=false npm_config_fund=false ` +
	`YARN_ENABLE_TELEMETRY=0 YARN_ENABLE_GLOBAL_CACHE=false COREPACK_ENABLE_DOWNLOAD_PROMPT=0 GIT_TERMINAL_PROMPT=0 CI=1 NO_COLOR=1 FORCE_COLOR=0 ` +
	`DENO_TLS_CA_STORE=system DENO_NO_UPDATE_CHECK=1 DENO_DIR=$PWD/deno ` +
	`NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt JAVA_HOME=/usr/lib/jvm/java-17-openjdk-amd64; `

// run runs a program's script in an empty folder, for at most limit.
func (m *machine) run(name, script string, limit time.Duration) (outcome, error) {
	dir := "/run1/" + name
	whole := fmt.Sprintf("rm -rf %[1]s; mkdir -p %[1]s; cd %[1]s; %s cat >script <<'END'\n%s\nEND\n"+
		"began=$(date +%%s%%N); timeout -k 1 %d sh script >out 2>&1 </dev/null; code=$?; ended=$(date +%%s%%N); echo $code $(( (ended-began)/1000000 )); tail -c 8000 out",
		dir, environment, script, int(limit.Seconds()))
	r, err := m.Commands.Run(m.t.Context(), whole, client.RunOptions{Timeout: limit + 30*time.Second})
	if err != nil {
		return outcome{}, err
	}
	head, output, _ := strings.Cut(r.Stdout, "\n")
	code, ms, ok := strings.Cut(head, " ")
	exit, err := strconv.Atoi(code)
	took, err2 := strconv.Atoi(strings.TrimSpace(ms))
	if !ok || err != nil || err2 != nil {
		return outcome{}, fmt.Errorf("the run of %s printed %q %q, %s", name, r.Stdout, r.Stderr, r.Status)
	}
	return outcome{Seconds: float64(took) / 1000, Exit: exit, Output: output}, nil
}

// rules replaces the sandbox's rules.
func (m *machine) rules(n client.Network) {
	m.t.Helper()
	if err := m.SetNetwork(m.t.Context(), n); err != nil {
		m.t.Fatal(err)
	}
}
