package conformance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func addrCases() []Case {
	const group = "Addresses"
	return []Case{
		{ID: 40, Group: group, Title: "an address where a name belongs", Run: literalHosts},
		{ID: 41, Group: group, Title: "decimal, octal, hexadecimal and short forms", Run: oddNumbers},
		{ID: 42, Group: group, Title: "mapped, NAT64, 6to4 and Teredo forms", Run: transitions},
		{ID: 43, Group: group, Title: "the floor: private ranges, the host, other sandboxes", Run: theFloor},
		{ID: 44, Group: group, Title: "cloud metadata, by address and by name", Run: metadata},
		{ID: 45, Group: group, Title: "edges of CIDRs, against a naive matcher", Run: cidrEdges},
	}
}

func literalHosts(t *Trial) {
	s := t.Sandbox(standard())
	hosts := []string{addrA.String(), addrB.String(), addrB.String() + ":80", "[" + twin(addrB).String() + "]"}
	t.Try(Try{
		What: "in Host, to A's and B's address", By: s,
		Orders: append(each(hosts, func(h string) probe.Order { return http80(addrB, get(h, "/canary")) }),
			each(hosts, func(h string) probe.Order { return http80(addrA, get(h, "/canary")) })...),
		Never: []string{"canary"}, Answer: cut, Log: denied("no-host"),
	})
	mixed := t.Sandbox(only(nameA, addrB.String()))
	t.Try(Try{
		What: "an allowed address in Host, to the attacker's", By: mixed,
		Orders: []probe.Order{http80(addrAttacker, get(addrB.String(), "/canary")), hello(addrAttacker, newHello(nameA).named(hostName(addrB.String())).bytes())},
		Never:  []string{"canary"}, Answer: cut, Log: denied("no-host", "bad-hello"),
	})
	t.Try(Try{
		What: "control: to the allowed address itself, whatever Host says", By: mixed,
		Orders:  []probe.Order{http80(addrB, get(addrB.String(), "/"))},
		Reaches: []Arrival{{At: addrB, Port: 80}}, Answer: served(addrB, addrB.String()), Log: allowed("allow-address"),
	})
}

func oddNumbers(t *Trial) {
	s := t.Sandbox(standard())
	forms := []string{ // of 198.51.100.20
		"3325256724", "0xc6336414", "0306.063.0144.024", "0xc6.0x33.0x64.0x14", "198.51.25620", "198.3367956", "198.51.100.20.",
		"198.51.100.020", "00198.51.100.20", "198.51.100", "1.2.3.4.5", "127.1", "0",
	}
	t.Try(Try{
		What: "in Host", By: s, Orders: each(forms, func(h string) probe.Order { return http80(addrB, get(h, "/canary")) }),
		Never: []string{"canary"}, Answer: cut, Log: denied("bad-name", "no-host"),
	})
	t.Try(Try{
		What: "in SNI", By: s,
		Orders: each(forms, func(h string) probe.Order { return hello(addrB, newHello(nameA).named(hostName(h)).bytes()) }),
		Answer: alerted, Log: denied("bad-name", "bad-hello"),
	})
	open := t.Sandbox(everything())
	curl := func(urls ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			for _, u := range urls {
				r, err := open.Commands.Run(ctx, "curl -sS --max-time 3 -o /dev/null "+u, client.RunOptions{})
				if err != nil {
					return err
				}
				if r.ExitCode == 0 || strings.Contains(r.Stderr, "timed out") {
					return fmt.Errorf("%s: exit code %d: %s", u, r.ExitCode, r.Stderr)
				}
			}
			return nil
		}
	}
	t.Try(Try{
		What: "of 169.254.169.254, as curl reads them", By: open, LogOnce: true,
		Do:  curl("http://2852039166/", "http://0xa9fea9fe/", "http://0251.0376.0251.0376/", "http://169.254.43518/"),
		Log: denied("floor"),
	})
	t.Try(Try{
		What: "control: a form of B's address, as curl reads it", By: open,
		Do: func(ctx context.Context) error {
			r, err := open.Commands.Run(ctx, "curl -sS --max-time 3 http://3325256724/", client.RunOptions{})
			if err == nil && !strings.Contains(r.Stdout, addrB.String()) {
				err = fmt.Errorf("curl got %q %q", r.Stdout, r.Stderr)
			}
			return err
		},
		Reaches: []Arrival{{At: addrB, Port: 80}}, Log: allowed("default"),
	})
}

// reach connects to addresses on port 80 and sends a request.
func reach(addrs ...string) []probe.Order {
	return each(addrs, func(a string) probe.Order { return http80(netip.MustParseAddr(a), get(a, "/canary")) })
}

func transitions(t *Trial) {
	s := t.Sandbox(everything())
	t.Try(Try{
		What: "of 10.0.0.5, mapped and in NAT64, 6to4, Teredo", By: s,
		Orders: reach("::ffff:10.0.0.5", "64:ff9b::a00:5", "64:ff9b:1::a00:5", "2002:a00:5::1", "2001:0:a00:5::1", "2001::f5ff:fffa"),
		Never:  []string{"canary"}, Answer: refused, Log: denied("floor"),
	})
	t.Try(Try{
		What: "in AAAA answers: removed", By: s, Asks: []string{"mapped.test", "nat64.test", "sixtofour.test", "ula.test", "linklocal.test"},
		Orders: each([]string{"mapped.test", "nat64.test", "sixtofour.test", "ula.test", "linklocal.test"}, func(n string) probe.Order {
			return ask(addrDNS, n, dns.TypeAAAA)
		}),
		Answer: resolvesTo(), Log: denied("rebinding"),
	})
	notB := t.Sandbox(client.Network{DenyOut: []string{addrB.String()}})
	t.Try(Try{
		What: "of a denied address: denied with it", By: notB,
		Orders: reach(addrB.String(), "64:ff9b::c633:6414", "2002:c633:6414::1"),
		Never:  []string{"canary"}, Answer: refused, Log: denied("deny-address"),
	})
	t.Try(Try{
		What: "control: an IPv6 address of the internet", By: s, Orders: []probe.Order{http80(twin(addrB), get(nameB, "/"))},
		Reaches: []Arrival{{At: twin(addrB), Port: 80}}, Answer: served(twin(addrB), nameB), Log: allowed("default"),
	})
}

func theFloor(t *Trial) {
	s := t.Sandbox(everything())
	other := t.Sandbox(standard())
	neighbour, err := other.Addr(t.ctx)
	t.must("find another sandbox's address", err)
	own, err := s.Addr(t.ctx)
	t.must("find the sandbox's address", err)
	gate, err := t.suite.stand.linkOf(own)
	t.must("find the sandbox's link", err)
	ranges := []string{
		"10.0.0.5", "100.64.0.1", "169.254.1.1", "168.63.129.16", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.168.0.1",
		"198.18.0.1", "198.19.255.255", "fd00::5", "fdff:ffff::1",
	}
	t.Try(Try{
		What: "every range that is routed", By: s, Orders: reach(ranges...),
		Never: []string{"canary"}, Answer: refused, Log: denied("floor"),
	})
	host := t.suite.stand.lab.HostAddr()
	host6, _ := t.suite.stand.lab.HostAddr6()
	var orders []probe.Order
	for _, a := range []netip.Addr{host, host6, gate.gate.Addr(), neighbour} {
		for _, port := range []uint16{22, 80, 443, 3900, 3901, 15001, 49983} {
			orders = append(orders, tcp(a, port, []byte("canary")))
		}
	}
	t.Try(Try{
		What: "the host's addresses and another sandbox, on ports that listen", By: s, Orders: orders,
		Never: []string{"canary"}, Answer: refused, Log: denied("floor"),
	})
	t.Try(Try{
		What: "multicast and broadcast", By: s,
		Orders: []probe.Order{udp(netip.MustParseAddr("224.0.0.251"), 5353, []byte("canary")), udp(netip.MustParseAddr("239.255.255.250"), 1900, []byte("canary"))},
		Never:  []string{"canary"}, Answer: unanswered,
	})
	listedFloor := t.Sandbox(only("10.0.0.0/8", "169.254.169.254", host.String(), "0.0.0.0/8", "fc00::/7"))
	t.Try(Try{
		What: "listed in allowOut: accepted, and of no effect", By: listedFloor,
		Orders: reach("10.0.0.5", "169.254.169.254", host.String(), "fd00::5", neighbour.String()),
		Never:  []string{"canary"}, Answer: refused, Log: denied("floor"),
	})
	t.Try(Try{
		What: "control: an address above the floor", By: s, Orders: reach(addrB.String()),
		Reaches: []Arrival{{At: addrB, Port: 80, Text: "canary"}}, Answer: served(addrB, addrB.String()), Log: allowed("default"),
	})
	hairpin(t, s)
}

// hairpin: the public URL of a private sandbox asks its token of other sandboxes
// as of everybody.
func hairpin(t *Trial, from *Subject) {
	no := false
	s := t.Fresh(client.Network{AllowPublicTraffic: &no})
	t.must("start a server in it", serve(t.ctx, s, 7007))
	url := "https://" + s.Host(7007) + "/"
	curl := func(flags, want string) func(context.Context) error {
		return func(ctx context.Context) error {
			r, err := from.Commands.Run(ctx, "curl -sS --max-time 5 -o /dev/null -w '%{http_code}' "+flags+" "+url, client.RunOptions{})
			if err == nil && r.Stdout != want {
				err = fmt.Errorf("curl says %q, not %s: %s", r.Stdout, want, r.Stderr)
			}
			return err
		}
	}
	t.Try(Try{What: "a private sandbox's public URL, without its token", By: from, Do: curl("", "403"), Log: allowed("default")})
	t.Try(Try{
		What: "control: with it", By: from, Do: curl("-H 'e2b-traffic-access-token: "+s.TrafficToken+"'", "200"), Log: allowed("default"),
	})
}

// serve starts a web server in a sandbox and waits until it listens.
func serve(ctx context.Context, s *Subject, port uint16) error {
	command := fmt.Sprintf("cd /tmp && exec python3 -m http.server %d", port)
	p, err := s.Commands.Start(ctx, command, client.RunOptions{})
	if err != nil {
		return err
	}
	go p.Close() // it goes on, unwatched
	return listens(ctx, s, int(port))
}

// listens waits until something in a sandbox answers on a port.
func listens(ctx context.Context, s *Subject, port int) error {
	r, err := s.Commands.Run(ctx, fmt.Sprintf("for i in $(seq 300); do curl -s -o /dev/null http://127.0.0.1:%d/ && exit 0; sleep 0.05; done; exit 1", port), client.RunOptions{})
	if err == nil && r.ExitCode != 0 {
		err = errors.New("the server does not listen")
	}
	return err
}

func metadata(t *Trial) {
	s := t.Sandbox(everything())
	const service = "169.254.169.254"
	names := []string{"metadata.google.internal", "metadata.test"}
	t.Try(Try{
		What: "by address, with a name in Host and without", By: s,
		Orders: []probe.Order{
			http80(netip.MustParseAddr(service), get(names[0], "/canary")), http80(netip.MustParseAddr(service), get(service, "/canary")),
			http80(netip.MustParseAddr("fd00:ec2::254"), get(names[0], "/canary")), http80(netip.MustParseAddr("168.63.129.16"), get(service, "/canary")),
		},
		Never: []string{"canary"}, Answer: refused, Log: denied("floor"),
	})
	t.Try(Try{
		What: "by name: the answer is removed", By: s, Asks: names,
		Orders: each(names, func(n string) probe.Order { return ask(addrDNS, n, dns.TypeA) }), Answer: resolvesTo(), Log: denied("rebinding"),
	})
	listed := t.Sandbox(only(append(names, service)...))
	t.Try(Try{
		What: "listed by name and address, asked through the proxy", By: listed, Asks: names,
		Orders: each(names, func(n string) probe.Order { return http80(addrA, get(n, "/canary")) }),
		Never:  []string{"canary"}, Answer: cut, Log: Want{Verdict: "fail", Reasons: []string{"resolve"}},
	})
	t.Try(Try{
		What: "listed, by address", By: listed, Orders: reach(service), Never: []string{"canary"}, Answer: refused, Log: denied("floor"),
	})
}

// cidrEdges draws random rules and asks at the edges of every prefix. What is
// right is said by a matcher that knows nothing but numbers.
func cidrEdges(t *Trial) {
	s := t.Fresh(everything())
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 45))
	for round := range 4 {
		n := randomRules(random, round)
		t.must("set the rules", s.SetNetwork(t.ctx, n))
		s.network = n
		addrs := edges(n)
		var reaches []Arrival
		right := make([]bool, len(addrs))
		orders := make([]probe.Order, len(addrs))
		for i, a := range addrs {
			orders[i] = tcp(a, 4000, []byte("canary "+a.String()))
			orders[i].Want = len("canary " + a.String())
			if right[i] = naive(n, a); right[i] {
				reaches = append(reaches, Arrival{At: a, Port: 4000, Text: "canary " + a.String()})
			}
		}
		log, log1 := denied("deny-address"), len(reaches) < len(addrs)
		if !log1 {
			log = allowed("allow-address", "default")
		}
		t.Try(Try{
			What: fmt.Sprintf("%d addresses, %d of them allowed (seed %d, round %d)", len(addrs), len(reaches), seed, round),
			By:   s, Orders: orders, Reaches: reaches, Log: log, LogOnce: true,
			AnswerEach: func(i int, got probe.Outcome) error {
				if right[i] {
					return echoed(orders[i].Parts[0])(got)
				}
				return refused(got)
			},
		})
	}
}

// randomRules draws CIDRs of 198.51.100.0/24, host bits and all.
func randomRules(r *rand.Rand, round int) client.Network {
	draw := func() string { return fmt.Sprintf("198.51.100.%d/%d", r.IntN(256), 25+r.IntN(8)) }
	var n client.Network
	for range 5 {
		n.AllowOut = append(n.AllowOut, draw())
		n.DenyOut = append(n.DenyOut, draw())
	}
	if round%2 == 1 {
		n.DenyOut = append(n.DenyOut, client.AllTraffic)
	}
	return n
}

// edges are the first and last address of every rule, and their neighbours.
func edges(n client.Network) []netip.Addr {
	var out []netip.Addr
	for _, text := range slices.Concat(n.AllowOut, n.DenyOut) {
		if text == client.AllTraffic {
			continue
		}
		first, last := bounds(text)
		for _, v := range []uint32{first - 1, first, last, last + 1} {
			out = append(out, netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}))
		}
	}
	inside := netip.MustParsePrefix("198.51.100.0/24")
	// The operator's own denials come before any rule: no matcher of rules foretells them.
	operators := []netip.Addr{addrForbidden, addrHairpin}
	out = slices.DeleteFunc(out, func(a netip.Addr) bool { return !inside.Contains(a) || slices.Contains(operators, a) })
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// bounds computes the first and last address of "a.b.c.d/bits" by hand.
func bounds(cidr string) (first, last uint32) {
	var a, b, c, d, bits uint32
	if _, err := fmt.Sscanf(cidr, "%d.%d.%d.%d/%d", &a, &b, &c, &d, &bits); err != nil {
		panic(fmt.Sprintf("%s: %v", cidr, err)) // they are made here
	}
	mask := ^uint32(0)
	if bits < 32 {
		mask = ^(^uint32(0) >> bits)
	}
	first = (a<<24 | b<<16 | c<<8 | d) & mask
	return first, first | ^mask
}

// naive decides by comparing numbers: allow, then deny, then allow.
func naive(n client.Network, a netip.Addr) bool {
	b := a.As4()
	v := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	in := func(list []string) bool {
		return slices.ContainsFunc(list, func(text string) bool {
			first, last := bounds(text)
			return first <= v && v <= last
		})
	}
	return in(n.AllowOut) || !in(n.DenyOut)
}
