package agent

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The texts are those the SDKs' own tests expect.
const (
	unauthorizedText = "unauthorized access, please provide a valid access token or method signing if supported"
	unclaimedText    = "this sandbox is not claimed yet"
)

// admits reports whether token opens the sandbox. A sandbox without a token is
// open to whoever reaches its port.
func (c *claim) admits(token string) bool {
	if c.AccessToken == "" {
		return true
	}
	got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(c.AccessToken))
	return subtle.ConstantTimeCompare(got[:], want[:]) == 1
}

// operation is what a signed URL allows.
type operation string

const (
	opRead  operation = "read"
	opWrite operation = "write"
)

// sign computes a signed URL's signature; expires is empty or Unix seconds as
// they stand in the query. The format is the SDKs': section "Signed URLs".
func sign(path string, op operation, user, token, expires string) string {
	text := path + ":" + string(op) + ":" + user + ":" + token
	if expires != "" {
		text += ":" + expires
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// checkSignature decides whether a query's signature allows op at now.
func (c *claim) checkSignature(q url.Values, op operation, now time.Time) error {
	given := q.Get("signature")
	if given == "" {
		return errors.New("missing signature query parameter")
	}
	expires := q.Get("signature_expiration")
	want := sign(q.Get("path"), op, q.Get("username"), c.AccessToken, expires)
	if subtle.ConstantTimeCompare([]byte(given), []byte(want)) != 1 {
		return errors.New("invalid signature")
	}
	if expires == "" {
		return nil
	}
	unix, err := strconv.ParseInt(expires, 10, 64)
	if err != nil {
		return errors.New("invalid signature")
	}
	if now.Unix() > unix {
		return errors.New("signature is already expired")
	}
	return nil
}

// admitFile answers the request and returns nil unless its token or its
// signature allows op on a file.
func (a *Agent) admitFile(w http.ResponseWriter, r *http.Request, op operation) *claim {
	c := a.claim.Load()
	if c == nil {
		writeError(w, http.StatusServiceUnavailable, unclaimedText)
		return nil
	}
	token := r.Header.Get("X-Access-Token")
	if c.admits(token) || a.isControl(r) {
		return c
	}
	if token != "" {
		writeError(w, http.StatusUnauthorized, unauthorizedText)
		return nil
	}
	if err := c.checkSignature(r.URL.Query(), op, time.Now()); err != nil {
		writeError(w, http.StatusUnauthorized, err.Error())
		return nil
	}
	return c
}

// basicUser returns the user an RPC names as "Basic base64(user:)", or "".
func basicUser(h http.Header) (string, error) {
	auth := h.Get("Authorization")
	if auth == "" {
		return "", nil
	}
	scheme, rest, _ := strings.Cut(auth, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return "", nil // a Bearer token is not ours to judge
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(rest))
	if err != nil {
		return "", errors.New("the Authorization header is not base64 of \"user:\"")
	}
	name, _, _ := strings.Cut(string(raw), ":")
	return name, nil
}
