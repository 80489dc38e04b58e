package ingress

import (
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/auth"
)

// How a client shows that it may speak to a sandbox that is not public.
const (
	tokenHeader = "E2b-Traffic-Access-Token" // the traffic token, or a signed URL's
	tokenParam  = "cordon_token"             // likewise
	tokenCookie = "__Host-cordon-token"      // a signed one
)

// cookieLife is how long a browser may go on after it showed the traffic token.
const cookieLife = 12 * time.Hour

// ticket is what a request was admitted by.
type ticket struct {
	link    string    // of a signed URL; empty for anything else
	expires time.Time // zero: never
}

// flaw is what is wrong with a token. The higher, the more its holder may be told:
// only who once had a genuine one learns that it has expired or was revoked.
type flaw uint8

const (
	genuine flaw = iota
	invalid
	expired
	revoked
)

// signed judges a token of a signed URL, or of the cookie made from one.
func (t *Target) signed(port uint16, token string, now time.Time) (ticket, flaw) {
	read, ok := auth.ParseURLToken(token)
	if !ok {
		return ticket{}, invalid
	}
	key := t.LinkKey
	if read.Link == "" {
		key = t.TrafficToken
	}
	if !read.Genuine(key, t.ID, port) {
		return ticket{}, invalid
	}
	switch {
	case !now.Before(read.Expires):
		return ticket{}, expired
	case read.Link != "" && !t.hasLink(read.Link):
		return ticket{}, revoked
	}
	return ticket{link: read.Link, expires: read.Expires}, genuine
}

func (t *Target) hasLink(link string) bool { return t.Link != nil && t.Link(link) }

// shown judges a token from a header or the query: the traffic token or a signed one.
func (t *Target) shown(port uint16, token string, now time.Time) (ticket, flaw) {
	if t.verifyToken(token) {
		return ticket{}, genuine
	}
	return t.signed(port, token, now)
}

// verifyToken compares in constant time, whatever the lengths.
func (t *Target) verifyToken(token string) bool {
	return auth.Equal(token, t.TrafficToken)
}

// pass is a request that may go on.
type pass struct {
	target string       // request target, without our token
	cookie *http.Cookie // when the client is a browser that gets it by a redirect to target
	ticket ticket
	// preflight: it is one without a token, to be answered by permit alone.
	preflight bool
}

// admitToken decides by token, header, query and cookie in this order: what a
// client shows counts, and a wrong one is not made good by another.
func (v *visit) admitToken(t *Target, to route) (pass, *refusal) {
	now := time.Now()
	target, given, param := stripParam(to.target)
	p := pass{target: target}
	if h := v.r.Header[tokenHeader]; len(h) > 0 {
		bad := invalid
		if len(h) == 1 {
			p.ticket, bad = t.shown(to.port, h[0], now)
		}
		return p, bad.refusal(t.ID, "header 'e2b-traffic-access-token'")
	}
	if given {
		ticket, bad := t.shown(to.port, param, now)
		if bad != genuine {
			return p, bad.refusal(t.ID, "query parameter 'cordon_token'")
		}
		if p.ticket = ticket; v.takesCookie(to) {
			p.cookie = t.cookie(to.port, param, ticket, now)
		}
		return p, nil
	}
	worst := genuine
	for _, c := range cookiesNamed(v.r.Header, tokenCookie) {
		ticket, bad := t.signed(to.port, c, now)
		if bad == genuine {
			if v.planted(t.ID) {
				return p, forbidden(t.ID, securedPrefix+"A page of another sandbox does not get to use its cookie")
			}
			if v.formElsewhere(t.ID) {
				return p, forbidden(t.ID, securedPrefix+"The cookie does not count for a form of another site")
			}
			p.ticket = ticket
			return p, nil
		}
		worst = max(worst, bad)
	}
	if worst >= expired {
		return p, worst.refusal(t.ID, "cookie")
	}
	return p, forbidden(t.ID, securedPrefix+"Token header 'e2b-traffic-access-token' is missing")
}

const securedPrefix = "Sandbox is secured with traffic access token. "

// refusal is the answer to a token that was shown in where.
func (f flaw) refusal(id, where string) *refusal {
	switch f {
	case genuine:
		return nil
	case expired:
		return linkOver(id, "The link to this sandbox has expired", "This link has expired")
	case revoked:
		return linkOver(id, "The link to this sandbox was revoked", "This link was revoked")
	}
	return forbidden(id, securedPrefix+"Provided token in "+where+" is invalid")
}

// takesCookie reports whether the client is sent back for a cookie: a browser at a
// sandbox's own host, with a connection that browsers keep such cookies for. A
// program passes at once. The token so leaves the address bar, the history and the
// Referer, and what the page loads passes too.
func (v *visit) takesCookie(to route) bool {
	return navigates(v.r) && !to.shared && v.scheme() == "https"
}

// cookie carries on what token opened, no longer than that.
func (t *Target) cookie(port uint16, token string, k ticket, now time.Time) *http.Cookie {
	expires := k.expires
	if expires.IsZero() { // the traffic token itself stays out of cookies
		expires = now.Add(cookieLife).Truncate(time.Second)
		token = auth.URLAccess{Sandbox: t.ID, Port: port, Expires: expires}.Sign(t.TrafficToken)
	}
	return &http.Cookie{
		Name: tokenCookie, Value: token, Path: "/",
		// Max-Age wins over Expires and does not depend on the browser's clock.
		Expires: expires, MaxAge: max(1, int(expires.Sub(now).Seconds())),
		// None and Partitioned: a page of another site may show the sandbox in a
		// frame, and no third site can use the cookie.
		Secure: true, HttpOnly: true, SameSite: http.SameSiteNoneMode, Partitioned: true,
	}
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
