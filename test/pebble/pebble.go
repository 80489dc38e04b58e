// Package pebble starts a real ACME server for tests: Let's Encrypt's pebble, built
// from a module of its own, the name server it asks, which takes signed updates
// (RFC 2136), and the files both need. Everything is on loopback.
package pebble

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
)

// Options say how the server differs from others.
type Options struct {
	// Domains are the zones of the name server; every name resolves to 127.0.0.1.
	Domains []string
	// HTTPSPort and HTTPPort are where it looks for TLS-ALPN-01 and HTTP-01; 0: nowhere.
	HTTPSPort, HTTPPort int
	// Validity of certificates; 0: a day.
	Validity time.Duration
	// In is where everything runs; nil: here.
	In Place
}

// Place is a network namespace to run in.
type Place interface {
	Listen(ctx context.Context, network, addr string) (net.Listener, error)
	ListenPacket(ctx context.Context, network, addr string) (net.PacketConn, error)
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
	Command(ctx context.Context, name string, args ...string) Process
}

// Process is a program that is not started yet; see exec.Cmd.
type Process interface {
	StdoutPipe() (io.ReadCloser, error)
	Start() error
	Wait() error
}

// Server is a running ACME server.
type Server struct {
	Directory string // URL
	RootsFile string // PEM, for the server's own TLS
	DNS       *Server53

	place  Place
	stop   context.CancelFunc
	done   chan struct{}
	manage string // URL
	client *http.Client

	mu  sync.Mutex // guards log
	log strings.Builder
}

// Start runs the server until the test ends.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	if o.In == nil {
		o.In = here{}
	}
	dir := t.TempDir()
	if _, _, err := tlsconf.LocalCA(dir, []string{"pebble.test"}, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	s := &Server{RootsFile: filepath.Join(dir, "ca.pem"), place: o.In, done: make(chan struct{})}
	s.DNS = serveDNS(t, o)
	acme, manage := s.freePort(t), s.freePort(t)
	s.Directory, s.manage = "https://"+acme+"/dir", "https://"+manage
	s.client = s.httpClient(t)
	config := filepath.Join(dir, "pebble.json")
	if err := os.WriteFile(config, settings(dir, acme, manage, o), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	program := build(t, dir)
	// The validator's own pauses, of up to 15 seconds, are for clients that rely on speed.
	p := s.place.Command(ctx, "env", "PEBBLE_VA_NOSLEEP=1", "PEBBLE_AUTHZREUSE=0", program, "-config", config, "-dnsserver", s.DNS.Addr)
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.done)
		s.record(out)
		_ = p.Wait() // killed
	}()
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("pebble:\n%s", s.Log())
		}
	})
	s.await(t)
	return s
}

// Stop ends the server; its name server goes on.
func (s *Server) Stop() {
	s.stop()
	<-s.done
}

// Log is what the server said so far.
func (s *Server) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

func (s *Server) record(r io.Reader) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		s.mu.Lock()
		s.log.WriteString(lines.Text() + "\n")
		s.mu.Unlock()
	}
}

// Root is the authority that certificates chain to.
func (s *Server) Root(t testing.TB) []byte {
	t.Helper()
	res, err := s.client.Get(s.manage + "/roots/0")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Pool holds Root.
func (s *Server) Pool(t testing.TB) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(s.Root(t)) {
		t.Fatal("pebble's root is no certificate")
	}
	return pool
}

func (s *Server) httpClient(t testing.TB) *http.Client {
	b, err := os.ReadFile(s.RootsFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(b)
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: s.place.Dial, TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true,
	}}
}

func (s *Server) await(t testing.TB) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if res, err := s.client.Get(s.Directory); err == nil {
			res.Body.Close()
			return
		}
	}
	t.Fatalf("pebble does not answer:\n%s", s.Log())
}

func (s *Server) freePort(t testing.TB) string {
	l, err := s.place.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// settings is pebble's configuration file.
func settings(dir, acme, manage string, o Options) []byte {
	validity := o.Validity
	if validity == 0 {
		validity = 24 * time.Hour
	}
	type object = map[string]any
	b, err := json.Marshal(object{"pebble": object{
		"listenAddress": acme, "managementListenAddress": manage,
		"certificate": filepath.Join(dir, "leaf.pem"), "privateKey": filepath.Join(dir, "leaf.key"),
		"httpPort": o.HTTPPort, "tlsPort": o.HTTPSPort, "keyAlgorithm": "ecdsa",
		"retryAfter": object{"authz": 1, "order": 1},
		"profiles":   object{"default": object{"description": "for tests", "validityPeriod": int(validity.Seconds())}},
	}})
	if err != nil {
		panic(err) // strings and numbers
	}
	return b
}

// build makes the program; the build cache makes it quick the second time.
func build(t testing.TB, dir string) string {
	t.Helper()
	root, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(root, "tools/pebble/go.mod")); err == nil {
			break
		}
		if root == "/" {
			t.Fatal("tools/pebble/go.mod is in no folder above this one")
		}
		root = filepath.Dir(root)
	}
	program := filepath.Join(dir, "pebble")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-modfile=tools/pebble/go.mod", "-o", program, "github.com/letsencrypt/pebble/v2/cmd/pebble")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build pebble: %v\n%s", err, out)
	}
	return program
}

// here is this process' network namespace.
type here struct{}

func (here) Listen(ctx context.Context, network, addr string) (net.Listener, error) {
	return (&net.ListenConfig{}).Listen(ctx, network, addr)
}

func (here) ListenPacket(ctx context.Context, network, addr string) (net.PacketConn, error) {
	return (&net.ListenConfig{}).ListenPacket(ctx, network, addr)
}

func (here) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

func (here) Command(ctx context.Context, name string, args ...string) Process {
	return exec.CommandContext(ctx, name, args...)
}
