package ingress

import (
	"errors"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// call is an admitted request: what it is for and by whom.
type call struct {
	backend *backend
	target  *Target
	to      route
	pass    pass
	guest   *guest

	host    string        // for the service
	fields  []relay.Field // that the service gets besides the client's
	upgrade string        // the protocol to switch to, empty for none
	held    *heldReader
}

// forward sends the request to the service and sees to the end of it.
func (v *visit) forward(c *call) {
	tunnel := false
	defer func() {
		if !tunnel {
			c.backend.depart(c.guest)
		}
	}()
	if !validMask(c.target.MaskHost) {
		v.refuse(badMask(c.to.id))
		return
	}
	c.host, c.fields = v.present(c.target, c.to)
	if c.upgrade = upgradeOf(v.r); v.stream != nil {
		c.upgrade = "websocket"
	}
	if v.byHTTP2(c) {
		v.forwardHTTP2(c)
		return
	}
	var result relay.Result
	result, tunnel = v.forwardHTTP1(c)
	if result.Err != nil && !result.Started && v.turnsOut(c, result.Err) {
		v.forwardHTTP2(c)
		return
	}
	v.code, v.err = result.Status, result.Err
	v.access.octets, v.access.wait = result.Octets, result.Wait
	switch {
	case result.Err == nil:
		if s := c.backend.speech(c.to.port); !s.http1.Load() {
			s.http1.Store(true)
		}
	case result.Started, errors.Is(result.Err, relay.ErrClient) && !errors.Is(result.Err, relay.ErrReset):
		v.abort()
	default:
		v.refuse(v.explain(c, result.Err))
	}
}

// forwardHTTP1 sends the request in HTTP/1.1. It reports whether a tunnel has come of
// it, which goes on by itself.
func (v *visit) forwardHTTP1(c *call) (result relay.Result, tunneled bool) {
	drop, fields := private, c.fields
	if cookie, had := stripCookie(v.r.Header); had {
		drop = privateOrCookie
		if cookie != "" {
			fields = append(fields, relay.Field{Name: "Cookie", Value: cookie})
		}
	}
	if c.target.MaskOrigin {
		drop = dropBesides(drop, fields)
	}
	info := v.info
	takesOver := c.upgrade != "" && v.stream == nil
	if takesOver {
		info.upgrading = true
	}
	// What outlives the request holds no string of its head, which is one piece of memory.
	b, g := c.backend, c.guest
	told := access{sandbox: c.target.ID, port: c.to.port, src: info.addr, start: v.access.start}
	result = b.pool.Forward(v.w, v.r, &relay.Out{
		Port: c.to.port, Target: c.pass.target, Host: c.host, Drop: drop, Set: fields, Upgrade: c.upgrade, Stream: v.stream,
		Answer:   func(code int, h http.Header) { v.answer(c.target, c.to, code, h) },
		Client:   info.http1Conn(v.r),
		Switched: func() { tunneled = true },
		Done: func(tunnel *relay.Octets) {
			switch {
			case tunnel != nil:
				b.depart(g)
				info.release()
				told.octets = *tunnel
				b.in.over("tunnel ended", told)
			case takesOver: // no tunnel: the connection may be taken over all the same, and is over then
				info.upgrading = false
			}
		},
	})
	return result, tunneled
}

// explain turns a failure before the first byte of an answer into ours.
func (v *visit) explain(c *call, err error) *refusal {
	b, to := c.backend, c.to
	if errors.Is(err, relay.ErrReset) || b.gone() {
		return notFound(to.id)
	}
	if t, ok := v.in.cfg.Lookup(to.id); !ok || t.State != Running {
		return notFound(to.id)
	}
	if errors.Is(err, relay.ErrBody) {
		return badRequest("The request's body is malformed or stopped coming.")
	}
	if _, ok := errors.AsType[*relay.DialError](err); ok {
		b.forget(to.port)
		return portClosed(to.id, to.port)
	}
	switch {
	case errors.Is(err, relay.ErrNoAnswer):
		return noAnswer(to.id, to.port, c.upgrade != "")
	case errors.Is(err, relay.ErrNoTLS):
		return noTLS(to.id, to.port)
	}
	return badAnswer(to.id, to.port)
}

// abort breaks the client's connection off, so that what it got of an answer
// cannot pass for all of it.
func (v *visit) abort() {
	if c := v.info.http1Conn(v.r); c != nil {
		relay.Abort(c)
	}
	panic(http.ErrAbortHandler)
}

// present returns what the service sees of where the request came from.
func (v *visit) present(t *Target, to route) (host string, fields []relay.Field) {
	fields = make([]relay.Field, 0, 5)
	if from := v.forwardedFor(); from != "" {
		fields = append(fields, relay.Field{Name: "X-Forwarded-For", Value: from})
	}
	fields = append(fields, relay.Field{Name: "X-Forwarded-Proto", Value: v.scheme()})
	mask := t.mask(to.port)
	switch {
	case mask == "":
		return v.r.Host, fields
	case t.MaskOrigin: // some compare Origin with X-Forwarded-Host, where it is there
		scheme := "http"
		if t.secure(to.port) {
			scheme = "https"
		}
		return mask, append(fields, v.maskedOrigins(scheme, mask)...)
	}
	return mask, append(fields, relay.Field{Name: "X-Forwarded-Host", Value: v.r.Host})
}

func (v *visit) forwardedFor() string {
	if v.info.trusted {
		if before := strings.Join(v.r.Header["X-Forwarded-For"], ", "); before != "" {
			return before + ", " + v.info.from
		}
	}
	return v.info.from
}

// private reports the header fields that services do not get from clients: who
// the client is, which we say, and our tokens. Servers of the CGI family take "_"
// for "-", and some of them (PHP's a ".") everything that cannot be in a variable's
// name, so that such spellings count too.
func private(name string) bool {
	if strings.ContainsFunc(name, unlettered) {
		name = http.CanonicalHeaderKey(strings.Map(dashed, name))
	}
	switch name {
	case "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Server",
		"X-Forwarded-Scheme", "X-Forwarded-Ssl", "X-Real-Ip", "Forwarded", tokenHeader, wakeHeader:
		return true
	}
	return false
}

func unlettered(c rune) bool { return dashed(c) != c }

// dashed makes a dash of what is neither a letter nor a digit.
func dashed(c rune) rune {
	if letterOrDigit(c) {
		return c
	}
	return '-'
}

func letterOrDigit(c rune) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

func privateOrCookie(name string) bool { return name == "Cookie" || private(name) }

// upgradeOf returns the protocol a client wants to switch to, when we pass that
// on. HTTP/2 is not: its requests would no longer be seen by us. A request may have
// a body, as Docker's clients send one with "tcp"; the switch comes behind it. A
// WebSocket's has none (RFC 6455, section 4.1).
func upgradeOf(r *http.Request) string {
	u := r.Header["Upgrade"]
	if r.ProtoMajor != 1 || r.ProtoMinor < 1 || len(u) != 1 {
		return ""
	}
	asked := false
	for _, v := range r.Header["Connection"] {
		for token := range strings.SplitSeq(v, ",") {
			asked = asked || strings.EqualFold(strings.TrimSpace(token), "upgrade")
		}
	}
	protocol := strings.TrimSpace(u[0])
	low := strings.ToLower(protocol)
	if low == "websocket" && r.ContentLength != 0 {
		return ""
	}
	if !asked || protocol == "" || strings.ContainsAny(protocol, ", ") || strings.HasPrefix(low, "h2") || strings.HasPrefix(low, "http") || strings.HasPrefix(low, "tls") {
		return ""
	}
	return protocol
}

// answer changes what must be changed in a service's header.
func (v *visit) answer(t *Target, to route, code int, h http.Header) {
	v.publish(t, to.port, h)
	if last := code >= 200 || code == http.StatusSwitchingProtocols; last && v.mode == TLS && v.in.cfg.HSTS > 0 {
		if _, own := h["Strict-Transport-Security"]; !own {
			h.Set("Strict-Transport-Security", v.in.hsts())
		}
	}
	if clear := h["Clear-Site-Data"]; len(clear) > 0 {
		if h["Clear-Site-Data"] = keepCookies(clear); len(h["Clear-Site-Data"]) == 0 {
			delete(h, "Clear-Site-Data")
		}
	}
	if cookies := h["Set-Cookie"]; len(cookies) > 0 {
		if h["Set-Cookie"] = ownCookies(cookies, to.host); len(h["Set-Cookie"]) == 0 {
			delete(h, "Set-Cookie")
		}
	}
}

// ownCookies keeps a service's cookies on its own host: browsers would send one
// for the domain to every sandbox, and take one from any of them.
func ownCookies(cookies []string, host string) []string {
	out := cookies[:0]
	for _, c := range cookies {
		name, _, _ := strings.Cut(c, "=")
		if strings.TrimSpace(name) == tokenCookie {
			continue
		}
		if !strings.Contains(strings.ToLower(c), "domain") {
			out = append(out, c)
			continue
		}
		parts := strings.Split(c, ";")
		kept := slices.DeleteFunc(parts[1:], func(attr string) bool {
			k, v, _ := strings.Cut(attr, "=")
			v = strings.TrimPrefix(strings.TrimSpace(v), ".")
			return strings.EqualFold(strings.TrimSpace(k), "domain") && !strings.EqualFold(v, host)
		})
		out = append(out, strings.Join(append(parts[:1], kept...), ";"))
	}
	return out
}

// keepCookies takes what clears cookies out of Clear-Site-Data: browsers clear those of
// the whole site, which all sandboxes are one of. The rest concerns one origin.
func keepCookies(lines []string) []string {
	var out []string
	for _, line := range lines {
		var kept []string
		for part := range strings.SplitSeq(line, ",") {
			part = strings.TrimSpace(part)
			switch strings.ToLower(strings.Trim(part, `"`)) {
			case "", "cookies":
			case "*":
				kept = append(kept, `"cache"`, `"storage"`, `"executionContexts"`)
			default:
				kept = append(kept, part)
			}
		}
		if len(kept) > 0 {
			out = append(out, strings.Join(kept, ", "))
		}
	}
	return out
}

func (in *Ingress) hsts() string {
	return "max-age=" + strconv.FormatInt(int64(in.cfg.HSTS.Seconds()), 10)
}

// http1Conn returns the client's connection when nobody else uses it.
func (c *connInfo) http1Conn(r *http.Request) net.Conn {
	if r.ProtoMajor != 1 {
		return nil
	}
	return c.conn
}
