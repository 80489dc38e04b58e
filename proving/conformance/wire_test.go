package conformance

import (
	"net/netip"
	"testing"

	"github.com/cordonhq/cordon/proving/lab"
)

// TestThePastIsTold tells what is left of earlier steps from what is new, so that
// the one is not held against a step and the other is never overlooked.
func TestThePastIsTold(t *testing.T) {
	host, name := netip.MustParseAddr("203.0.113.2"), netip.AddrPortFrom(addrDNS, 53)
	tcp := func(port uint16, seq uint32, flags uint8) lab.Packet {
		return lab.Packet{Proto: lab.ProtoTCP, Src: netip.AddrPortFrom(host, port), Dst: netip.AddrPortFrom(addrB, 80), Seq: seq, Flags: flags}
	}
	question := func(port uint16) lab.Packet {
		return lab.Packet{Proto: lab.ProtoUDP, Src: netip.AddrPortFrom(host, port), Dst: name}
	}
	objection := func(from netip.AddrPort, port uint16) lab.Packet {
		quote := ipv4(protoUDP, from.Addr(), host, udpHeader(from, netip.AddrPortFrom(host, port), []byte("answer")))
		return lab.Packet{
			Proto: lab.ProtoICMP, Type: 3, Code: 3, Src: netip.AddrPortFrom(host, 0), Dst: netip.AddrPortFrom(from.Addr(), 0),
			Payload: append(make([]byte, 4), quote...),
		}
	}
	w := &wire{}
	w.pass([]lab.Packet{tcp(1, 100, lab.FlagSYN), tcp(1, 101, lab.FlagACK), tcp(2, 7, lab.FlagACK), question(3)})
	for name, tt := range map[string]struct {
		seen []lab.Packet
		want int // how many of them are of the present
	}{
		"the end of a connection":                   {[]lab.Packet{tcp(1, 102, lab.FlagFIN)}, 0},
		"the end of one whose beginning nobody saw": {[]lab.Packet{tcp(2, 8, lab.FlagRST)}, 0},
		"its SYN, repeated":                         {[]lab.Packet{tcp(1, 100, lab.FlagSYN)}, 0},
		"a new connection between the same ports":   {[]lab.Packet{tcp(1, 102, lab.FlagFIN), tcp(1, 900, lab.FlagSYN), tcp(1, 901, lab.FlagACK)}, 2},
		"a new connection between others":           {[]lab.Packet{tcp(4, 1, lab.FlagSYN), tcp(4, 2, lab.FlagACK)}, 2},
		"the same question again":                   {[]lab.Packet{question(3)}, 1},
		"an objection to an old answer":             {[]lab.Packet{objection(name, 3)}, 0},
		"an objection to an answer nobody wanted":   {[]lab.Packet{objection(name, 4)}, 1},
		"an objection to who is no name server":     {[]lab.Packet{objection(netip.AddrPortFrom(addrB, 4000), 3)}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			present := w.present()
			for _, p := range tt.seen {
				if present(p) {
					n++
				}
			}
			if n != tt.want {
				t.Errorf("%d are of the present, want %d", n, tt.want)
			}
		})
	}
}
