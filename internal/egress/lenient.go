package egress

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
)

// badResponse says why an answer cannot be passed on.
func badResponse(why string) error { return fmt.Errorf("%w: %s", errBadResponse, why) }

// lineScanner finds the end of a response head as it arrives, looking at each byte
// once. Its lines may end in LF alone: clients take that (RFC 9112 section 2.2).
type lineScanner struct{ line, pos int }

// scan returns the length of the head once its empty line is there, else 0.
func (h *lineScanner) scan(b []byte) int {
	for {
		i := bytes.IndexByte(b[h.pos:], '\n')
		if i < 0 {
			h.pos = len(b)
			return 0
		}
		end := h.pos + i
		h.pos = end + 1
		if end == h.line || end == h.line+1 && b[h.line] == '\r' {
			return h.pos
		}
		h.line = h.pos
	}
}

// parseLeniently reads a head that parse refuses as clients read it: lines that end in
// LF alone, white space before a colon, folded lines, a length beside chunked coding or
// the same one twice. It leaves in s.head what is passed on in its place, in which
// every reader finds the same.
func (s *response) parseLeniently(head []byte) error {
	*s = response{length: -1, fields: s.fields[:0], head: s.head[:0]}
	line, rest := cutLine(head)
	if err := s.parseStatus(line); err != nil {
		return err
	}
	http10 := line[7] == '0'
	for {
		if line, rest = cutLine(rest); len(line) == 0 {
			break
		}
		if err := s.addLine(line); err != nil {
			return err
		}
	}
	if err := s.settleFraming(); err != nil {
		return err
	}
	if err := s.readFields(http10); err != nil {
		return err
	}
	s.head = append(s.head, "HTTP/1."...)
	s.head = append(s.head, head[7], ' ')
	s.head = append(strconv.AppendInt(s.head, int64(s.status), 10), ' ')
	line, _ = cutLine(head)
	for _, c := range bytes.Trim(line[12:], " ") {
		if c >= ' ' && c != 0x7f {
			s.head = append(s.head, c)
		}
	}
	s.head = append(s.head, crlf...)
	for _, f := range s.fields {
		s.head = append(s.head, f.name...)
		s.head = append(s.head, ": "...)
		s.head = append(s.head, f.value...)
		s.head = append(s.head, crlf...)
	}
	s.head = append(s.head, crlf...)
	return nil
}

// cutLine cuts a line and its end off, which scan has found to be there.
func cutLine(b []byte) (line, rest []byte) {
	line, rest, _ = bytes.Cut(b, []byte("\n"))
	return bytes.TrimSuffix(line, []byte("\r")), rest
}

// addLine takes a field line, or the folded rest of the one before.
func (s *response) addLine(line []byte) error {
	for _, c := range line {
		if c < ' ' && c != '\t' || c == 0x7f {
			return badResponse("a header line has a control character")
		}
	}
	if line[0] == ' ' || line[0] == '\t' {
		if len(s.fields) == 0 {
			return badResponse("the first header line is folded")
		}
		f := &s.fields[len(s.fields)-1]
		f.value = append(append(slices.Clone(f.value), ' '), bytes.Trim(line, " \t")...)
		return nil
	}
	name, value, ok := bytes.Cut(line, []byte(":"))
	if name = bytes.TrimRight(name, " \t"); !ok || !isTokens(name) {
		return badResponse("a header line is malformed")
	}
	if s.fields = append(s.fields, field{name, bytes.Trim(value, " \t")}); len(s.fields) > maxFields {
		return badResponse("too many header fields")
	}
	return nil
}

// settleFraming leaves one field that says where the body ends: chunked coding goes
// before a length (RFC 9112 section 6.3), and lengths have to be equal.
func (s *response) settleFraming() error {
	chunked, length := false, []byte(nil)
	for _, f := range s.fields {
		switch {
		case is(f.name, "transfer-encoding") && is(f.value, "chunked"):
			chunked = true
		case is(f.name, "transfer-encoding") && !is(f.value, "identity"):
			return badResponse("Transfer-Encoding is not exactly chunked")
		case is(f.name, "content-length"):
			for v := range bytes.SplitSeq(f.value, []byte(",")) {
				if v = bytes.Trim(v, " \t"); length != nil && !bytes.Equal(v, length) {
					return badResponse("two different lengths")
				}
				length = v
			}
		}
	}
	coded, counted := false, false
	s.fields = slices.DeleteFunc(s.fields, func(f field) bool {
		switch {
		case is(f.name, "transfer-encoding"):
			drop := coded || !is(f.value, "chunked")
			coded = coded || !drop
			return drop
		case is(f.name, "content-length"):
			drop := counted || chunked
			counted = true
			return drop
		}
		return false
	})
	for i := range s.fields {
		if is(s.fields[i].name, "content-length") {
			s.fields[i].value = length
		}
	}
	return nil
}
