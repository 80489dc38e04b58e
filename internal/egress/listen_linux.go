package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

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
