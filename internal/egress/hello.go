package egress

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/cordonhq/cordon/internal/policy"
)

// Sizes of a ClientHello. The raw cap leaves room for the headers of records
// that hold a few bytes each.
const (
	maxHello    = 64 << 10
	maxHelloRaw = 128 << 10
	maxRecord   = 1 << 14 // RFC 8446 section 5.1
)

const (
	recordFirst       = 20 // change_cipher_spec: types run from here, RFC 8446 section 5.1
	recordAlert       = 21
	recordHandshake   = 22
	recordLast        = 24 // heartbeat, RFC 6520 section 3
	msgClientHello    = 1  // RFC 8446 section 4
	extServerName     = 0  // RFC 6066 section 3
	nameTypeHostName  = 0  // RFC 6066 section 3
	maxExtensionCount = 512
)

// helloReader reassembles the first handshake message from TLS records as they
// arrive, looking at each byte once.
type helloReader struct {
	next int    // offset of the next record in the raw bytes
	msg  []byte // the handshake message so far, with its header
}

// feed looks at all raw bytes read so far and reports whether the message is complete.
func (h *helloReader) feed(raw []byte) (done bool, err error) {
	for {
		rec := raw[h.next:]
		if len(rec) > 0 && rec[0] != recordHandshake {
			return false, badHello("a record before the end of the ClientHello is no handshake record")
		}
		if len(rec) < 5 {
			return false, nil
		}
		size := int(rec[3])<<8 | int(rec[4])
		if rec[1] != 3 || size == 0 || size > maxRecord {
			return false, badHello("a record header is malformed")
		}
		if len(rec) < 5+size {
			return false, nil
		}
		h.next += 5 + size
		if done, err = h.add(rec[5 : 5+size]); done || err != nil {
			return done, err
		}
	}
}

// add appends the payload of a record.
func (h *helloReader) add(payload []byte) (done bool, err error) {
	msg := payload // one record is the rule: no copy then
	if h.msg != nil {
		msg = append(h.msg, payload...)
	}
	if msg[0] != msgClientHello {
		return false, badHello("the first message is no ClientHello")
	}
	want := 4
	if len(msg) >= 4 {
		want += int(msg[1])<<16 | int(msg[2])<<8 | int(msg[3])
	}
	switch {
	case want > maxHello:
		return false, &sniffError{ReasonSniffTooBig, "the ClientHello is larger than 64 KiB"}
	case len(msg) >= 4 && len(msg) > want:
		return false, badHello("bytes follow the ClientHello in its record")
	}
	if done = len(msg) >= 4 && len(msg) == want; !done && h.msg == nil {
		msg = slices.Clone(msg) // the buffer it lies in may move
	}
	h.msg = msg
	return done, nil
}

// readHello reads a ClientHello and leaves it pending in s, with size bytes. The
// name is canonical, or empty when the hello shows none.
func readHello(s *source) (name string, size int, err error) {
	var h helloReader
	for {
		done, err := h.feed(s.pending())
		if err != nil {
			return "", 0, err
		}
		if done {
			break
		}
		if err := s.fill(maxHelloRaw); err != nil {
			return "", 0, sniffFailed(err, badHello("the connection ended inside the ClientHello"))
		}
	}
	shown, err := parseHello(h.msg[4:])
	if err != nil || shown == "" {
		return "", h.next, err
	}
	name, err = nameShown(shown)
	return name, h.next, err
}

// nameShown turns a server_name into the canonical name it must be.
func nameShown(shown string) (string, error) {
	if _, err := netip.ParseAddr(strings.Trim(shown, "[]")); err == nil {
		return "", badHello("server_name is an IP address") // RFC 6066 section 3 forbids it
	}
	name, ok := policy.CanonicalName(shown)
	if !ok {
		return "", &sniffError{ReasonBadName, "server_name is no domain name"}
	}
	return name, nil
}

// parseHello finds the one server_name in the body of a ClientHello (RFC 8446
// section 4.1.2). It returns "" when the extension is missing and refuses
// whatever two readers could understand in two ways.
func parseHello(b []byte) (serverName string, err error) {
	p := parser{b: b}
	p.skip(2 + 32) // legacy_version, random
	p.vector8()    // legacy_session_id
	p.vector16()   // cipher_suites
	p.vector8()    // legacy_compression_methods
	if p.bad || len(p.b) == 0 {
		return "", p.err("the ClientHello is cut short")
	}
	exts := parser{b: p.vector16()}
	if p.bad || len(p.b) > 0 {
		return "", badHello("the extensions do not end where the ClientHello does")
	}
	var seen []uint16
	for len(exts.b) > 0 {
		kind, data := exts.uint16(), exts.vector16()
		if exts.bad {
			return "", badHello("an extension is cut short")
		}
		if slices.Contains(seen, kind) {
			return "", badHello("an extension appears twice")
		}
		if seen = append(seen, kind); len(seen) > maxExtensionCount {
			return "", badHello("too many extensions")
		}
		if kind == extServerName {
			if serverName, err = parseServerName(data); err != nil {
				return "", err
			}
		}
	}
	return serverName, nil
}

// parseServerName reads a server_name extension that must hold exactly one host_name.
func parseServerName(data []byte) (string, error) {
	ext := parser{b: data}
	list := parser{b: ext.vector16()}
	kind, name := list.uint8(), list.vector16()
	switch {
	case ext.bad || list.bad || len(ext.b) > 0:
		return "", badHello("server_name is malformed")
	case kind != nameTypeHostName:
		return "", badHello("server_name has an unknown name type")
	case len(list.b) > 0:
		return "", badHello("server_name has more than one entry")
	case len(name) == 0:
		return "", badHello("server_name is empty")
	}
	return string(name), nil
}

// parser cuts fields off b; after a field that is not there, bad stays set.
type parser struct {
	b   []byte
	bad bool
}

func (p *parser) take(n int) []byte {
	if p.bad || n > len(p.b) {
		p.b, p.bad = nil, true
		return nil
	}
	out := p.b[:n]
	p.b = p.b[n:]
	return out
}

func (p *parser) skip(n int) { p.take(n) }

func (p *parser) uint8() uint8 {
	if b := p.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (p *parser) uint16() uint16 {
	if b := p.take(2); b != nil {
		return uint16(b[0])<<8 | uint16(b[1])
	}
	return 0
}

func (p *parser) vector8() []byte  { return p.take(int(p.uint8())) }
func (p *parser) vector16() []byte { return p.take(int(p.uint16())) }

func (p *parser) err(detail string) error {
	if p.bad {
		return badHello(detail)
	}
	return nil
}
