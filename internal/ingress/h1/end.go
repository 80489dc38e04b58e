package h1

import (
	"io"
	"net/http"
	"strconv"
	"time"
)

// lingerTime and lingerBytes are what a client may go on sending after an answer
// that it did not wait for: were the connection closed under it, it would see a
// reset and maybe no answer (RFC 9112, section 9.6).
const (
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 1 << 20
)

// refuse answers what could not be read as a request.
func (c *conn) refuse(err error) {
	r := refusalOf(err)
	if r == nil {
		return
	}
	c.s.log().Debug("request refused", "client", c.remote, "status", r.status, "err", err)
	title := strconv.Itoa(r.status) + " " + http.StatusText(r.status)
	text := title + ": " + r.why + "\n"
	c.rwc.SetWriteDeadline(time.Now().Add(drainTime)) //nolint:errcheck // a dead connection shows in the write
	_, werr := io.WriteString(c.rwc, "HTTP/1.1 "+title+"\r\n"+c.s.dateField()+
		"Content-Type: text/plain; charset=utf-8\r\nContent-Length: "+strconv.Itoa(len(text))+"\r\nConnection: close\r\n\r\n"+text)
	if werr == nil && r.status != http.StatusRequestTimeout {
		c.linger()
	}
}

// linger lets the client see the answer before the connection is closed.
func (c *conn) linger() {
	if half, ok := c.rwc.(interface{ CloseWrite() error }); ok {
		if half.CloseWrite() != nil {
			return
		}
	}
	c.setReadDeadline(time.Now().Add(lingerTime))
	io.CopyN(io.Discard, c.rwc, lingerBytes) //nolint:errcheck // whatever comes is not looked at
}
