package h1

import (
	"net/http"
	"strconv"
)

// Header returns what WriteHeader sends.
func (x *exchange) Header() http.Header {
	if x.header == nil {
		x.header = http.Header{}
	}
	return x.header
}

// WriteHeader sends an interim answer at once, and lays out the header of the
// final one.
func (x *exchange) WriteHeader(code int) {
	if x.mayBegin(code) {
		x.give(code)
	}
}

func (x *exchange) give(code int) {
	x.interim.Lock()
	defer x.interim.Unlock()
	x.begin(code)
	if x.status != 0 {
		x.given.coding = x.header.Get("Transfer-Encoding")
	}
	x.layOut(x.header)
	x.begun()
}

// WriteFields is WriteHeader with a header as it is to be sent.
func (x *exchange) WriteFields(code int, fields []Field) {
	if !x.mayBegin(code) {
		return
	}
	x.interim.Lock()
	defer x.interim.Unlock()
	x.begin(code)
	x.given.raw, x.given.typed = true, true
	for _, f := range fields {
		x.layField(http.CanonicalHeaderKey(f.Name), f.Name, f.Value)
	}
	x.begun()
}

func (x *exchange) mayBegin(code int) bool {
	if x.c.hijacked.Load() || x.over.Load() || x.status != 0 {
		x.c.s.log().Debug("header given twice or too late", "status", code)
		return false
	}
	if code < 100 || code > 999 {
		panic("h1: invalid status " + strconv.Itoa(code))
	}
	return !isInterim(code) || x.req.ProtoMinor > 0 // RFC 9110, section 15.2
}

func isInterim(code int) bool { return code < 200 && code != http.StatusSwitchingProtocols }

// begin starts a head in c.bufs.head.
func (x *exchange) begin(code int) {
	if code == http.StatusContinue || !isInterim(code) {
		x.goAhead.Store(false)
	}
	if !isInterim(code) {
		x.status = code
	}
	b := append(x.c.bufs.head[:0], "HTTP/1.1 "...)
	if x.req.ProtoMinor == 0 {
		b[len("HTTP/1.")] = '0'
	}
	b = append(strconv.AppendInt(b, int64(code), 10), ' ')
	text := http.StatusText(code)
	if text == "" {
		text = "status code " + strconv.Itoa(code)
	}
	x.c.bufs.head = append(append(b, text...), "\r\n"...)
}

// begun sends an interim head.
func (x *exchange) begun() {
	if x.status != 0 {
		return
	}
	x.given = given{trailers: len(x.trailer) > 0}
	x.c.bufs.bw.Write(x.c.bufs.head) //nolint:errcheck // shows in the flush
	x.c.bufs.bw.WriteString("\r\n")  //nolint:errcheck // as above
	x.c.bufs.bw.Flush()              //nolint:errcheck // the answer fails likewise
}

// sayContinue tells the client to send the body, once.
func (x *exchange) sayContinue() {
	x.interim.Lock()
	defer x.interim.Unlock()
	if x.goAhead.CompareAndSwap(true, false) {
		x.c.bufs.bw.WriteString("HTTP/1.1 100 Continue\r\n\r\n") //nolint:errcheck // shows in the flush
		x.c.bufs.bw.Flush()                                      //nolint:errcheck // the answer fails likewise
	}
}

// Write sends a part of the body.
func (x *exchange) Write(p []byte) (int, error) {
	if err := x.mayWrite(len(p)); err != nil || len(p) == 0 {
		return 0, err
	}
	return x.write(p)
}

// WriteString is Write without a copy of what is short.
func (x *exchange) WriteString(s string) (int, error) {
	if err := x.mayWrite(len(s)); err != nil || s == "" {
		return 0, err
	}
	if b := x.c.bufs.body; x.gathers() && len(b)+len(s) <= cap(b) {
		x.c.bufs.body = append(b, s...)
		return len(s), nil
	}
	return x.write([]byte(s))
}

func (x *exchange) mayWrite(n int) error {
	switch {
	case x.c.hijacked.Load():
		return http.ErrHijacked
	case x.over.Load():
		return errOver
	case x.status == 0:
		x.WriteHeader(http.StatusOK)
	}
	if n > 0 && !bodyAllowed(x.status) {
		return http.ErrBodyNotAllowed
	}
	if x.size += int64(n); x.length >= 0 && x.size > x.length {
		return http.ErrContentLength
	}
	return nil
}

// gathers reports whether what is written is collected first, because its
// length is not known, its type is to be guessed, or for a chunk.
func (x *exchange) gathers() bool {
	if x.sent {
		return x.chunked
	}
	return x.length < 0 || !x.given.typed
}

func (x *exchange) write(p []byte) (int, error) {
	n := len(p)
	if x.gathers() {
		b := x.c.bufs.body
		if len(b)+len(p) <= cap(b) {
			x.c.bufs.body = append(b, p...)
			return n, nil
		}
		if len(b) > 0 {
			room := cap(b) - len(b)
			x.c.bufs.body = append(b, p[:room]...)
			p = p[room:]
			if err := x.sendGathered(); err != nil {
				return 0, err
			}
			if x.chunked && len(p) <= cap(b) {
				x.c.bufs.body = append(x.c.bufs.body, p...)
				return n, nil
			}
		}
	}
	if !x.sent {
		x.sendHead(p)
	}
	if err := x.send(p); err != nil {
		return 0, err
	}
	return n, nil
}

// sendGathered sends the head, if it is still here, and what was gathered.
func (x *exchange) sendGathered() error {
	b := x.c.bufs.body
	if !x.sent {
		x.sendHead(b)
	}
	x.c.bufs.body = b[:0]
	return x.send(b)
}

// send hands a part of the body on, framed.
func (x *exchange) send(p []byte) (err error) {
	if len(p) == 0 || x.req.Method == http.MethodHead {
		return nil
	}
	bw := x.c.bufs.bw
	if !x.chunked {
		_, err = bw.Write(p)
		return err
	}
	size := strconv.AppendUint(bw.AvailableBuffer(), uint64(len(p)), 16)
	if _, err = bw.Write(append(size, "\r\n"...)); err == nil {
		if _, err = bw.Write(p); err == nil {
			_, err = bw.WriteString("\r\n")
		}
	}
	return err
}

// Flush is FlushError.
func (x *exchange) Flush() { x.FlushError() } //nolint:errcheck // who wants it calls FlushError

// FlushError sends what was written so far.
func (x *exchange) FlushError() error {
	if err := x.mayWrite(0); err != nil {
		return err
	}
	if err := x.sendGathered(); err != nil {
		return err
	}
	return x.c.bufs.bw.Flush()
}
