package h1

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
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
	return validToken(name)
}

// appendField appends a field, and nothing that could be taken for more than one.
func appendField(b []byte, name, value string) []byte {
	if !validToken(name) {
		return b
	}
	b = append(b, name...)
	b = append(b, ": "...)
	if value = trim(value); validValue(value) {
		b = append(b, value...)
	} else {
		for i := range len(value) {
			b = append(b, value[i])
			if !validValue(value[i : i+1]) {
				b[len(b)-1] = ' '
			}
		}
	}
	return append(b, "\r\n"...)
}

// sendHead completes the head, now that it is known what follows, and sends it.
// p is the beginning of the body, all of it when the handler has returned.
func (x *exchange) sendHead(p []byte) {
	x.sent = true
	head, allowed := x.c.bufs.head, bodyAllowed(x.status)
	hasBody := allowed && x.req.Method != http.MethodHead
	whole := x.over.Load() && !x.given.trailers && x.given.coding == "" && x.length < 0
	if whole && allowed && (hasBody || len(p) > 0) { // a HEAD's handler need not say how long the body would be
		x.length = int64(len(p))
		head = append(strconv.AppendInt(append(head, "Content-Length: "...), x.length, 10), "\r\n"...)
	}
	if allowed && !x.given.typed && x.given.coding == "" && len(p) > 0 {
		head = appendField(head, "Content-Type", http.DetectContentType(p))
	}
	if !x.given.dated {
		head = append(head, x.c.s.dateField()...)
	}
	switch {
	case !hasBody || x.length >= 0:
	case x.req.ProtoMinor == 0 || x.given.coding == "identity":
		x.close = true // is where the body ends
	default:
		x.chunked = true
		head = append(head, "Transfer-Encoding: chunked\r\n"...)
	}
	head = x.appendConnection(head)
	x.c.bufs.head = head[:0]
	x.c.bufs.bw.Write(append(head, "\r\n"...)) //nolint:errcheck // shows in the next write or flush
}

// appendConnection decides what becomes of the connection.
func (x *exchange) appendConnection(head []byte) []byte {
	said := x.given.connection
	if x.status == http.StatusSwitchingProtocols {
		return head
	}
	if hasToken([]string{said}, "close") || x.c.s.closing.Load() || x.expected && !x.body.eof.Load() {
		x.close = true
	}
	if x.body.x != nil && !x.fullDuplex && !x.close {
		x.close = !x.body.drain()
	}
	if x.close && !hasToken([]string{said}, "close") {
		if said = ""; x.req.ProtoMinor > 0 {
			said = "close"
		}
	} else if said == "" && x.keepAlive10 && !x.close {
		said = "keep-alive"
	}
	if said == "" {
		return head
	}
	return appendField(head, "Connection", said)
}

// WriteTrailers says what the trailer will be.
func (x *exchange) WriteTrailers(fields []Field) {
	if x.c.hijacked.Load() || x.over.Load() {
		return
	}
	x.trailer = fields
	x.given.trailers = x.given.trailers || !x.sent && len(fields) > 0
}

// finish sends what is left of the answer after the handler.
func (x *exchange) finish() {
	if x.status == 0 {
		x.give(http.StatusOK)
	}
	x.sendGathered() //nolint:errcheck // shows in writeErr
	bw := x.c.bufs.bw
	if x.chunked {
		bw.WriteString("0\r\n")                //nolint:errcheck // shows in the flush
		bw.Write(x.appendTrailer([]byte(nil))) //nolint:errcheck // as above
		bw.WriteString("\r\n")                 //nolint:errcheck // as above
	}
	bw.Flush() //nolint:errcheck // shows in writeErr
	if x.written.Load() {
		x.c.rwc.SetWriteDeadline(time.Time{}) //nolint:errcheck // a dead connection shows in the write
	}
}

// appendTrailer appends the trailer: WriteTrailers's, or what Header has of it by now.
func (x *exchange) appendTrailer(b []byte) []byte {
	for _, f := range x.trailer {
		if trailable(http.CanonicalHeaderKey(f.Name)) {
			b = appendField(b, f.Name, f.Value)
		}
	}
	if x.trailer != nil || len(x.header) == 0 {
		return b
	}
	late := http.Header{}
	for _, name := range x.declared {
		late[name] = append(late[name], x.header[name]...)
	}
	for name, values := range x.header {
		if name, ok := strings.CutPrefix(name, http.TrailerPrefix); ok && trailable(http.CanonicalHeaderKey(name)) {
			late[name] = append(late[name], values...)
		}
	}
	names := make([]string, 0, len(late))
	for name := range late {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, v := range late[name] {
			b = appendField(b, name, v)
		}
	}
	return b
}

// keep reports whether the connection can carry another request: the answer was
// what its head said, and the request is read to its end.
func (x *exchange) keep() bool {
	if x.close || x.c.writeErr.Load() || x.status == http.StatusSwitchingProtocols {
		return false
	}
	if x.length >= 0 && x.size != x.length && x.req.Method != http.MethodHead && bodyAllowed(x.status) {
		return false
	}
	return x.body.drain()
}

// shut keeps whoever still reads the body from reading on.
func (x *exchange) shut() {
	if x.body.x == nil || x.body.take() {
		return
	}
	x.c.setReadDeadline(time.Unix(1, 0))
	x.body.Close() // waits for the reader
}
