package egress

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// inside is set for the copy of this test that runs in its own network
// namespace; the namespace ends with that process.
const inside = "CORDON_EGRESS_TEST_NETNS"

// inNetns runs the calling test again in a fresh network namespace, and reports
// true there. It skips without root, or fails if REQUIRE_PRIVILEGED is set.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) == "1" {
		return true
	}
	if os.Getuid() != 0 {
		if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in its namespace: %v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("it did not run:\n%s", out)
	}
	return false
}

// internet makes every address of the test ranges an address of this namespace,
// so that packets to them are delivered here.
func internet(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"10.88.0.2/32", "2001:db8:88::2/128", "93.184.216.1/32", "2606:4700::1/128", "93.184.216.99/32"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatalf("add %s: %v", a, err)
		}
	}
	for _, p := range []string{"93.184.216.0/24", "2606:4700::/32"} {
		_, dst, err := net.ParseCIDR(p)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}); err != nil {
			t.Fatalf("route %s: %v", p, err)
		}
	}
}

// real is a proxy with the real dialer.
func real(t *testing.T, lns ...net.Listener) *lab {
	t.Helper()
	l := &lab{t: t, names: map[string][]netip.Addr{
		"a.example":         {addrA, netip.MustParseAddr("2606:4700::1")},
		"slow4.sub.example": {netip.MustParseAddr("93.184.216.99"), netip.MustParseAddr("2606:4700::1")},
	}, owners: map[netip.Addr]Owner{}, news: make(chan struct{}, 1)}
	c, err := policy.Compile(onlyA, operator, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"10.88.0.2", "2001:db8:88::2"} {
		l.owners[netip.MustParseAddr(a)] = Owner{"sbx", c}
	}
	p, err := New(Config{Owner: l.owner, Resolve: l.resolve, Flows: l, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	l.p = p
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := p.Run(ctx, lns...); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
	return l
}

// serveAt runs the TLS echo on one exact address.
func serveAt(t *testing.T, addrs ...string) {
	t.Helper()
	echo := tlsEcho(t)
	var running sync.WaitGroup
	t.Cleanup(running.Wait) // after the listeners are closed
	for _, a := range addrs {
		ln, err := net.Listen("tcp", a)
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				running.Go(func() { defer c.Close(); echo(c) })
			}
		})
		t.Cleanup(func() { ln.Close() })
	}
}

func dialFrom(t *testing.T, src, dst string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(src)}, Timeout: 5 * time.Second}).Dial("tcp", dst)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(8 * time.Second))
	return c
}

func TestTransparentListenersSeeWhereConnectionsWereGoing(t *testing.T) {
	if !inNetns(t) {
		return
	}
	internet(t)
	serveAt(t, "93.184.216.1:443", "[2606:4700::1]:443")
	var lns []net.Listener
	tproxy(t, 443, 15001)
	for _, a := range []string{"127.0.0.1:15001", "[::1]:15001"} {
		ln, err := ListenTransparent(t.Context(), netip.MustParseAddrPort(a))
		if err != nil {
			t.Fatal(err)
		}
		lns = append(lns, ln)
	}
	l := real(t, lns...)
	for _, tt := range []struct{ src, dst, up string }{
		{"10.88.0.2", "93.184.216.66:443", "93.184.216.1:443"},
		{"2001:db8:88::2", "[2606:4700::66]:443", "[2606:4700::1]:443"},
	} {
		c := dialFrom(t, tt.src, tt.dst)
		converse(t, c, clientConfig("a.example"))
		if e := l.await(flowlog.Allowed); e.Dst.String() != tt.dst || e.Upstream.String() != tt.up || e.Src != addrPortOf(c.LocalAddr()) {
			t.Errorf("event %+v", e)
		}
		c = dialFrom(t, tt.src, tt.dst)
		send(t, c, helloFor("b.example"))
		wantAlert(t, c)
		if e := l.awaitDenied(policy.ReasonNameDenied); e.Dst.String() != tt.dst {
			t.Errorf("event %+v", e)
		}
	}
	t.Run("an address that refuses is passed over", func(t *testing.T) {
		converse(t, dialFrom(t, "10.88.0.2", "93.184.216.66:443"), clientConfig("slow4.sub.example"))
	})
	t.Run("(61) the proxy's own port", func(t *testing.T) {
		c := dialFrom(t, "10.88.0.2", "127.0.0.1:15001")
		send(t, c, helloFor("a.example"))
		wantAlert(t, c)
		l.awaitDenied(policy.ReasonFloor)
	})
}

// tproxy hands what the sandbox addresses send to a port to the listeners on
// another one, as the kernel path does.
func tproxy(t *testing.T, from, to uint16) {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct {
		family  nftables.TableFamily
		nfproto byte
		src     netip.Addr
		saddr   uint32 // offset in the network header
		via     netip.Addr
	}{
		{nftables.TableFamilyIPv4, unix.NFPROTO_IPV4, netip.MustParseAddr("10.88.0.2"), 12, netip.MustParseAddr("127.0.0.1")},
		{nftables.TableFamilyIPv6, unix.NFPROTO_IPV6, netip.MustParseAddr("2001:db8:88::2"), 8, netip.IPv6Loopback()},
	} {
		table := c.AddTable(&nftables.Table{Family: f.family, Name: fmt.Sprintf("p%d", f.family)})
		chain := c.AddChain(&nftables.Chain{Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: f.saddr, Len: uint32(f.src.BitLen() / 8)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: f.src.AsSlice()},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, from)},
			&expr.Immediate{Register: 1, Data: f.via.AsSlice()},
			&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, to)},
			&expr.TProxy{Family: f.nfproto, TableFamily: byte(f.family), RegAddr: 1, RegPort: 2},
		}})
	}
	if err := c.Flush(); err != nil {
		t.Fatalf("load the tproxy rules: %v", err)
	}
}

func TestUpstreamPortsAreCountedForEachDestination(t *testing.T) {
	if !inNetns(t) {
		return
	}
	internet(t)
	const ports = 4
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40003"), 0); err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{"93.184.216.1:443", "93.184.216.2:443"} {
		ln, err := net.Listen("tcp", dst)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		for i := range ports {
			c, err := dialTCP(t.Context(), netip.MustParseAddrPort(dst), func(netip.AddrPort) error { return nil })
			if err != nil {
				t.Fatalf("connection %d to %s: %v", i, dst, err)
			}
			defer c.Close()
		}
	}
}

func TestTransparentConnectionsAreKeptAlive(t *testing.T) {
	if !inNetns(t) {
		return
	}
	internet(t)
	ln, err := ListenTransparent(t.Context(), netip.MustParseAddrPort("127.0.0.1:15001"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialFrom(t, "10.88.0.2", "127.0.0.1:15001")
	c, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		idle, err2 := unix.GetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_KEEPIDLE)
		if on != 1 || idle != int(keepAlive.Idle.Seconds()) || err != nil || err2 != nil {
			t.Errorf("SO_KEEPALIVE %d, idle %d s: %v %v", on, idle, err, err2)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
