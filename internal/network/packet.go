package network

import (
	"encoding/binary"
	"net/netip"

	"github.com/cordonhq/cordon/internal/policy"
)

// packet is what a refused packet says about itself.
type packet struct {
	proto    policy.Proto
	src, dst netip.AddrPort
}

// maxExtensions bounds the IPv6 extension headers that are followed.
const maxExtensions = 8

// parsePacket reads the addresses, protocol and ports of an IP packet whose end
// may be missing. b comes from a sandbox; false means that it is no IP packet.
func parsePacket(b []byte) (packet, bool) {
	if len(b) == 0 {
		return packet{}, false
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b)
	case 6:
		return parseIPv6(b)
	}
	return packet{}, false
}

// parseIPv4 follows RFC 791, 3.1.
func parseIPv4(b []byte) (packet, bool) {
	size := int(b[0]&0x0f) * 4
	if size < 20 || len(b) < 20 {
		return packet{}, false
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	first := binary.BigEndian.Uint16(b[6:])&0x1fff == 0 // only the first fragment has ports
	return withPorts(policy.Proto(b[9]), src, dst, tail(b, size), first), true
}

// parseIPv6 follows RFC 8200, 3 and 4.
func parseIPv6(b []byte) (packet, bool) {
	if len(b) < 40 {
		return packet{}, false
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	next, rest, first := b[6], b[40:], true
	for range maxExtensions {
		size := 0
		switch next {
		case 0, 43, 60, 135: // hop-by-hop, routing, destination options, mobility
			if len(rest) >= 2 {
				size = 8 + int(rest[1])*8
			}
		case 44: // fragment
			if len(rest) >= 8 {
				size, first = 8, binary.BigEndian.Uint16(rest[2:])&0xfff8 == 0
			}
		default:
			return withPorts(policy.Proto(next), src, dst, rest, first), true
		}
		if size == 0 {
			break
		}
		next, rest = rest[0], tail(rest, size)
	}
	return packet{proto: policy.Proto(next), src: netip.AddrPortFrom(src, 0), dst: netip.AddrPortFrom(dst, 0)}, true
}

func withPorts(proto policy.Proto, src, dst netip.Addr, transport []byte, first bool) packet {
	var sport, dport uint16
	if (proto == policy.TCP || proto == policy.UDP) && first && len(transport) >= 4 {
		sport, dport = binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
	}
	return packet{proto: proto, src: netip.AddrPortFrom(src, sport), dst: netip.AddrPortFrom(dst, dport)}
}

// tail is b without its first n bytes, empty when it is shorter.
func tail(b []byte, n int) []byte { return b[min(n, len(b)):] }
