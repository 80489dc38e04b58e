package h1

import (
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// bodyAllowed reports whether an answer of this status may have a body (RFC
// 9110, section 6.4.1).
func bodyAllowed(status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}

// layOut lays out the fields of h, sorted by name.
func (x *exchange) layOut(h http.Header) {
	var few [16]string
	names := few[:0]
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		switch name { // an entry without a value means: do not add one
		case "Content-Type":
			x.given.typed = true
		case "Date":
			x.given.dated = true
		}
		for _, v := range h[name] {
			x.layField(name, name, v)
		}
	}
}

// layField adds a field to the head unless framing decides about it.
func (x *exchange) layField(canonical, name, value string) {
	switch canonical {
	case "Transfer-Encoding":
		return
	case "Content-Length":
		if !x.declare(value) {
			return
		}
	case "Connection":
		if x.status != http.StatusSwitchingProtocols {
			if x.given.connection != "" {
				value = x.given.connection + ", " + value
			}
			x.given.connection = value
			return
		}
	case "Date":
		x.given.dated = true
	case "Content-Type":
		x.given.typed = true
		if x.status == http.StatusNotModified && !x.given.raw {
			return
		}
	case "Content-Encoding":
		x.given.typed = x.given.typed || value != "" // what is coded does not show what it is
	case "Trailer":
		if x.status != 0 {
			x.given.trailers = true
			x.announce(value)
		}
	default:
		if strings.HasPrefix(name, http.TrailerPrefix) {
			x.given.trailers = true
			return
		}
	}
	x.c.bufs.head = appendField(x.c.bufs.head, name, value)
}

// declare takes a Content-Length in and reports whether it is to be sent.
func (x *exchange) declare(value string) bool {
	n, err := parseLength(trim(value))
	switch {
	case x.status == 0 || x.status == http.StatusNoContent || x.status == http.StatusSwitchingProtocols || x.length >= 0:
		return false
	case err != nil:
		x.c.s.log().Debug("answer with a malformed Content-Length", "value", value)
		return false
	case x.given.coding != "" && x.given.coding != "identity":
		return false // it would lie
	}
	x.length = n
	return x.status != http.StatusNotModified || x.given.raw
}

func (x *exchange) announce(value string) {
	for name := range strings.SplitSeq(value, ",") {
		if name = http.CanonicalHeaderKey(trim(name)); trailable(name) {
			x.declared = append(x.declared, name)
		}
	}
}

// trailable reports whether a trailer may have the field: what frames, routes or
// authenticates a message has to be known before its body (RFC 9110, section 6.5.1).
func trailable(name string) bool {
	switch name {
	case "Transfer-Encoding", "Content-Length", "Trailer", "Host", "Connection", "Keep-Alive", "Te", "Upgrade",
		"Authorization", "Content-Encoding", "Content-Type", "Content-Range", "Expect", "Max-Forwards", "Www-Authenticate":
		return false
	}
	return httpguts.ValidHeaderFieldName(name)
}

// appendField appends a field, and nothing that could be taken for more than one.
func appendField(b []byte, name, value string) []byte {
	if !httpguts.ValidHeaderFieldName(name) {
		return b
	}
	b = append(b, name...)
	b = append(b, ": "...)
	if value = trim(value); httpguts.ValidHeaderFieldValue(value) {
		b = append(b, value...)
	} else {
		for i := range len(value) {
			b = append(b, value[i])
			if !httpguts.ValidHeaderFieldValue(value[i : i+1]) {
				b[len(b)-1] = ' '
			}
		}
	}
	return append(b, "\r\n"...)
}
