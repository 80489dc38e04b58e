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
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
	"github.com/cordonhq/cordon/proving/stand"
)

// live is a server in a lab, and a client of it.
type live struct {
	*stand.Stand
	*client.Client
	lab  *lab.Lab
	self []byte // this test program, which is also the one that sandboxes run
}

// newStand starts a lab and a server in it. network is more YAML for the network
// section of its configuration.
func newStand(t *testing.T, network string) *live {
	t.Helper()
	s := &live{Stand: stand.New(t, stand.Options{Spares: 1, IPv6: true, Network: network, LogLevel: "info"})}
	s.lab = s.Lab
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	path, err := os.Executable()
	if err == nil {
		s.self, err = os.ReadFile(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(s.Dir, "state", "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	s.Client, err = client.New(client.Options{APIURL: stand.API, SandboxURL: stand.API, APIKey: strings.TrimSpace(string(key)), HTTPClient: s.http(0)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// http returns a client that speaks from the lab's host; a connection is used again.
func (s *live) http(timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{DialContext: s.lab.Host().Dial, IdleConnTimeout: 10 * time.Second}}
}

// healthy reports whether the API answers within a time.
func (s *live) healthy(within time.Duration) bool {
	hc := s.http(within)
	defer hc.CloseIdleConnections()
	res, err := hc.Get(stand.API + "/health")
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode < 300
}

// signal sends the server a signal.
func (s *live) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(s.PID(), sig); err != nil {
		t.Fatalf("signal %s to the server: %v", sig, err)
	}
}

// guest is a sandbox with the prober running in it.
type guest struct {
	*client.Sandbox
	live *live
	t    *testing.T
	addr string // of the prober, as the lab's host reaches it
	http *http.Client
}

const proberPort = 9999

// guest starts a sandbox under rules and the prober in it; it ends with the test.
// The prober is spoken to straight from the host, which needs no server.
func (s *live) guest(t *testing.T, n client.Network) *guest {
	t.Helper()
	return s.guestWith(t, client.CreateOptions{Network: n})
}

func (s *live) guestWith(t *testing.T, o client.CreateOptions) *guest {
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
	g := &guest{Sandbox: sb, live: s, t: t, http: s.http(30 * time.Second)}
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
	for a := range strings.FieldsSeq(out) {
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
