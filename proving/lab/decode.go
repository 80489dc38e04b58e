package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Protocol numbers that packets are recorded with (IANA). ARP is not an IP
// protocol; it gets a number that is reserved.
const (
	protoHopByHop = 0
	ProtoICMP     = 1
	ProtoTCP      = 6
	ProtoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	ProtoICMPv6   = 58
	protoDestOpts = 60
	ProtoARP      = 255
)

// TCP flags (RFC 9293, section 3.1).
const (
	FlagFIN = 1 << iota
	FlagSYN
	FlagRST
	FlagPSH
	FlagACK
)

// Packet is one packet as it arrived at the internet's end of the wire.
type Packet struct {
	Time    time.Time
	Proto   uint8          // IP protocol number
	Src     netip.AddrPort // the port is 0 where the protocol has none
	Dst     netip.AddrPort
	Flags   uint8  // TCP flags
	Seq     uint32 // TCP sequence number of the first payload byte, or of the SYN
	Type    uint8  // ICMP type
	Code    uint8  // ICMP code
	Payload []byte // what follows the transport header; of other protocols, the IP header
	// Neighbour marks address resolution and its kind (ARP, neighbour and router
	// discovery, multicast membership), which every link carries by itself.
	Neighbour bool
}

// String shows the packet on one line, as tcpdump does.
func (p Packet) String() string {
	var proto string
	switch p.Proto {
	case ProtoTCP:
		proto = "tcp"
	case ProtoUDP:
		proto = "udp"
	case ProtoICMP:
		proto = fmt.Sprintf("icmp(%d,%d)", p.Type, p.Code)
	case ProtoICMPv6:
		proto = fmt.Sprintf("icmpv6(%d,%d)", p.Type, p.Code)
	case ProtoARP:
		proto = "arp"
	default:
		proto = fmt.Sprintf("ip-proto-%d", p.Proto)
	}
	flags := ""
	if p.Proto == ProtoTCP {
		flags = " ["
		for i, letter := range "FSRP." {
			if p.Flags&(1<<i) != 0 {
				flags += string(letter)
			}
		}
		flags += "]"
	}
	s := fmt.Sprintf("%s %s > %s%s %d bytes", proto, p.Src, p.Dst, flags, len(p.Payload))
	if n := min(len(p.Payload), 48); n > 0 {
		s += fmt.Sprintf(" %q", p.Payload[:n])
	}
	return strings.TrimSpace(s)
}

const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd
	etherLab  = 0x88b5 // IEEE 802 local experimental: the recorder's own sentinels
)

// decode reads an Ethernet frame. The packet refers to frame's bytes. What cannot
// be read to the end is kept as far as it was read: a recorder must not overlook
// a packet because it is malformed.
func decode(frame []byte) (etherType uint16, p Packet, ok bool) {
	if len(frame) < 14 {
		return 0, p, false
	}
	etherType = binary.BigEndian.Uint16(frame[12:14])
	body := frame[14:]
	switch etherType {
	case etherIPv4:
		p, ok = decodeIPv4(body)
	case etherIPv6:
		p, ok = decodeIPv6(body)
	case etherARP:
		p, ok = Packet{Proto: ProtoARP, Payload: body, Neighbour: true}, true
	case etherLab:
		p, ok = Packet{Payload: body}, true
	default:
		p, ok = Packet{Proto: ProtoARP, Payload: body}, true
	}
	return etherType, p, ok
}

func decodeIPv4(b []byte) (p Packet, ok bool) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return p, false
	}
	head := int(b[0]&15) * 4
	p.Proto = b[9]
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	// A length of zero is an offloaded packet of more than 64 KiB (BIG TCP).
	if total := int(binary.BigEndian.Uint16(b[2:4])); total >= head && total <= len(b) {
		b = b[:total] // the rest is Ethernet padding
	}
	if head < 20 || head > len(b) {
		return p, true
	}
	later := binary.BigEndian.Uint16(b[6:8])&0x1fff != 0
	p.transport(b[head:], later)
	return p, true
}

func decodeIPv6(b []byte) (p Packet, ok bool) {
	if len(b) < 40 || b[0]>>4 != 6 {
		return p, false
	}
	p.Proto = b[6]
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	if n := int(binary.BigEndian.Uint16(b[4:6])); n > 0 && 40+n <= len(b) {
		b = b[:40+n]
	}
	b = b[40:]
	later := false
	for {
		switch p.Proto {
		case protoHopByHop, protoRouting, protoDestOpts:
			if len(b) < 8 || len(b) < 8+int(b[1])*8 {
				p.Payload = b
				return p, true
			}
			p.Proto, b = b[0], b[8+int(b[1])*8:]
		case protoFragment:
			if len(b) < 8 {
				p.Payload = b
				return p, true
			}
			later = later || binary.BigEndian.Uint16(b[2:4])&0xfff8 != 0
			p.Proto, b = b[0], b[8:]
		default:
			p.transport(b, later)
			return p, true
		}
	}
}

// transport reads what follows the IP header; of a later fragment there is
// nothing to read.
func (p *Packet) transport(b []byte, laterFragment bool) {
	p.Payload = b
	if laterFragment {
		return
	}
	switch {
	case p.Proto == ProtoTCP && len(b) >= 20:
		p.ports(b)
		p.Seq = binary.BigEndian.Uint32(b[4:8])
		p.Flags = b[13]
		if off := int(b[12]>>4) * 4; off >= 20 && off <= len(b) {
			p.Payload = b[off:]
		}
	case p.Proto == ProtoUDP && len(b) >= 8:
		p.ports(b)
		p.Payload = b[8:]
	case (p.Proto == ProtoICMP || p.Proto == ProtoICMPv6) && len(b) >= 4:
		p.Type, p.Code = b[0], b[1]
		p.Payload = b[4:]
		// Membership (RFC 2710, 3810), router and neighbour discovery (RFC 4861).
		p.Neighbour = p.Proto == ProtoICMPv6 && (p.Type >= 130 && p.Type <= 137 || p.Type == 143)
	}
	if p.Proto == 2 { // IGMP
		p.Neighbour = true
	}
}

// Quoted returns the beginning of the packet that an ICMP error is about (RFC 792,
// RFC 4443 section 3): one that its receiver had sent, or so it says. ok is false
// for everything else.
func (p Packet) Quoted() (quoted Packet, ok bool) {
	const unused = 4 // between the checksum and the quote
	switch {
	case len(p.Payload) < unused:
		return Packet{}, false
	case p.Proto == ProtoICMP && (p.Type == 3 || p.Type == 11 || p.Type == 12):
		return decodeIPv4(p.Payload[unused:])
	case p.Proto == ProtoICMPv6 && p.Type >= 1 && p.Type <= 4:
		return decodeIPv6(p.Payload[unused:])
	}
	return Packet{}, false
}

func (p *Packet) ports(b []byte) {
	p.Src = netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(b[0:2]))
	p.Dst = netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(b[2:4]))
}
