package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ListenTransparent listens on addr with IP_TRANSPARENT (IPV6_TRANSPARENT for an
// IPv6 address), so that TPROXY can deliver connections for any address to it;
// each connection's LocalAddr is then where it was going. It needs CAP_NET_ADMIN.
func ListenTransparent(ctx context.Context, addr netip.AddrPort) (*net.TCPListener, error) {
	network, level, option := "tcp4", unix.SOL_IP, unix.IP_TRANSPARENT
	if addr.Addr().Is6() {
		network, level, option = "tcp6", unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	lc := net.ListenConfig{
		KeepAlive: -1, // each connection inherits the listener's: four system calls less
		Control: func(_, _ string, raw syscall.RawConn) error {
			var failed error
			err := raw.Control(func(fd uintptr) {
				if failed = unix.SetsockoptInt(int(fd), level, option, 1); failed != nil {
					failed = fmt.Errorf("set IP_TRANSPARENT (needs CAP_NET_ADMIN): %w", failed)
					return
				}
				failed = setKeepAlive(int(fd))
			})
			return errors.Join(err, failed)
		},
	}
	lc.SetMultipathTCP(false) // its sockets cannot splice
	ln, err := lc.Listen(ctx, network, addr.String())
	if err != nil {
		return nil, fmt.Errorf("listen transparently on %s: %w", addr, err)
	}
	tl, ok := ln.(*net.TCPListener)
	if !ok {
		ln.Close()
		return nil, fmt.Errorf("listen transparently on %s: %T is no TCP listener", addr, ln)
	}
	return tl, nil
}

// setKeepAlive is what net does with a KeepAliveConfig.
func setKeepAlive(fd int) error {
	for _, o := range []struct{ level, option, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.SOL_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle.Seconds())},
		{unix.SOL_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval.Seconds())},
		{unix.SOL_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return fmt.Errorf("keep connections alive: %w", err)
		}
	}
	return nil
}

// originalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST
// (linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h).
const originalDst = 80

// RedirectedDst says where a connection was going before nftables redirected
// it to this host, for machines without TPROXY.
func RedirectedDst(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	four := addrPortOf(c.LocalAddr()).Addr().Is4()
	var dst netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		if four {
			dst, failed = originalDst4(int(fd))
		} else {
			dst, failed = originalDst6(int(fd))
		}
	})
	if err := errors.Join(err, failed); err != nil {
		return netip.AddrPort{}, fmt.Errorf("read SO_ORIGINAL_DST: %w", err)
	}
	return dst, nil
}

func originalDst4(fd int) (netip.AddrPort, error) {
	// The kernel fills a sockaddr_in; GetsockoptIPv6Mreq is the wrapper whose
	// buffer is large enough and has no pointers.
	m, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, originalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := m.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
}

func originalDst6(fd int) (netip.AddrPort, error) {
	m, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, originalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port := (*[2]byte)(unsafe.Pointer(&m.Addr.Port)) // in network order, as the kernel wrote it
	return netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), binary.BigEndian.Uint16(port[:])), nil
}
