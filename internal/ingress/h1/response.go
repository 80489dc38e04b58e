package h1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// responseHead bounds the head of an answer where the caller's reader does not.
const responseHead = 1 << 20

// ReadResponse reads the head of the answer to r (nil for a GET) and returns what
// http.ReadResponse would, and the fields as they came. Two things differ:
// closing the body does not wait for the rest of it, and no Cache-Control is
// made up for a Pragma. It is as lenient about what services send (bare LF,
// folded lines, no reason phrase, HTTP/1.0) and as strict about framing (two
// different lengths, unknown codings). A head is at most 1 MiB; who wants less
// limits what br reads from. Errors are of the reading, or say what is malformed.
func ReadResponse(br *bufio.Reader, r *http.Request) (*http.Response, []Field, error) {
	head, err := readHead(br, responseHead, statusLineBegun)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, nil, fmt.Errorf("read head: %w", err)
	}
	resp := &http.Response{Request: r, Body: http.NoBody}
	line, lines := cutLine(head)
	if err := statusLine(resp, line); err != nil {
		return nil, nil, err
	}
	fields, err := parseFields(lines, unfold)
	if err != nil {
		return nil, nil, err
	}
	resp.Header = headerOf(fields)
	if err := frameResponse(resp, br); err != nil {
		return nil, nil, err
	}
	return resp, fields, nil
}

// ResponseTrailers returns the trailer of an answer that ReadResponse returned as
// it came, once its body is read to the end; nil before.
func ResponseTrailers(resp *http.Response) []Field {
	if b, ok := resp.Body.(*answerBody); ok {
		return b.framed.fields
	}
	return nil
}

var errStatusLine = errors.New("malformed status line")

func statusLineBegun(b []byte) error {
	line, _, whole := bytes.Cut(b, []byte("\n"))
	if !whole {
		return nil
	}
	return statusLine(&http.Response{}, string(bytes.TrimSuffix(line, []byte("\r"))))
}

// statusLine parses "HTTP/1.1 200 OK".
func statusLine(resp *http.Response, line string) (err error) {
	version, status, ok := strings.Cut(line, " ")
	status = strings.TrimLeft(status, " ")
	code, _, _ := strings.Cut(status, " ")
	resp.Proto, resp.Status = version, status
	if !ok || len(code) != 3 || code[0] < '0' || code[0] > '9' {
		return errStatusLine
	}
	if resp.StatusCode, err = strconv.Atoi(code); err != nil {
		return errStatusLine
	}
	if resp.ProtoMajor, resp.ProtoMinor, ok = http.ParseHTTPVersion(version); !ok {
		return errStatusLine
	}
	return nil
}

// frameResponse finds out where the body ends (RFC 9112, section 6.3).
func frameResponse(resp *http.Response, br *bufio.Reader) error {
	h := resp.Header
	resp.Close = closes(resp)
	chunked, err := codedResponse(resp)
	if err != nil {
		return err
	}
	length, err := responseLength(h)
	if err != nil {
		return err
	}
	head := resp.Request != nil && resp.Request.Method == http.MethodHead
	empty := head || !bodyAllowed(resp.StatusCode) && resp.StatusCode >= 100
	if chunked {
		resp.TransferEncoding = []string{"chunked"}
		if resp.Trailer, err = announced(h); err != nil {
			return err
		}
	}
	switch {
	case head:
		resp.ContentLength = length
	case empty:
	case chunked:
		delete(h, "Content-Length")
		resp.ContentLength = -1
		resp.Body = &answerBody{resp: resp, framed: framed{br: br, left: -1, chunks: httputil.NewChunkedReader(br)}}
	case length >= 0:
		if resp.ContentLength = length; length > 0 {
			resp.Body = &answerBody{resp: resp, framed: framed{br: br, left: length}}
		}
	default:
		resp.ContentLength = -1
		resp.Close = true // is where it ends
		resp.Body = &answerBody{resp: resp, framed: framed{br: br, left: -1}}
	}
	return nil
}

// closes reports whether the service closes the connection after the answer.
func closes(resp *http.Response) bool {
	connection := resp.Header["Connection"]
	closing := httpguts.HeaderValuesContainsToken(connection, "close")
	switch {
	case resp.ProtoMajor < 1:
		return true
	case resp.ProtoMajor == 1 && resp.ProtoMinor == 0:
		return closing || !httpguts.HeaderValuesContainsToken(connection, "keep-alive")
	case closing:
		delete(resp.Header, "Connection")
	}
	return closing
}

// codedResponse reports whether the body is chunked.
func codedResponse(resp *http.Response) (bool, error) {
	codings, coded := resp.Header["Transfer-Encoding"]
	delete(resp.Header, "Transfer-Encoding")
	if !coded || !resp.ProtoAtLeast(1, 1) { // HTTP/1.0 has none (RFC 9112, section 6.1)
		return false, nil
	}
	if len(codings) != 1 || !sameToken(codings[0], "chunked") {
		return false, fmt.Errorf("unsupported transfer coding %q", codings)
	}
	return true, nil
}

// responseLength returns the Content-Length, -1 for none. Some services say it
// twice, which is harmless when it is the same.
func responseLength(h http.Header) (int64, error) {
	values := h["Content-Length"]
	if len(values) == 0 {
		return -1, nil
	}
	for _, v := range values[1:] {
		if v != values[0] {
			return 0, fmt.Errorf("different Content-Lengths %q", values)
		}
	}
	n, err := parseLength(values[0])
	if err != nil {
		return 0, fmt.Errorf("malformed Content-Length %q", values[0])
	}
	if len(values) > 1 {
		h["Content-Length"] = values[:1]
	}
	return n, nil
}

// answerBody is the body of an answer; one goroutine reads it.
type answerBody struct {
	resp   *http.Response
	framed framed
	closed bool
}

func (b *answerBody) Read(p []byte) (int, error) {
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	if b.framed.err != nil {
		return 0, b.framed.err
	}
	n, err := b.framed.read(p)
	if errors.Is(err, io.EOF) {
		mergeTrailer(&b.resp.Trailer, b.framed.fields)
	}
	return n, err
}

// Close ends the reading. Unless the body was read to its end, the connection
// is of no further use.
func (b *answerBody) Close() error {
	b.closed = true
	return nil
}
