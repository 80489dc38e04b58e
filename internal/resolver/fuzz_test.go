package resolver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

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

// FuzzUpstream sends anything as an upstream's reply. Whatever it is, a sandbox
// gets a well-formed reply without private addresses and without keys for
// encrypted hellos.
func FuzzUpstream(f *testing.F) {
	for _, text := range []string{
		"ech.test. 60 IN A 10.0.0.5", "ech.test. 60 IN CNAME ech.test.", "ech.test. 60 IN AAAA ::ffff:10.0.0.5",
		`ech.test. 60 IN HTTPS 1 . mandatory=alpn alpn="h2" ipv4hint=198.51.100.50,10.0.0.5 ech="AEX+DQ==" ipv6hint=fd00::5`,
	} {
		rr, err := dns.NewRR(text)
		if err != nil {
			f.Fatal(err)
		}
		m := new(dns.Msg).SetReply(ask("ech.test", rr.Header().Rrtype))
		m.Answer = []dns.RR{rr, rr}
		wire, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	fix := newFixture(f, strictInput)
	f.Fuzz(func(t *testing.T, wire []byte) {
		var m dns.Msg
		if m.Unpack(wire) != nil || len(m.Question) != 1 {
			return
		}
		q := question{"a", "ech.test", m.Question[0].Qtype}
		if !matches(&m, m.Id, q) {
			return
		}
		asked := ask("ech.test", q.qtype)
		in := &query{transport: transport{proto: policy.UDP}, sandbox: "s1", policy: fix.policy, msg: asked, name: q.name}
		reply := in.reply(m.Rcode)
		fix.fill(reply, in, readAnswers(q, &m, time.Now()))
		var got dns.Msg
		if err := got.Unpack(in.pack(reply)); err != nil || got.Id != asked.Id {
			t.Fatalf("the reply cannot be read: %v", err)
		}
		for _, a := range addrsOf(got.Answer) {
			if !a.IsLoopback() && !fix.policy.AnswerAllowed(q.name, a) {
				t.Errorf("%s was let through", a)
			}
		}
		for _, rr := range got.Answer {
			if h, ok := rr.(*dns.HTTPS); ok && slices.ContainsFunc(h.Value, func(kv dns.SVCBKeyValue) bool { return kv.Key() == dns.SVCB_ECHCONFIG }) {
				t.Error("a key for encrypted hellos was let through")
			}
		}
	})
}
