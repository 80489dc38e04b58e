// Package egress_test proves what the network settings promise against a live
// server with real sandboxes, in a small internet: each test says what a sandbox
// tries, what it sees, what the flow log says, and what arrived outside.
package egress_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/lab"
)

const (
	domain = "sbx.test"
	plain  = "127.0.0.1:3900" // where the API answers, in the lab's host
)

// stand is a lab with a server in it.
type stand struct {
	*client.Client
	lab    *lab.Lab
	dir    string
	config string
	log    *os.File
	self   []byte // this test program, which is also the one that sandboxes run

	mu     sync.Mutex // guards server
	server *lab.Cmd
}

// newStand starts a lab and a server in it. extra is YAML for the server's
// configuration, below its network section.
func newStand(t *testing.T, extra string) *stand {
	t.Helper()
	s := &stand{lab: lab.Start(t, lab.Config{Domain: domain, IPv6: true}), dir: t.TempDir()}
	s.config = filepath.Join(s.dir, "cordon.yaml")
	text := fmt.Sprintf(`
name: eg
state_dir: %[1]s/state
run_dir: %[1]s/run
domain: %[2]s
listen:
  https: ["0.0.0.0:443"]
  http: ["0.0.0.0:80"]
  plain: %[3]s
sandboxes:
  extra_ca: %[4]s
  spares: {base: 1}
log: {level: info}
network:
  upstreams: [8.8.8.8, 1.1.1.1]
%[5]s
`, s.dir, domain, plain, s.lab.CAFile(), extra)
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.log, err = os.Create(filepath.Join(s.dir, "server.log")); err != nil {
		t.Fatal(err)
	}
	if s.self, err = readSelf(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.stop(t, syscall.SIGTERM)
		s.log.Close()
		if t.Failed() {
			t.Logf("server log, the last 100 lines:\n%s", s.logTail(100))
		}
	})
	if err := s.start(t.Context()); err != nil {
		t.Fatalf("start the server: %v\n%s", err, s.logTail(50))
	}
	key, err := os.ReadFile(filepath.Join(s.dir, "state", "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	s.Client, err = client.New(client.Options{
		APIURL: "http://" + plain, SandboxURL: "http://" + plain, APIKey: strings.TrimSpace(string(key)), HTTPClient: s.http(0),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func readSelf() ([]byte, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

func binary() string {
	if b := os.Getenv("TEST_BINARY"); b != "" {
		return b
	}
	path, err := filepath.Abs("../../bin/cordon")
	if err != nil {
		panic(err)
	}
	return path
}

func (s *stand) logTail(n int) string {
	b, err := os.ReadFile(s.log.Name())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// http returns a client that speaks from the lab's host.
func (s *stand) http(timeout time.Duration) *http.Client {
	return &http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			DialContext:     s.lab.Host().Dial,
			MaxIdleConns:    8,
			IdleConnTimeout: 10 * time.Second,
		},
	}
}

// start starts the server and waits until its API answers.
func (s *stand) start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := os.Stat(binary()); err != nil {
		return fmt.Errorf("%w: run make build first", err)
	}
	// The server's life is ended by stop, not by the caller's context.
	s.server = s.lab.HostCommand(context.WithoutCancel(ctx), binary(), "--config", s.config, "serve")
	s.server.Stdout, s.server.Stderr = s.log, s.log
	if err := s.server.Start(); err != nil {
		return err
	}
	deadline := time.Now().Add(3 * time.Minute) // the first start may build the image
	for time.Now().Before(deadline) {
		if s.healthy(time.Second) {
			return nil
		}
		if err := s.server.Process.Signal(syscall.Signal(0)); err != nil {
			return errors.New("the server ended")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("the server does not answer")
}

// healthy reports whether the API answers within a time.
func (s *stand) healthy(within time.Duration) bool {
	hc := s.http(within)
	defer hc.CloseIdleConnections()
	res, err := hc.Get("http://" + plain + "/health")
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode < 300
}

// pid is the server's.
func (s *stand) pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server.Process.Pid
}

// signal sends the server a signal.
func (s *stand) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(s.pid(), sig); err != nil {
		t.Fatalf("signal %s to the server: %v", sig, err)
	}
}

// stop ends the server with a signal and waits for it.
func (s *stand) stop(t *testing.T, sig syscall.Signal) {
	t.Helper()
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

// guest is a sandbox with the prober running in it.
type guest struct {
	*client.Sandbox
	stand *stand
	t     *testing.T
	addr  string // of the prober, as the lab's host reaches it
	http  *http.Client
}

const proberPort = 9999

// guest starts a sandbox under rules and the prober in it; it ends with the test.
// The prober is spoken to straight from the host, which needs no server.
func (s *stand) guest(t *testing.T, n client.Network) *guest {
	t.Helper()
	return s.guestWith(t, client.CreateOptions{Network: n})
}

func (s *stand) guestWith(t *testing.T, o client.CreateOptions) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	sb, err := s.Create(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := sb.Kill(ctx); err != nil && !errors.Is(err, client.ErrNotFound) {
			t.Errorf("kill %s: %v", sb.ID, err)
		}
	})
	g := &guest{Sandbox: sb, stand: s, t: t, http: s.http(30 * time.Second)}
	if err := sb.Files.Write(ctx, proberPath, strings.NewReader(string(s.self))); err != nil {
		t.Fatalf("write the prober: %v", err)
	}
	g.sh("chmod 755 " + proberPath + "; setsid " + proberPath + " >/tmp/prober.log 2>&1 </dev/null &")
	g.locate()
	return g
}

// locate finds the prober's address and waits until it answers.
func (g *guest) locate() {
	g.t.Helper()
	out := g.sh("hostname -I")
	for _, a := range strings.Fields(out) {
		if ip := net.ParseIP(a); ip != nil && ip.To4() != nil {
			g.addr = net.JoinHostPort(a, fmt.Sprint(proberPort))
		}
	}
	if g.addr == "" {
		g.t.Fatalf("the sandbox has no IPv4 address: hostname -I says %q", out)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		res, err := g.http.Get("http://" + g.addr + "/ready")
		if err == nil {
			res.Body.Close()
			return
		}
		if time.Now().After(end) {
			g.t.Fatalf("the prober does not answer: %v; it says %s", err, g.sh("cat /tmp/prober.log"))
		}
	}
}

// sh runs a shell command in the sandbox and returns what it prints.
func (g *guest) sh(command string) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
	defer cancel()
	r, err := g.Commands.Run(ctx, command, client.RunOptions{})
	if err != nil {
		g.t.Fatalf("run %q: %v", command, err)
	}
	return r.Stdout + r.Stderr
}

// rules replaces the sandbox's rules and returns how long the call took.
func (g *guest) rules(n client.Network) time.Duration {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 10*time.Second)
	defer cancel()
	began := time.Now()
	if err := g.SetNetwork(ctx, n); err != nil {
		g.t.Fatalf("set network: %v", err)
	}
	return time.Since(began)
}
