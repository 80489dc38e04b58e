// Package sdk runs the published SDKs, unmodified, against a live server in a
// small internet: what a user's program does is what is tested.
package sdk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/lab"
)

const domain = "sbx.test"

// stand is a lab with a server in it and a control server beside it.
type stand struct {
	lab     *lab.Lab
	dir     string
	config  string
	control string // URL

	mu     sync.Mutex // guards server
	server *lab.Cmd
	log    *os.File
}

func newStand(t *testing.T) *stand {
	t.Helper()
	s := &stand{lab: lab.Start(t, lab.Config{Domain: domain}), dir: t.TempDir()}
	s.writeConfig(t)
	log, err := os.Create(filepath.Join(s.dir, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	s.log = log
	t.Cleanup(func() {
		s.stop(t, syscall.SIGTERM)
		log.Close()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("server log, the last 200 lines:\n%s", tail(string(b), 200))
		}
	})
	if err := s.start(t.Context()); err != nil {
		b, _ := os.ReadFile(log.Name())
		t.Fatalf("start the server: %v\n%s", err, tail(string(b), 50))
	}
	s.serveControl(t)
	return s
}

func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// writeConfig sets what differs from a user's machine: its own folders, the
// lab's domain, name servers and CA.
func (s *stand) writeConfig(t *testing.T) {
	t.Helper()
	s.config = filepath.Join(s.dir, "cordon.yaml")
	text := fmt.Sprintf(`
name: sdk
state_dir: %[1]s/state
run_dir: %[1]s/run
domain: %[2]s
listen:
  https: ["0.0.0.0:443"]
  http: ["0.0.0.0:80"]
  plain: 127.0.0.1:3900
network:
  upstreams: [8.8.8.8, 1.1.1.1]
sandboxes:
  extra_ca: %[3]s
  spares: {base: 2}
log: {level: debug}
`, s.dir, domain, s.lab.CAFile())
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func binary() string {
	path, err := filepath.Abs("../../bin/cordon")
	if err != nil {
		panic(err)
	}
	return path
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
		if res, err := s.client().Get("http://127.0.0.1:3900/health"); err == nil {
			res.Body.Close()
			return nil
		}
		if err := s.server.Process.Signal(syscall.Signal(0)); err != nil {
			return errors.New("the server ended")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("the server does not answer")
}

// stop ends the server with a signal and waits for it.
func (s *stand) stop(t *testing.T, sig syscall.Signal) {
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

// client speaks HTTP from inside the lab's host.
func (s *stand) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return s.lab.Host().Dial(ctx, network, addr)
		},
	}}
}

// serveControl lets the scenarios ask what arrived in the internet, and crash
// and start the server.
func (s *stand) serveControl(t *testing.T) {
	t.Helper()
	l, err := s.lab.Host().Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /mark", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, map[string]any{"mark": s.lab.Recorder().Mark()})
	})
	mux.HandleFunc("GET /seen", s.seen)
	mux.HandleFunc("POST /server/crash", func(w http.ResponseWriter, _ *http.Request) {
		s.stop(t, syscall.SIGKILL)
		reply(w, map[string]any{})
	})
	mux.HandleFunc("POST /server/start", func(w http.ResponseWriter, r *http.Request) {
		if err := s.start(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		reply(w, map[string]any{})
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	s.control = "http://" + l.Addr().String()
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// seen counts the packets recorded since a mark that went to an address, or
// whose payload holds a text.
func (s *stand) seen(w http.ResponseWriter, r *http.Request) {
	mark, err := strconv.ParseUint(r.FormValue("mark"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	seen := s.lab.Recorder().Since(lab.Mark(mark))
	if err := seen.Err(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if a := r.FormValue("addr"); a != "" {
		addr, err := netip.ParseAddr(a)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		seen = seen.To(addr)
	}
	if text := r.FormValue("text"); text != "" {
		seen = seen.Where(func(p lab.Packet) bool {
			return bytes.Contains(bytes.ToLower(p.Payload), []byte(text)) || bytes.Contains(p.Payload, dnsForm(text))
		})
	}
	reply(w, map[string]any{"packets": len(seen.Packets())})
}

// dnsForm is a name as it stands in a DNS question: length-prefixed labels.
func dnsForm(name string) []byte {
	var b []byte
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return b
}

// environ is what a user's shell has after eval "$(cordon env)", and where the
// scenarios find the lab.
func (s *stand) environ(t *testing.T) []string {
	t.Helper()
	out, err := s.lab.HostCommand(t.Context(), binary(), "--config", s.config, "env").Output()
	if err != nil {
		t.Fatalf("cordon env: %v", err)
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir}
	for line := range strings.Lines(string(out)) {
		if kv, ok := strings.CutPrefix(strings.TrimSpace(line), "export "); ok {
			kv, _, _ = strings.Cut(kv, " ")
			env = append(env, kv)
		}
	}
	facts, err := json.Marshal(map[string]string{
		"control": s.control, "hostIP": s.lab.HostAddr().String(),
		"allowed": "allowed.test", "sharedA": "shared-a.test", "sharedB": "shared-b.test", "sharedIP": "198.51.100.30",
		"deniedIP": "198.51.100.66", "neighbour": "8.8.8.9", "wildcard": "wild.test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(env, "LAB="+string(facts))
}

// runScenarios runs a scenario program in the lab's host and turns each line it
// prints into a subtest.
func (s *stand) runScenarios(t *testing.T, program string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if only := os.Getenv("SCENARIO"); only != "" {
		args = append(args, only)
	}
	cmd := s.lab.HostCommand(ctx, program, args...)
	cmd.Env = s.environ(t)
	out, err := cmd.CombinedOutput()
	ran := 0
	for _, block := range splitResults(string(out)) {
		head, detail, _ := strings.Cut(block, "\n")
		name, failed := strings.CutPrefix(head, "not ok ")
		if !failed {
			name = strings.TrimPrefix(head, "ok ")
		}
		ran++
		t.Run(name[:max(0, strings.LastIndex(name, " "))], func(t *testing.T) {
			t.Log(head)
			if failed {
				t.Errorf("%s", detail)
			}
		})
	}
	var exit *exec.ExitError
	if ran == 0 || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s ran %d scenarios: %v\n%s", program, ran, err, out)
	}
	if err != nil {
		t.Errorf("%s: %v", program, err)
	}
}

// splitResults cuts a program's output into one block a scenario; what comes
// before the first is dropped.
func splitResults(out string) []string {
	var blocks []string
	for line := range strings.Lines(out) {
		switch {
		case strings.HasPrefix(line, "ok ") || strings.HasPrefix(line, "not ok "):
			blocks = append(blocks, line)
		case len(blocks) > 0:
			blocks[len(blocks)-1] += line
		}
	}
	for i := range blocks {
		blocks[i] = strings.TrimRight(blocks[i], "\n")
	}
	return blocks
}
