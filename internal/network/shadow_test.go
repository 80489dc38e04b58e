package network

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// deaf makes a namespace drop every TCP packet that opens a connection to it, as a
// client behind a firewall does. Nothing answers such a packet.
func deaf(t testing.TB, path string) {
	t.Helper()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		t.Fatal(err)
	}
	table := c.AddTable(&nftables.Table{Name: "deaf", Family: nftables.TableFamilyINet})
	chain := c.AddChain(&nftables.Chain{
		Name: "in", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{ // TCP with SYN and without ACK
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1, DestRegister: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x02}},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

// boundTo binds a socket to a port of its own choice and lets others have it too.
func boundTo() func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1) // the internet owns all addresses by a route
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
		})
		return errors.Join(cerr, err)
	}
}

// dialFrom connects from an address, if one is given, and a port of a namespace.
func dialFrom(path, network string, from netip.Addr, port uint16, to netip.AddrPort, wait time.Duration) (c net.Conn, err error) {
	err = inNamespace(path, func() (err error) {
		d := net.Dialer{Timeout: wait, Control: boundTo()}
		d.SetMultipathTCP(false)
		if strings.HasPrefix(network, "udp") {
			d.LocalAddr = &net.UDPAddr{IP: from.AsSlice(), Port: int(port)}
		} else {
			d.LocalAddr = &net.TCPAddr{IP: from.AsSlice(), Port: int(port)}
		}
		c, err = d.Dial(network, to.String())
		return err
	})
	return c, err
}

// shadow is one try to take a host's port: a sandbox that opens a flow from port
// towards a client, whose next connection is to that port of the host.
type shadow struct {
	network string // tcp or udp
	port    uint16 // of the host's service
	client  uint16
}

func (s shadow) String() string { return fmt.Sprintf("%s %d to %d", s.network, s.port, s.client) }

// shadows are the tries of the tests: what is likely, and fifty ports at random.
func shadows() []shadow {
	out := []shadow{{"tcp", 2222, 20000}, {"udp", 5000, 20000}, {"tcp", 443, 40001}, {"udp", 443, 40001}, {"udp", 51820, 51820}, {"tcp", 65535, 1024}}
	used := map[uint16]bool{}
	for len(used) < 50 {
		s := shadow{[]string{"tcp", "udp"}[len(used)%2], uint16(1024 + rand.IntN(30000)), uint16(1024 + rand.IntN(60000))}
		if s.port != 15001 && s.port != 15053 && !used[s.port] && !used[s.client] {
			used[s.port] = true
			out = append(out, s)
		}
	}
	return out
}

// hostService answers "host" on a port of the host.
func hostService(t *testing.T, s shadow) {
	t.Helper()
	if s.network == "tcp" {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", s.port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte("host"))
				c.Close()
			}
		}()
		return
	}
	u, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(s.port)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort([]byte("host"), from)
		}
	}()
}

// askHost is the client's connection; it returns what answered.
func (w *world) askHost(s shadow, client, host netip.Addr) (string, error) {
	c, err := dialFrom(w.internet, s.network, client, s.client, netip.AddrPortFrom(host, s.port), 2*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	b := make([]byte, 64)
	if s.network == "udp" {
		if _, err := c.Write([]byte("question")); err != nil {
			return "", err
		}
	}
	k, err := c.Read(b)
	return string(b[:k]), err
}

func TestASandboxDoesNotTakeAPortOfTheHost(t *testing.T) {
	for family, addrs := range map[string]struct{ host, client netip.Addr }{
		"IPv4": {uplink4.Addr(), public4}, "IPv6": {uplink6.Addr(), public6},
	} {
		t.Run(family, func(t *testing.T) {
			w := start(t)
			deaf(t, w.internet)
			l := w.lease()
			w.apply(l, policy.Input{})
			for _, s := range shadows() {
				t.Run(s.String(), func(t *testing.T) {
					hostService(t, s)
					heard := w.shadow(t, l, s, netip.AddrPortFrom(addrs.client, s.client))
					if got, err := w.askHost(s, addrs.client, addrs.host); err != nil || got != "host" {
						t.Errorf("the client got %q, %v; want the host's answer", got, err)
					}
					if err := heard(); err != nil {
						t.Errorf("the sandbox %v", err)
					}
				})
			}
		})
	}
}

// shadow opens the sandbox's flow, and returns what tells whether the sandbox hears
// anything from the client.
func (w *world) shadow(t *testing.T, l sandbox.Lease, s shadow, to netip.AddrPort) (heard func() error) {
	t.Helper()
	if s.network == "udp" {
		c, err := dialFrom(l.NetNS, "udp", netip.Addr{}, s.port, to, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write([]byte("from inside")); err != nil {
			t.Fatal(err)
		}
		return func() error {
			_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			b := make([]byte, 64)
			if k, err := c.Read(b); err == nil {
				return fmt.Errorf("heard %q", b[:k])
			}
			return nil
		}
	}
	done := make(chan error, 1)
	go func() {
		c, err := dialFrom(l.NetNS, "tcp", netip.Addr{}, s.port, to, 150*time.Millisecond)
		if err == nil {
			c.Close()
		}
		done <- err
	}()
	// The flow is there when the tracker knows it.
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(time.Millisecond) {
		flows, err := w.flowsOf(w.byID[l.Sandbox])
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.TupleOrig.Proto.SourcePort == s.port && conntrack.Dst(f) == to {
				return func() error {
					if err := <-done; err == nil {
						return errors.New("is connected to the client")
					}
					return nil
				}
			}
		}
		if time.Now().After(end) {
			t.Fatal("the sandbox's flow does not begin")
		}
	}
}

// TestSourcePortsAreOfARangeOfTheirOwn: whatever port a sandbox takes, outside it is
// one of the range, and not one of its choice.
func TestSourcePortsAreOfARangeOfTheirOwn(t *testing.T) {
	w := start(t)
	l := w.lease()
	w.apply(l, policy.Input{})
	first, last := w.cfg.SourcePorts.First, w.cfg.SourcePorts.Last
	for _, to := range []netip.AddrPort{netip.AddrPortFrom(public4, 7000), netip.AddrPortFrom(public6, 7000)} {
		server, err := w.listenOutside(to)
		if err != nil {
			t.Fatal(err)
		}
		same := 0
		for i := range uint16(60) {
			port := first + i
			if i%2 == 0 {
				port = 20000 + i
			}
			c, err := dialFrom(l.NetNS, "udp", netip.Addr{}, port, to, time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			_ = server.SetReadDeadline(time.Now().Add(2 * time.Second))
			_, from, err := server.ReadFromUDPAddrPort(make([]byte, 8))
			c.Close()
			if err != nil {
				t.Fatal(err)
			}
			if from.Port() < first || from.Port() > last {
				t.Errorf("%s: port %d left as %d, outside of %d-%d", to, port, from.Port(), first, last)
			}
			if from.Port() == port {
				same++
			}
		}
		server.Close()
		if same > 2 {
			t.Errorf("%s: %d of 60 flows kept the port that the sandbox chose", to, same)
		}
	}
}

func (w *world) listenOutside(at netip.AddrPort) (u *net.UDPConn, err error) {
	err = inNamespace(w.internet, func() (err error) {
		u, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(at.Port())})
		return err
	})
	return u, err
}

// TestAFlowThatAnotherTableTranslated: a rule of the machine's owner that masquerades
// everything, before ours, must not bring the ports of the host back into reach.
func TestAFlowThatAnotherTableTranslated(t *testing.T) {
	w := start(t)
	deaf(t, w.internet)
	other := &nftables.Table{Name: "other", Family: nftables.TableFamilyINet}
	priority := nftables.ChainPriority(50)
	if err := w.kern.change(func(c *nftables.Conn) {
		c.AddTable(other)
		chain := c.AddChain(&nftables.Chain{Name: "post", Table: other, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: &priority})
		c.AddRule(&nftables.Rule{Table: other, Chain: chain, Exprs: []expr.Any{&expr.Masq{}}})
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.kern.change(func(c *nftables.Conn) { c.DelTable(other) }); err != nil {
			t.Error(err)
		}
	})
	l := w.lease()
	w.apply(l, policy.Input{})
	for _, s := range []shadow{{"tcp", 2222, 20000}, {"udp", 5000, 20000}} {
		heard := w.shadow(t, l, s, netip.AddrPortFrom(public4, s.client))
		got, err := w.askHost(s, public4, uplink4.Addr())
		if err == nil && got != "" {
			t.Errorf("%s: something answered %q", s, got)
		}
		if err := heard(); err != nil {
			t.Errorf("%s: the sandbox %v", s, err)
		}
	}
}

// TestNobodyConnectsIntoASandboxAsAReply: where the two ends of a flow open it at the
// same time, the second one is a connection from outside.
func TestNobodyConnectsIntoASandboxAsAReply(t *testing.T) {
	w := start(t)
	deaf(t, w.internet)
	l := w.lease()
	w.apply(l, policy.Input{})
	s := shadow{"tcp", 2222, 20000}
	heard := w.shadow(t, l, s, netip.AddrPortFrom(public4, s.client))
	flows, err := w.flowsOf(w.byID[l.Sandbox])
	if err != nil || len(flows) != 1 {
		t.Fatal(flows, err)
	}
	outside := flows[0].TupleReply.Proto.DestinationPort
	if c, err := dialFrom(w.internet, "tcp", public4, s.client, netip.AddrPortFrom(uplink4.Addr(), outside), 300*time.Millisecond); err == nil {
		c.Close()
		t.Errorf("the client is connected to port %d", outside)
	}
	if err := heard(); err != nil {
		t.Errorf("the sandbox %v", err)
	}
}

// TestASandboxConnectsToNothingOfTheHostAsAReply is the other direction: the host
// opened a flow to the sandbox that the sandbox did not answer, and listens now on
// the port that it had used.
func TestASandboxConnectsToNothingOfTheHostAsAReply(t *testing.T) {
	w := start(t)
	l := w.lease()
	w.apply(l, policy.Input{})
	deaf(t, l.NetNS)
	const host, inside = 40123, 7000
	c, err := (&net.Dialer{Timeout: 50 * time.Millisecond, LocalAddr: &net.TCPAddr{Port: host}}).Dial("tcp4", netip.AddrPortFrom(l.Addr4.Addr(), inside).String())
	if err == nil {
		c.Close()
		t.Fatal("the sandbox answered")
	}
	lc := net.ListenConfig{Control: boundTo()}
	lis, err := lc.Listen(context.Background(), "tcp4", fmt.Sprintf(":%d", host))
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	if c, err := dialFrom(l.NetNS, "tcp4", netip.Addr{}, inside, netip.AddrPortFrom(l.Gate4, host), 300*time.Millisecond); err == nil {
		c.Close()
		t.Error("the sandbox is connected to a service of the host")
	}
}

func TestTheRangeIsReservedAndGivenBack(t *testing.T) {
	privileged(t)
	const key = "/proc/sys/" + reservedPorts
	was, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sysctl.Write(reservedPorts, strings.TrimSpace(string(was))+"\n") })
	if err := sysctl.Write(reservedPorts, "8080,52100-52110"); err != nil {
		t.Fatal(err)
	}
	t.Run("while it runs", func(t *testing.T) {
		w := start(t)
		got, _ := os.ReadFile(key)
		if want := "8080,52000-59999"; strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is %q, want %q", reservedPorts, got, want)
		}
		w.halt()
		w.Close()
		w.boot(nil) // a restart does not forget what was there before
	})
	got, _ := os.ReadFile(key)
	if want := "8080,52100-52110"; strings.TrimSpace(string(got)) != want {
		t.Errorf("afterwards %s is %q, want %q", reservedPorts, got, want)
	}
}

func TestCheckFindsServicesInTheRange(t *testing.T) {
	w := start(t)
	if got := append(CheckSourcePorts(w.cfg.SourcePorts), CheckReserved(w.cfg.SourcePorts)...); len(got) != 0 {
		t.Fatal(got)
	}
	tcp, err := net.Listen("tcp", ":52345")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 52346})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	local, err := net.Listen("tcp", "127.0.0.1:52347")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	got := strings.Join(CheckSourcePorts(w.cfg.SourcePorts), "\n")
	for _, want := range []string{"TCP 52345", "UDP 52346"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q does not name %s", got, want)
		}
	}
	if strings.Contains(got, "52347") {
		t.Errorf("%q names a service on loopback, which nobody outside reaches", got)
	}
	if err := sysctl.Write(reservedPorts, "8080"); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(CheckReserved(w.cfg.SourcePorts), "\n"); !strings.Contains(got, "ip_local_reserved_ports") {
		t.Errorf("%q does not say that the range is not reserved", got)
	}
}

func FuzzPortRanges(f *testing.F) {
	f.Add("8080,52100-52110\n")
	f.Add("")
	f.Add("65535-1,70000,-")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parsePorts(s)
		if err != nil {
			return
		}
		b, err := parsePorts(formatPorts(a))
		if err != nil || formatPorts(b) != formatPorts(a) {
			t.Errorf("%q becomes %q, then %q, %v", s, formatPorts(a), formatPorts(b), err)
		}
	})
}
