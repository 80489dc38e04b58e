package ingress

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// How a client shows that it may speak to a sandbox that is not public.
const (
	tokenHeader = "E2b-Traffic-Access-Token" // the traffic token itself
	tokenParam  = "cordon_token"             // the traffic token, or a signed one
	tokenCookie = "__Host-cordon-token"      // a signed one
)

// cookieLife is how long a browser may go on after it showed the traffic token.
const cookieLife = 12 * time.Hour

// SignToken returns a token that opens one port of a sandbox that is not public
// until expires: https://<port>-<id>.<domain>/?cordon_token=<token>. It is void
// as soon as the sandbox's SigningKey, or else its TrafficToken, changes. It is
// empty when the sandbox has neither.
//
// The form is "s1.<unix seconds>.<HMAC-SHA-256, base64url>".
func SignToken(t *Target, port uint16, expires time.Time) string {
	key := t.signingKey()
	if key == nil {
		return ""
	}
	exp := strconv.FormatInt(expires.Unix(), 10)
	return "s1." + exp + "." + base64.RawURLEncoding.EncodeToString(signature(key, t.ID, port, exp))
}

func (t *Target) signingKey() []byte {
	if len(t.SigningKey) > 0 {
		return t.SigningKey
	}
	if t.TrafficToken == "" {
		return nil
	}
	m := hmac.New(sha256.New, []byte(t.TrafficToken))
	m.Write([]byte("cordon url signing key v1"))
	return m.Sum(nil)
}

func signature(key []byte, id string, port uint16, exp string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("cordon url v1\n" + id + "\n" + strconv.Itoa(int(port)) + "\n" + exp))
	return m.Sum(nil)
}

// verifySigned returns when a signed token expires, and whether it opens the port now.
func verifySigned(t *Target, port uint16, token string) (time.Time, bool) {
	rest, ok := strings.CutPrefix(token, "s1.")
	exp, mac, both := strings.Cut(rest, ".")
	key := t.signingKey()
	if !ok || !both || key == nil || len(exp) > 12 {
		return time.Time{}, false
	}
	got, err := base64.RawURLEncoding.Strict().DecodeString(mac)
	if err != nil || !hmac.Equal(got, signature(key, t.ID, port, exp)) {
		return time.Time{}, false
	}
	unix, err := strconv.ParseInt(exp, 10, 64)
	if err != nil {
		return time.Time{}, false
	}
	expires := time.Unix(unix, 0)
	return expires, time.Now().Before(expires)
}

// verifyToken compares in constant time, whatever the lengths.
func (t *Target) verifyToken(token string) bool {
	if t.TrafficToken == "" {
		return false
	}
	got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(t.TrafficToken))
	return subtle.ConstantTimeCompare(got[:], want[:]) == 1
}

// pass is a request that may go on.
type pass struct {
	target string       // request target, without our token
	cookie *http.Cookie // when the client is a browser that gets it by a redirect to target
}

// admit decides whether the request may speak to the port. The agent's port has
// its own access token, which the agent checks; its control routes do not exist
// for the outside.
func admit(r *http.Request, t *Target, to route) (pass, *refusal) {
	if to.port == t.agentPort() {
		if controlRoute(to.target) {
			return pass{}, &refusal{Code: http.StatusNotFound, Message: "not found"}
		}
		return pass{target: to.target}, nil
	}
	if t.Public {
		return pass{target: to.target}, nil
	}
	target, given, param := stripParam(to.target)
	if h := r.Header[tokenHeader]; len(h) > 0 {
		if len(h) > 1 || !t.verifyToken(h[0]) {
			return pass{}, forbidden(t.ID, "Sandbox is secured with traffic access token. Provided token in header 'e2b-traffic-access-token' is invalid")
		}
		return pass{target: target}, nil
	}
	if given {
		return admitParam(r, t, pass{target: target}, to.port, param)
	}
	for _, c := range cookiesNamed(r.Header, tokenCookie) {
		if _, ok := verifySigned(t, to.port, c); ok {
			return pass{target: target}, nil
		}
	}
	return pass{}, forbidden(t.ID, "Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing")
}

// admitParam lets a program with a token in its URL pass at once, and sends a
// browser back for a cookie, so that the token leaves the address bar, the history
// and the Referer, and that what the page loads passes too.
func admitParam(r *http.Request, t *Target, p pass, port uint16, token string) (pass, *refusal) {
	expires, ok := verifySigned(t, port, token)
	if !ok && t.verifyToken(token) {
		expires, ok = time.Now().Add(cookieLife), true
	}
	if !ok {
		return pass{}, forbidden(t.ID, "Sandbox is secured with traffic access token. Provided token in query parameter 'cordon_token' is invalid or has expired")
	}
	if navigates(r) {
		p.cookie = &http.Cookie{
			Name: tokenCookie, Value: SignToken(t, port, expires), Path: "/", Expires: expires,
			// None and Partitioned: a page of another site may show the sandbox in
			// a frame, and no third site can use the cookie.
			Secure: true, HttpOnly: true, SameSite: http.SameSiteNoneMode, Partitioned: true,
		}
	}
	return p, nil
}

// stripParam takes every cordon_token out of a request target and returns the
// last; all other bytes stay as they are.
func stripParam(target string) (rest string, found bool, value string) {
	path, query, ok := strings.Cut(target, "?")
	if !ok || !strings.Contains(query, "token") && !strings.Contains(query, "%") {
		return target, false, ""
	}
	var kept []string
	for part := range strings.SplitSeq(query, "&") {
		k, v, _ := strings.Cut(part, "=")
		name, err := url.QueryUnescape(k)
		if err != nil || name != tokenParam {
			kept = append(kept, part)
			continue
		}
		found = true
		if v, err = url.QueryUnescape(v); err == nil {
			value = v
		}
	}
	switch {
	case !found:
		return target, false, ""
	case len(kept) == 0:
		return path, true, value
	}
	return path + "?" + strings.Join(kept, "&"), true, value
}

// cookiesNamed returns the values of a cookie; there may be several.
func cookiesNamed(h http.Header, name string) []string {
	var out []string
	for _, line := range h["Cookie"] {
		for part := range strings.SplitSeq(line, ";") {
			if v, ok := strings.CutPrefix(strings.TrimSpace(part), name+"="); ok {
				out = append(out, v)
			}
		}
	}
	return out
}

// stripCookie returns the Cookie header without our own, and whether it was there.
func stripCookie(h http.Header) (string, bool) {
	found := false
	var kept []string
	for _, line := range h["Cookie"] {
		for part := range strings.SplitSeq(line, ";") {
			part = strings.TrimSpace(part)
			if name, _, _ := strings.Cut(part, "="); strings.TrimSpace(name) == tokenCookie {
				found = true
			} else if part != "" {
				kept = append(kept, part)
			}
		}
	}
	return strings.Join(kept, "; "), found
}
