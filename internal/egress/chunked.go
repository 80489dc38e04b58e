package egress

// maxTrailers is how many octets the trailer section of a body may have.
const maxTrailers = 8 << 10

// chunkScanner finds the end of a chunked body (RFC 9112 section 7.1) while its
// bytes are passed on as they are. It is strict: sizes are plain hex digits and
// every line ends in CRLF, so that nobody down the line finds another end.
type chunkScanner struct {
	state chunkState
	size  uint64 // of the chunk, then what is left of it
	digit int    // digits of the size seen
	line  []byte // trailer line so far
	total int    // octets of trailers seen
	// padded allows white space after a size, as some servers write.
	padded bool
}

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkPad
	chunkExt
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	chunkTrailer
	chunkTrailerLF
	chunkDone
)

// scan looks at b and returns how many of its bytes belong to the body, and
// whether the body ends with them.
func (s *chunkScanner) scan(b []byte) (n int, done bool, err error) {
	for n < len(b) {
		if s.state == chunkData {
			step := min(uint64(len(b)-n), s.size)
			n += int(step)
			if s.size -= step; s.size == 0 {
				s.state = chunkDataCR
			}
			continue
		}
		if err := s.step(b[n]); err != nil {
			return n, false, err
		}
		n++
		if s.state == chunkDone {
			return n, true, nil
		}
	}
	return n, false, nil
}

var errChunk = badRequest("the chunked body is malformed")

// step takes one byte of framing.
func (s *chunkScanner) step(c byte) error {
	switch s.state {
	case chunkSize, chunkPad, chunkExt:
		return s.sizeLine(c)
	case chunkSizeLF:
		if c != '\n' {
			return errChunk
		}
		s.state = chunkData
		if s.size == 0 {
			s.state = chunkTrailer
		}
		s.digit = 0
	case chunkDataCR:
		if c != '\r' {
			return errChunk
		}
		s.state = chunkDataLF
	case chunkDataLF:
		if c != '\n' {
			return errChunk
		}
		s.state = chunkSize
	default:
		return s.trailer(c)
	}
	return nil
}

// sizeLine takes one byte of "size [;extension] CR".
func (s *chunkScanner) sizeLine(c byte) error {
	switch {
	case c == '\r' && s.digit > 0:
		s.state = chunkSizeLF
	case s.state == chunkExt:
		if c < ' ' && c != '\t' || c == 0x7f {
			return errChunk
		}
		if s.total++; s.total > maxTrailers {
			return errChunk
		}
	case c == ';' && s.digit > 0:
		s.state = chunkExt
	case (c == ' ' || c == '\t') && s.digit > 0 && s.padded:
		s.state = chunkPad
	case s.state == chunkPad:
		return errChunk
	default:
		v, ok := unhex(c)
		if s.digit++; !ok || s.digit > 15 {
			return errChunk
		}
		if s.digit == 1 {
			s.size = 0
		}
		s.size = s.size<<4 | uint64(v)
	}
	return nil
}

// trailer takes one byte of the trailer section. A trailer must not frame or
// route (RFC 9110 section 6.5.1).
func (s *chunkScanner) trailer(c byte) error {
	if s.total++; s.total > maxTrailers {
		return errChunk
	}
	switch {
	case s.state == chunkTrailerLF:
		if c != '\n' {
			return errChunk
		}
		if len(s.line) == 0 {
			s.state = chunkDone
			return nil
		}
		f, err := parseField(s.line)
		if err != nil {
			return err
		}
		if is(f.name, "host") || is(f.name, "content-length") || is(f.name, "transfer-encoding") {
			return badRequest("a trailer that frames or routes the request")
		}
		s.line, s.state = s.line[:0], chunkTrailer
	case c == '\r':
		s.state = chunkTrailerLF
	case c == '\n':
		return errChunk
	default:
		s.line = append(s.line, c)
	}
	return nil
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
