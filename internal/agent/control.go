package agent

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/cordonhq/cordon/internal/agent/proof"
)

// dialogue is what host and agent proved to each other on one connection.
type dialogue struct {
	mu     sync.Mutex // guards nonces
	nonces proof.Nonces
}

type dialogueKey struct{}

// withDialogue is an http.Server's ConnContext.
func withDialogue(ctx context.Context, _ net.Conn) context.Context {
	return context.WithValue(ctx, dialogueKey{}, &dialogue{})
}

// open begins an exchange.
func (d *dialogue) open(host string) proof.Nonces {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nonces = proof.Nonces{Host: host, Agent: proof.NewNonce()}
	return d.nonces
}

// take ends the exchange: each serves one request.
func (d *dialogue) take() (n proof.Nonces, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, d.nonces = d.nonces, proof.Nonces{}
	return n, n.Agent != ""
}

// key is what the host must know: the last claim's, or the one the agent started with.
func (a *Agent) key() proof.Key {
	if c := a.claim.Load(); c != nil && c.control != nil {
		return *c.control
	}
	return a.cfg.ControlHash
}

// fromHost reports whether a request can come from the host. A program in the
// sandbox must not be able to pass on what the host and the agent tell each other,
// so the agent's own machine is not the host.
func (a *Agent) fromHost(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && !a.cfg.Own(from.Addr().Unmap().WithZone(""))
}

// getChallenge proves to the host that this is the agent.
func (a *Agent) getChallenge(w http.ResponseWriter, r *http.Request) {
	d, ok := r.Context().Value(dialogueKey{}).(*dialogue)
	nonce := r.Header.Get(proof.Nonce)
	if !ok || !proof.ValidNonce(nonce) || !a.fromHost(r) {
		notFound(w, r)
		return
	}
	n := d.open(nonce)
	w.Header().Set(proof.Nonce, n.Agent)
	w.Header().Set(proof.Header, a.key().Agent(n))
	w.WriteHeader(http.StatusNoContent)
}

// isControl reports whether the request is the host's: whether it carries the proof
// that the challenge before it on the connection asked for.
func (a *Agent) isControl(r *http.Request) bool {
	given := r.Header.Get(proof.Header)
	d, ok := r.Context().Value(dialogueKey{}).(*dialogue)
	if given == "" || !ok || !a.fromHost(r) {
		return false
	}
	n, ok := d.take()
	if !ok {
		return false
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 2*maxJSON)) // what is over maxJSON is refused by a text, more by the proof
	if err != nil {
		return false
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return proof.Equal(given, a.key().Host(n, proof.Request{Method: r.Method, URI: r.RequestURI, Body: body}))
}

// OwnAddress reports whether an address is one of this machine.
func OwnAddress(ip netip.Addr) bool {
	if ip.IsLoopback() {
		return true
	}
	found, err := net.InterfaceAddrs()
	if err != nil {
		return true // better deaf to the host than open to the sandbox
	}
	for _, f := range found {
		if p, err := netip.ParsePrefix(f.String()); err != nil || p.Addr().WithZone("") == ip {
			return true
		}
	}
	return false
}

// ListenConfig makes listeners whose address and port no other socket can take a
// part of. Go asks for the address to be reusable, which on Linux only concerns
// connections that ended, but in gVisor lets a second socket listen there.
func ListenConfig() *net.ListenConfig {
	return &net.ListenConfig{Control: exclusive}
}
