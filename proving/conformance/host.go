package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
	"github.com/cordonhq/cordon/proving/lab"
)

// What the stand's configuration says of these two is in writeConfig.
const nameForbidden = "www.forbidden.test" // below a name of always_deny

var (
	addrForbidden = netip.MustParseAddr("198.51.100.77") // of always_deny, nameForbidden's
	addrHairpin   = netip.MustParseAddr("198.51.100.99") // of public_addresses
)

func hostCases() []Case {
	const group = "The host and its operator"
	return []Case{
		{ID: 75, Group: group, Title: "the port of a service of the host, from a sandbox", Run: hostPorts, Within: 60 * time.Second},
		{ID: 76, Group: group, Title: "the host's public address behind NAT, neighbours, the network's NAT64", Run: nearTheHost},
		{ID: 77, Group: group, Title: "observe against the operator's denials", Run: observeTheOperator},
	}
}

// hostPorts: a sandbox opens a flow from the port of a service of the host to a
// client. The client's next packet to that service reaches the service.
func hostPorts(t *Trial) {
	s := t.Sandbox(everything())
	l := t.takeover(s)
	host6, _ := t.suite.stand.lab.HostAddr6()
	for _, f := range []struct {
		name                string
		inside, host, other netip.Addr
	}{
		{"IPv4", s.addr, t.suite.stand.lab.HostAddr(), addrB},
		{"IPv6", s.addr6, host6, twin(addrB)},
	} {
		for _, ports := range [][2]uint16{{5000, 20000}, {4443, 40001}} {
			service, port := netip.AddrPortFrom(f.host, ports[0]), netip.AddrPortFrom(f.other, ports[1])
			from := netip.AddrPortFrom(f.inside, ports[0])
			t.Try(Try{
				What: fmt.Sprintf("UDP %d to %d over %s", ports[0], ports[1], f.name), By: s,
				Do: func(ctx context.Context) error {
					return t.shadowUDP(ctx, s, frame(l, nil, packetOf(protoUDP, from.Addr(), port.Addr(), udpHeader(from, port, []byte("canary-75")))), service, port)
				},
				Reaches: []Arrival{{At: f.other, Text: "canary-75"}, {At: f.other, Text: "the host's answer"}}, Log: allowed("default"),
			})
			t.Try(Try{
				What: fmt.Sprintf("TCP %d to %d over %s", ports[0], ports[1], f.name), By: s,
				Do: func(ctx context.Context) error {
					return t.shadowTCP(ctx, s, frame(l, nil, packetOf(protoTCP, from.Addr(), port.Addr(), tcpSYN(from, port, nil))), service, port)
				},
				Reaches: []Arrival{{At: f.other, Text: "the host's answer"}}, Log: allowed("default"),
			})
		}
	}
}

func packetOf(proto byte, src, dst netip.Addr, payload []byte) []byte {
	if src.Is6() {
		return ipv6(proto, src, dst, payload)
	}
	return ipv4(proto, src, dst, payload)
}

// anyAddress lets a client of the internet have an address that a route makes local.
func anyAddress(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	})
}

// hears lets the sandbox's end send a frame and returns what tells, a moment later,
// whether any of the words came to it.
func (t *Trial) hears(ctx context.Context, s *Subject, packet []byte, words string) (func() error, error) {
	o := frames(packet)[0]
	o.Within = 1500 * time.Millisecond
	c, err := s.below.begin(ctx, o)
	return func() error {
		got := <-c
		for _, r := range got.Replies {
			if words != "" && bytes.Contains(r, []byte(words)) {
				return fmt.Errorf("the sandbox heard %q", words)
			}
			if words == "" && opens(r) {
				return errors.New("the sandbox heard a connection begin")
			}
		}
		return nil
	}, err
}

// opens reports whether a frame carries a TCP packet that opens a connection.
func opens(frame []byte) bool {
	at := 14 + 20
	if len(frame) > 14 && frame[14]>>4 == 6 {
		at = 14 + 40
	}
	return len(frame) > at+13 && (frame[14+9] == protoTCP || frame[14+6] == protoTCP) && frame[at+13]&0x12 == 0x02
}

func (t *Trial) shadowUDP(ctx context.Context, s *Subject, packet []byte, service, client netip.AddrPort) error {
	in := t.suite.stand.lab
	u, err := in.Host().ListenPacket(ctx, "udp", fmt.Sprintf(":%d", service.Port()))
	if err != nil {
		return err
	}
	defer u.Close()
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo([]byte("the host's answer"), from)
		}
	}()
	var c net.PacketConn
	if err := in.Internet().Do(func() (err error) {
		c, err = (&net.ListenConfig{Control: anyAddress}).ListenPacket(ctx, "udp", client.String())
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	heard, err := t.hears(ctx, s, packet, "a question")
	if err != nil {
		return err
	}
	b := make([]byte, 64)
	if n, _, err := c.ReadFrom(b); err != nil || string(b[:n]) != "canary-75" {
		return fmt.Errorf("the client did not hear the sandbox: %q, %w", b[:n], err)
	}
	if _, err := c.WriteTo([]byte("a question"), net.UDPAddrFromAddrPort(service)); err != nil {
		return err
	}
	n, _, err := c.ReadFrom(b)
	if err != nil || string(b[:n]) != "the host's answer" {
		err = fmt.Errorf("the client got %q: %w", b[:n], errors.Join(err, errors.New("not the host's answer")))
	}
	return errors.Join(err, heard())
}

func (t *Trial) shadowTCP(ctx context.Context, s *Subject, packet []byte, service, client netip.AddrPort) error {
	in := t.suite.stand.lab
	listener, err := in.Host().Listen(ctx, "tcp", fmt.Sprintf(":%d", service.Port()))
	if err != nil {
		return err
	}
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("the host's answer"))
			c.Close()
		}
	}()
	hush, err := silent(in.Internet(), client.Port())
	if err != nil {
		return err
	}
	defer hush()
	heard, err := t.hears(ctx, s, packet, "")
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if len(t.suite.wire.since(in.Recorder()).To(client.Addr()).ToPort(client.Port()).Packets()) > 0 {
			break // the sandbox's packet has left
		}
		if time.Now().After(deadline) {
			return errors.New("the sandbox's packet did not leave")
		}
	}
	var answer [64]byte
	n := 0
	err = in.Internet().Do(func() error {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(client), Control: anyAddress, Timeout: 3 * time.Second}
		c, err := d.DialContext(ctx, "tcp", service.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(3 * time.Second))
		n, err = c.Read(answer[:])
		return err
	})
	if err != nil || string(answer[:n]) != "the host's answer" {
		err = errors.Join(fmt.Errorf("the client got %q", answer[:n]), err)
	}
	return errors.Join(err, heard())
}

// silent makes a port of the internet answer nothing to what opens a connection, as a
// client behind a firewall does, until it is undone.
func silent(in *lab.Netns, port uint16) (undo func(), err error) {
	c, err := nftables.New(nftables.WithNetNSFd(in.FD()))
	if err != nil {
		return nil, err
	}
	table := c.AddTable(&nftables.Table{Name: "silent", Family: nftables.TableFamilyINet})
	chain := c.AddChain(&nftables.Chain{
		Name: "in", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protoTCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{byte(port >> 8), byte(port)}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x02}},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	if err := c.Flush(); err != nil {
		return nil, err
	}
	return func() {
		c.DelTable(table)
		_ = c.Flush() // the lab's namespace ends with it
	}, nil
}

// nearTheHost: what is not the host's own address, and leads to it or its neighbours.
func nearTheHost(t *Trial) {
	s := t.Sandbox(everything())
	l := t.suite.stand.lab
	neighbour := netip.MustParseAddr("203.0.113.1")
	host := l.HostAddr().As4()
	translated := netip.AddrFrom16([16]byte{0, 0x64, 0xff, 0x9b, 12: host[0], 13: host[1], 14: host[2], 15: host[3]})
	own := netip.MustParseAddr("2001:db8:64::a00:5") // 10.0.0.5 below the configured prefix
	t.Try(Try{
		What: "TCP to a public address, its and the host's NAT64 forms, a neighbour", By: s,
		Orders: each([]netip.Addr{addrHairpin, neighbour, translated, own}, func(a netip.Addr) probe.Order { return tcp(a, 80, get(nameA, "/canary-76")) }),
		Never:  []string{"canary-76"}, Answer: refused, Log: denied("floor"),
	})
	t.Try(Try{
		What: "UDP to them", By: s,
		Orders: each([]netip.Addr{addrHairpin, neighbour, translated, own}, func(a netip.Addr) probe.Order { return udp(a, 4000, []byte("canary-76")) }),
		Never:  []string{"canary-76"}, Answer: unanswered, Log: denied("floor"), LogOnce: true,
	})
	t.Try(Try{
		What: "control: the address next to it", By: s, Orders: []probe.Order{said(addrHairpin.Prev(), 4000, "canary-76")},
		Reaches: []Arrival{{At: addrHairpin.Prev(), Port: 4000, Text: "canary-76"}}, Log: allowed("default"),
	})
}

// observeTheOperator: a tenant may choose to watch his own rules, not the operator's.
func observeTheOperator(t *Trial) {
	s := t.Sandbox(client.Network{Mode: "observe", AllowOut: []string{addrForbidden.String(), nameForbidden, "*"}, DenyOut: []string{client.AllTraffic}})
	t.Try(Try{
		What: "an address of always_deny, TCP and UDP", By: s,
		Orders: []probe.Order{tcp(addrForbidden, 4000, []byte("canary-77")), udp(addrForbidden, 4000, []byte("canary-77"))},
		Never:  []string{"canary-77"}, Answer: unanswered, Log: denied("operator"),
	})
	t.Try(Try{
		What: "a name of always_deny, in Host and SNI, at another address", By: s,
		Orders: []probe.Order{http80(addrB, get(nameForbidden, "/canary-77")), hello(addrB, newHello(nameForbidden).bytes())},
		Never:  []string{"canary-77", nameForbidden}, Answer: cut, Log: Want{"deny", []string{"operator"}, nameForbidden},
	})
	t.Try(Try{
		What: "a question for it", By: s, Orders: []probe.Order{ask(addrDNS, nameForbidden, dns.TypeA)},
		Never: []string{nameForbidden}, Answer: blocked, Log: Want{"deny", []string{"operator"}, nameForbidden},
	})
	t.Try(Try{
		What: "control: what only the sandbox's own rules deny passes", By: s,
		Orders:  []probe.Order{said(addrB, 4000, "watched-77")},
		Reaches: []Arrival{{At: addrB, Port: 4000, Text: "watched-77"}}, Log: Want{Verdict: string(client.Observed), Reasons: []string{"deny-address"}},
	})
}
