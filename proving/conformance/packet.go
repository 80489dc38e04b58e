package conformance

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// Protocol numbers (IANA) that packets below are made with.
const (
	protoICMP    = 1
	protoIGMP    = 2
	protoIPIP    = 4
	protoTCP     = 6
	protoUDP     = 17
	protoDCCP    = 33
	proto6in4    = 41
	protoGRE     = 47
	protoESP     = 50
	protoICMPv6  = 58
	protoSCTP    = 132
	protoUDPLite = 136
)

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
)

// frame is an Ethernet frame to the host's end of a link. The source is filled
// in by the probe, unless it is given.
func frame(to link, from net.HardwareAddr, packet []byte) []byte {
	b := make([]byte, 14, 14+len(packet))
	copy(b, to.mac)
	copy(b[6:], from)
	binary.BigEndian.PutUint16(b[12:], etherIPv4)
	if packet[0]>>4 == 6 {
		binary.BigEndian.PutUint16(b[12:], etherIPv6)
	}
	return append(b, packet...)
}

// ipv4 puts a header of RFC 791 before a payload.
func ipv4(proto byte, src, dst netip.Addr, payload []byte) []byte {
	return fragment{}.ipv4(proto, src, dst, payload)
}

// fragment says which part of which packet a payload is; the zero value is a
// whole packet.
type fragment struct {
	id     uint16 // the same for all fragments of a packet
	offset int    // a multiple of 8
	more   bool
}

func (f fragment) ipv4(proto byte, src, dst netip.Addr, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(h[4:], f.id)
	flags := uint16(f.offset / 8)
	if f.more {
		flags |= 0x2000
	}
	binary.BigEndian.PutUint16(h[6:], flags)
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

// ipv6 puts a header of RFC 8200 before a payload.
func ipv6(next byte, src, dst netip.Addr, payload []byte) []byte {
	h := make([]byte, 40, 40+len(payload))
	h[0], h[6], h[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, payload...)
}

// udpHeader is a datagram with its checksum.
func udpHeader(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b[0:], src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[6:], pseudoSum(protoUDP, src.Addr(), dst.Addr(), b))
	return b
}

// tcpSYN opens a connection; RFC 9293 lets it carry data.
func tcpSYN(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(b[0:], src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], 0x01020304)
	b[12], b[13] = 5<<4, 2
	binary.BigEndian.PutUint16(b[14:], 64240)
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[16:], pseudoSum(protoTCP, src.Addr(), dst.Addr(), b))
	return b
}

// icmp is a message of RFC 792.
func icmp(kind, code byte, rest []byte) []byte {
	b := append([]byte{kind, code, 0, 0, 0x12, 0x34, 0, 1}, rest...)
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

func pseudoSum(proto byte, src, dst netip.Addr, segment []byte) uint16 {
	pseudo := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
	pseudo = append(pseudo, 0, proto, byte(len(segment)>>8), byte(len(segment)))
	if len(segment)%2 == 1 {
		segment = append(append([]byte{}, segment...), 0)
	}
	return checksum(append(pseudo, segment...))
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
