package relay

import (
	"crypto/sha1" //nolint:gosec // RFC 6455 names it; it protects nothing
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// stream answers a WebSocket that was asked for on an HTTP/2 stream (RFC 8441,
// section 5) and carries its bytes until one side ends. The end of the stream
// reaches the service as the end of its connection and the other way round.
func (x *exchange) stream(resp *http.Response) error {
	if resp.Header.Get("Sec-Websocket-Accept") != accepted(x.r.Header.Get("Sec-Websocket-Key")) {
		return fmt.Errorf("%w: it did not accept the WebSocket's key", ErrAnswer)
	}
	h := x.w.Header()
	copyHeader(h, resp.Header)
	delete(h, "Sec-Websocket-Accept")
	delete(h, "Content-Length")
	if _, typed := h["Content-Type"]; !typed {
		h["Content-Type"] = nil // or the server guesses one
	}
	if x.out.Answer != nil {
		x.out.Answer(resp.StatusCode, h)
	}
	x.started.Store(true)
	if x.pool.closed.Load() { // it may not have seen started
		x.started.Store(false)
		clear(h)
		return ErrReset
	}
	x.status = http.StatusOK
	x.w.WriteHeader(x.status)
	x.flush()
	up := make(chan error, 1)
	go x.streamUp(up)
	n, err := copyIdle(flushing{x}, x.conn.br)
	x.octets.Out = n
	x.rc.SetReadDeadline(longAgo) //nolint:errcheck // only to wake streamUp
	if uerr := <-up; err == nil && errors.Is(uerr, errStreamBroken) {
		err = uerr
	}
	return err
}

// accepted is the answer to a WebSocket's key (RFC 6455, section 4.2.2).
func accepted(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // as above
	return base64.StdEncoding.EncodeToString(sum[:])
}

var errStreamBroken = fmt.Errorf("%w: its stream broke off", ErrClient)

// streamUp copies what the client sends and passes the end of it on.
func (x *exchange) streamUp(done chan<- error) {
	n, err := copyIdle(x.conn.Conn, x.out.Stream)
	x.octets.In = n
	if err == nil {
		err = closeWrite(x.conn.Conn)
	}
	if err != nil {
		if x.r.Context().Err() != nil {
			err = errors.Join(errStreamBroken, err)
		}
		hangUp(x.conn.Conn) // ends the other direction
	}
	done <- err
}

// flushing writes to the client at once.
type flushing struct{ x *exchange }

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.x.w.Write(b)
	if err == nil {
		err = f.x.rc.Flush()
	}
	if err != nil {
		return n, fmt.Errorf("%w: %w", ErrClient, err)
	}
	return n, nil
}

var _ io.Writer = flushing{}
