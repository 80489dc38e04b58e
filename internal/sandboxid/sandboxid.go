// Package sandboxid makes and checks the names of sandboxes, and the random texts
// that name or open anything else.
package sandboxid

import (
	"crypto/rand"
	"regexp"
	"strings"
)

// ID names a sandbox: "i" and 20 characters of [a-z0-9]. Its length is fixed
// because runsc resolves prefixes, and it has no "-" because host names are split there.
type ID string

var form = regexp.MustCompile(`^i[0-9a-z]{20}$`)

// New returns a random ID (about 103 bits).
func New() ID { return ID(Name('i')) }

// Valid reports whether id has the form of an ID.
func (id ID) Valid() bool { return form.MatchString(string(id)) }

const alphabet = "0123456789abcdefghijklmnopqrstuvwxyz"

// Name returns a random name of an ID's form that begins with prefix, a lower-case
// letter: snapshots and checkpoints have others than sandboxes.
func Name(prefix byte) string {
	b := make([]byte, 21)
	b[0] = prefix
	var buf [32]byte
	for i := 1; i < len(b); {
		rand.Read(buf[:])
		for _, r := range buf {
			if r >= 252 || i == len(b) { // 252 = 7*36: no bias
				continue
			}
			b[i] = alphabet[r%36]
			i++
		}
	}
	return string(b)
}

// NewToken returns 128 random bits or more in lower-case letters and digits.
func NewToken() string { return strings.ToLower(rand.Text()) }
