package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func tlsCases() []Case {
	const group = "TLS"
	return []Case{
		{ID: 1, Group: group, Title: "the allowed name shown to another's address", Run: borrowedSNI},
		{ID: 2, Group: group, Title: "domain fronting (residual: spliced to the name shown, never to another's address)", Run: fronting},
		{ID: 3, Group: group, Title: "CONNECT through the proxy", Run: connectTricks},
		{ID: 4, Group: group, Title: "no name, an empty one, an address for a name", Run: namelessHello},
		{ID: 5, Group: group, Title: "two names, an unknown name type", Run: ambiguousHello},
		{ID: 6, Group: group, Title: "a hello of one byte a segment", Run: segmentedHello},
		{ID: 7, Group: group, Title: "a hello split over records", Run: recordedHello},
		{ID: 8, Group: group, Title: "post-quantum and padded hellos", Run: largeHello},
		{ID: 9, Group: group, Title: "a hello that never ends", Run: endlessHello},
		{ID: 10, Group: group, Title: "encrypted client hello", Run: encryptedHello},
		{ID: 11, Group: group, Title: "the wrong protocol for the port", Run: wrongProtocol},
		{ID: 13, Group: group, Title: "QUIC", Run: quic},
		{ID: 14, Group: group, Title: "STARTTLS on mail ports", Run: startTLS},
		{ID: 73, Group: group, Title: "a record or a preamble before the hello", Run: beforeHello},
		{ID: 74, Group: group, Title: "another name in a second hello", Run: secondHello},
	}
}

// borrowedSNI: whoever shows A's name gets A, wherever the packet was going.
func borrowedSNI(t *Trial) {
	s := t.Sandbox(standard())
	t.Try(Try{
		What: "A's name to A's address", By: s,
		Orders:  []probe.Order{https(addrA, nameA, get(nameA, "/"))},
		Reaches: []Arrival{{At: addrA, Port: 443, Text: nameA}},
		Answer:  served(addrA, nameA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "A's name to the attacker's address: A answers", By: s,
		Orders:  []probe.Order{https(addrAttacker, nameA, get(nameA, "/"))},
		Reaches: []Arrival{{At: addrA, Port: 443}},
		Answer:  served(addrA, nameA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "B's name to A's address", By: s,
		Orders: []probe.Order{https(addrA, nameB, get(nameB, "/"))},
		Never:  []string{nameB}, Answer: alerted, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	open := t.Sandbox(everything())
	t.Try(Try{
		What: "control: without rules the attacker's address is reached", By: open,
		Orders:  []probe.Order{https(addrAttacker, nameA, get(nameA, "/"))},
		Reaches: []Arrival{{At: addrAttacker, Port: 443}},
		Answer:  served(addrAttacker, nameA), Log: allowed("default"),
	})
}

// fronting: what is inside TLS cannot be judged without breaking it. The promise
// is that it reaches the owner of the name shown and nobody else.
func fronting(t *Trial) {
	s := t.Sandbox(standard())
	t.Try(Try{
		What: "A's hello, B in Host: A sees it, B's address nothing", By: s,
		Orders:  []probe.Order{https(addrB, nameA, get(nameB, "/"))},
		Reaches: []Arrival{{At: addrA, Port: 443}}, Never: []string{nameB},
		Answer: served(addrA, nameB), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "the same where both names share an address", By: s,
		Orders:  []probe.Order{https(addrShared, nameShared, get(nameNeighbor, "/"))},
		Reaches: []Arrival{{At: addrShared, Port: 443}},
		Answer:  served(addrShared, nameNeighbor), Log: allowed("allow-name"),
	})
}

// connectTricks: no request makes a tunnel of the proxy.
func connectTricks(t *Trial) {
	s := t.Sandbox(standard())
	tunnel := newHello(nameB).bytes()
	lines := []string{
		"CONNECT " + nameB + ":443 HTTP/1.1\r\nHost: " + nameB + ":443\r\n\r\n",
		"CONNECT " + nameA + ":443 HTTP/1.1\r\nHost: " + nameA + "\r\n\r\n",
		"CONNECT " + nameB + ":443 HTTP/1.1\r\nHost: " + nameA + "\r\n\r\n",
		"CONNECT " + at(addrB, 443) + " HTTP/1.0\r\n\r\n",
	}
	t.Try(Try{
		What: "CONNECT on 80, with a hello for B behind it", By: s,
		Orders: each(lines, func(l string) probe.Order { return http80(addrA, append([]byte(l), tunnel...)) }),
		Never:  []string{nameB, "CONNECT"}, Answer: cut, Log: denied("bad-request"),
	})
	t.Try(Try{
		What: "CONNECT on 443", By: s,
		Orders: each(lines, func(l string) probe.Order { return hello(addrA, []byte(l), tunnel) }),
		Never:  []string{nameB, "CONNECT"}, Answer: cut, Log: denied("protocol-mismatch"),
	})
	t.Try(Try{
		What: "control: GET on the same port", By: s,
		Orders:  []probe.Order{http80(addrA, get(nameA, "/"))},
		Reaches: []Arrival{{At: addrA, Port: 80, Text: nameA}}, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
}

// helloControl shows that a hello put together here is one that A answers.
func helloControl(t *Trial, s *Subject) {
	t.Try(Try{
		What: "control: the same hello with A's name", By: s,
		Orders:  []probe.Order{hello(addrAttacker, newHello(nameA).named(hostName(nameA)).bytes())},
		Reaches: []Arrival{{At: addrA, Port: 443, Text: nameA}}, Answer: serverHello, Log: allowed("allow-name"),
	})
}

func namelessHello(t *Trial) {
	s := t.Sandbox(standard())
	h := newHello(nameA)
	helloControl(t, s)
	t.Try(Try{
		What: "no server_name, to A, B and the attacker", By: s,
		Orders: []probe.Order{hello(addrA, h.named().bytes()), hello(addrB, h.named().bytes()), hello(addrAttacker, h.named().bytes())},
		Answer: alerted, Log: denied("no-sni"),
	})
	t.Try(Try{
		What: "an empty name, an empty list, an empty extension", By: s,
		Orders: each([]extension{hostName(""), serverName(), {extServerName, nil}}, func(e extension) probe.Order {
			return hello(addrA, h.named(e).bytes())
		}),
		Answer: alerted, Log: denied("bad-hello"),
	})
	t.Try(Try{
		What: "an address for a name", By: s,
		Orders: each([]string{addrA.String(), addrB.String(), "::1", "[::1]", twin(addrB).String()}, func(name string) probe.Order {
			return hello(addrB, h.named(hostName(name)).bytes())
		}),
		Answer: alerted, Log: denied("bad-hello"),
	})
}

func ambiguousHello(t *Trial) {
	s := t.Sandbox(standard())
	h := newHello(nameA)
	helloControl(t, s)
	a, b := hostName(nameA), hostName(nameB)
	t.Try(Try{
		What: "two extensions, in every order", By: s,
		Orders: each([][]extension{{a, b}, {b, a}, {a, a}}, func(exts []extension) probe.Order {
			return hello(addrB, h.named(exts...).bytes())
		}),
		Never: []string{nameA, nameB}, Answer: alerted, Log: denied("bad-hello"),
	})
	t.Try(Try{
		What: "two entries in one extension", By: s,
		Orders: each([][]entry{{{0, nameA}, {0, nameB}}, {{0, nameB}, {0, nameA}}, {{0, nameA}, {0, nameA}}}, func(list []entry) probe.Order {
			return hello(addrB, h.named(serverName(list...)).bytes())
		}),
		Never: []string{nameA, nameB}, Answer: alerted, Log: denied("bad-hello"),
	})
	t.Try(Try{
		What: "an unknown name type, alone and beside A", By: s,
		Orders: each([][]entry{{{1, nameA}}, {{0, nameA}, {1, nameB}}, {{255, nameB}, {0, nameA}}}, func(list []entry) probe.Order {
			return hello(addrB, h.named(serverName(list...)).bytes())
		}),
		Never: []string{nameA, nameB}, Answer: alerted, Log: denied("bad-hello"),
	})
	trailing := func(b []byte) []byte { return append(slices.Clone(b), 0) }
	t.Try(Try{
		What: "bytes behind the list, behind the hello in its record", By: s,
		Orders: []probe.Order{
			hello(addrB, h.named(extension{extServerName, trailing(a.data)}).bytes()),
			hello(addrB, overlong(h.bytes())),
		},
		Never: []string{nameA, nameB}, Answer: alerted, Log: denied("bad-hello"),
	})
}

// overlong adds a second message to the record of the first.
func overlong(record []byte) []byte {
	n := int(record[3])<<8 | int(record[4])
	out := append(slices.Clone(record), record[5:5+4]...)
	n += 4
	out[3], out[4] = byte(n>>8), byte(n)
	return out
}

func segmentedHello(t *Trial) {
	s := t.Sandbox(standard())
	byByte := func(name string) probe.Order {
		o := https(addrAttacker, name, get(name, "/"))
		o.Segment = 1
		return o
	}
	t.Try(Try{
		What: "A's, byte by byte: the whole exchange works", By: s,
		Orders: []probe.Order{byByte(nameA)}, Slow: 8 * time.Second,
		Reaches: []Arrival{{At: addrA, Port: 443}}, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "B's, byte by byte", By: s,
		Orders: []probe.Order{byByte(nameB)}, Slow: 8 * time.Second,
		Never: []string{nameB}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
}

func recordedHello(t *Trial) {
	s := t.Sandbox(standard())
	sizes := []int{1, 3, 16, 100, 500}
	cutInto := func(name string) []probe.Order {
		return each(sizes, func(size int) probe.Order {
			o := https(addrAttacker, name, get(name, "/"))
			o.TLS.Record = size
			return o
		})
	}
	t.Try(Try{
		What: "A's, in records of 1 to 500 bytes: the name is cut, A works", By: s, Orders: cutInto(nameA),
		Reaches: []Arrival{{At: addrA, Port: 443}}, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "B's, in records of 1 to 500 bytes", By: s, Orders: cutInto(nameB),
		Never: []string{nameB}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	inside := newHello(nameB).bytes()
	middle := bytes.Index(inside, []byte(nameB)) + 3 - 5
	split := append(probe.Records(inside[:5+middle], middle), recordOf(inside[5+middle:])...)
	split[3], split[4] = byte(middle>>8), byte(middle)
	t.Try(Try{
		What: "B's, in two records with an alert or empty records between", By: s,
		Orders: []probe.Order{
			hello(addrA, split),
			hello(addrA, slices.Concat(split[:5+middle], []byte{21, 3, 3, 0, 2, 1, 0}, split[5+middle:])),
			hello(addrA, slices.Concat(split[:5+middle], []byte{22, 3, 3, 0, 0}, split[5+middle:])),
		},
		Never: []string{nameB}, Answer: alerted, Log: denied("name-denied", "bad-hello"),
	})
}

func recordOf(payload []byte) []byte { return vector16([]byte{22, 3, 1}, payload) }

func largeHello(t *Trial) {
	s := t.Sandbox(standard())
	padded := func(name string) []probe.Order {
		return each([]int{0, 5 << 10, 16 << 10, 40 << 10, 60 << 10}, func(size int) probe.Order {
			o := https(addrAttacker, name, get(name, "/"))
			o.TLS.Padding = size
			return o
		})
	}
	t.Try(Try{
		What: "A's, post-quantum and of 5 to 60 KiB: A works", By: s, Orders: padded(nameA),
		Reaches: []Arrival{{At: addrA, Port: 443}}, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "B's, the same", By: s, Orders: padded(nameB),
		Never: []string{nameB}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	padding := make([]extension, 2)
	for i := range padding {
		padding[i] = extension{uint16(0xfa00 + i), make([]byte, 35<<10)}
	}
	t.Try(Try{
		What: "A's, of 70 KiB: over the cap", By: s,
		Orders: []probe.Order{hello(addrA, newHello(nameA).with(padding...).bytes())},
		Never:  []string{nameA}, Answer: cut, Log: denied("sniff-too-big"),
	})
}

// endlessHello: what never shows a whole name is ended by the deadline.
func endlessHello(t *Trial) {
	s := t.Sandbox(standard())
	whole := newHello(nameA).bytes()
	dribble := hello(addrA)
	for i := range 12 {
		dribble.Parts = append(dribble.Parts, whole[i:i+1])
	}
	dribble.Gap, dribble.Within = time.Second, 15*time.Second
	patient := func(o probe.Order) probe.Order { o.Within = 15 * time.Second; return o }
	t.Try(Try{
		What: "all but its last byte, one byte a second, nothing at all", By: s, Slow: 8 * time.Second,
		Orders: []probe.Order{
			patient(hello(addrA, whole[:len(whole)-1])), patient(hello(addrAttacker, whole[:20])), dribble, patient(hello(addrAttacker)),
		},
		Never: []string{nameA}, Answer: cut, Log: denied("sniff-timeout"),
	})
	t.Try(Try{
		What: "control: the last byte two seconds late", By: s, Slow: 8 * time.Second,
		Orders: []probe.Order{{
			Kind: probe.Stream, To: at(addrA, 443), Want: 6, Gap: 2 * time.Second,
			Parts: [][]byte{whole[:len(whole)-1], whole[len(whole)-1:]},
		}},
		Reaches: []Arrival{{At: addrA, Port: 443}}, Answer: serverHello, Log: allowed("allow-name"),
	})
}

func encryptedHello(t *Trial) {
	s := t.Sandbox(standard())
	outerA, err := echList(nameA)
	t.must("make an ECH configuration", err)
	outerB, err := echList(nameB)
	t.must("make an ECH configuration", err)
	hidden := func(name string, list []byte) probe.Order {
		o := https(addrB, name, get(name, "/"))
		o.TLS.ECH = list
		return o
	}
	t.Try(Try{
		What: "B outside, A hidden: the outer name decides", By: s,
		Orders: []probe.Order{hidden(nameA, outerB)},
		Never:  []string{nameB}, Answer: alerted, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "A outside, B hidden, to B's address: A gets it, and has no key", By: s,
		Orders:  []probe.Order{hidden(nameB, outerA)},
		Reaches: []Arrival{{At: addrA, Port: 443, Text: nameA}}, Never: []string{nameB},
		Answer: func(got probe.Outcome) error {
			if got.Secured || !strings.Contains(got.End, "ECH") {
				return errors.New("the server did not reject the encrypted hello")
			}
			return nil
		},
		Log: allowed("allow-name"),
	})
	keys := t.Sandbox(only("ech.test"))
	t.Try(Try{
		What: "keys in HTTPS and SVCB answers are removed", By: keys,
		Orders: []probe.Order{ask(addrDNS, "ech.test", dns.TypeHTTPS), ask(addrDNS, "_svc.ech.test", dns.TypeSVCB)},
		Asks:   []string{"ech.test", "_svc.ech.test"}, Log: allowed("allow-name"),
		Answer: func(got probe.Outcome) error { return noECH(got.Replies) },
	})
	t.Try(Try{
		What: "control: the internet's own answer has keys", Reaches: []Arrival{{At: addrDNS, Port: 53}},
		Do: func(ctx context.Context) error {
			reply, err := t.suite.stand.ask(ctx, "ech.test", dns.TypeHTTPS)
			if err == nil && noECH([][]byte{reply}) == nil {
				err = errors.New("it has none")
			}
			return err
		},
	})
}

// noECH: a DNS answer came, with records, none of which has encrypted-hello keys.
func noECH(replies [][]byte) error {
	if len(replies) != 1 {
		return errors.New("not one reply")
	}
	var m dns.Msg
	if err := m.Unpack(replies[0]); err != nil {
		return err
	}
	if m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0 {
		return fmt.Errorf("the reply has no records: %s", dns.RcodeToString[m.Rcode])
	}
	for _, rr := range m.Answer {
		var values []dns.SVCBKeyValue
		switch v := rr.(type) {
		case *dns.HTTPS:
			values = v.Value
		case *dns.SVCB:
			values = v.Value
		}
		for _, kv := range values {
			if kv.Key() == dns.SVCB_ECHCONFIG {
				return errors.New("the reply has ECH keys")
			}
		}
	}
	return nil
}

func wrongProtocol(t *Trial) {
	s := t.Sandbox(standard())
	silent := tcp(addrAttacker, 443)
	silent.Within = 15 * time.Second
	t.Try(Try{
		What: "HTTP for A on 443", By: s, Orders: []probe.Order{hello(addrA, get(nameA, "/"))},
		Never: []string{nameA}, Answer: cut, Log: denied("protocol-mismatch"),
	})
	t.Try(Try{
		What: "TLS for A on 80", By: s, Orders: []probe.Order{http80(addrA, newHello(nameA).bytes())},
		Never: []string{nameA}, Answer: cut, Log: denied("protocol-mismatch"),
	})
	t.Try(Try{
		What: "SSH on 443 and on 80", By: s,
		Orders: []probe.Order{tcp(addrAttacker, 443, []byte("SSH-2.0-evade\r\n")), tcp(addrAttacker, 80, []byte("SSH-2.0-evade\r\n"))},
		Never:  []string{"evade"}, Answer: cut, Log: denied("protocol-mismatch", "bad-request"),
	})
	t.Try(Try{
		What: "SSH on 443, waiting for the server to begin", By: s, Orders: []probe.Order{silent}, Slow: 8 * time.Second,
		Answer: cut, Log: denied("sniff-timeout"),
	})
	byAddr := t.Sandbox(only(addrAttacker.String()))
	t.Try(Try{
		What: "control: SSH to an allowed address", By: byAddr,
		Orders: []probe.Order{{
			Kind: probe.Stream, To: at(addrAttacker, 22), Parts: [][]byte{[]byte("SSH-2.0-evade\r\n")}, Turns: true, Want: 30,
		}},
		Reaches: []Arrival{{At: addrAttacker, Port: 22, Text: "evade"}}, Answer: answered, Log: allowed("allow-address"),
	})
}

// quicInitial has the form of a QUIC Initial packet (RFC 9000 section 17.2.2),
// with a text where the hello would be.
func quicInitial(text string) []byte {
	p := append([]byte{0xc3, 0, 0, 0, 1, 8}, "01234567"...)
	p = append(p, 0, 0, 0x44, 0xb0)
	p = append(p, text...)
	return append(p, make([]byte, 1200-len(p))...)
}

func quic(t *Trial) {
	s := t.Sandbox(standard())
	packet := quicInitial("quic canary")
	t.Try(Try{
		What: "UDP 443 to B, to A, to a shared address", By: s,
		Orders: []probe.Order{udp(addrB, 443, packet), udp(addrA, 443, packet), udp(addrShared, 443, packet)},
		Never:  []string{"quic canary"}, Answer: unanswered, Log: denied("deny-address"),
	})
	byAddr := t.Sandbox(only(addrB.String()))
	t.Try(Try{
		What: "control: UDP 443 to an allowed address", By: byAddr,
		Orders:  []probe.Order{udp(addrB, 443, packet)},
		Reaches: []Arrival{{At: addrB, Port: 443, Text: "quic canary"}}, Log: allowed("allow-address"),
	})
}

func startTLS(t *Trial) {
	dialogue := func(a string, port uint16) probe.Order {
		return probe.Order{
			Kind: probe.Stream, To: fmt.Sprintf("%s:%d", a, port), Turns: true, Want: 50,
			Parts: [][]byte{nil, []byte("EHLO canary\r\n"), []byte("STARTTLS\r\n")},
		}
	}
	s := t.Sandbox(standard())
	var orders []probe.Order
	for _, port := range []uint16{25, 587, 143, 110, 5432} {
		orders = append(orders, dialogue(addrA.String(), port), dialogue(addrB.String(), port))
	}
	t.Try(Try{
		What: "mail and database ports of A and B", By: s, Orders: orders,
		Never: []string{"canary"}, Answer: refused, Log: denied("deny-address"),
	})
	pinned := t.Sandbox(only(nameA + ":587"))
	t.Try(Try{
		What: "the same under a rule for A:587, before A was resolved", By: pinned,
		Orders: []probe.Order{dialogue(addrA.String(), 587)},
		Never:  []string{"canary"}, Answer: refused, Log: denied("no-name", "deny-address"),
	})
	t.Try(Try{
		What: "resolve A", By: pinned, Orders: []probe.Order{ask(addrDNS, nameA, dns.TypeA)},
		Asks: []string{nameA}, Answer: resolvesTo(addrA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "control: A:587 now works", By: pinned, Orders: []probe.Order{dialogue(addrA.String(), 587)},
		Reaches: []Arrival{{At: addrA, Port: 587, Text: "STARTTLS"}}, Answer: answered, Log: allowed("pinned"),
	})
	t.Try(Try{
		What: "and neither B:587 nor A:25", By: pinned,
		Orders: []probe.Order{dialogue(addrB.String(), 587), dialogue(addrA.String(), 25)},
		Never:  []string{"canary"}, Answer: refused, Log: denied("no-name", "deny-address"),
	})
}

// beforeHello: where a rule names the port, what comes before a ClientHello does not
// hide its name. The records here are ones that no TLS server takes first.
func beforeHello(t *Trial) {
	s := t.Fresh(only(nameShared + ":8443"))
	t.Try(Try{
		What: "resolve a name that shares its address", By: s, Orders: []probe.Order{ask(addrDNS, nameShared, dns.TypeA)},
		Asks: []string{nameShared}, Answer: resolvesTo(addrShared), Log: allowed("allow-name"),
	})
	own, other := newHello(nameShared).bytes(), newHello(nameNeighbor).bytes()
	behind := func(first string, gap time.Duration) []probe.Order {
		return each([][]byte{own, other}, func(hello []byte) probe.Order {
			o := tcp(addrShared, 8443, append([]byte(first), hello...))
			if gap > 0 {
				o.Parts, o.Gap = append([][]byte{nil}, o.Parts...), gap
			}
			return o
		})
	}
	data, beat := "\x17\x03\x03\x00\x01\x00", "\x18\x03\x03\x00\x01\x00"
	t.Try(Try{
		What: "application data or a heartbeat, then its own hello or its neighbour's", By: s,
		Orders: slices.Concat(behind(data, 0), behind(beat, 0)),
		Never:  []string{nameShared, nameNeighbor}, Answer: alerted, Log: denied("bad-hello"),
	})
	t.Try(Try{
		What: "a preamble of the PROXY protocol, then the same", By: s,
		Orders: slices.Concat(behind("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", 0), behind("\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", 0)),
		Never:  []string{nameShared, nameNeighbor, "PROXY", "QUIT"}, Answer: reset, Log: denied("bad-request"),
	})
	t.Try(Try{
		What: "after a silence in which the server could have spoken: no byte passes", By: s,
		Orders:  slices.Concat(behind(data, 600*time.Millisecond), behind("PROXY UNKNOWN\r\n", 600*time.Millisecond)),
		Reaches: []Arrival{{At: addrShared, Port: 8443}}, Never: []string{nameShared, nameNeighbor, "PROXY"}, Answer: cut, Log: denied("bad-hello", "bad-request"),
	})
	o := https(addrShared, nameShared, get(nameShared+":8443", "/"))
	o.To = at(addrShared, 8443)
	t.Try(Try{
		What: "control: the handshake of its own name", By: s, Orders: []probe.Order{o},
		Reaches: []Arrival{{At: addrShared, Port: 8443}}, Answer: served(addrShared, nameShared+":8443"), Log: allowed("allow-name"),
	})
}

// secondHello: the hello that follows a server's retry request shows the name of the
// first. The one for B here has no key, as the first has none: no server goes on with it.
func secondHello(t *Trial) {
	s := t.Sandbox(standard())
	h := newHello(nameA)
	first, second := h.offering(nil), h.offering(h.x25519Share())
	other := first.named(hostName(nameB))
	retried := func(part clientHello) probe.Order {
		again := part.bytes()
		again[2] = 3 // RFC 8446 section 5.1
		o := tcp(addrAttacker, 443, first.bytes(), again)
		o.Turns, o.HalfClose = true, true
		return o
	}
	t.Try(Try{
		What: "control: a server asks for a second hello, gets it and answers", By: s, Orders: []probe.Order{retried(second)},
		Reaches: []Arrival{{At: addrA, Port: 443, Text: nameA}}, Log: allowed("allow-name"),
		Answer: func(got probe.Outcome) error {
			if bytes.Count(got.Received, []byte{22, 3, 3}) < 2 {
				return errors.New("not two answers came")
			}
			return serverHello(got)
		},
	})
	t.Try(Try{
		What: "A's, then B's when the server asks for a second", By: s, Orders: []probe.Order{retried(other)},
		Reaches: []Arrival{{At: addrA, Port: 443, Text: nameA}}, Never: []string{nameB}, Log: Want{"deny", []string{"bad-hello"}, nameB},
		Answer: func(got probe.Outcome) error {
			if !bytes.HasSuffix(got.Received, accessDenied) {
				return errors.New("no access_denied alert came")
			}
			return nil
		},
	})
	t.Try(Try{
		What: "A's and B's in one segment, alone and with early data between", By: s,
		Orders: []probe.Order{
			tcp(addrA, 443, append(first.bytes(), other.bytes()...)),
			tcp(addrA, 443, slices.Concat(first.bytes(), []byte("\x17\x03\x03\x00\x05early"), other.bytes())),
		},
		Reaches: []Arrival{{At: addrA, Port: 443, Text: nameA}}, Never: []string{nameB}, Log: Want{"deny", []string{"bad-hello"}, nameB},
	})
}
