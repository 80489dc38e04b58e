package lab

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

func frame(t testing.TB, hexBytes string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(hexBytes, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	ether4 = "ffffffffffff 020000000001 0800 "
	ether6 = "ffffffffffff 020000000001 86dd "
	from6  = "20010db8000000000000000000000001 20010db8000000000000000000000002 "
	udp    = "0035 1f90 000b 0000 616263 "
)

func TestDecode(t *testing.T) {
	for _, c := range []struct{ name, hex, want string }{
		{"UDP over IPv4, with padding behind it", ether4 + "4500001f 00000000 40110000 cb007102 c6336414 " + udp + "0000000000",
			`udp 203.0.113.2:53 > 198.51.100.20:8080 3 bytes "abc"`},
		{"a later fragment has no ports", ether4 + "4500001f 00000001 40110000 cb007102 c6336414 " + udp,
			`udp 203.0.113.2:0 > 198.51.100.20:0 11 bytes "\x005\x1f\x90\x00\v\x00\x00abc"`},
		{"a SYN with options", ether4 + "4500002c 00000000 40060000 cb007102 c6336414 c001 01bb 00000001 00000000 6002 ffff 00000000 020405b4",
			`tcp 203.0.113.2:49153 > 198.51.100.20:443 [S] 0 bytes`},
		{"a TCP header that is cut off is still a packet", ether4 + "45000018 00000000 40060000 cb007102 c6336414 c00101bb",
			`tcp 203.0.113.2:0 > 198.51.100.20:0 [] 4 bytes "\xc0\x01\x01\xbb"`},
		{"UDP behind IPv6 extension headers", ether6 + "60000000 001b 00 40 " + from6 + "3c00000000000000 1100000000000000 " + udp,
			`udp [2001:db8::1]:53 > [2001:db8::2]:8080 3 bytes "abc"`},
		{"a first IPv6 fragment", ether6 + "60000000 0013 2c 40 " + from6 + "1100000100000000 " + udp,
			`udp [2001:db8::1]:53 > [2001:db8::2]:8080 3 bytes "abc"`},
		{"GRE keeps its number", ether4 + "45000016 00000000 402f0000 cb007102 c6336414 6162",
			`ip-proto-47 203.0.113.2:0 > 198.51.100.20:0 2 bytes "ab"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, p, ok := decode(frame(t, c.hex))
			if got := p.String(); !ok || got != c.want {
				t.Errorf("got  %s (%v)\nwant %s", got, ok, c.want)
			}
		})
	}
}

func TestQuoted(t *testing.T) {
	const quote4 = "4500001f 00000000 40110000 c6336414 cb007102 " + udp
	const quote6 = "60000000 000b 11 40 " + from6 + udp
	for _, c := range []struct{ name, hex, want string }{
		{"port unreachable", ether4 + "4500003b 00000000 40010000 cb007102 c6336414 0303 0000 00000000 " + quote4,
			`udp 198.51.100.20:53 > 203.0.113.2:8080 3 bytes "abc"`},
		{"port unreachable of IPv6", ether6 + "60000000 003b 3a 40 " + from6 + "0104 0000 00000000 " + quote6,
			`udp [2001:db8::1]:53 > [2001:db8::2]:8080 3 bytes "abc"`},
		{"an echo request quotes nothing", ether4 + "4500003b 00000000 40010000 cb007102 c6336414 0800 0000 00000000 " + quote4, ""},
		{"a message that is cut off", ether4 + "45000018 00000000 40010000 cb007102 c6336414 0303 0000", ""},
		{"UDP quotes nothing", ether4 + "4500001f 00000000 40110000 cb007102 c6336414 " + udp, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, p, _ := decode(frame(t, c.hex))
			quoted, ok := p.Quoted()
			if ok != (c.want != "") || ok && quoted.String() != c.want {
				t.Errorf("got  %s (%v)\nwant %s", quoted, ok, c.want)
			}
		})
	}
}

func TestReassembleOrdersAndDropsRepeats(t *testing.T) {
	seg := func(seq uint32, data string) Packet { return Packet{Proto: ProtoTCP, Seq: seq, Payload: []byte(data)} }
	syn := Packet{Proto: ProtoTCP, Seq: 0xfffffffd, Flags: FlagSYN}
	got := reassemble([]Packet{syn, seg(1, "def"), seg(0xfffffffe, "abc"), seg(0xfffffffe, "abc"), seg(2, "efgh")})
	if !bytes.Equal(got, []byte("abcdefgh")) {
		t.Errorf("got %q over the wrap of the sequence number", got)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(frame(f, ether4+"4500001f 00000000 40110000 cb007102 c6336414 "+udp))
	f.Add(frame(f, ether6+"60000000 001b 00 40 "+from6+"3c00000000000000 1100000000000000 "+udp))
	f.Add(frame(f, ether4+"4f000014 00000000 40060000 cb007102 c6336414"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, p, ok := decode(b)
		if ok && len(p.Payload) > len(b) {
			t.Errorf("payload of %d bytes in a frame of %d", len(p.Payload), len(b))
		}
		_ = p.String()
		_, _ = p.Quoted()
		_ = Seen{packets: []Packet{p, p}}.Payload()
	})
}
