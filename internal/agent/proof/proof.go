// Package proof lets the host and a sandbox's agent show each other that both know the
// control key, without either sending it: another program that listens on the agent's
// port learns nothing and is told nothing.
//
// The host opens with a nonce of its own (GET Path with Nonce). The agent answers
// with a nonce and what Agent computes from both. Only when that is right does the
// host send its request, on the same connection, with what Host computes from both
// nonces and the whole request.
package proof

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

const (
	// Path is where a host asks an agent to prove itself.
	Path = "/cordon/challenge"
	// Nonce is the header with the sender's nonce.
	Nonce = "X-Cordon-Nonce"
	// Header is the header with the sender's proof.
	Header = "X-Cordon-Proof"
)

// Key is what both know: the SHA-256 of the control token.
type Key [sha256.Size]byte

// NewNonce returns what has not been used before.
func NewNonce() string { return rand.Text() }

// maxNonce bounds what the other side may take for a nonce.
const maxNonce = 64

// ValidNonce reports whether a nonce is fit to be hashed beside other fields.
func ValidNonce(s string) bool {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
	return len(s) >= len(rand.Text()) && len(s) <= maxNonce && strings.Trim(s, alphabet) == ""
}

// Nonces are both sides' of one exchange.
type Nonces struct{ Host, Agent string }

// Agent is what an agent proves itself with.
func (k Key) Agent(n Nonces) string { return k.sum("agent", n.Host, n.Agent) }

// Request is what a host asks for.
type Request struct {
	Method, URI string
	Body        []byte
}

// Host is what a host proves itself with, for one request.
func (k Key) Host(n Nonces, r Request) string {
	body := sha256.Sum256(r.Body)
	return k.sum("host", n.Host, n.Agent, r.Method, r.URI, hex.EncodeToString(body[:]))
}

// sum hashes fields, none of which holds a line break.
func (k Key) sum(fields ...string) string {
	mac := hmac.New(sha256.New, k[:])
	mac.Write([]byte("cordon control 1\n" + strings.Join(fields, "\n")))
	return hex.EncodeToString(mac.Sum(nil))
}

// Equal compares proofs in constant time.
func Equal(a, b string) bool { return hmac.Equal([]byte(a), []byte(b)) }
