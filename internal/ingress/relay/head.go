package relay

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/ingress/h1"
)

// HopByHop reports the fields that belong to one connection (RFC 9110, section
// 7.6.1) and those that are written from what the server parsed.
func HopByHop(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
		"Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length", "Host", "Http2-Settings":
		return true
	}
	return false
}

// ConnectionListed returns the fields that the Connection header declares to be
// hop-by-hop, beside the usual ones.
func ConnectionListed(h http.Header) map[string]bool {
	var listed map[string]bool
	for _, v := range h["Connection"] {
		for token := range strings.SplitSeq(v, ",") {
			token = strings.TrimSpace(token)
			if token == "" || strings.EqualFold(token, "keep-alive") || strings.EqualFold(token, "close") || strings.EqualFold(token, "upgrade") {
				continue
			}
			if listed == nil {
				listed = map[string]bool{}
			}
			listed[http.CanonicalHeaderKey(token)] = true
		}
	}
	return listed
}

func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, "\r\n"...)
}

// appendHead appends the request's head. Method, names and values are free of
// line breaks: the server checked them.
func (x *exchange) appendHead(b []byte, size int64, expect bool) []byte {
	r := x.r
	b = append(b, r.Method...)
	b = append(b, ' ')
	b = append(b, x.out.Target...)
	b = append(b, " HTTP/1.1\r\n"...)
	h := head{r: r, out: x.out, size: size, expect: expect, listed: ConnectionListed(r.Header)}
	fields := h1.Fields(r)
	if !names(fields, "Host") { // HTTP/2, HTTP/1.0, or somebody else's server
		b = h.host(b, "Host")
	}
	if fields != nil {
		for _, f := range fields {
			b = h.field(b, f)
		}
	} else {
		for name, values := range r.Header {
			for _, v := range values {
				b = h.field(b, h1.Field{Name: name, Value: v})
			}
		}
	}
	return append(h.rest(b), "\r\n"...)
}

func names(fields []h1.Field, name string) bool {
	for _, f := range fields {
		if strings.EqualFold(f.Name, name) {
			return true
		}
	}
	return false
}

// head is a request's header on its way to the service: the client's fields in their
// order and spelling, and what we say in the place where the client said it, or last.
type head struct {
	r      *http.Request
	out    *Out
	size   int64 // of the body; under 0: not known
	expect bool
	listed map[string]bool // by the Connection header

	named, framed, switched, upgraded, announced bool // the field is written
	set                                          uint // bits of out.Set that are written
}

// field appends one field of the client's, or what stands in its place.
func (h *head) field(b []byte, f h1.Field) []byte {
	name := http.CanonicalHeaderKey(f.Name)
	if HopByHop(name) {
		return h.own(b, name, f)
	}
	if h.out.Drop != nil && h.out.Drop(name) {
		return h.instead(b, name, f.Name)
	}
	if h.listed[name] || name == "Expect" && !h.expect {
		return b
	}
	return appendField(b, f.Name, f.Value)
}

// own appends a field that concerns the connection to the service.
func (h *head) own(b []byte, name string, f h1.Field) []byte {
	switch name {
	case "Host":
		return h.host(b, f.Name)
	case "Content-Length":
		if h.size >= 0 && (h.size > 0 || f.Value == "0") {
			return h.length(b, f.Name)
		}
	case "Transfer-Encoding":
		if h.size < 0 {
			return h.length(b, f.Name)
		}
	case "Connection":
		return h.connection(b, f)
	case "Upgrade":
		return h.upgrade(b, f.Name)
	case "Te":
		if strings.EqualFold(strings.TrimSpace(f.Value), "trailers") {
			return appendField(b, f.Name, f.Value)
		}
	case "Trailer":
		return h.announce(b, f)
	}
	return b
}

// instead appends what we say in place of a field that is not passed on.
func (h *head) instead(b []byte, name, spelled string) []byte {
	for i, f := range h.out.Set {
		if h.set&(1<<i) == 0 && http.CanonicalHeaderKey(f.Name) == name {
			h.set |= 1 << i
			return appendField(b, spelled, f.Value)
		}
	}
	return b
}

func (h *head) host(b []byte, spelled string) []byte {
	if h.named {
		return b
	}
	h.named = true
	return appendField(b, spelled, h.out.Host)
}

// length says how the body is framed.
func (h *head) length(b []byte, spelled string) []byte {
	if h.framed {
		return b
	}
	h.framed = true
	if h.size < 0 {
		return appendField(b, spelled, "chunked")
	}
	return appendField(b, spelled, strconv.FormatInt(h.size, 10))
}

func (h *head) connection(b []byte, f h1.Field) []byte {
	if h.out.Upgrade == "" || h.switched {
		return b
	}
	h.switched = true
	if !strings.EqualFold(f.Value, "upgrade") {
		f.Value = "Upgrade"
	}
	return appendField(b, f.Name, f.Value)
}

func (h *head) upgrade(b []byte, spelled string) []byte {
	if h.out.Upgrade == "" || h.upgraded {
		return b
	}
	h.upgraded = true
	return appendField(b, spelled, h.out.Upgrade)
}

// announce appends the names of trailer fields that may follow the body.
func (h *head) announce(b []byte, f h1.Field) []byte {
	if h.size >= 0 {
		return b
	}
	h.announced = true
	var kept []string
	all := true
	for name := range strings.SplitSeq(f.Value, ",") {
		name = strings.TrimSpace(name)
		if name == "" || forbiddenTrailer(http.CanonicalHeaderKey(name), h.out) {
			all = false
			continue
		}
		kept = append(kept, name)
	}
	switch {
	case all:
		return appendField(b, f.Name, f.Value)
	case len(kept) > 0:
		return appendField(b, f.Name, strings.Join(kept, ", "))
	}
	return b
}

// rest appends what we say and the client did not.
func (h *head) rest(b []byte) []byte {
	for i, f := range h.out.Set {
		if h.set&(1<<i) == 0 {
			b = appendField(b, f.Name, f.Value)
		}
	}
	b = h.connection(b, h1.Field{Name: "Connection", Value: "Upgrade"})
	b = h.upgrade(b, "Upgrade")
	switch method := h.r.Method; {
	case h.size < 0:
		b = h.length(b, "Transfer-Encoding")
	case h.size > 0, method == http.MethodPost, method == http.MethodPut, method == http.MethodPatch:
		b = h.length(b, "Content-Length")
	}
	if h.announced || h.size >= 0 {
		return b
	}
	for name := range h.r.Trailer {
		if !forbiddenTrailer(name, h.out) {
			b = appendField(b, "Trailer", name)
		}
	}
	return b
}

// forbiddenTrailer reports trailer fields that a service might merge into the
// header and then trust.
func forbiddenTrailer(name string, out *Out) bool {
	if UnsafeTrailer(name) || out.Drop != nil && out.Drop(name) {
		return true
	}
	for _, f := range out.Set {
		if strings.EqualFold(f.Name, name) {
			return true
		}
	}
	return false
}

// UnsafeTrailer reports trailer fields that have a meaning of their own in a header.
func UnsafeTrailer(name string) bool {
	if HopByHop(name) {
		return true
	}
	switch name {
	case "Authorization", "Cookie", "Expect", "Content-Type", "Content-Encoding", "Content-Range", "Range":
		return true
	}
	return false
}

// appendTrailers appends the last chunk and the trailers, which are known now.
func (x *exchange) appendTrailers(b []byte) []byte {
	b = append(b, "0\r\n"...)
	if fields := h1.Trailers(x.r); fields != nil {
		for _, f := range fields {
			b = x.appendTrailer(b, f)
		}
		return append(b, "\r\n"...)
	}
	for name, values := range x.r.Trailer {
		for _, v := range values {
			b = x.appendTrailer(b, h1.Field{Name: name, Value: v})
		}
	}
	return append(b, "\r\n"...)
}

func (x *exchange) appendTrailer(b []byte, f h1.Field) []byte {
	if forbiddenTrailer(http.CanonicalHeaderKey(f.Name), x.out) || strings.ContainsAny(f.Value, "\r\n\x00") {
		return b
	}
	return appendField(b, f.Name, f.Value)
}
