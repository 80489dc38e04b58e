package egress

import (
	"bytes"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/cordonhq/cordon/internal/policy"
)

// Sizes of HTTP/1 heads. The cap on a response's head is only about memory.
const (
	maxRequestHead  = 32 << 10
	maxResponseHead = 64 << 10
	maxFields       = 256
	maxMethod       = 32 // octets before a space makes a line a request line
)

// field is one header field as it stood on the wire, without the white space
// around the value. Both alias the head they were parsed from.
type field struct{ name, value []byte }

// headScanner finds the end of a head as it arrives, looking at each byte once.
type headScanner struct{ line, pos int }

// scan returns the length of the head once its empty line is there, else 0. It
// refuses a bare LF at once: a reader that takes it for a line end sees another head.
func (h *headScanner) scan(b []byte) (int, error) {
	for {
		i := bytes.IndexByte(b[h.pos:], '\n')
		if i < 0 {
			h.pos = len(b)
			return 0, nil
		}
		end := h.pos + i
		if end == 0 || b[end-1] != '\r' {
			return 0, badRequest("a line ends without CR")
		}
		h.pos = end + 1
		if end-1 == h.line {
			return h.pos, nil
		}
		h.line = h.pos
	}
}

// request is a parsed request head. Its slices alias the head.
type request struct {
	method  []byte
	target  []byte // origin form or "*"
	minor   byte   // of HTTP/1
	fields  []field
	host    string // Host as it stood; empty when there is none
	name    string // canonical; empty when host shows none
	port    uint16 // from Host, or the one connected to when it names none
	length  int64  // of the body; 0 when chunked
	chunked bool
	close   bool // the client wants the connection closed
	upgrade bool // it offers one that may pass
	expect  bool // 100-continue
	json    bool // Accept names a JSON type
}

// parse reads a complete head, including its empty line (RFC 9112). It refuses
// everything that another parser might read differently. at is the port it was
// sent to, which is meant where no port is named.
func (q *request) parse(head []byte, at uint16) error {
	*q = request{fields: q.fields[:0], port: at}
	line, rest, _ := bytes.Cut(head, crlf)
	authority, err := q.parseLine(line)
	if err != nil {
		return err
	}
	if q.fields, err = parseFields(q.fields, rest); err != nil {
		return err
	}
	hosts, err := q.readFields()
	if err != nil {
		return err
	}
	return q.readHost(hosts, authority)
}

var crlf = []byte("\r\n")

// parseLine reads "METHOD target HTTP/1.x" and returns the authority of an
// absolute-form target.
func (q *request) parseLine(line []byte) (authority []byte, err error) {
	method, rest, ok := bytes.Cut(line, []byte(" "))
	target, version, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok || !ok2 || !isTokens(method) || len(target) == 0 {
		return nil, badRequest("the request line is malformed")
	}
	switch string(version) {
	case "HTTP/1.1":
		q.minor = 1
	case "HTTP/1.0":
	default:
		return nil, badRequest("the version is neither HTTP/1.1 nor HTTP/1.0")
	}
	for _, c := range target {
		if c <= ' ' || c == 0x7f {
			return nil, badRequest("the target has a control character")
		}
	}
	q.method, q.target = method, target
	switch {
	case string(method) == "CONNECT":
		return nil, badRequest("CONNECT is not passed on")
	case string(method) == "PRI":
		return nil, badRequest("HTTP/2 with prior knowledge is not passed on")
	case target[0] == '/', string(target) == "*" && string(method) == "OPTIONS":
		return nil, nil
	}
	return q.absolute(target)
}

// absolute turns an absolute-form target (RFC 9112 section 3.2.2) into origin
// form and returns its authority.
func (q *request) absolute(target []byte) ([]byte, error) {
	const scheme = "http://"
	if len(target) < len(scheme) || !strings.EqualFold(string(target[:len(scheme)]), scheme) {
		return nil, badRequest("the target is neither a path nor an http URL")
	}
	rest := target[len(scheme):]
	end := bytes.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	authority, path := rest[:end], rest[end:]
	switch {
	case len(authority) == 0:
		return nil, badRequest("the target has no authority")
	case len(path) == 0 && string(q.method) == "OPTIONS":
		q.target = []byte("*")
	case len(path) == 0:
		q.target = []byte("/")
	case path[0] != '/':
		q.target = append([]byte("/"), path...)
	default:
		q.target = path
	}
	return authority, nil
}

// parseFields appends the field lines of b, which ends with the empty line.
func parseFields(out []field, b []byte) ([]field, error) {
	for {
		line, rest, ok := bytes.Cut(b, crlf)
		if !ok {
			return nil, badRequest("the head has no end")
		}
		if len(line) == 0 {
			return out, nil
		}
		f, err := parseField(line)
		if err != nil {
			return nil, err
		}
		if out = append(out, f); len(out) > maxFields {
			return nil, badRequest("too many header fields")
		}
		b = rest
	}
}

// parseField reads one field line (RFC 9112 section 5). Folded lines and white
// space before the colon fail as no token.
func parseField(line []byte) (field, error) {
	name, value, ok := bytes.Cut(line, []byte(":"))
	if !ok || !isTokens(name) {
		return field{}, badRequest("a header line is malformed")
	}
	for _, c := range value {
		if c < ' ' && c != '\t' || c == 0x7f {
			return field{}, badRequest("a header value has a control character")
		}
	}
	return field{name, bytes.Trim(value, " \t")}, nil
}

// readFields takes from the fields what framing and routing depend on.
func (q *request) readFields() (hosts [][]byte, err error) { //nolint:gocyclo // one header field after the other
	lengths, codings, offers := 0, 0, false
	for _, f := range q.fields {
		switch {
		case is(f.name, "host"):
			hosts = append(hosts, f.value)
		case is(f.name, "content-length"):
			lengths++
			if q.length, err = parseLength(f.value); err != nil {
				return nil, err
			}
		case is(f.name, "transfer-encoding"):
			codings++
			if !is(f.value, "chunked") {
				return nil, badRequest("Transfer-Encoding is not exactly chunked")
			}
			q.chunked = true
		case is(f.name, "connection"):
			if err = q.readConnection(f.value); err != nil {
				return nil, err
			}
		case is(f.name, "upgrade"), is(f.name, "http2-settings"):
			offers = true
		case is(f.name, "accept"):
			q.json = q.json || contains(f.value, "json")
		case is(f.name, "expect"):
			if !is(f.value, "100-continue") {
				return nil, badRequest("an unknown expectation")
			}
			q.expect = true
		}
	}
	switch {
	case lengths > 1:
		return nil, badRequest("more than one Content-Length")
	case codings > 1:
		return nil, badRequest("more than one Transfer-Encoding")
	case lengths > 0 && codings > 0:
		return nil, badRequest("Content-Length and Transfer-Encoding")
	case codings > 0 && q.minor == 0:
		return nil, badRequest("Transfer-Encoding in HTTP/1.0")
	case offers:
		err = q.settleOffers()
	}
	return hosts, err
}

// readConnection reads the options of a Connection field. An option that names
// a field tells the next hop to drop that field: not those that frame and route.
func (q *request) readConnection(value []byte) error {
	for option := range bytes.SplitSeq(value, []byte(",")) {
		option = bytes.Trim(option, " \t")
		switch {
		case is(option, "close"):
			q.close = true
		case is(option, "host"), is(option, "content-length"), is(option, "transfer-encoding"):
			return badRequest("Connection names a field that frames or routes the request")
		}
	}
	return nil
}

// parseLength reads a Content-Length: digits only, no list, no sign.
func parseLength(v []byte) (int64, error) {
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, badRequest("Content-Length is no number")
		}
	}
	n, err := strconv.ParseInt(string(v), 10, 64)
	if err != nil {
		return 0, badRequest("Content-Length is no number")
	}
	return n, nil
}

// readHost finds the one name and port that the request shows.
func (q *request) readHost(hosts [][]byte, authority []byte) error {
	at := q.port
	switch {
	case len(hosts) > 1:
		return badRequest("more than one Host")
	case len(hosts) == 0 && q.minor == 1:
		return badRequest("HTTP/1.1 without Host")
	case len(hosts) == 0:
		return nil
	}
	var err error
	q.host = string(hosts[0])
	if q.name, q.port, err = parseHost(q.host, q.port); err != nil {
		return err
	}
	if q.name != "" {
		q.rewriteHost()
	}
	if authority == nil {
		return nil
	}
	name, port, err := parseHost(string(authority), at)
	if err != nil {
		return err
	}
	if name != q.name || port != q.port || name == "" && !strings.EqualFold(string(authority), q.host) {
		return badRequest("the target's authority is not the Host")
	}
	return nil
}

// rewriteHost writes Host in A-labels where it is in another script, so that the next
// reader finds the name that was judged.
func (q *request) rewriteHost() {
	for i := range len(q.host) {
		if q.host[i] < utf8.RuneSelf {
			continue
		}
		for j := range q.fields {
			if is(q.fields[j].name, "host") {
				q.fields[j].value = append([]byte(q.name), q.host[len(q.host)-portLen(q.host):]...)
			}
		}
		return
	}
}

// portLen is the length of the port in "name:port", with the colon.
func portLen(host string) int {
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		return len(host) - i
	}
	return 0
}

// parseHost splits "name[:port]". An address literal, or nothing, is no name;
// what is neither name nor address is refused. The port is at if none is given.
func parseHost(s string, at uint16) (name string, port uint16, err error) {
	port = at
	host := s
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.HasSuffix(s, "]") {
		n, err := strconv.ParseUint(s[i+1:], 10, 16)
		if err != nil || n == 0 || s[i+1] < '0' || s[i+1] > '9' {
			return "", 0, &sniffError{ReasonBadName, "the port in Host is malformed"}
		}
		host, port = s[:i], uint16(n)
	}
	if host == "" && s == "" {
		return "", port, nil
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		if a, err := netip.ParseAddr(inner); !ok || err != nil || !a.Is6() || a.Zone() != "" {
			return "", 0, &sniffError{ReasonBadName, "the brackets in Host hold no IPv6 address"}
		}
		return "", port, nil
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
		return "", port, nil
	}
	name, ok := policy.CanonicalHost(host)
	if !ok {
		return "", 0, &sniffError{ReasonBadName, "Host is no domain name"}
	}
	return name, port, nil
}

// hasBody reports whether a body follows the head.
func (q *request) hasBody() bool { return q.chunked || q.length > 0 }

// appendTo writes the head as this proxy reads it: one space between the parts
// of the request line, one after each colon, no other line ends than CRLF.
func (q *request) appendTo(b []byte) []byte {
	b = append(b, q.method...)
	b = append(b, ' ')
	b = append(b, q.target...)
	b = append(b, " HTTP/1."...)
	b = append(b, '0'+q.minor)
	b = append(b, crlf...)
	for _, f := range q.fields {
		b = append(b, f.name...)
		b = append(b, ": "...)
		b = append(b, f.value...)
		b = append(b, crlf...)
	}
	return append(b, crlf...)
}

// what is one line for the flow log: the method and the path, without the
// query, which may hold secrets.
func (q *request) what() string {
	path, _, _ := bytes.Cut(q.target, []byte("?"))
	if len(path) > 200 {
		path = path[:200]
	}
	return string(q.method) + " " + printable(string(path))
}

// is compares ASCII without case; want is lower case.
func is(b []byte, want string) bool {
	if len(b) != len(want) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != want[i] {
			return false
		}
	}
	return true
}

// contains is is for a part of b.
func contains(b []byte, want string) bool {
	for i := range len(b) - len(want) + 1 {
		if is(b[i:i+len(want)], want) {
			return true
		}
	}
	return false
}

func isTokens(b []byte) bool {
	for _, c := range b {
		if !isToken(c) {
			return false
		}
	}
	return len(b) > 0
}

// isToken reports whether c may stand in a token (RFC 9110 section 5.6.2).
func isToken(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	return strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// looksLikeHTTP reports whether b may be the beginning of a request: a method
// and a space. What does not is another protocol, not a malformed request.
func looksLikeHTTP(b []byte) bool {
	for i, c := range b {
		switch {
		case c == ' ':
			return i > 0
		case !isToken(c) || i >= maxMethod:
			return false
		}
	}
	return true
}
