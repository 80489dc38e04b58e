package egress

import (
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Limits of what is read of HTTP/2 (RFC 9113). A header block is held back, with its
// frames, until it is whole.
const (
	maxBlock         = 64 << 10
	maxContinuations = 64
	maxTable         = 64 << 10 // of the decoder: what a client may use of what its server offers
	defaultTable     = 4 << 10  // without an offer (RFC 9113 section 6.5.2)
	frameHeader      = 9
)

// frame is the head of one (RFC 9113 section 4.1).
type frame struct {
	length int
	kind   http2.FrameType
	flags  http2.Flags
	id     uint32 // of the stream, with the reserved bit
}

func frameAt(b []byte) frame {
	return frame{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   http2.FrameType(b[3]),
		flags:  http2.Flags(b[4]),
		id:     uint32(b[5])<<24 | uint32(b[6])<<16 | uint32(b[7])<<8 | uint32(b[8]),
	}
}

// requestScanner finds the requests in what a client of HTTP/2 sends, as it arrives.
// It keeps the dynamic table of the header compression and the highest stream, nothing
// of a single stream: a header block on a higher one begins a request, any other ends
// one with trailers.
type requestScanner struct {
	judge  func(*call) error       // is asked about each request before its block may pass
	resize func(table uint32) bool // takes memory for a larger table

	begun bool   // the preface is through
	rest  int    // octets of a frame's payload that are still to come
	top   uint32 // the highest stream so far
	large bool   // resize was asked
	dec   *hpack.Decoder
	call  call // the one being read
}

// scan returns how many octets of b, from its beginning, may be passed on: no part of a
// header block before it is whole and was judged. The caller shows the others again
// with more behind them. After an error nothing further may pass.
func (s *requestScanner) scan(b []byte) (n int, err error) {
	if !s.begun {
		switch k := min(len(b), len(http2.ClientPreface)); {
		case string(b[:k]) != http2.ClientPreface[:k]:
			return 0, badRequest("the preface of HTTP/2 is malformed")
		case k < len(http2.ClientPreface):
			return 0, nil
		}
		s.begun, n = true, len(http2.ClientPreface)
	}
	for {
		k := min(s.rest, len(b)-n)
		n += k
		s.rest -= k
		if s.rest > 0 || len(b)-n < frameHeader {
			return n, nil
		}
		switch h := frameAt(b[n:]); {
		case h.id>>31 != 0:
			return n, badRequest("a frame of HTTP/2 with the reserved bit set")
		case h.kind == http2.FrameContinuation:
			return n, badRequest("a CONTINUATION without a header block to continue")
		case h.kind == http2.FramePushPromise:
			return n, badRequest("a PUSH_PROMISE of a client")
		case h.kind == http2.FrameHeaders:
			size, err := s.block(b[n:])
			if size == 0 || err != nil {
				return n, err
			}
			n += size
			s.call = call{}
		default:
			n += frameHeader
			s.rest = h.length
		}
	}
}

// block reads the header block that b begins with and has it judged. It returns its
// size with all its frames, or 0 while it is not whole.
func (s *requestScanner) block(b []byte) (int, error) {
	size, err := blockSize(b)
	if size == 0 || err != nil {
		return 0, err
	}
	first := frameAt(b)
	if first.id%2 == 0 {
		return 0, badRequest("a request on a stream that is not the client's")
	}
	s.call = call{id: first.id}
	if s.dec == nil {
		s.dec = hpack.NewDecoder(defaultTable, nil)
		s.dec.SetAllowedMaxDynamicTableSize(maxTable)
		s.dec.SetMaxStringLength(maxBlock)
	}
	s.dec.SetEmitFunc(s.call.add)
	begun := false
	for rest := b[:size]; len(rest) > 0; {
		h := frameAt(rest)
		fragment := rest[frameHeader : frameHeader+h.length]
		rest = rest[frameHeader+h.length:]
		if h.kind == http2.FrameHeaders {
			if fragment, err = unpadded(fragment, h.flags); err != nil {
				return 0, err
			}
		}
		if !begun && len(fragment) > 0 {
			begun = true
			if err := s.makeRoom(fragment[0]); err != nil {
				return 0, err
			}
		}
		if _, err := s.dec.Write(fragment); err != nil {
			return 0, errCompression
		}
	}
	if s.dec.Close() != nil {
		return 0, errCompression
	}
	if err := s.finish(); err != nil {
		return 0, err
	}
	return size, nil
}

var errCompression = badRequest("the header compression of HTTP/2 is malformed")

// makeRoom takes memory for a larger table if the block changes its size, with which it
// begins then (RFC 7541 section 4.2).
func (s *requestScanner) makeRoom(first byte) error {
	if first&0xe0 != 0x20 || s.large {
		return nil
	}
	if !s.resize(maxTable) {
		return sniffFailed(errCharge, nil)
	}
	s.large = true
	return nil
}

// finish judges the block that was read.
func (s *requestScanner) finish() error {
	c := &s.call
	trailers := c.id <= s.top
	switch {
	case c.wrong != "":
		return badRequest(c.wrong)
	case trailers && (c.shown != 0 || c.host != nil):
		c.shown = 0 // there is nothing to answer
		return badRequest("trailers that name a destination")
	case trailers:
		return nil
	}
	s.top = c.id
	if err := c.check(); err != nil {
		return err
	}
	return s.judge(c)
}

// blockSize returns the size of the header block that b begins with, 0 while it is not
// whole. Nothing may stand between its frames (RFC 9113 section 4.3).
func blockSize(b []byte) (int, error) {
	size, first := 0, frameAt(b)
	for count := 0; ; count++ {
		if len(b)-size < frameHeader {
			return 0, nil
		}
		h := frameAt(b[size:])
		size += frameHeader + h.length
		switch {
		case count > 0 && (h.kind != http2.FrameContinuation || h.id != first.id):
			return 0, badRequest("another frame inside a header block")
		case size > maxBlock || count > maxContinuations:
			return 0, &sniffError{ReasonSniffTooBig, "a header block beyond the cap"}
		case size > len(b):
			return 0, nil
		case h.flags.Has(http2.FlagHeadersEndHeaders): // the same of a CONTINUATION
			return size, nil
		}
	}
}

// unpadded takes the padding and the priority from a HEADERS frame (RFC 9113 section 6.2).
func unpadded(b []byte, flags http2.Flags) ([]byte, error) {
	padding, priority := 0, 0
	if flags.Has(http2.FlagHeadersPadded) {
		if len(b) == 0 {
			return nil, errPadding
		}
		padding, b = int(b[0]), b[1:]
	}
	if flags.Has(http2.FlagHeadersPriority) {
		priority = 5
	}
	if padding+priority > len(b) {
		return nil, errPadding
	}
	return b[priority : len(b)-padding], nil
}

var errPadding = badRequest("a HEADERS frame is shorter than its padding")

// call is the head of one request of HTTP/2.
type call struct {
	id        uint32
	shown     shown // the pseudo-header fields that were there
	method    string
	path      string
	authority string
	host      *string
	grpc      bool
	json      bool
	length    bool // Content-Length was there
	fields    int
	size      int    // of the names and values
	regular   bool   // a field that is no pseudo-header field came
	wrong     string // the first thing that is
}

// shown is a set of pseudo-header fields.
type shown uint8

const (
	showsMethod shown = 1 << iota
	showsScheme
	showsAuthority
	showsPath
	showsAll = showsMethod | showsScheme | showsAuthority | showsPath
)

// add takes one field of the block.
func (c *call) add(f hpack.HeaderField) {
	if c.wrong == "" {
		c.wrong = c.take(f)
	}
}

// take reads what routing depends on, and refuses what another reader, or HTTP/1 behind
// it, might read differently (RFC 9113 section 8.2). It returns what is wrong.
func (c *call) take(f hpack.HeaderField) string { //nolint:gocyclo // one header field after the other
	c.fields++
	c.size += len(f.Name) + len(f.Value)
	if c.fields > maxFields || c.size > maxBlock { // the table makes much of few octets
		return "too many header fields"
	}
	for i := range len(f.Value) {
		if ch := f.Value[i]; ch < ' ' && ch != '\t' || ch == 0x7f {
			return "a header value has a control character"
		}
	}
	if strings.HasPrefix(f.Name, ":") {
		return c.takePseudo(f)
	}
	c.regular = true
	for i := range len(f.Name) {
		if ch := f.Name[i]; !isToken(ch) || 'A' <= ch && ch <= 'Z' {
			return "a header name that HTTP/2 does not have"
		}
	}
	switch f.Name {
	case "":
		return "a header without a name"
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings":
		return "a header of HTTP/1 connections in HTTP/2"
	case "host":
		if c.host != nil {
			return "more than one Host"
		}
		c.host = &f.Value
	case "te":
		if f.Value != "trailers" {
			return "TE is not trailers"
		}
	case "content-length":
		if _, err := parseLength([]byte(f.Value)); err != nil || f.Value == "" || c.length {
			return "Content-Length is no number, or is there twice"
		}
		c.length = true
	case "content-type":
		c.grpc = strings.HasPrefix(f.Value, "application/grpc")
	case "accept":
		c.json = c.json || contains([]byte(f.Value), "json")
	}
	return ""
}

func (c *call) takePseudo(f hpack.HeaderField) string {
	var bit shown
	switch f.Name {
	case ":method":
		bit, c.method = showsMethod, f.Value
	case ":scheme":
		bit = showsScheme
	case ":authority":
		bit, c.authority = showsAuthority, f.Value
	case ":path":
		bit, c.path = showsPath, f.Value
	case ":protocol":
		return "CONNECT is not passed on"
	default:
		return "a pseudo-header field that requests do not have"
	}
	switch {
	case c.shown&bit != 0:
		return f.Name + " is there twice"
	case c.regular:
		return "a pseudo-header field behind others"
	case bit == showsScheme && f.Value != "http" && f.Value != "https":
		return "a scheme other than http and https"
	}
	c.shown |= bit
	return ""
}

// check refuses a head that is not one of a request to :authority.
func (c *call) check() error {
	switch {
	case c.method == "CONNECT":
		return badRequest("CONNECT is not passed on")
	case c.shown&showsAuthority == 0 || c.authority == "":
		return badRequest("HTTP/2 without :authority")
	case c.shown != showsAll:
		return badRequest("a pseudo-header field is missing")
	case !isTokens([]byte(c.method)):
		return badRequest("the method is malformed")
	case c.path == "*" && c.method == "OPTIONS":
	case !strings.HasPrefix(c.path, "/"): // an absolute URL names a destination
		return badRequest("the path does not begin with /")
	}
	if strings.ContainsAny(c.path, " \t") {
		return badRequest("the path has a blank")
	}
	return nil
}

// name returns the name that the request shows, empty for an address, as HTTP/1
// requests to the port have it.
func (c *call) name(at uint16) (string, error) {
	for i := range len(c.authority) {
		if c.authority[i] >= 0x80 { // it is passed on as it is
			return "", &sniffError{ReasonBadName, ":authority is not in ASCII"}
		}
	}
	name, port, err := parseHost(c.authority, at)
	if err != nil {
		return "", err
	}
	if port != at {
		return "", &sniffError{ReasonPortMismatch, ":authority names another port than the one connected to"}
	}
	if c.host == nil {
		return name, nil
	}
	host, port, err := parseHost(*c.host, at)
	if err != nil || host != name || port != at || name == "" && !strings.EqualFold(*c.host, c.authority) {
		return "", badRequest("Host is not the :authority")
	}
	return name, nil
}

// what is one line for the flow log.
func (c *call) what() string {
	path, _, _ := strings.Cut(c.path, "?")
	return c.method + " " + printable(path[:min(len(path), 200)])
}

// answerScanner follows the frames a server sends, so that one can be put between two.
type answerScanner struct {
	head  [frameHeader]byte
	have  int  // octets of head
	rest  int  // octets of the payload that are still to come
	block bool // inside a header block
}

// between reports whether a frame may be put where the octets so far end.
func (s *answerScanner) between() bool { return s.have == 0 && s.rest == 0 && !s.block }

// scan looks at b and returns its length, or with stop set how much of it ends what
// has begun.
func (s *answerScanner) scan(b []byte, stop bool) (n int) {
	for n < len(b) && (!stop || !s.between()) {
		if s.rest > 0 {
			k := min(s.rest, len(b)-n)
			s.rest -= k
			n += k
			continue
		}
		k := copy(s.head[s.have:], b[n:])
		n += k
		if s.have += k; s.have < frameHeader {
			break
		}
		h := frameAt(s.head[:])
		s.have, s.rest = 0, h.length
		switch h.kind {
		case http2.FrameHeaders, http2.FramePushPromise, http2.FrameContinuation:
			s.block = !h.flags.Has(http2.FlagHeadersEndHeaders)
		}
	}
	return n
}
