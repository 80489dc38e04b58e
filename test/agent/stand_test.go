// Package agent_test proves what holds inside a sandbox, against a live server
// with real sandboxes: limits and what is told about them, files in bulk, and what
// hostile programs in a sandbox can do to its agent.
package agent_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// live is a server in a lab, and a client of it.
type live struct {
	*stand.Stand
	*client.Client
}

func newStand(t *testing.T) *live {
	t.Helper()
	s := &live{Stand: stand.New(t, stand.Options{Spares: 1, LogLevel: "info"})}
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	key, err := os.ReadFile(filepath.Join(s.Dir, "state", "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	s.Client, err = client.New(client.Options{
		APIURL: stand.API, SandboxURL: stand.API, APIKey: strings.TrimSpace(string(key)),
		HTTPClient: &http.Client{Transport: &http.Transport{DialContext: s.Lab.Host().Dial, IdleConnTimeout: 10 * time.Second}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sandbox makes a sandbox that ends with the test.
func (s *live) sandbox(t *testing.T) *client.Sandbox {
	t.Helper()
	sb, err := s.Create(t.Context(), client.CreateOptions{Timeout: 10 * time.Minute})
	if err != nil {
		t.Fatalf("create a sandbox: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
		defer cancel()
		if err := sb.Kill(ctx); err != nil {
			t.Errorf("kill %s: %v", sb.ID, err)
		}
	})
	return sb
}
