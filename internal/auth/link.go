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

// URLAccess is what a signed public URL permits: one port of one sandbox, until
// a time.
type URLAccess struct {
	Sandbox string
	Port    uint16
	// Link tells the URLs of a sandbox apart, so that one can be revoked; letters
	// and digits. It is empty in what a browser gets for having shown the traffic token.
	Link    string
	Expires time.Time // whole seconds; the URL is void from then on
}

// URLToken is a token as it was read, before anybody knows whether it is genuine.
type URLToken struct {
	Link    string
	Expires time.Time

	signed string // what the MAC is about, as it was written
	mac    []byte
}

const (
	macSize      = 20  // octets of the MAC a URL carries: 160 bits
	maxURLToken  = 128 // octets
	maxLinkID    = 32
	tokenVersion = "c1" // the first part of every token
)

// Sign returns a token for the URL: "c1.<Unix seconds>.<link>.<MAC>". A key of the
// sandbox's own makes its URLs end with it.
func (a URLAccess) Sign(key string) string {
	signed := tokenVersion + "." + strconv.FormatInt(a.Expires.Unix(), 10) + "." + a.Link
	return signed + "." + base64.RawURLEncoding.EncodeToString(urlMAC(key, a.Sandbox, a.Port, signed))
}

func urlMAC(key, sandbox string, port uint16, signed string) []byte {
	h := hmac.New(sha256.New, []byte(key))
	// The parts cannot run into each other: none contains a space. The first word
	// keeps these MACs apart from others under the same key.
	fmt.Fprintf(h, "cordon-url %d %s %s", port, signed, sandbox)
	return h.Sum(nil)[:macSize]
}

// ParseURLToken reads a token. There is one way to write each: what Sign would not
// have written is refused.
func ParseURLToken(s string) (URLToken, bool) {
	version, rest, _ := strings.Cut(s, ".")
	if version != tokenVersion || len(s) > maxURLToken {
		return URLToken{}, false
	}
	parts := strings.Split(rest, ".")
	if len(parts) != 3 || len(parts[1]) > maxLinkID || strings.ContainsFunc(parts[1], notAlphanumeric) {
		return URLToken{}, false
	}
	unix, err := strconv.ParseInt(parts[0], 10, 64)
	if err != nil || unix < 0 || unix > maxUnix || strconv.FormatInt(unix, 10) != parts[0] {
		return URLToken{}, false
	}
	mac, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
	if err != nil || len(mac) != macSize || strings.ContainsAny(parts[2], "\r\n") {
		return URLToken{}, false
	}
	signed := s[:strings.LastIndexByte(s, '.')]
	return URLToken{Link: parts[1], Expires: time.Unix(unix, 0).UTC(), signed: signed, mac: mac}, true
}

// maxUnix is the end of the year 9999, the last that RFC 3339 can say.
const maxUnix = 253402300799

func notAlphanumeric(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9')
}

// Genuine reports whether the token was signed with key for the sandbox and port.
// Whether its time is over or its link was revoked is the caller's to look at, once
// it is genuine. An empty key signs nothing.
func (t URLToken) Genuine(key, sandbox string, port uint16) bool {
	return key != "" && hmac.Equal(t.mac, urlMAC(key, sandbox, port, t.signed))
}
