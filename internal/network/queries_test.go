package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/share"
)

// inSocket counts what waits in a socket, by what it says.
func inSocket(t *testing.T, u *net.UDPConn) map[string]int {
	t.Helper()
	if err := u.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	got, b := map[string]int{}, make([]byte, 64)
	for {
		k, _, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			return got
		}
		got[string(b[:k])]++
	}
}

// flood sends datagrams of one flow from a sandbox.
func flood(t *testing.T, l sandbox.Lease, who string, to netip.AddrPort, n int) {
	t.Helper()
	enter(t, l.NetNS, func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		for range n {
			if _, err := c.Write([]byte(who)); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestAFloodOfQueriesLeavesRoomForAnotherKeys: all queries wait in one socket. However
// slowly it is read, what one key sends does not fill it.
func TestAFloodOfQueriesLeavesRoomForAnotherKeys(t *testing.T) {
	w := start(t)
	for network, host := range map[string]string{"udp4": "127.0.0.1", "udp6": "::1"} {
		t.Run(network, func(t *testing.T) {
			pc, err := (&net.ListenConfig{Control: transparent}).ListenPacket(context.Background(), network, netip.AddrPortFrom(netip.MustParseAddr(host), w.cfg.DNSPort).String())
			if err != nil {
				t.Fatal(err)
			}
			defer pc.Close()
			u := pc.(*net.UDPConn)
			raw, err := u.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) }); cerr != nil || err != nil {
				t.Fatal(cerr, err)
			}
			to := netip.AddrPortFrom(netip.MustParseAddr("8.8.8.8"), 53)
			if network == "udp6" {
				to = netip.AddrPortFrom(public6, 53)
			}
			// None of it leaves the host: the kernel hands port 53 to the socket.
			began := time.Now()
			var wg sync.WaitGroup
			for i := range 4 {
				l := w.owned(t, network+"greedy")
				wg.Go(func() { flood(t, l, fmt.Sprint("greedy", i), to, 4000) })
			}
			wg.Wait()
			flood(t, w.owned(t, network+"other"), "other", to, 500)
			seconds := time.Since(began).Seconds() + 1
			got := inSocket(t, u)
			if got["other"] != 500 {
				t.Errorf("another key has %d of 500 queries in the socket", got["other"])
			}
			all := 0
			for i := range 4 {
				one := got[fmt.Sprint("greedy", i)]
				if all += one; float64(one) > DefaultQueries*seconds+16 {
					t.Errorf("a sandbox has %d queries in the socket", one)
				}
			}
			if float64(all) > 2.5*DefaultQueries*seconds+16 {
				t.Errorf("a key has %d queries in the socket", all)
			}
		})
	}
	for _, scope := range []share.Scope{share.Sandbox, share.Key} {
		w.flows.wait(t, string(scope), func(e flowEvent) bool {
			return e.Reason == ReasonQueries && e.Rule.ID == "limit.dns_datagrams."+string(scope)
		})
	}
}

// TestOtherPortsAreNotPacedAsQueries: the rate is about port 53.
func TestOtherPortsAreNotPacedAsQueries(t *testing.T) {
	w := start(t)
	to := netip.AddrPortFrom(public4, 7000)
	c := w.count(t, to)
	l := w.lease()
	w.apply(l, policy.Input{})
	flood(t, l, "data", to, DefaultQueries+1000)
	if got := c.opened("data"); got != DefaultQueries+1000 {
		t.Errorf("%d of %d datagrams came out", got, DefaultQueries+1000)
	}
}
