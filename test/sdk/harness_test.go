// Package sdk runs the published SDKs, unmodified, against a live server in a
// small internet: what a user's program does is what is tested.
package sdk

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/proving/lab"
	"github.com/cordonhq/cordon/proving/stand"
)

// live is a running server with a control server beside it.
type live struct {
	*stand.Stand
	control string // URL
}

func newStand(t *testing.T) *live {
	t.Helper()
	s := &live{Stand: stand.New(t, stand.Options{Spares: 2})}
	if err := s.Start(t.Context()); err != nil {
		t.Fatalf("start the server: %v", err)
	}
	s.serveControl(t)
	return s
}

// serveControl lets the scenarios ask what arrived in the internet, and crash
// and start the server.
func (s *live) serveControl(t *testing.T) {
	t.Helper()
	l, err := s.Lab.Host().Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /mark", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, map[string]any{"mark": s.Lab.Recorder().Mark()})
	})
	mux.HandleFunc("GET /seen", s.seen)
	mux.HandleFunc("POST /server/crash", func(w http.ResponseWriter, _ *http.Request) {
		s.Stop(t, syscall.SIGKILL)
		reply(w, map[string]any{})
	})
	mux.HandleFunc("POST /server/start", func(w http.ResponseWriter, r *http.Request) {
		if err := s.Start(r.Context()); err != nil {
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
func (s *live) seen(w http.ResponseWriter, r *http.Request) {
	mark, err := strconv.ParseUint(r.FormValue("mark"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	seen := s.Lab.Recorder().Since(lab.Mark(mark))
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

// environ is what a user's shell has, and where the scenarios find the lab.
func (s *live) environ(t *testing.T) []string {
	t.Helper()
	facts, err := json.Marshal(map[string]string{
		"control": s.control, "hostIP": s.Lab.HostAddr().String(),
		"allowed": "allowed.test", "sharedA": "shared-a.test", "sharedB": "shared-b.test", "sharedIP": "198.51.100.30",
		"deniedIP": "198.51.100.66", "neighbour": "8.8.8.9", "wildcard": "wild.test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(s.Environ(t), "LAB="+string(facts))
}

// runScenarios runs a scenario program with a user's environment.
func (s *live) runScenarios(t *testing.T, program string, args ...string) string {
	t.Helper()
	return s.Scenarios(t, s.environ(t), program, args...)
}
