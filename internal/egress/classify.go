package egress

import "golang.org/x/net/http2"

// protocol is what the first bytes of a connection say it speaks, on a port that
// says nothing.
type protocol uint8

const (
	undecided    protocol = iota // more bytes could still make it TLS or HTTP
	showsTLS                     // a TLS record, whatever is wrong with it
	showsHTTP                    // a request line, whatever is wrong with it
	showsHTTP2                   // the first line of the preface of HTTP/2
	showsNothing                 // a protocol in which no name is shown
	showsProxy                   // a preamble of the PROXY protocol: what follows it is hidden
)

// classifier tells protocols apart as bytes arrive, looking at each once. What any
// server might take for HTTP is HTTP, so that it meets the strict parser: the
// lenient ones skip empty lines, split at other white space and take an absolute
// target without a version.
type classifier struct {
	start  int  // of the first line that is not empty
	pos    int  // bytes looked at
	begun  bool // the line has a first word
	method bool // that word has ended
}

// look looks at all bytes so far.
func (c *classifier) look(b []byte) protocol {
	if p := tlsOf(b); p != showsNothing {
		return p
	}
	if p := proxyOf(b); p != showsNothing {
		return p
	}
	for ; c.pos < len(b); c.pos++ {
		switch ch := b[c.pos]; {
		case ch == '\n' && c.begun:
			if string(b[:c.pos+1]) == http2.ClientPreface[:min(c.pos+1, len(http2.ClientPreface))] {
				return showsHTTP2
			}
			return lineOf(b[c.start:c.pos])
		case ch == '\n':
			c.start = c.pos + 1
		case isBlank(ch):
			c.method = c.begun
		case !c.method && !isToken(ch): // no server knows such a method
			return showsNothing
		default:
			c.begun = true
		}
	}
	return undecided
}

// end says what it is when nothing more comes.
func (c *classifier) end(b []byte) protocol { return lineOf(b[c.start:]) }

// tlsOf recognises TLS records and the form of SSL 2 in which a TLS client may
// still say hello (RFC 5246 appendix E.2): OpenSSL takes it, and no name is in it.
// Every type of record counts, though only a handshake can begin TLS: some servers
// skip others and read the hello behind them.
func tlsOf(b []byte) protocol {
	switch {
	case len(b) == 0:
		return undecided
	case b[0] == recordHandshake:
		return showsTLS
	case recordFirst <= b[0] && b[0] <= recordLast:
		return recordOf(b)
	case b[0] < 0x80 || len(b) > 2 && b[2] != msgClientHello || len(b) > 3 && b[3] != 3:
		return showsNothing
	case len(b) < 4:
		return undecided
	}
	return showsTLS
}

// recordOf recognises a record whose type is no handshake by its version. In an
// alert, which has a length of two, crypto/tls takes any version below 0x1000.
func recordOf(b []byte) protocol {
	switch {
	case len(b) < 2:
		return undecided
	case b[1] == 3:
		return showsTLS
	case b[0] != recordAlert || b[1] >= 0x10 || len(b) > 3 && b[3] != 0 || len(b) > 4 && b[4] != 2:
		return showsNothing
	case len(b) < 5:
		return undecided
	}
	return showsTLS
}

// The two preambles of the PROXY protocol
// (https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt sections 2.1 and 2.2).
// Behind one a server reads another protocol, in which a name may be shown.
const (
	proxyV1 = "PROXY "
	proxyV2 = "\r\n\r\n\x00\r\nQUIT\n"
)

func proxyOf(b []byte) protocol {
	for _, preamble := range [...]string{proxyV1, proxyV2} {
		n := min(len(b), len(preamble))
		switch {
		case string(b[:n]) != preamble[:n]:
		case n == len(preamble):
			return showsProxy
		default:
			return undecided
		}
	}
	return showsNothing
}

// lineOf judges a complete line: a request line has a version or an absolute
// target behind its first word.
func lineOf(line []byte) protocol {
	first := true
	for i, c := range line {
		if isBlank(c) || i > 0 && !isBlank(line[i-1]) {
			continue
		}
		for _, start := range [...]string{"http/", "http://", "https://"} {
			if w := line[i:]; !first && len(w) >= len(start) && is(w[:len(start)], start) {
				return showsHTTP
			}
		}
		first = false
	}
	return showsNothing
}

// isBlank reports whether some server splits words at c: RFC 9112 section 3 names
// five, and Python's split knows more.
func isBlank(c byte) bool {
	switch c {
	case ' ', '\t', '\v', '\f', '\r', 0x1c, 0x1d, 0x1e, 0x1f, 0x85, 0xa0:
		return true
	}
	return false
}
