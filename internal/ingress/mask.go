package ingress

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// A service that is behind a mask, or that knows only the address it is bound to,
// names itself by a host that means the user's own machine to a browser. What it
// says of itself becomes the URL that the client used, and with Target.MaskOrigin
// what the client says of that URL becomes the service's.

// mask is the host that the services of a port see, empty for the client's own.
func (t *Target) mask(port uint16) string {
	if t.MaskHost == "" || port == t.agentPort() {
		return ""
	}
	return strings.ReplaceAll(t.MaskHost, "${PORT}", strconv.Itoa(int(port)))
}

// validMask guards the wire; what a mask may be is decided where it is set.
func validMask(mask string) bool {
	return !strings.ContainsFunc(mask, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// maskedOrigins returns Origin and Referer as a service behind the mask is to see
// them, where they are of the URL that the request is for. Those of other pages stay
// as they are, so that the service's own check of where a request comes from holds.
func (v *visit) maskedOrigins(scheme, mask string) []relay.Field {
	var out []relay.Field
	for _, name := range [...]string{"Origin", "Referer"} {
		if values := v.r.Header[name]; len(values) == 1 {
			if rest, own := v.afterOwnOrigin(values[0]); own && (rest == "" || name == "Referer") {
				out = append(out, relay.Field{Name: name, Value: scheme + "://" + mask + rest})
			}
		}
	}
	return out
}

// afterOwnOrigin returns what follows the origin of the request's own URL in page,
// and false for a page of another origin. A page that was loaded by https counts as
// one of the URL as well where the request came by http: a proxy in front of us may
// have ended TLS. The other way round it does not, since anyone on the way can write
// a page of http.
func (v *visit) afterOwnOrigin(page string) (rest string, own bool) {
	scheme, authority, rest, ok := cutURL(page)
	if !ok || scheme == "" || scheme == "http" && v.scheme() == "https" {
		return "", false
	}
	return rest, lower(withoutPort(authority, scheme)) == lower(withoutPort(v.r.Host, scheme))
}

// dropBesides adds to a predicate of field names those of fields.
func dropBesides(drop func(string) bool, fields []relay.Field) func(string) bool {
	return func(name string) bool {
		for _, f := range fields {
			if f.Name == name {
				return true
			}
		}
		return drop(name)
	}
}

// publish puts the client's URL in the place of the service's own in the fields of
// an answer that send a browser somewhere. All other targets stay byte for byte.
func (v *visit) publish(t *Target, port uint16, h http.Header) {
	if port == t.agentPort() {
		return
	}
	for _, name := range [...]string{"Location", "Content-Location", "Refresh"} {
		for i, value := range h[name] {
			at := 0
			if name == "Refresh" {
				at = refreshTarget(value)
			}
			if rest, ok := t.afterOwnHost(port, value[at:]); ok {
				h[name][i] = value[:at] + v.scheme() + "://" + v.r.Host + rest
			}
		}
	}
}

// afterOwnHost returns what follows the authority in a URL by which a service names
// itself: with the mask's host, or with the loopback's name or address and the port
// that was asked for.
func (t *Target) afterOwnHost(port uint16, target string) (rest string, own bool) {
	scheme, authority, rest, ok := cutURL(target)
	if !ok {
		return "", false
	}
	authority = lower(authority)
	mask := lower(t.mask(port))
	name, suffix := authority, ""
	if i := strings.LastIndexByte(authority, ':'); i >= 0 && !strings.HasSuffix(authority, "]") {
		name, suffix = authority[:i], authority[i+1:]
	}
	if suffix == "" {
		suffix = defaultPorts[scheme]
	}
	if suffix == strconv.Itoa(int(port)) && (name == "localhost" || name == "127.0.0.1" || name == mask) {
		return rest, true
	}
	return rest, mask != "" && (authority == mask || withoutPort(authority, scheme) == withoutPort(mask, scheme))
}

var defaultPorts = map[string]string{"http": "80", "https": "443"}

// withoutPort leaves the port out where it is the scheme's own.
func withoutPort(authority, scheme string) string {
	if port, ok := defaultPorts[scheme]; ok {
		return strings.TrimSuffix(authority, ":"+port)
	}
	return authority
}

// cutURL takes an absolute http URL, or one that leaves its scheme out, apart. It
// wants the plain form, which all readers read alike: an authority without user
// information that ends where a path, query or fragment begins.
func cutURL(s string) (scheme, authority, rest string, ok bool) {
	if i := strings.Index(s, "://"); i == 4 || i == 5 {
		if scheme = lower(s[:i]); scheme != "http" && scheme != "https" {
			return "", "", "", false
		}
		s = s[i+1:]
	}
	if s, ok = strings.CutPrefix(s, "//"); !ok {
		return "", "", "", false
	}
	end := strings.IndexAny(s, "/?#")
	if end < 0 {
		end = len(s)
	}
	for i := range end {
		if c := s[i]; !letterOrDigit(rune(c)) && !strings.ContainsRune("-._:[]", rune(c)) {
			return "", "", "", false
		}
	}
	return scheme, s[:end], s[end:], end > 0
}

// refreshTarget returns where the URL begins in a Refresh field, as browsers read it:
// `5; url=https://…`, with or without "url=" and quotes.
func refreshTarget(value string) int {
	i := skip(value, 0, "0123456789. \t")
	if i == len(value) || i == 0 || value[i] != ';' && value[i] != ',' {
		return len(value)
	}
	i = skip(value, i+1, " \t")
	if len(value)-i >= 3 && lower(value[i:i+3]) == "url" {
		if j := skip(value, i+3, " \t"); j < len(value) && value[j] == '=' {
			i = skip(value, j+1, " \t")
		}
	}
	if i < len(value) && (value[i] == '"' || value[i] == '\'') {
		i++
	}
	return i
}

// skip returns the first index from i on whose byte is not one of set.
func skip(s string, i int, set string) int {
	for i < len(s) && strings.IndexByte(set, s[i]) >= 0 {
		i++
	}
	return i
}
