package network

import (
	"encoding/hex"
	"net/netip"
	"testing"

	"github.com/cordonhq/cordon/internal/policy"
)

func TestParsePacket(t *testing.T) {
	tcp4 := "45000028000040004006000" + "00adf0002c6336464" + "8000" + "1e61" // 10.223.0.2:32768 > 198.51.100.100:7777
	v6 := "6000000000082c40" + "20010db8000000000000000000000001" + "20010db8000000000000000000000002"
	cases := []struct {
		name, hex string
		want      packet
		ok        bool
	}{
		{"a whole IPv4 header with ports", tcp4, packet{policy.TCP, netip.MustParseAddrPort("10.223.0.2:32768"), netip.MustParseAddrPort("198.51.100.100:7777")}, true},
		{"ports cut off", tcp4[:42], packet{policy.TCP, netip.MustParseAddrPort("10.223.0.2:0"), netip.MustParseAddrPort("198.51.100.100:0")}, true},
		{"IPv6 with a fragment header, first fragment", v6 + "1100000100000000" + "00350035", packet{policy.UDP, netip.MustParseAddrPort("[2001:db8::1]:53"), netip.MustParseAddrPort("[2001:db8::2]:53")}, true},
		{"IPv6, later fragment", v6 + "1100001000000000" + "00350035", packet{policy.UDP, netip.MustParseAddrPort("[2001:db8::1]:0"), netip.MustParseAddrPort("[2001:db8::2]:0")}, true},
		{"IPv6, extension header cut off", v6 + "1100", packet{44, netip.MustParseAddrPort("[2001:db8::1]:0"), netip.MustParseAddrPort("[2001:db8::2]:0")}, true},
		{"an IPv4 header shorter than it can be", "44" + tcp4[2:], packet{}, false},
		{"half a header", tcp4[:20], packet{}, false},
		{"nothing", "", packet{}, false},
		{"another version", "55" + tcp4[2:], packet{}, false},
	}
	for _, c := range cases {
		b, err := hex.DecodeString(c.hex)
		if err != nil {
			t.Fatal(c.name, err)
		}
		if got, ok := parsePacket(b); got != c.want || ok != c.ok {
			t.Errorf("%s: %+v, %t; want %+v, %t", c.name, got, ok, c.want, c.ok)
		}
	}
}

func FuzzParsePacket(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x45\x00\x00\x28\x00\x00\x40\x00\x40\x06\x00\x00\x0a\xdf\x00\x02\xc6\x33\x64\x64\x80\x00\x1e\x61"))
	f.Add([]byte("\x60\x00\x00\x00\x00\x08\x00\x40 1234567890123451234567890123456\x2b\x00\x00\x00\x00\x00\x00\x00\x06\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := parsePacket(b)
		if !ok {
			return
		}
		if p.src.Addr().Is4() != (b[0]>>4 == 4) || p.src.Addr().Is4() != p.dst.Addr().Is4() {
			t.Errorf("families of %v and %v", p.src, p.dst)
		}
		if (p.src.Port() != 0 || p.dst.Port() != 0) && p.proto != policy.TCP && p.proto != policy.UDP {
			t.Errorf("ports of protocol %d", p.proto)
		}
		shorter, ok := parsePacket(b[:len(b)-1])
		if ok && (shorter.src.Addr() != p.src.Addr() || shorter.dst.Addr() != p.dst.Addr()) {
			t.Error("the end of a packet changes its addresses")
		}
	})
}
