package network

import (
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/sandbox"
)

type flowEvent = flowlog.Event

// networkOrder returns v as it lies in memory in network order.
func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// listenIn listens inside a slot.
func listenIn(t testing.TB, l sandbox.Lease, addr string) net.Listener {
	t.Helper()
	var out net.Listener
	enter(t, l.NetNS, func() (err error) {
		out, err = net.Listen("tcp", addr)
		return err
	})
	serveTCP(t, out)
	return out
}

func listenHost(t testing.TB, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	serveTCP(t, l)
	return l
}

func hostDial(to netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{Timeout: 2 * time.Second}).Dial("tcp", to.String())
}

// dialFromHere connects from the calling thread's namespace.
func dialFromHere(to netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{Timeout: 300 * time.Millisecond}).Dial("tcp", to.String())
}

// echoICMP sends an ICMP message of a kind from a raw socket in the slot and waits
// for an answer of any kind.
func echoICMP(l sandbox.Lease, to netip.Addr, kind byte) error {
	var fd int
	err := inNamespace(l.NetNS, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVERR, 1); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 300000}); err != nil {
		return err
	}
	sa := &unix.SockaddrInet4{Addr: to.As4()}
	if err := unix.Connect(fd, sa); err != nil {
		return err
	}
	m := make([]byte, 20)
	m[0], m[5] = kind, 1
	sum := ^checksum.Checksum(m, 0)
	m[2], m[3] = byte(sum>>8), byte(sum)
	if _, err := unix.Write(fd, m); err != nil {
		return err
	}
	_, err = unix.Read(fd, make([]byte, 200))
	return err
}

// list prints the table as nft(8) does.
func (w *world) list(t testing.TB) string {
	t.Helper()
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("nft is not installed: the table cannot be listed")
	}
	out, err := exec.Command(nft, "-n", "list", "table", "inet", w.table().Table().Name).CombinedOutput()
	if err != nil {
		t.Fatal("list the table:", err, string(out))
	}
	return string(out)
}

// logTo writes a log as text.
func logTo(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

// change makes changes with the library alone.
func (k *kernel) change(queue func(*nftables.Conn)) error {
	return k.read(func(c *nftables.Conn) error {
		queue(c)
		return c.Flush()
	})
}

// flushRuleset does what "nft flush ruleset" does.
func (k *kernel) flushRuleset() error { return k.change((*nftables.Conn).FlushRuleset) }
