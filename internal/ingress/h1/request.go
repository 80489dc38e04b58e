package h1

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// refusal is the answer to what is not a request this package serves.
type refusal struct {
	status int
	why    string // sent to the client
}

func (r *refusal) Error() string { return r.why }

func malformed(why string) error { return &refusal{http.StatusBadRequest, why} }

// refusalOf turns what went wrong with a head, of which something came, into an
// answer; nil when nobody is there to read one.
func refusalOf(err error) *refusal {
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		return refused
	case errors.Is(err, errTooLong):
		return &refusal{http.StatusRequestHeaderFieldsTooLarge, "the request line and header are too long"}
	case errors.Is(err, io.ErrUnexpectedEOF):
		return &refusal{http.StatusBadRequest, "the header ends too soon"}
	case isTimeout(err):
		return &refusal{http.StatusRequestTimeout, "the header did not come in time"}
	}
	return nil
}

// requestLine parses "GET /path HTTP/1.1".
func requestLine(line string) (method, target, version string, err error) {
	method, rest, ok := strings.Cut(line, " ")
	target, version, more := strings.Cut(rest, " ")
	major, _, known := http.ParseHTTPVersion(version)
	switch {
	case !ok || !more || !httpguts.ValidHeaderFieldName(method) || target == "" || !known:
		return "", "", "", malformed("malformed request line")
	case major != 1 || version > "HTTP/1.1":
		return "", "", "", &refusal{http.StatusHTTPVersionNotSupported, "HTTP/1.0 and 1.1 are spoken here"}
	}
	return method, target, version, nil
}

// begunWell refuses early what cannot become a request, so that who speaks
// another protocol is told before the header's time is over.
func begunWell(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if !httpguts.IsTokenRune(rune(b[0])) {
		return malformed("malformed request line")
	}
	line, _, whole := bytes.Cut(b, []byte("\n"))
	if !whole {
		return nil
	}
	_, _, _, err := requestLine(string(bytes.TrimSuffix(line, []byte("\r"))))
	return err
}

// readRequest parses a head. What is strict here is what keeps others, who read
// the request after us, from reading another one (RFC 9112, section 11.2).
func (x *exchange) readRequest(head string) error {
	line, lines := cutLine(head)
	method, target, version, err := requestLine(line)
	if err != nil {
		return err
	}
	u, err := parseTarget(method, target)
	if err != nil {
		return malformed("malformed request target")
	}
	if x.fields, err = parseFields(lines, refuseFolds); errors.Is(err, errTooLong) {
		return err
	} else if err != nil {
		return malformed(err.Error())
	}
	r := http.Request{
		Method: method, URL: u, RequestURI: target, Proto: version, ProtoMajor: 1, ProtoMinor: int(version[len(version)-1] - '0'),
		Header: headerOf(x.fields), RemoteAddr: x.c.remote, TLS: x.c.tls, Body: http.NoBody,
	}
	hosts := r.Header["Host"]
	switch {
	case len(hosts) > 1:
		return malformed("more than one Host")
	case len(hosts) == 0 && r.ProtoMinor > 0:
		return malformed("missing Host")
	case len(hosts) == 1 && !httpguts.ValidHostHeader(hosts[0]):
		return malformed("malformed Host")
	}
	if r.Host = u.Host; r.Host == "" && len(hosts) == 1 { // RFC 9112, section 3.2.2
		r.Host = hosts[0]
	}
	delete(r.Header, "Host")
	x.keepAlive10 = r.ProtoMinor == 0 && httpguts.HeaderValuesContainsToken(r.Header["Connection"], "keep-alive")
	x.close = httpguts.HeaderValuesContainsToken(r.Header["Connection"], "close") || r.ProtoMinor == 0 && !x.keepAlive10
	r.Close = x.close
	if err := x.frame(&r); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(x.c.ctx)
	x.ctx, x.cancel = requestContext{ctx, x}, cancel
	x.req = r.WithContext(&x.ctx)
	return nil
}

// parseTarget parses a request target in one of the four forms of RFC 9112,
// section 3.2.
func parseTarget(method, target string) (*url.URL, error) {
	authority := method == http.MethodConnect && target[0] != '/'
	if authority {
		target = "http://" + target
	}
	u, err := url.ParseRequestURI(target)
	if err == nil && authority {
		u.Scheme = ""
	}
	return u, err
}

// frame finds out where the request's body ends.
func (x *exchange) frame(r *http.Request) error {
	codings, coded := r.Header["Transfer-Encoding"]
	lengths := r.Header["Content-Length"]
	switch {
	case coded && r.ProtoMinor == 0:
		return malformed("Transfer-Encoding in HTTP/1.0")
	case coded && len(lengths) > 0:
		return malformed("both Transfer-Encoding and Content-Length")
	case coded && (len(codings) > 1 || !sameToken(codings[0], "chunked")):
		return &refusal{http.StatusNotImplemented, "Transfer-Encoding other than chunked"}
	case len(lengths) > 1:
		return malformed("more than one Content-Length")
	case len(lengths) == 1:
		n, err := parseLength(lengths[0])
		if err != nil {
			return malformed("malformed Content-Length")
		}
		r.ContentLength = n
	case coded:
		delete(r.Header, "Transfer-Encoding")
		r.TransferEncoding = []string{"chunked"}
		r.ContentLength = -1
		var err error
		if r.Trailer, err = announced(r.Header); err != nil {
			return malformed(err.Error())
		}
	}
	return x.expect(r)
}

// expect gives the request its body, and sees to what the client expects first.
func (x *exchange) expect(r *http.Request) error {
	if r.ContentLength != 0 {
		x.body.open(x, r.ContentLength)
		r.Body = &x.body
	}
	switch expected := r.Header["Expect"]; {
	case len(expected) == 0 || len(expected) == 1 && expected[0] == "":
	case !httpguts.HeaderValuesContainsToken(expected, "100-continue"):
		return &refusal{http.StatusExpectationFailed, "Expect other than 100-continue"}
	default:
		x.expected = r.ProtoMinor > 0 && r.ContentLength != 0
		x.goAhead.Store(x.expected)
	}
	return nil
}

func parseLength(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}

// announced takes the Trailer field out of a chunked message's header and
// returns the names in it.
func announced(h http.Header) (http.Header, error) {
	values, ok := h["Trailer"]
	if !ok {
		return nil, nil
	}
	delete(h, "Trailer")
	var names http.Header
	for _, v := range values {
		for name := range strings.SplitSeq(v, ",") {
			name = http.CanonicalHeaderKey(trim(name))
			switch name {
			case "":
				continue
			case "Transfer-Encoding", "Trailer", "Content-Length":
				return nil, errTrailer
			}
			if names == nil {
				names = http.Header{}
			}
			names[name] = nil
		}
	}
	return names, nil
}

var errTrailer = errors.New("field that cannot be in a trailer")

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}
