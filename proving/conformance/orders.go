package conformance

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/cordonhq/cordon/proving/conformance/probe"
)

// get is a request whose answer ends the connection.
func get(host, path string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, host)
}

// keep is a request after which the connection goes on.
func keep(host, path string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, host)
}

// tcp sends parts over a TCP connection and reads to the end.
func tcp(to netip.Addr, port uint16, parts ...[]byte) probe.Order {
	return probe.Order{Kind: probe.Stream, To: at(to, port), Parts: parts}
}

// udp sends one datagram and waits for one reply, not for long.
func udp(to netip.Addr, port uint16, payload []byte) probe.Order {
	return probe.Order{Kind: probe.Datagram, To: at(to, port), Parts: [][]byte{payload}, Want: 1, Within: 1500 * time.Millisecond}
}

// https does a handshake for a name with whoever is at an address, and sends a
// request in it.
func https(to netip.Addr, name string, request []byte) probe.Order {
	return probe.Order{Kind: probe.Stream, To: at(to, 443), TLS: &probe.TLS{Name: name}, Parts: [][]byte{request}}
}

// hello sends raw bytes to port 443 and reads the first record of an answer.
func hello(to netip.Addr, parts ...[]byte) probe.Order {
	return probe.Order{Kind: probe.Stream, To: at(to, 443), Parts: parts, Want: 6}
}

// http80 sends raw bytes to port 80.
func http80(to netip.Addr, parts ...[]byte) probe.Order { return tcp(to, 80, parts...) }

// each makes one order for each of the things.
func each[T any](things []T, order func(T) probe.Order) []probe.Order {
	out := make([]probe.Order, len(things))
	for i, thing := range things {
		out[i] = order(thing)
	}
	return out
}
