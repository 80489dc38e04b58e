package relay

import (
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// Field is a field of a header. Its name is canonical.
type Field struct{ Name, Value string }

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

// appendHead appends the request's head, its fields sorted by name. Method, names and
// values are free of line breaks: the server checked them. A size under 0 is not known.
func (x *exchange) appendHead(b []byte, size int64, expect bool) []byte {
	r, out := x.r, x.out
	b = append(b, r.Method...)
	b = append(b, ' ')
	b = append(b, out.Target...)
	b = append(b, " HTTP/1.1\r\n"...)
	b = appendField(b, "Host", out.Host)
	listed := ConnectionListed(r.Header)
	var few [32]string
	for _, name := range sortedNames(few[:0], r.Header) {
		switch {
		case HopByHop(name), listed[name], out.drops(name), name == "Expect" && !expect:
			continue
		}
		for _, v := range r.Header[name] {
			b = appendField(b, name, v)
		}
	}
	if te := r.Header["Te"]; len(te) == 1 && strings.EqualFold(strings.TrimSpace(te[0]), "trailers") {
		b = appendField(b, "Te", "trailers")
	}
	for _, f := range out.Set {
		b = appendField(b, f.Name, f.Value)
	}
	if out.Upgrade != "" {
		b = appendField(b, "Connection", "Upgrade")
		b = appendField(b, "Upgrade", out.Upgrade)
	}
	switch {
	case size < 0:
		b = appendField(b, "Transfer-Encoding", "chunked")
		for _, name := range slices.Sorted(maps.Keys(r.Trailer)) {
			if !out.forbidsTrailer(name) {
				b = appendField(b, "Trailer", name)
			}
		}
	case size > 0, r.Method == http.MethodPost, r.Method == http.MethodPut, r.Method == http.MethodPatch, r.Header["Content-Length"] != nil:
		b = append(b, "Content-Length: "...)
		b = append(strconv.AppendInt(b, size, 10), "\r\n"...)
	}
	return append(b, "\r\n"...)
}

func sortedNames(names []string, h http.Header) []string {
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (o *Out) drops(name string) bool { return o.Drop != nil && o.Drop(name) }

// forbidsTrailer reports trailer fields that a service might merge into the
// header and then trust.
func (o *Out) forbidsTrailer(name string) bool {
	return UnsafeTrailer(name) || o.drops(name) || slices.ContainsFunc(o.Set, func(f Field) bool { return strings.EqualFold(f.Name, name) })
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
	for _, name := range slices.Sorted(maps.Keys(x.r.Trailer)) {
		if x.out.forbidsTrailer(name) {
			continue
		}
		for _, v := range x.r.Trailer[name] {
			if !strings.ContainsAny(v, "\r\n\x00") {
				b = appendField(b, name, v)
			}
		}
	}
	return append(b, "\r\n"...)
}
