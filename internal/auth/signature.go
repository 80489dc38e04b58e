package auth

import (
	"crypto/sha256"
	"encoding/base64"
	"strconv"
	"strings"
	"time"
)

// The operations a file signature can permit.
const (
	ReadFile  = "read"
	WriteFile = "write"
)

// FileAccess is what a signed file URL permits: what its holder may do without
// the access token.
type FileAccess struct {
	Path      string // exactly as in the URL's query; empty for an upload whose body names it
	Operation string // ReadFile or WriteFile
	User      string // empty when the URL names none
	Expires   int64  // Unix seconds; 0: never
}

// Sign returns the value of the query parameter "signature". The form is the
// SDKs' own: v1_ and the SHA-256 of the parts, in base64 without padding.
func (a FileAccess) Sign(accessToken string) string {
	parts := []string{a.Path, a.Operation, a.User, accessToken}
	if a.Expires != 0 {
		parts = append(parts, strconv.FormatInt(a.Expires, 10))
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, ":")))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// Verify reports whether signature permits the access at time now. Without an
// access token nothing is permitted by signature.
func (a FileAccess) Verify(accessToken, signature string, now time.Time) bool {
	if accessToken == "" || !Equal(signature, a.Sign(accessToken)) {
		return false
	}
	return a.Expires == 0 || now.Unix() <= a.Expires
}
