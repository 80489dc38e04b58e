package network

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/sandbox"
)

type flowEvent = flowlog.Event

// listenIn listens inside a slot.
func listenIn(t testing.TB, l sandbox.Lease, addr string) net.Listener {
	t.Helper()
	var out net.Listener
	enter(t, l.NetNS, func() (err error) {
		out, err = net.Listen("tcp", addr)
		return err
	})
	go serveTCP(out)
	return out
}

func listenHost(t testing.TB, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	go serveTCP(l)
	return l
}

func hostDial(to netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{Timeout: 2 * time.Second}).Dial("tcp", to.String())
}

// dialFromHere connects from the calling thread's namespace.
func dialFromHere(to netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{Timeout: 300 * time.Millisecond}).Dial("tcp", to.String())
}
