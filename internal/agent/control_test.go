package agent

import (
	"bufio"
	"crypto/sha256"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/agent/proof"
)

// hostDialogue is a connection on which the agent has proved itself.
func (h *harness) hostDialogue(t *testing.T) (net.Conn, *bufio.Reader, proof.Nonces) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	in := bufio.NewReader(conn)
	n, agents, err := challenge(conn, in)
	if err != nil {
		t.Fatal(err)
	}
	if want := h.key().Agent(n); agents != want {
		t.Fatalf("the agent's proof is %s, want %s", agents, want)
	}
	return conn, in, n
}

func (h *harness) key() proof.Key { return sha256.Sum256([]byte(testControl)) }

// ask sends a request whose proof was made for another perhaps.
func ask(t *testing.T, conn net.Conn, in *bufio.Reader, method, path, body, proven string) int {
	t.Helper()
	req, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(proof.Header, proven)
	if err := req.Write(conn); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}

func TestAProofServesOneRequestOnOneConnection(t *testing.T) {
	h := claimed(t)
	const kills, body = "/cordon/kills?after=-1&wait=0", "{}"
	conn, in, n := h.hostDialogue(t)
	right := h.key().Host(n, proof.Request{Method: "GET", URI: kills, Body: []byte(body)})
	if got := ask(t, conn, in, "GET", kills, body, right); got != 200 {
		t.Fatalf("the right proof: %d", got)
	}
	if got := ask(t, conn, in, "GET", kills, body, right); got != 404 {
		t.Errorf("the same proof again: %d", got)
	}
	other, otherIn, _ := h.hostDialogue(t)
	if got := ask(t, other, otherIn, "GET", kills, body, right); got != 404 {
		t.Errorf("the proof on another connection: %d", got)
	}
	for name, r := range map[string]struct{ method, path, body string }{
		"another method": {"POST", kills, body},
		"another path":   {"GET", "/cordon/kills?after=0&wait=0", body},
		"another body":   {"GET", kills, "{ }"},
	} {
		conn, in, n := h.hostDialogue(t)
		proven := h.key().Host(n, proof.Request{Method: "GET", URI: kills, Body: []byte(body)})
		if got := ask(t, conn, in, r.method, r.path, r.body, proven); got != 404 && got != 405 {
			t.Errorf("a proof for %s: %d", name, got)
		}
	}
	conn, in, n = h.hostDialogue(t)
	if got := ask(t, conn, in, "GET", kills, body, h.key().Agent(n)); got != 404 {
		t.Errorf("the agent's own proof, sent back: %d", got)
	}
}

func TestTheAgentsMachineIsNotTheHost(t *testing.T) {
	h := claimed(t)
	_, _, _ = h.hostDialogue(t)
	h.agent.cfg.Own = OwnAddress
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n, agents, err := challenge(conn, bufio.NewReader(conn)); err == nil || agents != "" {
		t.Errorf("the agent proved itself to its own machine: %+v %s", n, agents)
	}
	for addr, want := range map[string]bool{"127.0.0.1": true, "127.9.9.9": true, "::1": true, "203.0.113.7": false, "2001:db8::7": false} {
		if got := OwnAddress(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is own: %v, want %v", addr, got, want)
		}
	}
	found, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		if p := netip.MustParsePrefix(f.String()); !OwnAddress(p.Addr()) {
			t.Errorf("%s is not own", p)
		}
	}
}

func TestANonceIsNothingElse(t *testing.T) {
	h := claimed(t)
	for _, nonce := range []string{"", "short", strings.Repeat("A", 65), strings.Repeat("a", 26), proof.NewNonce() + "-"} {
		if got := h.do("GET", proof.Path, nil, proof.Nonce, nonce); got.StatusCode != 404 || got.Header.Get(proof.Header) != "" {
			t.Errorf("nonce %q: %d", nonce, got.StatusCode)
		}
	}
}

func TestAListenersPortIsItsOwn(t *testing.T) {
	ln, err := ListenConfig().Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if second, err := net.Listen("tcp", ln.Addr().String()); err == nil {
		second.Close()
		t.Error("a second socket listens there")
	}
}
