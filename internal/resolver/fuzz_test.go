package resolver

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"

	"context"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/policy"
)

// FuzzMessage sends anything as a sandbox's message. Whatever it is, the reply is
// a well-formed response to it within the size allowed, and only listed names are
// asked for.
func FuzzMessage(f *testing.F) {
	seed := func(m *dns.Msg) {
		wire, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire, true)
		f.Add(wire, false)
	}
	seed(ask("a.test", dns.TypeA))
	seed(ask("_443._tcp.x.wild.test", dns.TypeHTTPS).SetEdns0(4096, true))
	seed(ask("b.test", dns.TypeANY))
	fix := newFixture(f, strictInput, func(c *Config) {
		c.Budget = Budget{QueriesPerSecond: 1e9, Burst: 1e9, LabelsPerMinute: 1e6}
		c.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no network here") }
	})
	f.Fuzz(func(t *testing.T, wire []byte, udp bool) {
		proto := policy.TCP
		if udp {
			proto = policy.UDP
		}
		reply := fix.answer(t.Context(), transport{proto, sandboxAddr, netip.MustParseAddrPort("8.8.8.8:53")}, wire)
		if reply == nil {
			return
		}
		if udp && len(reply) > maxUDP {
			t.Errorf("a datagram of %d octets", len(reply))
		}
		var m dns.Msg
		if err := m.Unpack(reply); err != nil || !m.Response {
			t.Errorf("the reply is no response: %v", err)
		}
		if len(wire) < 2 || !slices.Equal(reply[:2], wire[:2]) {
			t.Error("the reply has another ID")
		}
	})
}
