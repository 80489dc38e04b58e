package egress

import (
	"bytes"
	"errors"
)

// errBadResponse says that the upstream does not speak HTTP/1 as it should.
var errBadResponse = errors.New("the upstream's answer is no well-formed HTTP/1 response")

// response is what must be known of a response head to find its end.
type response struct {
	status  int
	length  int64 // of the body; -1: until the connection ends, unless chunked or bodyless
	chunked bool
	close   bool // the upstream closes after it
	fields  []field
	head    []byte // written anew, where the one that came has another form
}

// parse reads a complete response head.
func (s *response) parse(head []byte) error {
	*s = response{length: -1, fields: s.fields[:0], head: s.head[:0]}
	line, rest, _ := bytes.Cut(head, crlf)
	err := s.parseStatus(line)
	if err != nil {
		return err
	}
	if bytes.IndexByte(line, '\n') >= 0 { // the line ends before, for a lenient reader
		return badResponse("a line ends without CR")
	}
	if s.fields, err = parseFields(s.fields, rest); err != nil {
		return errors.Join(errBadResponse, err)
	}
	return s.readFields(line[7] == '0')
}

// parseStatus reads "HTTP/1.1 200 OK"; the phrase and its space may be missing.
func (s *response) parseStatus(line []byte) error {
	if len(line) < len("HTTP/1.1 200") || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[7] < '0' || line[7] > '9' || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return badResponse("the status line is malformed")
	}
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return badResponse("the status line is malformed")
		}
		s.status = s.status*10 + int(c-'0')
	}
	if s.status < 100 {
		return badResponse("the status is below 100")
	}
	return nil
}

func (s *response) readFields(http10 bool) error {
	closes, keeps := false, false
	for _, f := range s.fields {
		switch {
		case is(f.name, "content-length"):
			n, err := parseLength(f.value)
			if err != nil || s.length >= 0 {
				return badResponse("Content-Length is no number, or there twice")
			}
			s.length = n
		case is(f.name, "transfer-encoding"):
			if s.chunked || !is(f.value, "chunked") {
				return badResponse("Transfer-Encoding is not exactly chunked")
			}
			s.chunked = true
		case is(f.name, "connection"):
			for option := range bytes.SplitSeq(f.value, []byte(",")) {
				option = bytes.Trim(option, " \t")
				closes = closes || is(option, "close")
				keeps = keeps || is(option, "keep-alive")
			}
		}
	}
	if s.chunked && s.length >= 0 {
		return badResponse("Content-Length and Transfer-Encoding") // RFC 9112 section 6.3: it may be smuggling
	}
	// Chunked coding in HTTP/1.0 ends with the connection for some clients.
	s.close = closes || http10 && (!keeps || s.chunked)
	return nil
}

// bodyless reports whether no body follows, whatever the fields say (RFC 9112
// section 6.3); head: it answers a HEAD request.
func (s *response) bodyless(head bool) bool {
	return head || s.status < 200 || s.status == 204 || s.status == 304
}
