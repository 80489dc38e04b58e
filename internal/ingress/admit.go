package ingress

import (
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/auth"
)

// caller is who sends a request, as far as that can be known.
type caller struct {
	addr   netip.Addr // zero when a trusted proxy did not say it in a form we read
	inside bool       // a sandbox of this server
}

// caller is the client: the other end of the connection or, when that is a trusted
// proxy, the last one in its X-Forwarded-For that is not a trusted proxy too.
// Anything further left may have been written by the client itself.
func (v *visit) caller() caller {
	c := caller{addr: v.info.addr, inside: v.info.inside}
	if !v.info.trusted {
		return c
	}
	hops := strings.Split(strings.Join(v.r.Header["X-Forwarded-For"], ","), ",")
	for _, hop := range slices.Backward(hops) {
		hop = strings.TrimSpace(hop)
		if hop == "" && len(hops) == 1 {
			return c // it forwards for itself
		}
		addr, err := netip.ParseAddr(hop)
		if err != nil {
			ap, err := netip.ParseAddrPort(hop)
			if err != nil {
				return caller{}
			}
			addr = ap.Addr()
		}
		if c.addr = addr.Unmap().WithZone(""); !v.in.sources.trusts(c.addr) {
			return c
		}
	}
	return c
}

// allows reports whether the caller is in the sandbox's list of sources. Sandboxes
// of this server have addresses that mean nothing to who wrote the list, may be
// inside a network it names, and are used again by others: only a list that lets
// everybody in lets them in.
func (t *Target) allows(c caller) bool {
	if t.AllowIn == nil {
		return true
	}
	for _, p := range t.AllowIn {
		if p.Contains(c.addr) && (!c.inside || p.Bits() == 0) {
			return true
		}
	}
	return false
}

// admit decides whether the request may speak to the port. Nothing has reached the
// sandbox before, and nothing is woken without it.
func (v *visit) admit(t *Target, to route) (pass, *refusal) {
	if to.port == t.agentPort() {
		return v.admitAgent(t, to)
	}
	if !t.allows(v.caller()) {
		return pass{}, notListed(t.ID)
	}
	if t.Public {
		return pass{target: to.target}, nil
	}
	p, refused := v.admitToken(t, to)
	if preflight(v.r) && (refused != nil || t.State != Running) {
		return pass{preflight: true}, nil
	}
	return p, refused
}

// admitAgent lets requests to the agent pass, which has its own access token and
// checks it; its control routes do not exist for the outside. The list of sources
// is about the sandbox's own services: who holds the access token may call from
// anywhere, as with the API key. It counts where there is no such token, or it
// could be walked around by a command in the sandbox.
func (v *visit) admitAgent(t *Target, to route) (pass, *refusal) {
	p := pass{target: to.target}
	switch {
	case controlRoute(to.target):
		return p, &refusal{Code: http.StatusNotFound, Message: "not found"}
	case t.AccessToken == "" && !t.allows(v.caller()):
		return p, notListed(t.ID)
	case t.State != Running && preflight(v.r): // the agent would permit every page as well
		return pass{preflight: true}, nil
	case t.State != Running && !t.agentAdmits(v.r, to.target):
		return p, notFound(t.ID)
	}
	return p, nil
}

// agentAdmits reports whether the agent would answer the request, of a sandbox that
// is paused: strangers cannot wake it, nor does asking whether it runs.
func (t *Target) agentAdmits(r *http.Request, target string) bool {
	path, query, _ := strings.Cut(target, "?")
	if healthPoll(r.Method, path) || r.Method == http.MethodOptions {
		return false
	}
	if t.AccessToken == "" || auth.Equal(r.Header.Get("X-Access-Token"), t.AccessToken) {
		return true
	}
	if path != "/files" || r.Header.Get("X-Access-Token") != "" {
		return false
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		return false
	}
	file := auth.FileAccess{Path: q.Get("path"), Operation: auth.WriteFile, User: q.Get("username")}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		file.Operation = auth.ReadFile
	}
	if e := q.Get("signature_expiration"); e != "" {
		if file.Expires, err = strconv.ParseInt(e, 10, 64); err != nil {
			return false
		}
	}
	return file.Verify(t.AccessToken, q.Get("signature"), time.Now())
}

// healthPoll reports the requests by which the SDKs ask whether a sandbox runs.
// They neither wake it nor keep it from ending.
func healthPoll(method, path string) bool {
	return path == "/health" && (method == http.MethodGet || method == http.MethodHead)
}
