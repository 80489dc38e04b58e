// Package ingress_test proves what public URLs promise against a live server with
// real sandboxes: what clients of every kind are told, what they reach, and what is
// left of a connection when its sandbox ends.
package ingress_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// connLimit is how many requests a sandbox of the stand serves at a time.
const connLimit = 12

// live is a server in a lab, and a client of it.
type live struct {
	*stand.Stand
	*client.Client
	roots *x509.CertPool // the server's CA
	self  string         // this test program, which is also the service in sandboxes
}

func newLive(t *testing.T) *live {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	o := stand.Options{LogLevel: "info", Listen: fmt.Sprintf("  connections_per_sandbox: %d", connLimit)}
	if os.Getenv("INGRESS_REUSE") != "" {
		o.Network = "  subnet4: 10.224.7.0/24" // few addresses
	}
	s := &live{Stand: stand.New(t, o)}
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s.self = string(program)
	ca, err := os.ReadFile(filepath.Join(s.Dir, "state/ca/ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	s.roots = x509.NewCertPool()
	s.roots.AppendCertsFromPEM(ca)
	s.Client = s.User(t)
	return s
}

// web returns a client that keeps connections, as a browser does, and follows no
// redirect.
func (s *live) web(t *testing.T, http2 bool) *http.Client {
	t.Helper()
	transport := &http.Transport{
		DialContext: s.Lab.Dial, TLSClientConfig: &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: http2,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{
		Timeout: time.Minute, Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// bothProtocols runs f with a client of each.
func (s *live) bothProtocols(t *testing.T, f func(t *testing.T, c *http.Client)) {
	t.Run("HTTP1", func(t *testing.T) { f(t, s.web(t, false)) })
	t.Run("HTTP2", func(t *testing.T) { f(t, s.web(t, true)) })
}

// guest is a sandbox that ends with the test.
type guest struct {
	*client.Sandbox
	t *testing.T
}

func (s *live) guest(t *testing.T, o client.CreateOptions) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	sb, err := s.Create(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{Sandbox: sb, t: t}
	t.Cleanup(g.kill)
	return g
}

func (g *guest) kill() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := g.Kill(ctx); err != nil && !errors.Is(err, client.ErrNotFound) {
		g.t.Errorf("kill %s: %v", g.ID, err)
	}
}

// url is that of a port's root.
func (g *guest) url(port int) string { return "https://" + g.Host(port) + "/" }

// serve starts the service in the sandbox on some addresses, "host:port", and waits
// until it listens there. It calls itself by the sandbox's ID.
func (g *guest) serve(s *live, addrs ...string) {
	g.t.Helper()
	g.install(s)
	g.sh("setsid " + servicePath + " " + g.ID + " " + strings.Join(addrs, " ") + " >/tmp/service.log 2>&1 </dev/null &")
	g.sh("for i in $(seq 200); do grep -q ready /tmp/service.log && exit; sleep 0.05; done; cat /tmp/service.log; exit 1")
}

// install puts the service's program into the sandbox.
func (g *guest) install(s *live) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), time.Minute)
	defer cancel()
	if err := g.Files.Write(ctx, servicePath, strings.NewReader(s.self)); err != nil {
		g.t.Fatalf("write the service: %v", err)
	}
	g.sh("chmod 755 " + servicePath)
}

// address is the sandbox's own.
func (g *guest) address() string { return strings.TrimSpace(g.sh("hostname -I")) }

// sh runs a shell command in the sandbox and returns what it prints.
func (g *guest) sh(command string) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
	defer cancel()
	r, err := g.Commands.Run(ctx, command, client.RunOptions{})
	if err != nil || r.ExitCode != 0 {
		g.t.Fatalf("run %q: %v %+v", command, err, r)
	}
	return r.Stdout
}

// fetch returns the status and the body of an answer.
func fetch(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return send(t, c, req)
}

func send(t *testing.T, c *http.Client, req *http.Request) (int, string) {
	t.Helper()
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s: read the answer: %v", req.URL, err)
	}
	return res.StatusCode, string(body)
}
