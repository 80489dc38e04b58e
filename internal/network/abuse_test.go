package network

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// tracked counts the flows that the tracker holds of a slot, towards a port.
func (w *world) tracked(l sandbox.Lease, port uint16) (count int) {
	w.t.Helper()
	flows, err := w.ct.Flows(conntrack.Mark{}) // whatever their mark
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range flows {
		if conntrack.Src(f).Addr() == l.Addr4.Addr() && conntrack.Dst(f).Port() == port {
			count++
		}
	}
	return count
}

// TestQuestionsCountAsFlows holds for a sandbox that may reach nothing: what it
// asks on port 53 is answered by the resolver, and tracked.
func TestQuestionsCountAsFlows(t *testing.T) {
	w := start(t, func(c *Config) { c.MaxFlows = 20 })
	resolver(t, 15053)
	l, other := w.lease(), w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}})
	w.apply(other, policy.Input{DenyOut: []string{"0.0.0.0/0"}})
	for i := range 100 {
		c, err := dial(l, "udp", netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(100 + i)}), 53))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if n := w.tracked(l, 53); n < 15 || n > 21 {
		t.Errorf("%d flows to port 53 are tracked; want 20", n)
	}
	w.flows.wait(t, "too many", func(e flowEvent) bool { return e.Reason == ReasonTooMany && e.Sandbox == string(l.Sandbox) })
	if err := echoUDP(other, at("8.8.8.8:53"), time.Second); err != nil {
		t.Errorf("another sandbox's question: %v", err)
	}
}

func TestFlowsOfTheProxyCountAsFlows(t *testing.T) {
	w := start(t, func(c *Config) { c.MaxFlows = 20 })
	proxy(t, 15001)
	l := w.lease()
	w.apply(l, policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com"}})
	passed := 0
	for range 40 {
		c, err := dial(l, "tcp", at("198.51.100.10:443"))
		if err != nil {
			continue
		}
		defer c.Close()
		passed++
	}
	if passed < 15 || passed > 21 {
		t.Errorf("%d of 40 flows came to the proxy; want 20", passed)
	}
}

// TestASandboxCannotEndTheHostsFlows sends from a slot the ICMP error that a
// closed port would have answered a datagram of the host with: were it believed,
// any sandbox could end the resolver's questions for all.
func TestASandboxCannotEndTheHostsFlows(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{})
	c, err := net.Dial("udp4", "198.51.100.10:7777")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func(wait time.Duration) error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 10))
		return err
	}
	for range 10 { // the server answers from the right address once it is set up
		if err = ask(200 * time.Millisecond); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal("the host's own flow:", err)
	}
	us := c.LocalAddr().(*net.UDPAddr).AddrPort()
	if err := portUnreachable(l, us, at("198.51.100.10:7777")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // for the error to be taken in
	if err := ask(2 * time.Second); err != nil {
		t.Errorf("after a sandbox's ICMP error about it: %v", err)
	}
}

// portUnreachable sends from a slot an ICMP error about a datagram (RFC 792).
func portUnreachable(l sandbox.Lease, from, to netip.AddrPort) error {
	m := make([]byte, 8+20+8)
	m[0], m[1] = 3, 3
	ip := m[8:]
	ip[0], ip[8], ip[9] = 0x45, 64, byte(policy.UDP)
	binary.BigEndian.PutUint16(ip[2:], 29)
	copy(ip[12:], from.Addr().AsSlice())
	copy(ip[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip[:20], 0))
	binary.BigEndian.PutUint16(ip[20:], from.Port())
	binary.BigEndian.PutUint16(ip[22:], to.Port())
	binary.BigEndian.PutUint16(ip[24:], 9)
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, 0))
	return inNamespace(l.NetNS, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, m, 0, &unix.SockaddrInet4{Addr: from.Addr().As4()})
	})
}

// TestASlotRestsUntilItsFlowsAreForgotten closes the connection to the tracker:
// the slot must not go before its flows do.
func TestASlotRestsUntilItsFlowsAreForgotten(t *testing.T) {
	w := start(t)
	l := w.lease()
	w.apply(l, policy.Input{})
	w.halt() // so that only the test empties the trash
	if err := w.Release(context.Background(), l); err != nil {
		t.Fatal(err)
	}
	if err := w.ct.Close(); err != nil {
		t.Fatal(err)
	}
	there := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.slots[l.Slot] != nil
	}
	if err := w.deleteReleased(); err == nil || !there() {
		t.Errorf("with the tracker out of reach: error %v, slot there: %t", err, there())
	}
	w.ct = &conntrack.Tracker{}
	if err := w.deleteReleased(); err != nil || there() {
		t.Errorf("afterwards: error %v, slot there: %t", err, there())
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w.boot(nil)
}
