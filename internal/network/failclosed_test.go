package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/failclosed"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// wiretap keeps the packets that arrive at the internet's end of the wire.
type wiretap struct {
	mu   sync.Mutex // guards seen
	seen []packet
	fd   int
	done chan struct{}
}

func (w *world) tap() *wiretap {
	w.t.Helper()
	tap := &wiretap{done: make(chan struct{})}
	enter(w.t, w.internet, func() (err error) {
		tap.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(networkOrder(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		i, err := net.InterfaceByName("net0")
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptTimeval(tap.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}),
			unix.Bind(tap.fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: i.Index}))
	})
	stop := make(chan struct{})
	go func() {
		defer close(tap.done)
		b := make([]byte, 2048)
		for {
			select {
			case <-stop:
				return
			default:
			}
			k, from, err := unix.Recvfrom(tap.fd, b, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if p, ok := parsePacket(b[:k]); ok {
				tap.mu.Lock()
				tap.seen = append(tap.seen, p)
				tap.mu.Unlock()
			}
		}
	}()
	w.t.Cleanup(func() { close(stop); <-tap.done; unix.Close(tap.fd) })
	return tap
}

// count returns how many of the packets so far ok accepts.
func (p *wiretap) count(ok func(packet) bool) (count int) {
	time.Sleep(50 * time.Millisecond)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.seen {
		if ok(s) {
			count++
		}
	}
	return count
}

// flush does what "nft flush ruleset" does.
func flush(t testing.TB) {
	t.Helper()
	k := &kernel{}
	defer k.close()
	if err := k.flushRuleset(); err != nil {
		t.Fatal(err)
	}
}

func TestWithoutRulesAndServerNothingPasses(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	p := w.apply(l, policy.Input{DenyOut: []string{"198.51.100.0/24", "2001:db8:2::/48"}})
	allowed4, allowed6 := at("198.51.101.1:7777"), at("[2001:db8:3::1]:7777")
	live := open(t, l, allowed4)
	host := listenHost(t, ":9999")
	defer host.Close()
	tap := w.tap()
	if err := CheckGuard(w.cfg.Name); err != nil {
		t.Errorf("doctor would say: %v", err)
	}
	w.halt()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	flush(t)

	// What a sandbox could send; every one of these got through before, see the end.
	targets := []netip.AddrPort{
		at("198.51.100.1:7777"), at("[2001:db8:2::1]:7777"), allowed4, allowed6,
		netip.AddrPortFrom(uplink4.Addr(), 9999), netip.AddrPortFrom(uplink6.Addr(), 9999),
		netip.AddrPortFrom(l.Gate4, 9999), netip.AddrPortFrom(l.Gate6, 9999),
	}
	for _, to := range targets {
		if reaches(l, to) {
			t.Errorf("%s was reached", to)
		}
		_ = echoUDP(l, to, 20*time.Millisecond)
	}
	if err := echoes(live); err == nil {
		t.Error("a live flow goes on without rules")
	}
	if heardMulticast(t, l) {
		t.Error("the host heard a multicast")
	}
	spoof := netip.MustParseAddr("192.88.99.7")
	sendAs(t, l, spoof, targets[0])
	left := func(p packet) bool {
		return w.plan.Subnet4.Contains(p.src.Addr()) || w.plan.Subnet6.Contains(p.src.Addr())
	}
	if got := tap.count(func(p packet) bool { return left(p) || p.src.Addr() == spoof }); got > 0 {
		t.Errorf("%d packets left", got)
	}

	w.boot(map[sandbox.ID]sandbox.Held{l.Sandbox: {Lease: l, Policy: p}})
	for _, to := range []netip.AddrPort{allowed4, allowed6} {
		if _, err := hello(l, to); err != nil {
			t.Errorf("%s after the server is back: %v", to, err)
		}
	}
	if _, err := dial(l, "tcp", targets[0]); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a denied destination after the server is back: %v", err)
	}

	// The proof that all this tests something: without the fail-closed guard it is open.
	w.halt()
	flush(t)
	if err := w.link.RuleDel(failclosed.Rule(netlink.FAMILY_V4, w.guardBit())); err != nil {
		t.Fatal(err)
	}
	if CheckGuard(w.cfg.Name) == nil {
		t.Error("doctor would see nothing")
	}
	sendAs(t, l, spoof, targets[0])
	if !reaches(l, targets[4]) || tap.count(func(p packet) bool { return p.src.Addr() == spoof }) != 1 || !heardPlain(t, l) {
		t.Error("without rules and routes it should be open")
	}
	if err := w.guard.Route(w.link, netlink.FAMILY_V4); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // for halt, when the test ends
	w.cancel = cancel
	go func() { <-ctx.Done(); w.done <- nil }()
}

// heardPlain is the control of heardMulticast: a listener hears what is for it.
func heardPlain(t *testing.T, l sandbox.Lease) bool { return heard(t, l, l.Gate4) }

func heardMulticast(t *testing.T, l sandbox.Lease) bool {
	return heard(t, l, netip.MustParseAddr("224.0.0.251")) || heard(t, l, netip.MustParseAddr("255.255.255.255"))
}

// heard reports whether a socket of the host gets what the sandbox sends to an address.
func heard(t *testing.T, l sandbox.Lease, to netip.Addr) bool {
	t.Helper()
	u, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 5353})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	i, err := net.InterfaceByName(l.Link)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: [4]byte{224, 0, 0, 251}, Ifindex: int32(i.Index)})
	})
	if err != nil {
		t.Fatal(err)
	}
	sendAs(t, l, l.Addr4.Addr(), netip.AddrPortFrom(to, 5353))
	_ = u.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	_, err = u.Read(make([]byte, 100))
	return err == nil
}

func TestRoutingRulesComeBack(t *testing.T) {
	w := start(t)
	w.lease()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := w.link.RuleDel(failclosed.Rule(family, w.guardBit())); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the rules are back", func() bool { return CheckGuard(w.cfg.Name) == nil })
}

func TestTheHostsAddressesAreFollowed(t *testing.T) {
	w := start(t)
	up, err := netlink.LinkByName("up0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile(policy.Input{}, &policy.Operator{IsHost: w.IsHost}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"203.0.115.77/32", "2001:db8:15::77/128"} {
		own := netip.MustParsePrefix(a)
		judged := func() bool {
			return p.Decide(policy.Flow{Proto: policy.TCP, Dst: netip.AddrPortFrom(own.Addr(), 443)}).Allow
		}
		if !judged() {
			t.Errorf("%s is the host's before it has it", own.Addr())
		}
		if err := netlink.AddrAdd(up, slot.Address(own)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a new address is always blocked", func() bool { return !judged() && !p.AnswerAllowed("example.com", own.Addr()) })
		if err := netlink.AddrDel(up, slot.Address(own)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "an address that is gone is not", judged)
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(3 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within three seconds: " + what)
		}
	}
}

func TestFlushedRulesLetNothingSlip(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"198.51.100.0/24"}})
	tap, denied, allowed := w.tap(), at("198.51.100.1:7777"), at("198.51.101.1:7777")
	live := open(t, l, allowed)
	stop, done := make(chan struct{}), make(chan error)
	go func() { // as fast as it goes
		c, err := dial(l, "udp", denied)
		for err == nil {
			select {
			case <-stop:
				done <- c.Close()
				return
			default:
				_, _ = c.Write([]byte("out"))
			}
		}
		done <- err
	}()
	for range 50 {
		flush(t)
		time.Sleep(5 * time.Millisecond)
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := tap.count(func(p packet) bool { return p.dst == denied }); got > 0 {
		t.Errorf("%d packets to a denied destination left", got)
	}
	if tap.count(func(p packet) bool { return p.dst == allowed }) == 0 {
		t.Error("the wiretap is deaf")
	}
	if err := echoes(live); err != nil {
		t.Errorf("a live flow afterwards: %v", err)
	}
}
