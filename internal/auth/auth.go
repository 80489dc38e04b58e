// Package auth makes, checks and compares secrets: API keys
// that are stored as hashes only, tokens of sandboxes, signatures of files and
// of public URLs. It keeps nothing and does no I/O but reading randomness.
package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"regexp"
	"time"
)

// Hash is the SHA-256 of a secret. Keys and tokens carry 128 random bits or
// more, so there is no dictionary to slow an attacker down with: a plain hash
// cannot be inverted, and unlike bcrypt it can be looked up.
type Hash [sha256.Size]byte

// HashOf returns the hash under which secret is stored.
func HashOf(secret string) Hash { return sha256.Sum256([]byte(secret)) }

// String returns h in hexadecimal.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements encoding.TextMarshaler.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hash) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(h)) {
		return fmt.Errorf("hash of %d digits, want %d", len(text), hex.EncodedLen(len(h)))
	}
	if _, err := hex.Decode(h[:], text); err != nil {
		return fmt.Errorf("decode hash: %w", err)
	}
	return nil
}

// Key is a stored API key. The secret itself is shown once, when it is made.
type Key struct {
	ID      string    `json:"id"`             // "k" and 16 hexadecimal digits; owns sandboxes
	Name    string    `json:"name"`           // for people; need not be unique
	Hash    Hash      `json:"hash"`           // of the secret
	Hint    string    `json:"hint"`           // how the secret starts, to tell keys apart: "e2b_1a2b"
	Admin   bool      `json:"admin"`          // may manage keys and see every owner's sandboxes
	Created time.Time `json:"created"`        // UTC
	Note    string    `json:"note,omitempty"` // where it came from: "first start"
	// MaxSandboxes and MaxPaused are how many of its sandboxes may run, and be
	// paused; 0 is the server's default.
	MaxSandboxes int `json:"maxSandboxes,omitempty"`
	MaxPaused    int `json:"maxPaused,omitempty"`
}

// keyForm is what the strictest SDK demands: "e2b_" and lower-case hexadecimal.
var keyForm = regexp.MustCompile(`^e2b_[0-9a-f]{40}$`)

// ValidKeyForm reports whether secret looks like a key of NewKey.
func ValidKeyForm(secret string) bool { return keyForm.MatchString(secret) }

// NewKey returns a key and its secret, "e2b_" and 40 hexadecimal digits (160
// random bits). Only the key is to be stored.
func NewKey(name string, admin bool, now time.Time) (Key, string) {
	secret := "e2b_" + randomHex(20)
	return KeyFor(secret, name, admin, now), secret
}

// KeyFor returns the key to store for a secret chosen elsewhere, for example
// in the server's configuration.
func KeyFor(secret, name string, admin bool, now time.Time) Key {
	return Key{
		ID:      "k" + randomHex(8),
		Name:    name,
		Hash:    HashOf(secret),
		Hint:    secret[:min(8, len(secret)/4)],
		Admin:   admin,
		Created: now.UTC(),
	}
}

// Equal compares two secrets in a time that does not depend on where they
// differ, nor on their lengths. An empty want equals nothing: a secret that was
// never set is not matched by one that was never sent.
func Equal(got, want string) bool {
	a, b := HashOf(got), HashOf(want)
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && want != ""
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails: it stops the program instead
	return hex.EncodeToString(b)
}

// Find returns the key whose secret this is. It compares the hashes of all keys
// in a time that depends only on how many there are.
func Find(keys []Key, secret string) (key Key, found bool) {
	h := HashOf(secret)
	at := -1
	for i := range keys {
		if subtle.ConstantTimeCompare(h[:], keys[i].Hash[:]) == 1 {
			at = i
		}
	}
	if at < 0 || secret == "" {
		return Key{}, false
	}
	return keys[at], true
}
