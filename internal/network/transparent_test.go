package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
)

// transparent makes a socket accept connections to any address.
func transparent(network, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if network[len(network)-1] == '6' {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1))
			return
		}
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1))
	})
	return errors.Join(cerr, err)
}

// proxy listens as the transparent proxy does and says what was asked for.
func proxy(t testing.TB, port uint16) {
	t.Helper()
	lc := net.ListenConfig{Control: transparent}
	lc.SetMultipathTCP(false)
	for network, host := range map[string]string{"tcp4": "127.0.0.1", "tcp6": "::1"} {
		l, err := lc.Listen(context.Background(), network, netip.AddrPortFrom(netip.MustParseAddr(host), port).String())
		if err != nil {
			t.Fatal(err)
		}
		greet(t, l, func(c net.Conn) string { return "proxy for " + c.LocalAddr().String() })
	}
}

// resolver answers datagrams from the address they were sent to, and says which
// that was.
func resolver(t testing.TB, port uint16) {
	t.Helper()
	for network, host := range map[string]string{"udp4": "127.0.0.1", "udp6": "::1"} {
		pc, err := (&net.ListenConfig{Control: transparent}).ListenPacket(context.Background(), network, netip.AddrPortFrom(netip.MustParseAddr(host), port).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pc.Close() })
		go answerAs(pc.(*net.UDPConn), network)
	}
}

func answerAs(u *net.UDPConn, network string) {
	b, oob := make([]byte, 512), make([]byte, 512)
	for {
		_, o, _, from, err := u.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:o])
		if err != nil || len(msgs) == 0 {
			continue
		}
		sa, err := unix.ParseOrigDstAddr(&msgs[0])
		if err != nil {
			continue
		}
		var dst netip.AddrPort
		switch a := sa.(type) {
		case *unix.SockaddrInet4:
			dst = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
		case *unix.SockaddrInet6:
			dst = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
		}
		reply, err := (&net.ListenConfig{Control: transparent}).ListenPacket(context.Background(), network, dst.String())
		if err != nil {
			continue
		}
		_, _ = reply.(*net.UDPConn).WriteToUDPAddrPort([]byte("resolver for "+dst.String()), from)
		reply.Close()
	}
}

func TestNamedPortsGoToTheProxy(t *testing.T) {
	w := start(t)
	w.serve(80, 443, 7777)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com", "198.51.100.0/24"}})
	for _, to := range []string{"198.51.102.9:443", "192.0.0.8:80", "[2001:db8:2::10]:443"} {
		if c, err := dial(l, "tcp", at(to)); !errors.Is(err, syscall.ECONNREFUSED) {
			if err == nil {
				c.Close()
			}
			t.Errorf("%s without a proxy: %v; want refused", to, err)
		}
		w.flows.wait(t, "no listener for "+to, func(e flowEvent) bool { return e.Dst == at(to) && e.Reason == ReasonNoSocket })
	}
	proxy(t, w.cfg.ProxyPort)
	for to, want := range map[string]string{
		"198.51.102.9:443":     "proxy for 198.51.102.9:443",
		"198.51.102.9:80":      "proxy for 198.51.102.9:80",
		"192.0.0.8:443":        "proxy for 192.0.0.8:443",
		"[2001:db8:2::10]:443": "proxy for [2001:db8:2::10]:443",
		"198.51.100.9:443":     uplink4.Addr().String(), // allowed by address: the kernel forwards
	} {
		if who, err := hello(l, at(to)); err != nil || who != want {
			t.Errorf("%s: %q, %v; want %q", to, who, err, want)
		}
	}
	for _, to := range []string{"198.51.102.9:7777", "10.0.0.1:443", "192.0.0.8:7777", uplink4.Addr().String() + ":443"} {
		if c, err := dial(l, "tcp", at(to)); !errors.Is(err, syscall.ECONNREFUSED) {
			if err == nil {
				c.Close()
			}
			t.Errorf("%s: %v; want refused", to, err)
		}
	}
	id, p, ok := w.Owner(l.Addr4.Addr())
	if !ok || id != l.Sandbox || p.Generation() != 1 {
		t.Errorf("owner of %s: %s, %v, %t", l.Addr4.Addr(), id, p, ok)
	}
	if id, _, ok = w.Owner(l.Addr6.Addr()); !ok || id != l.Sandbox {
		t.Errorf("owner of %s: %s, %t", l.Addr6.Addr(), id, ok)
	}
	if id, _, ok = w.Owner(l.Gate4); ok {
		t.Errorf("owner of the gateway: %s", id)
	}
}

func TestDenyingAllClosesTheServicesOwnAddressToo(t *testing.T) {
	w := start(t)
	proxy(t, w.cfg.ProxyPort)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}})
	if _, err := hello(l, at("192.0.0.8:443")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v; want refused", err)
	}
	w.apply(l, policy.Input{})
	if who, err := hello(l, at("192.0.0.8:443")); err != nil || who != "proxy for 192.0.0.8:443" {
		t.Errorf("%q, %v", who, err)
	}
}

func TestPort53GoesToTheResolver(t *testing.T) {
	w := start(t)
	w.serve(53)
	resolver(t, w.cfg.DNSPort)
	proxy(t, w.cfg.DNSPort) // the same for TCP
	l := w.lease()
	ask := func(to netip.AddrPort, wait time.Duration) string {
		c, err := dial(l, "udp", to)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(wait))
		if _, err := c.Write([]byte("?")); err != nil {
			return err.Error()
		}
		b := make([]byte, 100)
		k, err := c.Read(b)
		if err != nil {
			return "nothing"
		}
		return string(b[:k])
	}
	cases := []struct {
		name     string
		in       policy.Input
		to       string
		answered bool
		judged   bool // over UDP the resolver gets it all the same, and refuses
	}{
		{name: "no rules: any server", to: "9.9.9.9:53", answered: true},
		{name: "no rules: any server, IPv6", to: "[2001:db8:2::35]:53", answered: true},
		{name: "a floor address is no server", to: "10.0.0.53:53"},
		{name: "a listed domain brings the default server", in: policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com"}}, to: "8.8.8.8:53", answered: true},
		{name: "and no other", in: policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com"}}, to: "1.1.1.1:53", judged: true},
		{name: "an allowed address", in: policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"1.1.1.1"}}, to: "1.1.1.1:53", answered: true},
		{name: "a denied one", in: policy.Input{DenyOut: []string{"1.1.1.1"}}, to: "1.1.1.1:53", judged: true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w.t = t
			w.apply(l, c.in)
			wait := 200 * time.Millisecond
			if c.answered || c.judged {
				wait = 3 * time.Second
			}
			got, want := ask(at(c.to), wait), "resolver for "+c.to
			if (got == want) != (c.answered || c.judged) {
				t.Errorf("UDP: %q", got)
			}
			who, err := hello(l, at(c.to))
			if (err == nil) != c.answered || c.answered && who != "proxy for "+c.to {
				t.Errorf("TCP: %q, %v", who, err)
			}
		})
	}
	w.t = t
}

func TestTheProxysPortsAreNotReachableFromOutside(t *testing.T) {
	w := start(t)
	w.serve(7777)
	// Even when someone binds them to every address.
	for _, port := range []uint16{w.cfg.ProxyPort, w.cfg.DNSPort} {
		l := listenHost(t, fmt.Sprintf(":%d", port))
		defer l.Close()
		err := inNamespace(w.internet, func() error {
			c, err := dialFromHere(netip.AddrPortFrom(uplink4.Addr(), port))
			if err == nil {
				c.Close()
				return fmt.Errorf("port %d answered", port)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		c, err := hostDial(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
		if err != nil {
			t.Errorf("port %d on the loopback: %v", port, err)
			continue
		}
		c.Close()
	}
	l := w.lease()
	w.apply(l, policy.Input{})
	for _, to := range []netip.Addr{l.Gate4, uplink4.Addr()} {
		if _, err := dial(l, "tcp", netip.AddrPortFrom(to, w.cfg.ProxyPort)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v; want refused", to, err)
		}
	}
}

func TestAProxiedFlowStaysWithTheProxyWhenRulesLoosen(t *testing.T) {
	w := start(t)
	w.serve(443)
	proxy(t, w.cfg.ProxyPort)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com"}})
	c, err := dial(l, "tcp", at("198.51.100.10:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w.apply(l, policy.Input{})
	time.Sleep(20 * time.Millisecond)
	_ = c.SetDeadline(time.Now().Add(time.Second))
	b := make([]byte, 100)
	if _, err := c.Read(b); err != nil {
		t.Fatal("read what the proxy said:", err)
	}
	if err := echoes(c); err != nil {
		t.Errorf("the proxy no longer answers: %v", err)
	}
	// A new connection is forwarded.
	if who, err := hello(l, at("198.51.100.10:443")); err != nil || who != uplink4.Addr().String() {
		t.Errorf("%q, %v", who, err)
	}
}

// Distributions set rp_filter, WireGuard's scripts src_valid_mark: with both, the
// reverse path check looks at the mark of the transparent path.
func TestTheTransparentPathSurvivesReversePathChecks(t *testing.T) {
	w := start(t)
	proxy(t, w.cfg.ProxyPort)
	l := w.lease()
	for _, key := range []string{"all/rp_filter", "all/src_valid_mark", l.Link + "/rp_filter", "lo/rp_filter"} {
		path := "net/ipv4/conf/" + key
		if err := sysctl.Write(path, "1"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = sysctl.Write(path, "0") })
	}
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com"}})
	for _, to := range []string{"198.51.100.10:443", "[2001:db8:2::10]:80"} {
		if who, err := hello(l, at(to)); err != nil || who != "proxy for "+to {
			t.Errorf("%s: %q, %v", to, who, err)
		}
	}
}

func TestTheTrackerTellsOfForwardedFlowsOnly(t *testing.T) {
	w := start(t)
	w.serve(443)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com", "198.51.100.0/24"}})
	proxy(t, w.cfg.ProxyPort)
	proxied, before, after := at("198.51.102.9:443"), at("198.51.100.9:443"), at("198.51.100.10:443")
	ctx, cancel := context.WithCancel(t.Context())
	events, done := make(chan conntrack.Event, 1000), make(chan error, 1)
	go func() {
		// Whatever mark a flow has: this is about what the kernel tells at all.
		done <- conntrack.Watch(ctx, conntrack.Mark{}, eventBuffer, func(e conntrack.Event) { events <- e }, func() { t.Error("events were lost") })
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	tells := func(of netip.AddrPort, wait time.Duration) bool {
		for timeout := time.After(wait); ; {
			select {
			case e := <-events:
				if e.Dst == proxied {
					t.Errorf("an event of the flow to %s, which the proxy logs", proxied)
				}
				if e.Dst == of {
					return true
				}
			case <-timeout:
				return false
			}
		}
	}
	greet := func(to netip.AddrPort) {
		t.Helper()
		if _, err := hello(l, to); err != nil {
			t.Fatalf("%s: %v", to, err)
		}
	}
	listens := false
	for end := time.Now().Add(5 * time.Second); !listens && time.Now().Before(end); {
		greet(before)
		listens = tells(before, 50*time.Millisecond)
	}
	greet(proxied)
	greet(after)
	if !listens || !tells(after, 5*time.Second) {
		t.Errorf("no event of the flow to %s", after)
	}
}
