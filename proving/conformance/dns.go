package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func dnsCases() []Case {
	const group = "DNS"
	return []Case{
		{ID: 46, Group: group, Title: "a tunnel to an unlisted zone", Run: unlistedTunnel},
		{ID: 47, Group: group, Title: "a tunnel under an allowed wildcard (residual: its budget)", Run: listedTunnel},
		{ID: 48, Group: group, Title: "odd types, EDNS, 0x20", Run: oddQuestions},
		{ID: 49, Group: group, Title: "what is not DNS, other resolvers, TCP", Run: otherResolvers},
		{ID: 50, Group: group, Title: "DNS over TLS, QUIC and HTTPS", Run: encryptedDNS},
		{ID: 51, Group: group, Title: "rebinding", Run: rebinding},
		{ID: 52, Group: group, Title: "an alias to elsewhere", Run: aliases},
		{ID: 53, Group: group, Title: "reuse of a learned address", Run: learnedAddress, Within: time.Minute},
		{ID: 54, Group: group, Title: "games with TTLs", Run: ttlGames},
		{ID: 56, Group: group, Title: "/etc/hosts, mDNS, LLMNR", Run: otherNames},
		{ID: 78, Group: group, Title: "names shown to the proxy, beside those asked for", Run: shownNames},
	}
}

func unlistedTunnel(t *Trial) {
	s := t.Sandbox(standard())
	name := func(i int) string { return fmt.Sprintf("736563726574%d.%s", i, nameTunnel) }
	var orders []probe.Order
	for i, qtype := range []uint16{dns.TypeTXT, dns.TypeA, dns.TypeAAAA, dns.TypeMX, dns.TypeSRV, dns.TypeHTTPS, dns.TypeCNAME} {
		orders = append(orders, ask(addrDNS, name(i), qtype), askTCP(addrDNS, query(name(i), qtype)))
	}
	t.Try(Try{
		What: "data in labels, by seven types, UDP and TCP", By: s, Orders: orders,
		Never: []string{"736563726574", nameTunnel}, Answer: blocked, Log: denied("name-denied"), LogLines: len(orders) / 2,
	})
	t.Try(Try{
		What: "in reverse names, and in B's", By: s,
		Orders: []probe.Order{ask(addrDNS, "20.100.51.198.in-addr.arpa", dns.TypePTR), ask(addrDNS, "736563726574."+nameB, dns.TypeTXT)},
		Never:  []string{"736563726574", nameB}, Answer: blocked, Log: denied("name-denied"),
	})
	open := t.Sandbox(everything())
	t.Try(Try{
		What: "control: without rules the tunnel is open", By: open, Orders: []probe.Order{ask(addrDNS, name(99), dns.TypeTXT)},
		Asks: []string{name(99)}, Log: allowed("default"),
		Answer: func(got probe.Outcome) error {
			if len(got.Replies) == 0 || !bytes.Contains(got.Replies[0], []byte("the tunnel is open")) {
				return errors.New("it is not")
			}
			return nil
		},
	})
}

// listedTunnel: who is allowed to ask for any name under a zone can send its
// owner bytes in them; how many a minute is what is promised.
func listedTunnel(t *Trial) {
	const budget, atOnce = 100, 80 // more at once would be too many questions, whatever for
	s := t.Fresh(only("*." + nameTunnel))
	name := func(i int) string { return fmt.Sprintf("x%d.%s", i, nameTunnel) }
	names := func(from int, leave int, log Want) {
		orders := make([]probe.Order, atOnce)
		for i := range orders {
			orders[i] = ask(addrDNS, name(from+i), dns.TypeTXT)
		}
		t.Try(Try{
			What: fmt.Sprintf("%d names at once: %d leave", atOnce, leave), By: s, Orders: orders, LogOnce: true,
			Do: func(context.Context) error {
				left := map[string]bool{}
				for _, q := range t.suite.wire.since(t.suite.stand.lab.Recorder()).Questions() {
					left[q.Name] = true
				}
				if len(left) != leave {
					return fmt.Errorf("%d names left the host", len(left))
				}
				return nil
			},
			Asks: []string{nameTunnel}, Log: log,
			Answer: func(got probe.Outcome) error {
				m, err := reply(got)
				if err == nil && m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeRefused {
					err = errors.New("neither an answer nor REFUSED")
				}
				return err
			},
		})
	}
	names(0, atOnce, allowed("allow-name"))
	names(atOnce, budget-atOnce, denied("budget-labels"))
	t.Try(Try{
		What: "a name that was counted already costs nothing", By: s, Orders: []probe.Order{ask(addrDNS, name(0), dns.TypeTXT)},
		Asks: []string{nameTunnel}, Answer: answeredWith(dns.RcodeSuccess), Log: allowed("allow-name"),
	})
}

// shownNames: a name in a Host header or a TLS hello leaves the host like one in a
// question, and comes out of the same budget.
func shownNames(t *Trial) {
	const shown, asked, budget = 50, 80, 100
	s := t.Fresh(only("*." + nameWild))
	name := func(i int) string { return fmt.Sprintf("s78-%d.%s", i, nameWild) }
	orders := make([]probe.Order, shown)
	for i := range orders {
		orders[i] = http80(addrWild, get(name(i), "/"))
	}
	t.Try(Try{
		What: fmt.Sprintf("%d names in Host", shown), By: s, Orders: orders, Slow: 10 * time.Second,
		Reaches: []Arrival{{At: addrWild, Port: 80}}, Asks: []string{nameWild}, Log: allowed("allow-name"),
	})
	orders = make([]probe.Order, asked)
	for i := range orders {
		orders[i] = ask(addrDNS, name(shown+i), dns.TypeTXT)
	}
	t.Try(Try{
		What: fmt.Sprintf("%d more in questions: %d leave", asked, budget-shown), By: s, Orders: orders, LogOnce: true,
		Asks: []string{nameWild}, Log: denied("budget-labels"),
		Do: func(context.Context) error {
			left := map[string]bool{}
			for _, q := range t.suite.wire.since(t.suite.stand.lab.Recorder()).Questions() {
				left[q.Name] = true
			}
			if len(left) != budget-shown {
				return fmt.Errorf("%d names left the host", len(left))
			}
			return nil
		},
	})
	t.Try(Try{
		What: "and one more in Host and in a hello", By: s, Slow: 10 * time.Second,
		Orders: []probe.Order{http80(addrWild, get("canary."+nameWild, "/")), hello(addrWild, newHello("canary2."+nameWild).bytes())},
		Never:  []string{"canary"}, Log: denied("budget"),
		Answer: func(got probe.Outcome) error {
			if len(got.Received) > 200 {
				return errors.New("somebody answered")
			}
			return nil
		},
	})
}

func oddQuestions(t *Trial) {
	s := t.Sandbox(standard())
	types := []uint16{dns.TypeANY, dns.TypeNULL, dns.TypeAXFR, dns.TypeIXFR, dns.TypeNAPTR, dns.TypeDNSKEY, dns.TypeLOC, 65399, dns.TypeTKEY}
	t.Try(Try{
		What: "types nobody needs, about A", By: s, Orders: each(types, func(qt uint16) probe.Order { return ask(addrDNS, nameA, qt) }),
		Answer: answeredWith(dns.RcodeRefused), Log: denied("query-type"),
	})
	chaos := new(dns.Msg).SetQuestion("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	update := new(dns.Msg).SetUpdate(nameA + ".")
	notify := new(dns.Msg).SetNotify(nameA + ".")
	t.Try(Try{
		What: "other classes and opcodes", By: s, Orders: each([]*dns.Msg{chaos, update, notify}, func(m *dns.Msg) probe.Order {
			return question(addrDNS, m)
		}),
		Answer: func(got probe.Outcome) error {
			m, err := reply(got)
			if err == nil && m.Rcode == dns.RcodeSuccess {
				err = errors.New("it was answered")
			}
			return err
		}, Log: denied("query-type"),
	})
	two := new(dns.Msg).SetQuestion(nameA+".", dns.TypeA)
	two.Question = append(two.Question, dns.Question{Name: nameB + ".", Qtype: dns.TypeA, Qclass: dns.ClassINET})
	answer := new(dns.Msg).SetQuestion(nameA+".", dns.TypeA)
	answer.Answer = []dns.RR{txt(nameB)}
	t.Try(Try{
		What: "two questions, an answer in a question", By: s,
		Orders: []probe.Order{question(addrDNS, two), question(addrDNS, answer)},
		Never:  []string{nameA, nameB, "canary"}, Answer: answeredWith(dns.RcodeFormatError), Log: denied("malformed"),
	})
	response := new(dns.Msg).SetQuestion(nameB+".", dns.TypeA)
	response.Response = true
	t.Try(Try{
		What: "a response", By: s, Orders: []probe.Order{udp(addrDNS, 53, pack(response))},
		Never: []string{nameB}, Answer: unanswered, Log: denied("malformed"),
	})
	carried(t, s)
}

func txt(name string) *dns.TXT {
	return &dns.TXT{Hdr: dns.RR_Header{Name: name + ".", Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{"canary"}}
}

// carried: whatever rides on an allowed question stays behind.
func carried(t *Trial, s *Subject) {
	options := new(dns.Msg).SetQuestion("e48."+nameWild+".", dns.TypeA)
	options.SetEdns0(4096, true)
	opt := options.IsEdns0()
	opt.Option = []dns.EDNS0{
		&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("canary-option")}, &dns.EDNS0_PADDING{Padding: []byte("canary-padding")},
		&dns.EDNS0_NSID{Code: dns.EDNS0NSID, Nsid: "63616e617279"}, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "63616e6172792d31"},
		&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 32, Address: addrB.AsSlice()},
	}
	extra := new(dns.Msg).SetQuestion("f48."+nameWild+".", dns.TypeA)
	extra.Extra = []dns.RR{txt("canary." + nameB)}
	mixed := new(dns.Msg).SetQuestion("G48.WiLd.tEsT.", dns.TypeA)
	mixed.Id = 0xc0de
	t.Try(Try{
		What: "EDNS options, extra records, the case of letters, the ID", By: s,
		Orders: []probe.Order{question(addrDNS, options), question(addrDNS, extra), question(addrDNS, mixed)},
		Asks:   []string{nameWild}, Never: []string{"canary", nameB}, Answer: resolvesTo(addrWild), Log: allowed("allow-name"),
		Do: func(context.Context) error {
			sent := t.suite.wire.since(t.suite.stand.lab.Recorder())
			if sent.Contains([]byte("WiLd")) || sent.Contains([]byte{0xc0, 0xde, 1}) {
				return errors.New("the sandbox's spelling or ID left the host")
			}
			if !sent.AskedFor("g48." + nameWild) {
				return errors.New("the question itself did not leave") // or this proves nothing
			}
			return nil
		},
	})
}

func otherResolvers(t *Trial) {
	s := t.Sandbox(standard())
	garbage := []byte("canary canary canary canary")
	t.Try(Try{
		What: "bytes that are no DNS, on UDP 53", By: s,
		Orders: []probe.Order{udp(addrDNS, 53, garbage), udp(addrDNS, 53, []byte("canary")), udp(addrDNS, 53, quicInitial("canary"))},
		Never:  []string{"canary"}, Log: denied("malformed", "query-type"),
	})
	t.Try(Try{
		What: "HTTP, TLS and SSH on TCP 53", By: s,
		Orders: []probe.Order{
			tcp(addrDNS, 53, get(nameA, "/canary")), tcp(addrDNS, 53, newHello(nameA).bytes()), tcp(addrDNS, 53, []byte("SSH-2.0-canary\r\n")),
			tcp(addrDNS, 53, append([]byte{0, 30}, "canary, as long as announced:)"...)),
		},
		Never: []string{"canary", nameA}, Slow: 12 * time.Second,
		Answer: func(got probe.Outcome) error {
			if len(got.Received) > 100 {
				return errors.New("somebody answered")
			}
			return nil
		},
	})
	others := []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.4.4"), addrAttacker}
	t.Try(Try{
		What: "other resolvers, UDP: refused, even for A", By: s,
		Orders: each(others, func(a netip.Addr) probe.Order { return ask(a, nameA, dns.TypeA) }),
		Answer: answeredWith(dns.RcodeRefused), Log: denied("deny-address", "no-name"), LogLines: 1,
	})
	t.Try(Try{
		What: "other resolvers, UDP, for B", By: s,
		Orders: each(others, func(a netip.Addr) probe.Order { return ask(a, nameB, dns.TypeA) }),
		Answer: blocked, Log: Want{"deny", []string{"name-denied"}, nameB}, LogLines: 1,
	})
	t.Try(Try{
		What: "other resolvers, TCP", By: s,
		Orders: each(others, func(a netip.Addr) probe.Order { return askTCP(a, query(nameA, dns.TypeA)) }),
		Answer: refused, Log: denied("deny-address", "no-name"),
	})
	t.Try(Try{
		What: "B over TCP, behind A on the same connection", By: s,
		Orders: []probe.Order{{
			Kind: probe.Stream, To: at(addrDNS, 53), Turns: true, Want: 120,
			Parts: [][]byte{vector16(nil, query(nameA, dns.TypeA)), vector16(nil, query("behind."+nameB, dns.TypeA))},
		}},
		Asks: []string{nameA}, Never: []string{nameB}, Log: Want{"deny", []string{"name-denied"}, "behind." + nameB},
	})
	t.Try(Try{
		What: "control: A over TCP", By: s, Orders: []probe.Order{askTCP(addrDNS, query(nameA, dns.TypeA))},
		Asks: []string{nameA}, Answer: resolvesTo(addrA), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "control: another resolver's address, where the rules allow it", By: t.Sandbox(only("1.1.1.1")),
		Orders: []probe.Order{ask(others[0], nameB, dns.TypeA)}, Asks: []string{nameB}, Answer: resolvesTo(addrB), Log: allowed("default"),
	})
}

func encryptedDNS(t *Trial) {
	s := t.Sandbox(standard())
	dot := func(port uint16) probe.Order {
		o := tcp(addrDNS, port, newHello("dns.google").bytes())
		o.Want = 6
		return o
	}
	t.Try(Try{
		What: "DNS over TLS", By: s, Orders: []probe.Order{dot(853), dot(8853)},
		Never: []string{"dns.google"}, Answer: refused, Log: denied("deny-address"),
	})
	t.Try(Try{
		What: "DNS over QUIC", By: s,
		Orders: []probe.Order{udp(addrDNS, 853, quicInitial("canary")), udp(addrDNS, 8853, quicInitial("canary")), udp(addrDNS, 443, quicInitial("canary"))},
		Never:  []string{"canary"}, Answer: unanswered, Log: denied("deny-address"), LogOnce: true,
	})
	t.Try(Try{
		What: "DNS over HTTPS, by name and by address", By: s,
		Orders: []probe.Order{https(addrDNS, "dns.google", get("dns.google", "/dns-query")), hello(addrDNS, newHello(nameA).named().bytes())},
		Never:  []string{"dns.google"}, Answer: alerted, Log: denied("name-denied", "no-sni"),
	})
	open := t.Sandbox(everything())
	t.Try(Try{
		What: "discovery of encrypted resolvers: no such name", By: open,
		Orders: []probe.Order{ask(addrDNS, "_dns.resolver.arpa", dns.TypeSVCB), ask(addrDNS, "use-application-dns.net", dns.TypeA)},
		Answer: answeredWith(dns.RcodeNameError), Log: allowed("local"),
	})
	t.Try(Try{
		What: "control: DNS over TLS where the address is allowed", By: t.Sandbox(only(addrDNS.String())), Orders: []probe.Order{dot(853)},
		Reaches: []Arrival{{At: addrDNS, Port: 853, Text: "dns.google"}}, Answer: answered, Log: allowed("allow-address"),
	})
}

func rebinding(t *Trial) {
	open := t.Sandbox(everything())
	names := []string{"private.test", "alias-private.test", "host.test", "any.test"}
	t.Try(Try{
		What: "names that lead to private addresses, the host", By: open,
		Orders: each(names, func(n string) probe.Order { return ask(addrDNS, n, dns.TypeA) }), Asks: names,
		Answer: resolvesTo(), Log: denied("rebinding"),
	})
	t.Try(Try{
		What: "a name that leads to the loopback: handed out, as it leads nowhere else", By: open,
		Orders: []probe.Order{ask(addrDNS, "loopback.test", dns.TypeA)}, Asks: []string{"loopback.test"},
		Answer: resolvesTo(netip.MustParseAddr("127.0.0.1")), Log: allowed("default"),
	})
	t.Try(Try{
		What: "names that are the sandbox itself, whatever its rules", By: t.Sandbox(standard()),
		Orders: []probe.Order{ask(addrDNS, "localhost", dns.TypeA), ask(addrDNS, "t1.localhost", dns.TypeA), ask(netip.MustParseAddr("1.1.1.1"), "t1.localhost", dns.TypeA)},
		Answer: resolvesTo(netip.MustParseAddr("127.0.0.1")), Log: allowed("local"),
	})
	t.Try(Try{
		What: "a public and a private address: the public one is left", By: open,
		Orders: []probe.Order{ask(addrDNS, "private-mixed.test", dns.TypeA)}, Asks: []string{"private-mixed.test"},
		Answer: resolvesTo(addrA), Log: allowed("default"),
	})
	for i := range 3 {
		t.Try(Try{
			What: fmt.Sprintf("an address that changes after the first answer, question %d", i+1), By: open,
			Orders: []probe.Order{ask(addrDNS, "flip.test", dns.TypeA)}, Asks: []string{"flip.test"},
			Answer: func(got probe.Outcome) error {
				m, err := reply(got)
				if err == nil && slices.ContainsFunc(addresses(m), netip.Addr.IsPrivate) {
					err = errors.New("a private address was handed out")
				}
				return err
			},
		})
		time.Sleep(1100 * time.Millisecond) // what it may be kept for
	}
	t.Try(Try{
		What: "private hints in service bindings", By: open, Asks: []string{"ech.test", "_svc.ech.test"},
		Orders: []probe.Order{ask(addrDNS, "ech.test", dns.TypeHTTPS), ask(addrDNS, "_svc.ech.test", dns.TypeSVCB)},
		Answer: func(got probe.Outcome) error {
			m, err := reply(got)
			if err == nil && (len(m.Answer) == 0 || strings.Contains(m.String(), "10.0.0.5") || strings.Contains(m.String(), "fd00::5")) {
				err = errors.New("the hints are there, or nothing is")
			}
			return err
		}, Log: allowed("default"),
	})
	listed := t.Sandbox(only("private.test", "alias-private.test", "loopback.test", "host.test", "private-mixed.test"))
	t.Try(Try{
		What: "listed, through the proxy", By: listed, Asks: append(names, "loopback.test"),
		Orders: each([]string{"private.test", "alias-private.test", "loopback.test", "host.test"}, func(n string) probe.Order { return http80(addrA, get(n, "/canary")) }),
		Never:  []string{"canary"}, Answer: cut, Log: Want{Verdict: "fail", Reasons: []string{"resolve"}},
	})
	t.Try(Try{
		What: "control: through the proxy to the public one of two", By: listed,
		Orders:  []probe.Order{http80(addrB, get("private-mixed.test", "/"))},
		Reaches: reachesA, Answer: served(addrA, "private-mixed.test"), Log: allowed("allow-name"),
	})
}

// aliases: the owner of an allowed name may point it at any public address, and
// that is all the alias gives: the other name stays denied.
func aliases(t *Trial) {
	s := t.Sandbox(only("escape.test", "loop.test", "dangling.test"))
	t.Try(Try{
		What: "an allowed alias of B: its own name reaches B's address", By: s,
		Orders:  []probe.Order{http80(addrAttacker, get("escape.test", "/"))},
		Reaches: []Arrival{{At: addrB, Port: 80}}, Answer: served(addrB, "escape.test"), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "B's name there, by HTTP and TLS", By: s,
		Orders: []probe.Order{http80(addrB, get(nameB, "/canary")), hello(addrB, newHello(nameB).bytes())},
		Never:  []string{nameB, "canary"}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "B in DNS", By: s, Orders: []probe.Order{ask(addrDNS, nameB, dns.TypeA)}, Answer: blocked, Log: denied("name-denied"),
	})
	t.Try(Try{
		What: "aliases that lead nowhere or in circles, through the proxy", By: s, Asks: []string{"loop.test"},
		Orders: []probe.Order{http80(addrA, get("loop.test", "/")), http80(addrA, get("dangling.test", "/"))},
		Slow:   8 * time.Second, Answer: cut, Log: Want{Verdict: "fail", Reasons: []string{"resolve"}},
	})
}

func learnedAddress(t *Trial) {
	s := t.Sandbox(standard())
	t.Try(Try{
		What: "resolve an allowed name", By: s, Orders: []probe.Order{ask(addrDNS, nameShared, dns.TypeA)},
		Asks: []string{nameShared}, Answer: resolvesTo(addrShared), Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "its neighbour at that address, by TLS and HTTP", By: s,
		Orders: []probe.Order{https(addrShared, nameNeighbor, get(nameNeighbor, "/canary")), http80(addrShared, get(nameNeighbor, "/canary"))},
		Never:  []string{nameNeighbor, "canary"}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameNeighbor},
	})
	t.Try(Try{
		What: "that address on other ports", By: s,
		Orders: []probe.Order{tcp(addrShared, 8443, []byte("canary")), tcp(addrShared, 8080, []byte("canary")), tcp(addrShared, 22), tcp(addrShared, 4000, []byte("canary"))},
		Never:  []string{"canary"}, Answer: refused, Log: denied("deny-address"),
	})
	pinned, other := t.Fresh(only(nameShared+":4000")), t.Fresh(only(nameShared+":4000"))
	t.Try(Try{
		What: "resolve a name of a rule with a port", By: pinned, Orders: []probe.Order{ask(addrDNS, nameShared, dns.TypeA)},
		Asks: []string{nameShared}, Answer: resolvesTo(addrShared), Log: allowed("allow-name"),
	})
	echo := said(addrShared, 4000, "canary-53\r\n")
	t.Try(Try{
		What: "control: the port works", By: pinned, Orders: []probe.Order{echo},
		Reaches: []Arrival{{At: addrShared, Port: 4000, Text: "canary-53"}}, Answer: echoed(echo.Parts[0]), Log: allowed("pinned"),
	})
	t.Try(Try{
		What: "for another sandbox under the same rule, which did not ask", By: other, Orders: []probe.Order{echo},
		Never: []string{"canary-53"}, Answer: refused, Log: denied("no-name", "deny-address"),
	})
	t.Try(Try{
		What: "other ports and UDP at the pinned address", By: pinned,
		Orders: []probe.Order{tcp(addrShared, 8443, []byte("canary-53")), udp(addrShared, 4000, []byte("canary-53")), udp(addrShared, 4000, quicInitial("canary-53")), http80(addrShared, get(nameShared, "/canary-53"))},
		Never:  []string{"canary-53"}, Answer: unanswered, Log: denied("no-name", "deny-address", "name-denied", "name-tcp-only"),
	})
	sharedPort(t)
}

// said sends a line and waits for as much to come back.
func said(to netip.Addr, port uint16, line string) probe.Order {
	o := tcp(to, port, []byte(line))
	o.Want = len(line)
	return o
}

// sharedPort: a rule with a port opens that port of the addresses of its name, for
// that name. Whoever shares address and port is not reached by another name, however
// late or slowly that is shown; a server that speaks first is.
func sharedPort(t *Trial) {
	s := t.Fresh(only(nameShared+":8443", nameShared+":8080", nameShared+":22"))
	t.Try(Try{
		What: "resolve a name that shares its address", By: s, Orders: []probe.Order{ask(addrDNS, nameShared, dns.TypeA)},
		Asks: []string{nameShared}, Answer: resolvesTo(addrShared), Log: allowed("allow-name"),
	})
	secure := func(name string) probe.Order {
		o := https(addrShared, name, get(name+":8443", "/"))
		o.To = at(addrShared, 8443)
		return o
	}
	t.Try(Try{
		What: "control: its own name there, by TLS and HTTP", By: s,
		Orders:  []probe.Order{secure(nameShared), tcp(addrShared, 8080, get(nameShared+":8080", "/"))},
		Reaches: []Arrival{{At: addrShared, Port: 8443}, {At: addrShared, Port: 8080}}, Log: allowed("allow-name"),
		AnswerEach: func(i int, got probe.Outcome) error {
			return served(addrShared, nameShared+[]string{":8443", ":8080"}[i])(got)
		},
	})
	wrong := Want{"deny", []string{"name-denied"}, nameNeighbor}
	shown, request := newHello(nameNeighbor).bytes(), get(nameNeighbor+":8080", "/canary")
	t.Try(Try{
		What: "its neighbour there, by server name and by Host", By: s,
		Orders: []probe.Order{secure(nameNeighbor), tcp(addrShared, 8443, shown), tcp(addrShared, 8080, request)},
		Never:  []string{nameNeighbor, "canary"}, Answer: cut, Log: wrong,
	})
	slowly := func(port uint16, b []byte) probe.Order {
		o := tcp(addrShared, port, b)
		o.Segment = 1
		return o
	}
	t.Try(Try{
		What: "the same, one byte at a time", By: s, Slow: 10 * time.Second, Orders: []probe.Order{slowly(8443, shown), slowly(8080, request)},
		Never: []string{nameNeighbor, "canary"}, Answer: cut, Log: wrong,
	})
	t.Try(Try{
		What: "on a connection whose first request was for its own name", By: s,
		Orders:  []probe.Order{tcp(addrShared, 8080, append(keep(nameShared+":8080", "/"), request...))},
		Reaches: []Arrival{{At: addrShared, Port: 8080}}, Never: []string{nameNeighbor, "canary"}, Log: wrong,
	})
	t.Try(Try{
		What: "by HTTP/2 without TLS: the request is judged, the server sees the preface alone", By: s,
		Orders:  []probe.Order{tcp(addrShared, 8080, clearHTTP2(nameNeighbor+":8080", "/canary"))},
		Reaches: []Arrival{{At: addrShared, Port: 8080}}, Never: []string{nameNeighbor, "canary"}, Log: wrong,
		Answer: func(got probe.Outcome) error {
			if got.End != probe.EOF || !bytes.Contains(got.Received, []byte("denied by egress policy")) {
				return errors.New("the connection did not end with a denial")
			}
			return nil
		},
	})
	late := func(port uint16, b []byte) probe.Order {
		o := tcp(addrShared, port, nil, b)
		o.Gap = 600 * time.Millisecond
		return o
	}
	t.Try(Try{
		What: "after a silence in which the server could have spoken: no byte passes", By: s,
		Orders:  []probe.Order{late(8443, shown), late(8080, request)},
		Reaches: []Arrival{{At: addrShared, Port: 8443}, {At: addrShared, Port: 8080}}, Never: []string{nameNeighbor, "canary"}, Answer: cut, Log: wrong,
	})
	t.Try(Try{
		What: "what shows no name where one belongs, and what never ends", By: s, Slow: 8 * time.Second,
		Orders: []probe.Order{
			tcp(addrShared, 8443, newHello(nameShared).named().bytes()), tcp(addrShared, 8080, []byte("\r\nGET /canary HTTP/1.1\r\nHost: "+nameNeighbor+"\r\n\r\n")),
			tcp(addrShared, 8080, []byte("GET http://"+nameNeighbor+"/canary\r\n")), tcp(addrShared, 8080, []byte("GET /canary")),
		},
		Never: []string{nameNeighbor, "canary"}, Answer: cut, Log: denied("no-sni", "protocol-mismatch", "bad-request", "sniff-timeout"),
	})
	banner := tcp(addrShared, 22, nil, []byte("SSH-2.0-canary\r\n"))
	banner.Turns, banner.Want = true, 30
	t.Try(Try{
		What: "control: a server that speaks first", By: s, Orders: []probe.Order{banner},
		Reaches: []Arrival{{At: addrShared, Port: 22, Text: "SSH-2.0-canary"}}, Answer: answered, Log: allowed("pinned"),
	})
}

// clearHTTP2 is a GET by HTTP/2 with prior knowledge (RFC 9113 section 3.3), with no
// compression that would hide its text.
func clearHTTP2(authority, path string) []byte {
	block := []byte{0x82, 0x86, 0x04, byte(len(path))} // :method GET, :scheme http, :path
	block = append(append(block, path...), 0x01, byte(len(authority)))
	block = append(block, authority...)
	out := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0, 0, 0, 4, 0, 0, 0, 0, 0)
	out = append(out, 0, 0, byte(len(block)), 1, 5, 0, 0, 0, 1) // HEADERS, whole, on stream 1
	return append(out, block...)
}

func ttlGames(t *Trial) {
	s := t.Fresh(only("zero.test:4000", "forever.test", "short.test"))
	t.Try(Try{
		What: "an answer for a week is one for an hour", By: s, Orders: []probe.Order{ask(addrDNS, "forever.test", dns.TypeA)},
		Asks: []string{"forever.test"}, Log: allowed("allow-name"),
		Answer: func(got probe.Outcome) error {
			m, err := reply(got)
			if err == nil && (len(m.Answer) == 0 || m.Answer[0].Header().Ttl > 3600) {
				err = fmt.Errorf("it is %v", m.Answer)
			}
			return err
		},
	})
	many := make([]probe.Order, 30)
	for i := range many {
		many[i] = ask(addrDNS, "zero.test", dns.TypeA)
	}
	began := time.Now()
	t.Try(Try{
		What: "30 questions for a name of TTL 0: one a second leaves, and two more at most", By: s, Orders: many, Asks: []string{"zero.test"},
		Answer: answeredWith(dns.RcodeSuccess), Log: allowed("allow-name"),
		Do: func(context.Context) error {
			n := len(t.suite.wire.since(t.suite.stand.lab.Recorder()).Questions())
			if took := time.Since(began); n > 3+int(took/time.Second) || n == 0 {
				return fmt.Errorf("%d left in %s", n, took)
			}
			return nil
		},
	})
	pinned := netip.MustParseAddr("198.51.100.13")
	echo := said(pinned, 4000, "canary-54\r\n")
	t.Try(Try{
		What: "control: a name of TTL 0 is pinned", By: s, Orders: []probe.Order{echo},
		Reaches: []Arrival{{At: pinned, Port: 4000, Text: "canary-54"}}, Answer: echoed(echo.Parts[0]), Log: allowed("pinned"),
	})
	// A pin is trusted for half a minute at least. Then the server asks for the name
	// before it lets a connection pass, and rotate.test has another address by then.
	rotating := t.Fresh(only("rotate.test:4000"))
	got := t.Try(Try{
		What: "control: a name with another address each time is pinned", By: rotating,
		Orders: []probe.Order{ask(addrDNS, "rotate.test", dns.TypeA)}, Asks: []string{"rotate.test"}, Log: allowed("allow-name"),
	})
	m, err := reply(got[0])
	if err == nil && len(addresses(m)) != 1 {
		err = fmt.Errorf("%v holds no address", m)
	}
	t.must("resolve rotate.test", err)
	former := said(addresses(m)[0], 4000, "canary-54b\r\n")
	t.Later(36*time.Second, func(t *Trial) {
		t.Try(Try{
			What: "half a minute later the name still has the address", By: s, Orders: []probe.Order{echo}, Asks: []string{"zero.test"},
			Reaches: []Arrival{{At: pinned, Port: 4000, Text: "canary-54"}}, Answer: echoed(echo.Parts[0]), Log: allowed("pinned"),
		})
		t.Try(Try{
			What: "and another name no longer has its own: ended", By: rotating, Orders: []probe.Order{former}, Asks: []string{"rotate.test"},
			Never: []string{"canary-54b"}, Answer: cut, Log: denied("pin-expired"),
		})
		t.Try(Try{
			What: "and refused from then on", By: rotating, Orders: []probe.Order{former},
			Never: []string{"canary-54b"}, Answer: refused, Log: denied("pin-expired"),
		})
	})
}

func otherNames(t *Trial) {
	s := t.Fresh(standard())
	hosts := fmt.Sprintf("printf '%s %s\\n%s %s\\n' | sudo tee -a /etc/hosts >/dev/null", addrAttacker, nameA, addrA, nameB)
	_, err := s.Commands.Run(t.ctx, hosts, client.RunOptions{})
	t.must("write /etc/hosts", err)
	curl := func(url string) (string, error) {
		r, err := s.Commands.Run(t.ctx, "curl -sS --max-time 5 "+url, client.RunOptions{})
		if err != nil {
			return "", err
		}
		return r.Stdout, nil
	}
	t.Try(Try{
		What: "A at the attacker's address, in /etc/hosts: A answers", By: s, Reaches: []Arrival{{At: addrA, Port: 443}}, Log: allowed("allow-name"),
		Do: func(context.Context) error {
			out, err := curl("https://" + nameA + "/")
			if err == nil && !strings.Contains(out, addrA.String()) && !strings.Contains(out, twin(addrA).String()) {
				err = fmt.Errorf("curl got %q", out)
			}
			return err
		},
	})
	t.Try(Try{
		What: "B at A's address, in /etc/hosts", By: s, Never: []string{nameB}, LogOnce: true,
		Do: func(context.Context) error {
			for url, said := range map[string]string{"http://" + nameB + "/": "# denied by egress policy", "https://" + nameB + "/": ""} {
				out, err := curl(url)
				if err != nil {
					return fmt.Errorf("curl: %w", err)
				}
				if !strings.HasPrefix(out, said) || said == "" && out != "" {
					return fmt.Errorf("curl got %q", out)
				}
			}
			return nil
		},
		Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "mDNS, LLMNR and NetBIOS", By: s, Never: []string{nameB}, Answer: unanswered,
		Orders: each([]string{"224.0.0.251:5353", "224.0.0.252:5355", "8.8.8.8:5353", "8.8.8.8:5355", "198.51.100.255:137"}, func(to string) probe.Order {
			return probe.Order{Kind: probe.Datagram, To: to, Parts: [][]byte{query(nameB, dns.TypeA)}, Want: 1, Within: 1500 * time.Millisecond}
		}),
		Log: denied("floor", "deny-address"), LogOnce: true,
	})
}
