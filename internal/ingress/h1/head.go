package h1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// errTooLong: a head or trailer has more octets than it may.
var errTooLong = errors.New("header too long")

// readHead takes a head, its empty line included, from br. Whenever it is not
// all there, waiting is called with what is, before more is awaited; its error
// ends the reading. At the end of input it returns io.EOF if nothing came at all.
func readHead(br *bufio.Reader, limit int, waiting func(begun []byte) error) (string, error) {
	seen := 0
	for {
		b, _ := br.Peek(br.Buffered()) // never more than is there: no error
		if n := endOfHead(b, max(0, seen-2)); n > limit || n < 0 && len(b) > limit {
			return "", errTooLong
		} else if n > 0 {
			head := string(b[:n])
			br.Discard(n) //nolint:errcheck // it is there
			return head, nil
		}
		if err := waiting(b); err != nil {
			return "", err
		}
		seen = len(b)
		if seen == br.Size() {
			long, err := readLines(br, limit)
			return string(long), err
		}
		if _, err := br.Peek(seen + 1); err != nil {
			if errors.Is(err, io.EOF) && seen > 0 {
				err = io.ErrUnexpectedEOF
			}
			return "", err
		}
	}
}

// endOfHead returns how long the head is that b begins with, -1 when b has no
// empty line from offset from on. A line ends with CRLF or LF (RFC 9112, section 2.2).
func endOfHead(b []byte, from int) int {
	for i := from; ; {
		j := bytes.IndexByte(b[i:], '\n')
		if j < 0 {
			return -1
		}
		i += j + 1
		switch next := b[i:]; {
		case len(next) > 0 && next[0] == '\n':
			return i + 1
		case len(next) > 1 && next[0] == '\r' && next[1] == '\n':
			return i + 2
		}
	}
}

// readLines takes lines from br up to an empty one, which it includes.
func readLines(br *bufio.Reader, limit int) ([]byte, error) {
	var lines []byte
	start := 0 // of the last line
	for {
		piece, err := br.ReadSlice('\n')
		lines = append(lines, piece...)
		switch {
		case len(lines) > limit:
			return nil, errTooLong
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		}
		if last := lines[start:]; len(last) == 1 || len(last) == 2 && last[0] == '\r' {
			return lines, nil
		}
		start = len(lines)
	}
}

// cutLine cuts the first line off s, without its end.
func cutLine(s string) (line, rest string) {
	line, rest, _ = strings.Cut(s, "\n")
	return strings.TrimSuffix(line, "\r"), rest
}

// folding is whether a field's value may go on in the next line.
type folding bool

// What clients and services may do; RFC 9112, section 5.2 lets a proxy choose.
const (
	refuseFolds folding = false
	unfold      folding = true
)

var (
	errName  = errors.New("malformed field name")
	errValue = errors.New("malformed field value")
	errFold  = errors.New("folded field")
	errColon = errors.New("field without a colon")
)

// maxFields is how many lines a header or trailer may have. A field of three octets
// takes some hundred of ours, for as long as the message's body does.
const maxFields = 1000

// parseFields parses the lines of a header or trailer.
func parseFields(lines string, folds folding) ([]Field, error) {
	n := max(0, strings.Count(lines, "\n")-1)
	if n > maxFields {
		return nil, errTooLong
	}
	fields := make([]Field, 0, n)
	for {
		var line string
		if line, lines = cutLine(lines); line == "" {
			return fields, nil
		}
		name, value, ok := strings.Cut(line, ":")
		switch {
		case isSpace(line[0]):
			return nil, errFold // of nothing: those of a field are taken with it
		case !ok:
			return nil, errColon
		}
		if lines != "" && isSpace(lines[0]) {
			if folds == refuseFolds {
				return nil, errFold
			}
			value, lines = unfolded(value, lines)
		}
		if value = trim(value); !httpguts.ValidHeaderFieldValue(value) {
			return nil, errValue
		}
		switch {
		case httpguts.ValidHeaderFieldName(name):
			fields = append(fields, Field{name, value})
		case folds == unfold && httpguts.ValidHeaderFieldName(strings.ReplaceAll(name, " ", "")) && !framing(trim(name)):
			// Services have been seen to do it. Nobody would agree on what the
			// name is, so the field goes no further.
		default:
			return nil, errName
		}
	}
}

// unfolded takes the lines that continue value; each fold is one space.
func unfolded(value, lines string) (string, string) {
	var b strings.Builder
	b.WriteString(trim(value))
	for lines != "" && isSpace(lines[0]) {
		var more string
		more, lines = cutLine(lines)
		b.WriteByte(' ')
		b.WriteString(trim(more))
	}
	return b.String(), lines
}

// framing reports the fields that say where a body ends.
func framing(name string) bool {
	return strings.EqualFold(name, "Content-Length") || strings.EqualFold(name, "Transfer-Encoding")
}

// headerOf returns fields as a map with canonical names.
func headerOf(fields []Field) http.Header {
	h := make(http.Header, len(fields))
	values := make([]string, len(fields)) // one allocation for the slices of all
	for i, f := range fields {
		name := http.CanonicalHeaderKey(f.Name)
		if before, ok := h[name]; ok {
			h[name] = append(before, f.Value)
			continue
		}
		values[i] = f.Value
		h[name] = values[i : i+1 : i+1]
	}
	return h
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' }

func trim(s string) string { return strings.Trim(s, " \t") }

// sameToken compares without regard to case, of ASCII only: Unicode's folding makes
// "chunked" of what begins with "chun" and U+212A, and who reads after us does not.
func sameToken(s, t string) bool {
	return len(s) == len(t) && strings.EqualFold(s, t) // every other letter that folds to an ASCII one is longer
}
