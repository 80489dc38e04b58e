package egress

import (
	"bytes"
)

// Offers to go on in another protocol that a server may ignore (RFC 9110 section 7.8).
// Those in which a name is shown that this proxy does not read are dropped with all
// that belongs to them, and the request goes on without: HTTP/2, which Java's
// HttpClient, cargo and curl --http2 offer with every request, and TLS (RFC 2817). A
// single other one passes.

// dropped reports whether an offered protocol is one that is dropped.
func dropped(protocol []byte) bool {
	for _, prefix := range [...]string{"h2", "http/", "tls"} {
		if len(protocol) >= len(prefix) && is(protocol[:len(prefix)], prefix) {
			return true
		}
	}
	return false
}

// settleOffers keeps the one upgrade that passes, or removes what offers one.
func (q *request) settleOffers() error {
	var kept []byte
	n := 0
	for _, f := range q.fields {
		if !is(f.name, "upgrade") {
			continue
		}
		for p := range bytes.SplitSeq(f.value, []byte(",")) {
			if p = bytes.Trim(p, " \t"); len(p) == 0 || dropped(p) {
				continue
			}
			if !isTokens(bytes.Replace(p, []byte("/"), []byte("-"), 1)) {
				return badRequest("Upgrade is malformed")
			}
			kept = p
			n++
		}
	}
	q.upgrade = n == 1 && q.minor == 1
	out := q.fields[:0]
	for _, f := range q.fields {
		switch {
		case is(f.name, "http2-settings"):
			continue
		case is(f.name, "upgrade"):
			if !q.upgrade || kept == nil {
				continue
			}
			f.value, kept = kept, nil
		case is(f.name, "connection"):
			if f.value = q.options(f.value); len(f.value) == 0 {
				continue
			}
		}
		out = append(out, f)
	}
	q.fields = out
	return nil
}

// options is the value of a Connection field without what names a dropped field.
func (q *request) options(value []byte) []byte {
	var out []byte
	for option := range bytes.SplitSeq(value, []byte(",")) {
		option = bytes.Trim(option, " \t")
		if len(option) == 0 || is(option, "http2-settings") || is(option, "upgrade") && !q.upgrade {
			continue
		}
		if out != nil {
			out = append(out, ", "...)
		}
		out = append(out, option...)
	}
	return out
}
