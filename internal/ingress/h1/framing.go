package h1

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

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
	if httpguts.HeaderValuesContainsToken([]string{said}, "close") || x.c.s.closing.Load() || x.expected && !x.body.eof.Load() {
		x.close = true
	}
	if x.body.x != nil && !x.fullDuplex && !x.close {
		x.close = !x.body.drain()
	}
	if x.close && !httpguts.HeaderValuesContainsToken([]string{said}, "close") {
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
