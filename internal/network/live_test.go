package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
	"github.com/cordonhq/cordon/internal/share"
)

// open connects and reads the greeting.
func open(t testing.TB, l sandbox.Lease, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := dial(l, "tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Read(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	return c
}

// echoes reports whether a connection still carries bytes both ways.
func echoes(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err
}

func TestTighteningCutsLiveFlows(t *testing.T) {
	for name, to := range map[string][2]string{
		"IPv4": {"198.51.100.10:7777", "198.51.101.10:7777"}, "IPv6": {"[2001:db8:2::10]:7777", "[2001:db8:3::10]:7777"},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			w.serve(7777)
			l := w.lease()
			w.apply(l, policy.Input{})
			refused, reading, kept := open(t, l, at(to[0])), open(t, l, at(to[0])), open(t, l, at(to[1]))
			udp, err := dial(l, "udp", at(to[0]))
			if err != nil {
				t.Fatal(err)
			}
			defer udp.Close()
			err = echoes(udp)
			for range 2 { // a datagram may get lost
				if err != nil {
					err = echoes(udp)
				}
			}
			if err != nil {
				t.Fatal("UDP before:", err)
			}
			ended := make(chan error, 1)
			go func() { _, err := reading.Read(make([]byte, 1)); ended <- err }() // sends nothing itself
			time.Sleep(20 * time.Millisecond)
			began := time.Now()
			w.apply(l, policy.Input{DenyOut: []string{at(to[0]).Addr().String()}})
			select {
			case err := <-ended:
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the reader: %v; want reset", err)
				}
				t.Logf("the reader was reset after %v", time.Since(began))
			case <-time.After(time.Second):
				t.Error("the reader still waits after a second")
			}
			if err := echoes(refused); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("the refused flow: %v; want reset", err)
			}
			if err := echoes(udp); err == nil {
				t.Error("UDP still echoes")
			}
			if err := echoes(kept); err != nil {
				t.Errorf("the allowed flow: %v", err)
			}
			w.apply(l, policy.Input{}) // loosening
			if err := echoes(kept); err != nil {
				t.Errorf("after loosening: %v", err)
			}
		})
	}
}

func TestAFailedUpdateLeavesTheFormerPolicy(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"198.51.100.0/24"}})
	live := open(t, l, at("198.51.101.1:7777"))
	// Someone's chain in the way: the next program's rules jump to what is gone.
	s := w.byID[l.Sandbox]
	taken := &nftables.Set{Table: w.table().Table(), Name: fmt.Sprintf("s%d_2_deny4", s.Num), KeyType: nftables.TypeMark}
	if err := w.kern.do(func(b *nft.Batch) { b.AddSet(taken, nil) }); err != nil {
		t.Fatal(err)
	}
	bad := compiled(t, policy.Input{DenyOut: []string{"198.51.101.1", "198.51.103.1"}}, nil)
	if err := w.Apply(context.Background(), l, bad); err == nil {
		t.Fatal("an update that the kernel must refuse succeeded")
	}
	if _, err := dial(l, "tcp", at("198.51.100.1:7777")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the former denial: %v; want refused", err)
	}
	if err := echoes(live); err != nil {
		t.Errorf("a live flow: %v", err)
	}
	if _, p, _ := w.Owner(l.Addr4.Addr()); len(p.Input().DenyOut) != 1 {
		t.Errorf("Owner tells the policy that failed: %v", p.Input())
	}
	if err := w.Apply(context.Background(), l, bad); err != nil { // and the next try works
		t.Fatal(err)
	}
	if err := echoes(live); err == nil {
		t.Error("the second try did not cut the flow")
	}
	if err := w.kern.dropSets([]*nftables.Set{taken}); err != nil {
		t.Error(err)
	}
}

func TestReleaseLeavesNothing(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{AllowOut: []string{"198.51.100.0/24:7777", "198.51.102.0/24"}})
	c := open(t, l, at("198.51.100.10:7777"))
	s := w.byID[l.Sandbox]
	for range 2 { // it is idempotent
		if err := w.Release(context.Background(), l); err != nil {
			t.Fatal(err)
		}
	}
	if err := echoes(c); err == nil {
		t.Error("a released sandbox still speaks")
	}
	if _, _, ok := w.Owner(l.Addr4.Addr()); ok {
		t.Error("the address still has an owner")
	}
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(l.NetNS); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the namespace is still there")
		}
	}
	if flows, err := w.flowsOf(s); err != nil || len(flows) > 0 {
		t.Errorf("flows are left: %v, %v", flows, err)
	}
	listing := w.list(t)
	for _, word := range []string{fmt.Sprintf("s%d", s.Num) + " {", fmt.Sprintf("s%d", s.Num) + "_", s.MAC.String(), "goto " + fmt.Sprintf("s%d", s.Num) + "\n"} {
		if strings.Contains(listing, word) {
			t.Errorf("the table still knows %q:\n%s", word, listing)
		}
	}
	if err := w.Apply(context.Background(), l, compiled(t, policy.Input{}, nil)); err == nil {
		t.Error("a released lease takes a policy")
	}
}

func TestSlotsOutliveTheServer(t *testing.T) {
	w := start(t)
	w.serve(7777)
	kept, spare, lost := w.lease(), w.lease(), w.lease()
	p := w.apply(kept, policy.Input{DenyOut: []string{"198.51.102.0/24"}})
	w.apply(lost, policy.Input{})
	live, doomed := open(t, kept, at("198.51.100.10:7777")), open(t, lost, at("198.51.100.10:7777"))
	w.halt()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := echoes(live); err != nil {
		t.Errorf("without a server: %v", err)
	}
	stop := make(chan struct{})
	trouble := make(chan error, 1)
	go func() { // traffic that must never be interrupted, and traffic that must never pass
		var err error
		for err == nil {
			select {
			case <-stop:
				trouble <- nil
				return
			default:
			}
			if err = echoes(live); err != nil {
				break
			}
			if c, derr := dial(kept, "tcp", at("198.51.102.1:7777")); derr == nil {
				c.Close()
				err = errors.New("a denied destination was reached")
			}
		}
		trouble <- err
	}()
	w.boot(map[sandbox.ID]sandbox.Held{kept.Sandbox: {Lease: kept, Policy: p}, spare.Sandbox: {Lease: spare}})
	time.Sleep(100 * time.Millisecond)
	close(stop)
	if err := <-trouble; err != nil {
		t.Errorf("meanwhile: %v", err)
	}
	if id, _, ok := w.Owner(kept.Addr4.Addr()); !ok || id != kept.Sandbox {
		t.Errorf("owner: %s, %t", id, ok)
	}
	if err := echoes(doomed); err == nil {
		t.Error("a sandbox that nobody holds still speaks")
	}
	if reaches(spare, at("198.51.100.10:7777")) {
		t.Error("a spare reaches the internet")
	}
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(lost.NetNS); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the unknown slot is still there")
		}
	}
	// The policy can be tightened, and the lease be released, as before.
	w.apply(kept, policy.Input{DenyOut: []string{"198.51.100.10"}})
	if err := echoes(live); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("after tightening: %v; want reset", err)
	}
	if err := w.Release(context.Background(), kept); err != nil {
		t.Error(err)
	}
}

func TestARestartedMachineGetsItsSlotsBack(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	p := w.apply(l, policy.Input{})
	w.halt()
	if err := w.byID[l.Sandbox].Destroy(w.link); err != nil { // as a restart does
		t.Fatal(err)
	}
	w.Close()
	w.boot(map[sandbox.ID]sandbox.Held{l.Sandbox: {Lease: l, Policy: p}})
	if who, err := hello(l, at("198.51.100.10:7777")); err != nil {
		t.Fatal(who, err)
	}
}

func TestAChangedConfigurationDoesNotAdoptALease(t *testing.T) {
	w := start(t)
	l := w.lease()
	l.Addr4 = netip.MustParsePrefix("10.224.0.2/30")
	n, err := New(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	err = n.Reconcile(context.Background(), map[sandbox.ID]sandbox.Held{l.Sandbox: {Lease: l}})
	if err == nil || !strings.Contains(err.Error(), "10.224.0.2") {
		t.Errorf("%v; want an error that names the address", err)
	}
}

func TestPinsAdmitExactlyWhatWasResolved(t *testing.T) {
	w := start(t)
	w.serve(5432, 7777)
	proxy(t, w.cfg.ProxyPort)
	l, other := w.lease(), w.lease()
	rules := policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"db.example.com:5432"}}
	p := w.apply(l, rules)
	w.apply(other, rules)
	if err := w.Pin(l.Sandbox, "db.example.com", public4, []uint16{5432}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := w.Pin(l.Sandbox, "db.example.com", public6, []uint16{5432}, time.Minute); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again before it runs out
		if err := w.Pin(l.Sandbox, "db.example.com", public4, []uint16{5432}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []netip.Addr{public4, public6} {
		to := netip.AddrPortFrom(a, 5432)
		if who, err := hello(l, to); err != nil || who != "proxy for "+to.String() {
			t.Errorf("%s: %q, %v", to, who, err)
		}
		if got, due, _ := w.Pinned(l.Sandbox, to); len(got) != 1 || got[0] != "db.example.com" || due != nil {
			t.Errorf("%s is pinned to %q, and due are %q", to, got, due)
		}
		if err := echoUDP(l, to, time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s over UDP: %v; want refused", to, err)
		}
		w.flows.wait(t, "a refusal of UDP that says why", func(e flowEvent) bool {
			return e.Sandbox == string(l.Sandbox) && e.Proto == "udp" && e.Dst == to && e.Reason == policy.ReasonNameTCP && e.Name == "db.example.com"
		})
		for who, dst := range map[sandbox.Lease]netip.AddrPort{l: netip.AddrPortFrom(a, 7777), other: to} {
			if err := echoUDP(who, dst, time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s over UDP: %v; want refused", dst, err)
			}
			w.flows.wait(t, "a refusal of UDP that no name is about", func(e flowEvent) bool {
				return e.Sandbox == string(who.Sandbox) && e.Proto == "udp" && e.Dst == dst && e.Reason == policy.ReasonDenyAddr && e.Name == ""
			})
		}
		for what, try := range map[string]error{
			"another port":    second(hello(l, netip.AddrPortFrom(a, 7777))),
			"another address": second(hello(l, netip.AddrPortFrom(a.Next(), 5432))),
			"another sandbox": second(hello(other, netip.AddrPortFrom(a, 5432))),
		} {
			if !errors.Is(try, syscall.ECONNREFUSED) {
				t.Errorf("%s: %s: %v; want refused", a, what, try)
			}
		}
	}
	if got, due, _ := w.Pinned(other.Sandbox, netip.AddrPortFrom(public4, 5432)); got != nil || due != nil {
		t.Errorf("another sandbox has the pins %q, %q", got, due)
	}
	live := open(t, l, netip.AddrPortFrom(public4, 5432))
	w.halt()
	w.Close()
	w.boot(map[sandbox.ID]sandbox.Held{l.Sandbox: {Lease: l, Policy: p}})
	if err := echoes(live); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if _, err := hello(l, netip.AddrPortFrom(public4, 5432)); err != nil {
		t.Errorf("a new connection after a restart: %v", err)
	}
	if got, due, _ := w.Pinned(l.Sandbox, netip.AddrPortFrom(public4, 5432)); len(due) != 1 || due[0] != "db.example.com" || got != nil {
		t.Errorf("after a restart: pinned to %q, due are %q; want the name to be asked for again", got, due)
	}
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"db.example.com:5432", "b.example.com:99"}})
	if err := echoes(live); err != nil {
		t.Errorf("after another rule came: %v", err)
	}
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"b.example.com:5432"}})
	if err := echoes(live); err == nil { // the proxy cuts it too; here nobody told it
		t.Error("the flow outlived its name's rule")
	}
	if err := second(hello(l, netip.AddrPortFrom(public4, 5432))); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a pin outlived its name's rule: %v", err)
	}
}

func second(_ string, err error) error { return err }

// TestPinsGoAlongAndEnd follows a pin to another life of a sandbox, where its name is
// asked for again, and to its end.
func TestPinsGoAlongAndEnd(t *testing.T) {
	w := start(t)
	w.serve(5432)
	proxy(t, w.cfg.ProxyPort)
	rules := policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"db.example.com:5432"}}
	old, next, stricter := w.lease(), w.lease(), w.lease()
	w.apply(old, rules)
	w.apply(next, rules)
	w.apply(stricter, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"other.example.com:5432"}})
	to := netip.AddrPortFrom(public4, 5432)
	for _, a := range []netip.Addr{public4, public6} {
		if err := w.Pin(old.Sandbox, "db.example.com", a, []uint16{5432}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	pins := w.Pins(old.Sandbox)
	if len(pins) != 2 || pins[0].Name != "db.example.com" || pins[0].Verified.IsZero() {
		t.Fatalf("the pins are %+v", pins)
	}
	for _, l := range []sandbox.Lease{next, stricter} {
		if err := w.Repin(l, pins); err != nil {
			t.Fatal(err)
		}
	}
	if names, due, _ := w.Pinned(next.Sandbox, to); names != nil || len(due) != 1 {
		t.Errorf("in the next life: %q count, %q are due", names, due)
	}
	if who, err := hello(next, to); err != nil || who != "proxy for "+to.String() {
		t.Errorf("in the next life: %q, %v", who, err)
	}
	if err := second(hello(stricter, to)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("under rules that do not list the name: %v", err)
	}
	// The name could not be asked for: it counts, as it was found an instant ago.
	if !w.Confirm(next.Sandbox, "db.example.com", to) || w.Confirm(next.Sandbox, "other.example.com", to) {
		t.Error("only the name that was found there may be confirmed")
	}
	if names, _, _ := w.Pinned(next.Sandbox, to); len(names) != 1 {
		t.Errorf("confirmed, and %q count", names)
	}
	if err := w.Pin(next.Sandbox, "db.example.com", public4, []uint16{5432}, time.Hour); err != nil {
		t.Fatal(err)
	}
	if names, due, _ := w.Pinned(next.Sandbox, to); len(names) != 1 || due != nil {
		t.Errorf("asked for again: %q count, %q are due", names, due)
	}
	// It no longer has the address.
	for range 2 {
		if err := w.Unpin(next.Sandbox, "db.example.com", to); err != nil {
			t.Fatal(err)
		}
	}
	if err := second(hello(next, to)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after its end: %v", err)
	}
	if _, _, lost := w.Pinned(next.Sandbox, to); lost != "db.example.com" {
		t.Errorf("lost is %q", lost)
	}
	w.flows.wait(t, "expired", func(e flowEvent) bool {
		return e.Sandbox == string(next.Sandbox) && e.Reason == policy.ReasonPinExpired && e.Name == "db.example.com" && e.Dst == to
	})
	if who, err := hello(old, to); err != nil {
		t.Errorf("the sandbox it came from: %q, %v", who, err)
	}
}

func TestPinsAreBounded(t *testing.T) {
	w := start(t)
	w.pinning = share.NewRates(share.Pins.Of(1e6, 0), 1e6) // the other limit
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"*.example.com:5432"}})
	addr := netip.MustParseAddr("198.18.0.0").As4()
	for i := range nft.MaxPins + 10 {
		addr[2], addr[3] = byte(i>>8), byte(i)
		if err := w.Pin(l.Sandbox, "db.example.com", netip.AddrFrom4(addr), []uint16{5432}, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(w.byID[l.Sandbox].pins.live); n != nft.MaxPins {
		t.Errorf("%d pins are kept", n)
	}
	if names, due, _ := w.Pinned(l.Sandbox, netip.AddrPortFrom(netip.AddrFrom4(addr), 5432)); len(names) != 1 || due != nil {
		t.Errorf("the last one: %q, %q", names, due)
	}
	if n := len(w.Pins(l.Sandbox)); n != maxSavedPins {
		t.Errorf("%d go along", n)
	}
}

func TestASpoofedSourceIsDropped(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l, victim := w.lease(), w.lease()
	w.apply(l, policy.Input{})
	w.apply(victim, policy.Input{})
	seen := make(chan netip.AddrPort, 16)
	var pc net.PacketConn
	enter(t, w.internet, func() (err error) {
		pc, err = net.ListenPacket("udp4", "198.51.100.77:7000")
		return err
	})
	defer pc.Close()
	go func() {
		b := make([]byte, 64)
		for {
			k, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_ = from
			seen <- netip.AddrPortFrom(netip.MustParseAddr(string(b[:k])), 0)
		}
	}()
	send := func(src netip.Addr, mac net.HardwareAddr) {
		t.Helper()
		sendFrame(t, l, mac, src, netip.MustParseAddrPort("198.51.100.77:7000"))
	}
	own := w.plan.Slot(l.Slot, true).MAC
	send(victim.Addr4.Addr(), own)
	send(netip.MustParseAddr("198.51.100.1"), own)
	send(l.Addr4.Addr(), w.plan.Slot(victim.Slot, true).MAC)
	send(l.Addr4.Addr(), own) // the last one is honest
	select {
	case got := <-seen:
		if got.Addr() != l.Addr4.Addr() {
			t.Errorf("a packet from %s arrived", got.Addr())
		}
	case <-time.After(2 * time.Second):
		t.Error("the honest packet did not arrive")
	}
	select {
	case got := <-seen:
		t.Errorf("one more packet arrived, from %s", got.Addr())
	case <-time.After(50 * time.Millisecond):
	}
	e := w.flows.wait(t, "spoofed", func(e flowEvent) bool {
		return e.Reason == ReasonSpoofed && e.Src.Addr() == victim.Addr4.Addr()
	})
	if e.Sandbox != string(l.Sandbox) {
		t.Errorf("the liar is %s, logged as %s", l.Sandbox, e.Sandbox)
	}
}

// sendAs sends a datagram from a slot's link with any source address.
func sendAs(t testing.TB, l sandbox.Lease, src netip.Addr, to netip.AddrPort) {
	t.Helper()
	mac, err := net.ParseMAC(l.MAC)
	if err != nil {
		t.Fatal(err)
	}
	sendFrame(t, l, mac, src, to)
}

// sendFrame is sendAs with any hardware address too. It carries its source address.
func sendFrame(t testing.TB, l sandbox.Lease, mac net.HardwareAddr, src netip.Addr, to netip.AddrPort) {
	t.Helper()
	payload := []byte(src.String())
	udp := make([]byte, 8+len(payload))
	binary.BigEndian.PutUint16(udp[0:], 4000)
	binary.BigEndian.PutUint16(udp[2:], to.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	copy(udp[8:], payload)
	ip := make([]byte, 20, 100)
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(udp)))
	copy(ip[12:], src.AsSlice())
	copy(ip[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip, 0))
	gate, err := net.InterfaceByName(l.Link)
	if err != nil {
		t.Fatal(err)
	}
	frame := append(append(append([]byte{}, gate.HardwareAddr...), mac...), 8, 0)
	frame = append(append(frame, ip...), udp...)
	enter(t, l.NetNS, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		i, err := net.InterfaceByName(slot.SandboxLink)
		if err != nil {
			return err
		}
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_IP), Ifindex: i.Index, Halen: 6})
	})
}

func TestICMP(t *testing.T) {
	w := start(t)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"198.51.101.0/24"}})
	ping := func(to string, kind byte) error { return echoICMP(l, netip.MustParseAddr(to), kind) }
	if err := ping("198.51.100.10", 8); err != nil {
		t.Errorf("an allowed address: %v", err)
	}
	if err := ping("198.51.101.10", 8); !errors.Is(err, syscall.EHOSTUNREACH) { // what Linux makes of code 13
		t.Errorf("a denied address: %v; want prohibited", err)
	}
	if err := ping("198.51.100.10", 13); err == nil {
		t.Error("a timestamp request was answered")
	}
	w.flows.wait(t, "protocol", func(e flowEvent) bool { return e.Reason == policy.ReasonProtocol && e.Proto == "icmp" })
}

func TestADeletedTableComesBack(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l, bare := w.lease(), w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"198.51.100.0/24"}})
	live := open(t, l, at("198.51.101.1:7777"))
	other := &kernel{}
	defer other.close()
	for range 3 {
		if err := other.flushRuleset(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(2 * time.Second); ; time.Sleep(time.Millisecond) {
			if there, err := w.kern.hasTable(w.table().Table().Name); err == nil && there {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the table is still gone")
			}
		}
		if _, err := dial(l, "tcp", at("198.51.100.1:7777")); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a denied destination: %v; want refused", err)
		}
		if err := echoes(live); err != nil {
			t.Errorf("a live flow: %v", err)
		}
	}
	if reaches(bare, at("198.51.101.1:7777")) {
		t.Error("a slot without a policy passes")
	}
	w.apply(l, policy.Input{DenyOut: []string{"198.51.101.0/24"}})
	if err := echoes(live); err == nil {
		t.Error("tightening afterwards cut nothing")
	}
	if err := w.Release(context.Background(), l); err != nil {
		t.Error(err)
	}
}

func TestOneSandboxCannotFillTheTracker(t *testing.T) {
	w := start(t, func(c *Config) { c.MaxFlows = 20 })
	w.serve(7777)
	l, other := w.lease(), w.lease()
	w.apply(l, policy.Input{})
	w.apply(other, policy.Input{})
	passed := 0
	for range 40 {
		c, err := dial(l, "tcp", at("198.51.100.10:7777"))
		if err != nil {
			continue
		}
		defer c.Close()
		passed++
	}
	if passed < 15 || passed > 21 {
		t.Errorf("%d of 40 flows passed; want 20", passed)
	}
	w.flows.wait(t, "too many", func(e flowEvent) bool { return e.Reason == ReasonTooMany && e.Sandbox == string(l.Sandbox) })
	if _, err := hello(other, at("198.51.100.10:7777")); err != nil {
		t.Errorf("another sandbox: %v", err)
	}
}

func TestManyAtATime(t *testing.T) {
	w := start(t)
	w.serve(7777)
	done := make(chan error)
	for i := range 8 {
		go func() {
			for range 4 {
				l, err := w.Acquire(context.Background(), sandboxid.New())
				if err != nil {
					done <- err
					return
				}
				mine := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(10 + i)}), 7777)
				p := compiled(t, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{mine.Addr().String()}}, nil)
				if err := w.Apply(context.Background(), l, p); err != nil {
					done <- err
					return
				}
				if _, err := hello(l, mine); err != nil {
					done <- err
					return
				}
				if _, err := dial(l, "tcp", at("198.51.100.9:7777")); !errors.Is(err, syscall.ECONNREFUSED) {
					done <- err
					return
				}
				if err := w.Release(context.Background(), l); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestErrorsOfAllowedFlowsComeBack(t *testing.T) {
	w := start(t)
	l := w.lease()
	w.apply(l, policy.Input{})
	for _, to := range []string{"198.51.100.10:9", "[2001:db8:2::10]:9"} { // nobody listens there
		if err := refusalUDP(l, at(to)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v; want the internet's own refusal", to, err)
		}
	}
}

func TestAThousandSlotsAreAdoptedInOneTransaction(t *testing.T) {
	w := start(t)
	p := compiled(t, policy.Input{DenyOut: []string{"198.51.100.0/24", "1.2.3.0/24", "2001:db8::/48", "2001:db9::/48"}}, nil)
	var kept []adopted
	for i := range 1000 {
		num := 8000 + i
		s := &slotState{Slot: w.plan.Slot(num, true)}
		s.Index = uint32(1e6 + num)
		kept = append(kept, adopted{id: sandboxid.New(), slot: s, policy: p})
	}
	began := time.Now()
	if err := w.replaceTable(kept); err != nil {
		t.Fatal(err)
	}
	t.Logf("took %v", time.Since(began))
}
