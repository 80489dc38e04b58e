package bench

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// The clients below do the least HTTP that a correct answer needs, so that the
// load costs less than what it loads.

// keptHTTP1 sends request after request on one connection.
func (l Load) keptHTTP1() (func() error, func(), error) {
	c, err := l.kept("http/1.1")
	if err != nil {
		return nil, nil, err
	}
	r := bufio.NewReaderSize(c, 4096)
	request := []byte("GET /x?y=z HTTP/1.1\r\nHost: " + l.Name + "\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	step := func() error {
		if _, err := c.Write(request); err != nil {
			return err
		}
		return readAnswer(r)
	}
	if err := step(); err != nil {
		c.Close()
		return nil, nil, err
	}
	return step, func() { c.Close() }, nil
}

// kept connects, with TLS unless the load is a plain one.
func (l Load) kept(protocol string) (net.Conn, error) {
	raw, err := l.dial()
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Now().Add(l.For + deadline))
	if l.Kind == loadPlain {
		return raw, nil
	}
	c := tls.Client(raw, anyServer(l.Name, protocol))
	err = c.Handshake()
	if got := c.ConnectionState().NegotiatedProtocol; err == nil && got != protocol {
		err = fmt.Errorf("the server speaks %q, not %s", got, protocol)
	}
	if err != nil {
		raw.Close()
	}
	return c, err
}

// readAnswer reads a 200 with a Content-Length.
func readAnswer(r *bufio.Reader) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 200")) {
		return fmt.Errorf("answer %q", line)
	}
	length := -1
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		const name = "content-length:"
		if len(line) > len(name) && bytes.EqualFold(line[:len(name)], []byte(name)) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[len(name):]))); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return errors.New("the answer has no Content-Length")
	}
	_, err = r.Discard(length)
	return err
}

// h2conn sends request after request on one HTTP/2 connection (RFC 9113).
type h2conn struct {
	w       *bufio.Writer
	f       *http2.Framer
	request []byte // header block, the same bytes every time
	stream  uint32
	unread  uint32 // octets of data not yet acknowledged
}

func (l Load) keptHTTP2() (func() error, func(), error) {
	c, err := l.kept("h2")
	if err != nil {
		return nil, nil, err
	}
	h := &h2conn{w: bufio.NewWriter(c), stream: 1}
	h.f = http2.NewFramer(h.w, bufio.NewReader(c))
	h.request = headerBlock(l.Name)
	_, err = io.WriteString(h.w, http2.ClientPreface)
	if err == nil {
		// Without a table of its own the peer's header blocks need no decoding
		// to stay in step.
		err = h.f.WriteSettings(http2.Setting{ID: http2.SettingEnablePush}, http2.Setting{ID: http2.SettingHeaderTableSize})
	}
	if err == nil {
		err = h.step()
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return h.step, func() { c.Close() }, nil
}

// headerBlock encodes a request without touching the dynamic table.
func headerBlock(host string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: host}, {Name: ":path", Value: "/x?y=z"},
		{Name: "user-agent", Value: "bench"}, {Name: "accept", Value: "*/*"},
	} {
		f.Sensitive = f.Name == ":authority" || f.Name == ":path" // never indexed
		_ = e.WriteField(f)                                       // into memory
	}
	return b.Bytes()
}

func (h *h2conn) step() error {
	err := h.f.WriteHeaders(http2.HeadersFrameParam{StreamID: h.stream, BlockFragment: h.request, EndStream: true, EndHeaders: true})
	if err == nil {
		err = h.w.Flush()
	}
	got := uint32(0)
	for done := false; err == nil && !done; {
		var f http2.Frame
		if f, err = h.f.ReadFrame(); err == nil {
			done, err = h.frame(f, &got)
		}
	}
	if err == nil && got != messageSize {
		err = fmt.Errorf("the answer has %d octets, want %d", got, messageSize)
	}
	h.stream += 2
	return err
}

// frame handles one frame and reports whether it ends the answer.
func (h *h2conn) frame(f http2.Frame, got *uint32) (done bool, err error) {
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			err = errors.Join(h.f.WriteSettingsAck(), h.w.Flush())
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			err = errors.Join(h.f.WritePing(true, f.Data), h.w.Flush())
		}
	case *http2.HeadersFrame:
		done = f.StreamEnded()
	case *http2.DataFrame:
		*got += uint32(len(f.Data()))
		if h.unread += f.Length; h.unread > 16<<10 { // padding counts too
			err = h.f.WriteWindowUpdate(0, h.unread)
			h.unread = 0
		}
		done = f.StreamEnded()
	case *http2.RSTStreamFrame:
		err = fmt.Errorf("the stream was reset: %v", f.ErrCode)
	case *http2.GoAwayFrame:
		err = fmt.Errorf("the server goes away: %v", f.ErrCode)
	}
	return done, err
}
