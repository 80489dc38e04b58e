package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
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

// URLAccess is what a signed public URL permits: one port of one sandbox, until
// a time.
type URLAccess struct {
	Sandbox string
	Port    uint16
	Expires time.Time
}

// macSize is how many octets of the MAC a URL carries: 160 bits.
const macSize = 20

// Sign returns a token for the URL: the expiry and a MAC under key. A key of
// the sandbox's own (its traffic token) makes the URLs end with the sandbox, and
// a new one revokes them all.
func (a URLAccess) Sign(key string) string {
	expires := strconv.FormatInt(a.Expires.Unix(), 10)
	return expires + "." + base64.RawURLEncoding.EncodeToString(a.mac(key, expires))
}

func (a URLAccess) mac(key, expires string) []byte {
	h := hmac.New(sha256.New, []byte(key))
	// The parts cannot run into each other: only the last is not a number or an
	// ID. The first word keeps these MACs apart from others under the same key.
	fmt.Fprintf(h, "cordon-url %d %s %s", a.Port, expires, a.Sandbox)
	return h.Sum(nil)[:macSize]
}

// Verify reports whether token, made by Sign, permits access to a's sandbox and
// port at time now; a.Expires plays no part. An empty key permits nothing.
func (a URLAccess) Verify(key, token string, now time.Time) bool {
	expires, sum, found := strings.Cut(token, ".")
	unix, err := strconv.ParseInt(expires, 10, 64)
	got, macErr := base64.RawURLEncoding.DecodeString(sum)
	if !found || err != nil || macErr != nil || key == "" || now.Unix() > unix {
		return false
	}
	return hmac.Equal(got, a.mac(key, expires))
}
