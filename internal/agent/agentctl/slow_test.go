package agentctl_test

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/agent/agentctl"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// TestAnAgentThatIsAlwaysSlowIsReady: on a small or emulated machine each answer takes
// longer than the patience of the first probes.
func TestAnAgentThatIsAlwaysSlowIsReady(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(time.Second):
			w.WriteHeader(http.StatusNoContent)
		case <-r.Context().Done():
		}
	})}
	go func() { _ = s.Serve(l) }()
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	at := sandbox.AgentAddr{Addr: netip.MustParseAddrPort(l.Addr().String())}
	if err := agentctl.New(agentctl.Config{}).WaitReady(ctx, at); err != nil {
		t.Error(err)
	}
}
