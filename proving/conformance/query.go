package conformance

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/proving/conformance/probe"
)

// query is a DNS message with one question and EDNS, as stub resolvers send it.
func query(name string, qtype uint16) []byte {
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	m.SetEdns0(1232, false)
	return pack(m)
}

// pack encodes a message that is known to be encodable.
func pack(m *dns.Msg) []byte {
	b, err := m.Pack()
	if err != nil {
		panic(fmt.Sprintf("pack a DNS message: %v", err))
	}
	return b
}

// ask sends a question over UDP and waits for the reply.
func ask(server netip.Addr, name string, qtype uint16) probe.Order {
	return withAnswer(udp(server, 53, query(name, qtype)))
}

// question sends a message of DNS over UDP and waits for the reply.
func question(server netip.Addr, m *dns.Msg) probe.Order {
	return withAnswer(udp(server, 53, pack(m)))
}

// withAnswer waits longer for a reply, which is to come.
func withAnswer(o probe.Order) probe.Order {
	o.Within = 4 * time.Second
	return o
}

// askTCP sends DNS messages over TCP, each with its length, and reads one reply.
func askTCP(server netip.Addr, messages ...[]byte) probe.Order {
	var stream []byte
	for _, m := range messages {
		stream = vector16(stream, m)
	}
	return probe.Order{Kind: probe.Stream, To: at(server, 53), Parts: [][]byte{stream}, Want: 2}
}

// ask asks the lab's name server from the host, as the product's resolver does.
func (s *stand) ask(ctx context.Context, name string, qtype uint16) ([]byte, error) {
	c, err := s.lab.Host().Dial(ctx, "udp", at(addrDNS, 53))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := c.Write(query(name, qtype)); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	n, err := c.Read(buf)
	return buf[:n], err
}

// reply decodes the one DNS message that came, over UDP or TCP.
func reply(got probe.Outcome) (*dns.Msg, error) {
	var wire []byte
	switch {
	case len(got.Replies) == 1:
		wire = got.Replies[0]
	case len(got.Received) > 2:
		wire = got.Received[2:]
	default:
		return nil, errors.New("no reply came")
	}
	m := new(dns.Msg)
	return m, m.Unpack(wire)
}

// answeredWith: a reply with this code came; REFUSED says why (RFC 8914).
func answeredWith(rcode int) func(probe.Outcome) error {
	return func(got probe.Outcome) error {
		m, err := reply(got)
		switch {
		case err != nil:
			return err
		case m.Rcode != rcode:
			return fmt.Errorf("the reply is %s, not %s", dns.RcodeToString[m.Rcode], dns.RcodeToString[rcode])
		case rcode == dns.RcodeRefused && len(m.Answer) > 0:
			return errors.New("a refusal with an answer")
		}
		return nil
	}
}

// blocked: NOERROR without any record, with extended error 15 "Blocked" (RFC 8914
// section 4.16).
func blocked(got probe.Outcome) error {
	if err := answeredWith(dns.RcodeSuccess)(got); err != nil {
		return err
	}
	m, err := reply(got)
	if err != nil {
		return err
	}
	if len(m.Answer)+len(m.Ns) > 0 {
		return fmt.Errorf("the denial holds records: %v", m)
	}
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if ede, ok := o.(*dns.EDNS0_EDE); ok && ede.InfoCode == dns.ExtendedErrorCodeBlocked {
				return nil
			}
		}
	}
	return errors.New("the denial does not say Blocked")
}

// resolvesTo: the reply has exactly these addresses, in any order.
func resolvesTo(want ...netip.Addr) func(probe.Outcome) error {
	return func(got probe.Outcome) error {
		m, err := reply(got)
		if err != nil {
			return err
		}
		have := addresses(m)
		slices.SortFunc(have, netip.Addr.Compare)
		slices.SortFunc(want, netip.Addr.Compare)
		if !slices.Equal(have, want) {
			return fmt.Errorf("the reply has %v, not %v", have, want)
		}
		return nil
	}
}

func addresses(m *dns.Msg) []netip.Addr {
	out := []netip.Addr{}
	for _, rr := range m.Answer {
		var a netip.Addr
		ok := false
		switch rr := rr.(type) {
		case *dns.A:
			a, ok = netip.AddrFromSlice(rr.A.To4())
		case *dns.AAAA:
			a, ok = netip.AddrFromSlice(rr.AAAA.To16())
		}
		if ok {
			out = append(out, a)
		}
	}
	return out
}
