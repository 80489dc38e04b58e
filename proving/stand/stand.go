// Package stand starts a live server for a test: the built binary in the host of a lab,
// with folders, a name and a configuration of its own, and nothing left of it when the
// test ends.
package stand

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// Domain is where the sandboxes of all stands are reached.
const Domain = "sbx.test"

// API is where the control API answers in the lab's host, without TLS.
const API = "http://127.0.0.1:3900"

// Options say how the server differs from others.
type Options struct {
	// Spares is how many running spares of the base template it keeps.
	Spares int
	// IPv6 gives the lab and its sandboxes IPv6 as well.
	IPv6 bool
	// Network is more YAML for the network section, indented by two.
	Network string
	// Listen is more YAML for the listen section, indented by two.
	Listen string
	// Sandboxes is more YAML for the sandboxes section, indented by two.
	Sandboxes string
	// Domains are more domains of the server, beside Domain.
	Domains []string
	// Under is a program with arguments that runs the server, such as setpriv.
	Under []string
	// LogLevel is the server's; empty means debug.
	LogLevel string
}

// Stand is a lab with a server in it.
type Stand struct {
	Lab    *lab.Lab
	Dir    string // of everything the server keeps; it ends with the test
	Config string // the configuration file
	Name   string // of the server, no other's on this machine

	under  []string
	mu     sync.Mutex // guards server
	server *lab.Cmd
	log    *os.File
}

// New returns a stand whose server is not started. When the test ends, it is
// ended with all that it started; if the test failed, its log is shown.
func New(t testing.TB, o Options) *Stand {
	t.Helper()
	lab.Privileged(t)
	dir := t.TempDir()
	name := fmt.Sprintf("t%03s", strconv.FormatInt(rand.Int64N(36*36*36), 36)) // tests of several packages run at once
	// Cleanups run in reverse order: the server ends, then the lab, then this.
	t.Cleanup(func() { clearCgroups(t, name) })
	s := &Stand{Lab: lab.Start(t, lab.Config{Domain: Domain, IPv6: o.IPv6}), Dir: dir, Config: filepath.Join(dir, "cordon.yaml"), Name: name}
	if err := os.WriteFile(s.Config, s.configuration(o), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(s.Dir, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	s.log, s.under = log, o.Under
	t.Cleanup(func() {
		s.Stop(t, syscall.SIGTERM)
		log.Close()
		if t.Failed() {
			t.Logf("server log, the last 200 lines:\n%s", s.Log(200))
		}
	})
	return s
}

// configuration is what differs from a user's machine: folders, the lab's domain,
// name servers and CA.
func (s *Stand) configuration(o Options) []byte {
	return fmt.Appendf(nil, `name: %[1]s
state_dir: %[2]s/state
run_dir: %[2]s/run
domain: %[3]s
domains: [%[10]s]
listen:
  https: ["0.0.0.0:443"]
  http: ["0.0.0.0:80"]
  plain: 127.0.0.1:3900
%[8]s
network:
  upstreams: [8.8.8.8, 1.1.1.1]
%[6]s
sandboxes:
  extra_ca: %[4]s
  spares: {base: %[5]d}
%[9]s
log: {level: %[7]s}
`, s.Name, s.Dir, Domain, s.Lab.CAFile(), o.Spares, o.Network, cmp.Or(o.LogLevel, "debug"), o.Listen, o.Sandboxes, strings.Join(o.Domains, ", "))
}

// Binary is the server's program, which make build makes; TEST_BINARY names another.
func Binary() string {
	if path := os.Getenv("TEST_BINARY"); path != "" {
		return path
	}
	path, err := filepath.Abs("../../bin/cordon")
	if err != nil {
		panic(err) // the working directory is gone
	}
	return path
}

// Command returns a run of cordon in the lab's host, as a user's on the server's
// machine.
func (s *Stand) Command(ctx context.Context, args ...string) *lab.Cmd {
	return s.Lab.HostCommand(ctx, Binary(), append([]string{"--config", s.Config}, args...)...)
}

// Start starts the server and waits until its API answers.
func (s *Stand) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := os.Stat(Binary()); err != nil {
		return fmt.Errorf("%w: run make build first", err)
	}
	// The server's life is ended by Stop, not by the caller's context.
	s.server = s.Command(context.WithoutCancel(ctx), "serve")
	if len(s.under) > 0 {
		args := append(append([]string{}, s.under[1:]...), Binary(), "--config", s.Config, "serve")
		s.server = s.Lab.HostCommand(context.WithoutCancel(ctx), s.under[0], args...)
	}
	s.server.Stdout, s.server.Stderr = s.log, s.log
	if err := s.server.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func(server *lab.Cmd) {
		_ = server.Wait() // Stop reports it
		close(ended)
	}(s.server)
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // the first start may build the image
		if res, err := s.Client().Get(API + "/health"); err == nil {
			res.Body.Close()
			return nil
		}
		select {
		case <-ended:
			s.server = nil
			return fmt.Errorf("the server ended:\n%s", s.Log(50))
		default:
		}
	}
	return fmt.Errorf("the server does not answer:\n%s", s.Log(50))
}

// Stop ends the server, if it runs, with a signal and waits for it.
func (s *Stand) Stop(t testing.TB, sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil {
		return
	}
	if err := s.server.Process.Signal(sig); err != nil {
		t.Errorf("signal the server: %v", err)
	}
	done := make(chan error, 1)
	server := s.server
	go func() { done <- server.Wait() }()
	select {
	case err := <-done:
		if err != nil && sig == syscall.SIGTERM {
			t.Errorf("the server ended badly: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the server does not end")
		_ = s.server.Process.Kill()
		<-done
	}
	s.server = nil
}

// PID is the server's process.
func (s *Stand) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server.Process.Pid
}

// Log is the end of what the server printed so far.
func (s *Stand) Log(lines int) string {
	b, err := os.ReadFile(s.log.Name())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Client speaks HTTP from the lab's host, where the sandboxes' names resolve.
func (s *Stand) Client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return s.Lab.Dial(ctx, network, addr)
		},
	}}
}

// Environ is what a user's shell has after eval "$(cordon env)".
func (s *Stand) Environ(t testing.TB) []string {
	t.Helper()
	out, err := s.Command(t.Context(), "env").Output()
	if err != nil {
		t.Fatalf("cordon env: %v", err)
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.Dir}
	for line := range strings.Lines(string(out)) {
		if kv, ok := strings.CutPrefix(strings.TrimSpace(line), "export "); ok {
			kv, _, _ = strings.Cut(kv, " ")
			env = append(env, kv)
		}
	}
	return env
}

// User is a client with the administrator's key, which speaks from the lab's host.
func (s *Stand) User(t testing.TB) *client.Client {
	t.Helper()
	key, err := os.ReadFile(filepath.Join(s.Dir, "state", "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	return s.userOf(t, string(key))
}

var secretForm = regexp.MustCompile(`e2b_[0-9a-f]{40}`)

// NewUser is a client with a new key of its own, made by the command line.
func (s *Stand) NewUser(t testing.TB, name string) *client.Client {
	t.Helper()
	out, err := s.Command(t.Context(), "key", "create", name).CombinedOutput()
	secret := secretForm.FindString(string(out))
	if err != nil || secret == "" {
		t.Fatalf("cordon key create: %v\n%s", err, out)
	}
	return s.userOf(t, secret)
}

func (s *Stand) userOf(t testing.TB, key string) *client.Client {
	t.Helper()
	web := s.Client()
	web.Timeout = 0 // commands may take their time
	c, err := client.New(client.Options{APIURL: API, SandboxURL: API, APIKey: strings.TrimSpace(key), HTTPClient: web})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// clearCgroups removes the cgroups of a server whose processes have ended with
// the lab, and what was made around them.
func clearCgroups(t testing.TB, name string) {
	roots, err := filepath.Glob("/sys/fs/cgroup/cordon/" + name)
	more, moreErr := filepath.Glob("/sys/fs/cgroup/*/cordon/" + name)
	if err := errors.Join(err, moreErr); err != nil {
		t.Error(err)
	}
	for _, root := range append(roots, more...) {
		var dirs []string
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // what is gone already is fine
		})
		for _, dir := range slices.Backward(dirs) {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				t.Errorf("remove cgroup %s: %v", dir, err)
			}
		}
		_ = unix.Rmdir(filepath.Dir(root)) // others' may be in it
	}
}
