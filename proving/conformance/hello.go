package conformance

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"time"
)

// clientHello is a ClientHello taken apart, to be put together wrongly. It comes
// from crypto/tls, so that a server answers it if nothing is changed.
type clientHello struct {
	head []byte // of the message, up to the extensions
	exts []extension
}

type extension struct {
	kind uint16
	data []byte
}

const (
	extServerName      = 0  // RFC 6066 section 3
	extSupportedGroups = 10 // RFC 8446 section 4.2.7
	extKeyShare        = 51 // RFC 8446 section 4.2.8
	groupX25519        = 29
)

// newHello returns the hello that crypto/tls sends for a name.
func newHello(name string) clientHello {
	here, there := net.Pipe()
	defer there.Close()
	go func() {
		defer here.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		// It fails as soon as the hello is read: nobody answers.
		_ = tls.Client(here, &tls.Config{ServerName: name, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}).HandshakeContext(ctx)
	}()
	record := make([]byte, 5)
	if _, err := io.ReadFull(there, record); err != nil {
		panic(err) // crypto/tls always begins with a record
	}
	message := make([]byte, binary.BigEndian.Uint16(record[3:]))
	if _, err := io.ReadFull(there, message); err != nil {
		panic(err)
	}
	return takeApart(message)
}

// takeApart parses the fields of RFC 8446 section 4.1.2.
func takeApart(message []byte) clientHello {
	at := 4 + 2 + 32                                     // header, version, random
	at += 1 + int(message[at])                           // session ID
	at += 2 + int(binary.BigEndian.Uint16(message[at:])) // cipher suites
	at += 1 + int(message[at])                           // compression methods
	h := clientHello{head: slices.Clone(message[4:at])}
	for rest := message[at+2:]; len(rest) >= 4; {
		n := int(binary.BigEndian.Uint16(rest[2:]))
		h.exts = append(h.exts, extension{binary.BigEndian.Uint16(rest), slices.Clone(rest[4 : 4+n])})
		rest = rest[4+n:]
	}
	return h
}

// named replaces the server_name extension by others, in its place.
func (h clientHello) named(exts ...extension) clientHello {
	out := clientHello{head: h.head}
	for _, e := range h.exts {
		if e.kind == extServerName {
			out.exts = append(out.exts, exts...)
			continue
		}
		out.exts = append(out.exts, e)
	}
	return out
}

// with adds extensions at the beginning: the last must stay last if it is a
// pre-shared key.
func (h clientHello) with(exts ...extension) clientHello {
	return clientHello{head: h.head, exts: append(slices.Clone(exts), h.exts...)}
}

// offering limits the hello to X25519, with a share of a key or, for nil, without one:
// then a server has to ask for it.
func (h clientHello) offering(share []byte) clientHello {
	out := clientHello{head: h.head}
	for _, e := range h.exts {
		switch e.kind {
		case extSupportedGroups:
			e.data = vector16(nil, []byte{0, groupX25519})
		case extKeyShare:
			e.data = vector16(nil, share)
		}
		out.exts = append(out.exts, e)
	}
	return out
}

// x25519Share returns the entry of key_share for X25519.
func (h clientHello) x25519Share() []byte {
	for _, e := range h.exts {
		if e.kind != extKeyShare {
			continue
		}
		for list := e.data[2:]; len(list) >= 4; {
			size := 4 + int(binary.BigEndian.Uint16(list[2:]))
			if binary.BigEndian.Uint16(list) == groupX25519 {
				return slices.Clone(list[:size])
			}
			list = list[size:]
		}
	}
	panic("crypto/tls offers no X25519")
}

// bytes puts the hello into one record.
func (h clientHello) bytes() []byte {
	var exts []byte
	for _, e := range h.exts {
		exts = binary.BigEndian.AppendUint16(exts, e.kind)
		exts = vector16(exts, e.data)
	}
	body := vector16(slices.Clone(h.head), exts)
	message := append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	const most = 1 << 14 // RFC 8446 section 5.1
	var out []byte
	for len(message) > 0 {
		n := min(most, len(message))
		out = vector16(append(out, 22, 3, 1), message[:n])
		message = message[n:]
	}
	return out
}

func vector16(b, data []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(data))), data...)
}

// entry is one name of a server_name extension.
type entry struct {
	kind byte // 0 is host_name
	name string
}

// serverName is a server_name extension with any entries.
func serverName(entries ...entry) extension {
	var list []byte
	for _, e := range entries {
		list = vector16(append(list, e.kind), []byte(e.name))
	}
	return extension{extServerName, vector16(nil, list)}
}

func hostName(name string) extension { return serverName(entry{0, name}) }

// echList is a list of one encrypted-hello configuration whose outer name is
// publicName and whose key nobody has, so the inner hello is never read.
func echList(publicName string) ([]byte, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if len(publicName) > 255 {
		return nil, errors.New("the public name is too long")
	}
	contents := []byte{7, 0, 0x20} // ID, DHKEM(X25519)
	contents = vector16(contents, key.PublicKey().Bytes())
	contents = vector16(contents, []byte{0, 1, 0, 1}) // HKDF-SHA256, AES-128-GCM
	contents = append(contents, 64, byte(len(publicName)))
	contents = append(contents, publicName...)
	contents = vector16(contents, nil)
	config := vector16([]byte{0xfe, 0x0d}, contents)
	return vector16(nil, config), nil
}
