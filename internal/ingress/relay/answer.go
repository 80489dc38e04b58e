package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// receive reads the head of the answer and passes interim ones on.
func (x *exchange) receive() (*http.Response, error) {
	for range interim {
		resp, err := x.readHead()
		if err != nil {
			return nil, err
		}
		switch code := resp.StatusCode; {
		case code == http.StatusSwitchingProtocols:
			if x.out.Upgrade == "" || !strings.EqualFold(resp.Header.Get("Upgrade"), x.out.Upgrade) {
				return nil, fmt.Errorf("%w: it switched to a protocol nobody asked for", ErrAnswer)
			}
			return resp, nil
		case code >= 200:
			return resp, nil
		case code == http.StatusContinue:
			x.proceed(true)
		case code < 100:
			return nil, fmt.Errorf("%w: status %d", ErrAnswer, code)
		case x.r.ProtoAtLeast(1, 1):
			x.hint(resp)
		}
	}
	return nil, fmt.Errorf("%w: over %d interim answers", ErrAnswer, interim)
}

// hint passes an interim answer on.
func (x *exchange) hint(resp *http.Response) {
	x.interim.Lock()
	defer x.interim.Unlock()
	h := x.w.Header()
	ours := maps.Clone(h)
	clear(h)
	copyHeader(h, resp.Header)
	if x.out.Answer != nil {
		x.out.Answer(resp.StatusCode, h)
	}
	x.w.WriteHeader(resp.StatusCode)
	clear(h)
	maps.Copy(h, ours)
}

// fieldsMost is how many fields an answer may have.
const fieldsMost = 1000

// readHead reads the head of an answer.
func (x *exchange) readHead() (*http.Response, error) {
	c := x.conn
	c.head.left = x.pool.cfg.HeadBytes
	_, err := c.br.Peek(1)
	if err != nil {
		if c.reused && x.replayable() && x.r.Context().Err() == nil && !x.pool.closed.Load() {
			return nil, errStale
		}
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return nil, fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	c.reused = false // it speaks: no second try
	slow := false
	if b, _ := c.br.Peek(c.br.Buffered()); !bytes.Contains(b, []byte("\r\n\r\n")) {
		slow = true
		c.SetReadDeadline(time.Now().Add(x.pool.cfg.HeadTimeout)) //nolint:errcheck // a dead connection shows in the read
	}
	if first, err := c.br.Peek(1); err == nil && first[0] == 0 { // no answer in HTTP/1 begins so
		if b, err := c.br.Peek(9); err == nil && BeginsHTTP2(b) {
			return nil, ErrHTTP2
		}
	}
	resp, err := http.ReadResponse(c.br, x.r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	fields := 0
	for name, values := range resp.Header {
		fields += len(values)
		if !strings.Contains(name, " ") {
			continue
		}
		// Services have been seen to do it. Readers do not agree on what the name is,
		// so the field goes no further, and one about the framing spoils the answer.
		switch http.CanonicalHeaderKey(strings.TrimSpace(name)) {
		case "Content-Length", "Transfer-Encoding":
			return nil, fmt.Errorf("%w: blank in the name %q", ErrAnswer, name)
		}
		delete(resp.Header, name)
	}
	if fields > fieldsMost {
		return nil, fmt.Errorf("%w: it has %d fields", ErrAnswer, fields)
	}
	if slow {
		c.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	}
	c.head.left = math.MaxInt64
	return resp, nil
}

// BeginsHTTP2 reports whether the nine octets are the head of a SETTINGS frame with
// which a server begins HTTP/2 (RFC 9113, sections 3.4, 4.1 and 6.5).
func BeginsHTTP2(b []byte) bool {
	const settings = 4
	return len(b) >= 9 && b[0] == 0 && b[3] == settings && b[4] == 0 && string(b[5:9]) == "\x00\x00\x00\x00"
}

// copyHeader adds the end-to-end fields of src to dst.
func copyHeader(dst, src http.Header) {
	listed := ConnectionListed(src)
	for name, values := range src {
		switch name {
		case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
			continue
		}
		if !listed[name] {
			dst[name] = values
		}
	}
}

// deliver sends the answer to the client.
func (x *exchange) deliver(resp *http.Response) error {
	h, err := x.begin(resp)
	if err != nil {
		return err
	}
	announced := len(resp.Trailer)
	if err := x.copyAnswer(resp); err != nil {
		return err
	}
	if len(resp.Trailer) > 0 && x.r.ProtoMajor == 1 {
		x.flush() // trailers need chunks
	}
	for name, values := range resp.Trailer {
		if len(resp.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
	return nil
}

// begin sends the head of the answer, and returns the header that takes its trailer.
func (x *exchange) begin(resp *http.Response) (http.Header, error) {
	x.interim.Lock()
	defer x.interim.Unlock()
	h := x.w.Header()
	copyHeader(h, resp.Header)
	if _, typed := h["Content-Type"]; !typed {
		h["Content-Type"] = nil // or the server guesses one
	}
	if resp.StatusCode == http.StatusNotModified && x.r.ProtoMajor == 2 {
		delete(h, "Content-Length") // optional there, and clients written in Go would miss the body
	}
	for _, name := range slices.Sorted(maps.Keys(resp.Trailer)) {
		h.Add("Trailer", name)
	}
	if x.out.Answer != nil {
		x.out.Answer(resp.StatusCode, h)
	}
	if x.r.ProtoMajor == 1 && x.upload != nil && !x.read.Load() {
		// The body is still on its way: were the connection kept, its rest could
		// be taken for the next request.
		h.Set("Connection", "close")
	}
	x.started.Store(true)
	if x.pool.closed.Load() { // it may not have seen started
		x.started.Store(false)
		clear(h)
		return nil, ErrReset
	}
	x.status = resp.StatusCode
	x.w.WriteHeader(resp.StatusCode)
	return h, nil
}

func (x *exchange) flush() {
	if f, ok := x.w.(http.Flusher); ok {
		f.Flush()
	}
}

// copyAnswer copies the body. It flushes whenever the service has nothing more
// at hand, so that events and frames arrive one by one, and holds a buffer only
// while there are bytes.
func (x *exchange) copyAnswer(resp *http.Response) error {
	if resp.Body == http.NoBody {
		return nil
	}
	br := x.conn.br
	var sent int64
	for {
		if br.Buffered() == 0 && sent != resp.ContentLength {
			if sent > 0 || resp.ContentLength < 0 {
				x.flush()
			}
			br.Peek(1) //nolint:errcheck // the error shows in the read
		}
		n, end, err := x.copyPiece(resp.Body)
		sent += n
		x.octets.Out = sent
		if end || err != nil {
			return err
		}
	}
}

func (x *exchange) copyPiece(body io.Reader) (n int64, end bool, err error) {
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	got, rerr := body.Read(buf[:])
	if got > 0 {
		if _, err := x.w.Write(buf[:got]); err != nil {
			return int64(got), false, fmt.Errorf("%w: %w", ErrClient, err)
		}
	}
	if rerr != nil && rerr != io.EOF {
		return int64(got), false, fmt.Errorf("%w: %w", ErrAnswer, rerr)
	}
	return int64(got), rerr == io.EOF, nil
}

// keepHint is how long the service says it keeps the connection, less a second;
// 0 when it does not say.
func keepHint(h http.Header) time.Duration {
	for param := range strings.SplitSeq(h.Get("Keep-Alive"), ",") {
		v, ok := strings.CutPrefix(strings.TrimSpace(param), "timeout=")
		if !ok {
			continue
		}
		s, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			continue
		}
		return max(time.Duration(s)*time.Second-time.Second, time.Millisecond)
	}
	return 0
}

// switched is the header of a switch of protocols, with the two fields it needs.
func (x *exchange) switched(resp *http.Response) http.Header {
	h := http.Header{}
	copyHeader(h, resp.Header)
	delete(h, "Content-Length")
	h["Connection"] = []string{"Upgrade"}
	h["Upgrade"] = resp.Header["Upgrade"][:1] // the one asked for; see receive
	return h
}
