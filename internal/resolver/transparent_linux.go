package resolver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ListenTransparentTCP listens on addr so that TPROXY can deliver connections for
// any address to it. It needs CAP_NET_ADMIN.
func ListenTransparentTCP(ctx context.Context, addr netip.AddrPort) (net.Listener, error) {
	network, options := family("tcp", addr.Addr())
	lc := net.ListenConfig{Control: setOptions(options.transparent)}
	l, err := lc.Listen(ctx, network, addr.String())
	if err != nil {
		return nil, fmt.Errorf("listen transparently on tcp %s: %w", addr, err)
	}
	return l, nil
}

// Limits of the sockets that replies are sent from and that are kept: one for
// each server that sandboxes address, closed when it was not used for a while.
const (
	maxReplySockets = 64
	replySocketIdle = 30 * time.Second
)

// TransparentUDP receives datagrams for any address by TPROXY.
//
// A reply has to come from the server that the sandbox addressed. The receiving
// socket has another address and port, so replies go out by further transparent
// sockets, bound to the servers' addresses. They never receive: TPROXY delivers to
// the listening socket, since none of them is connected.
type TransparentUDP struct {
	conn    *net.UDPConn
	listen  net.ListenConfig // of reply sockets
	network string

	mu      sync.Mutex // guards all below
	replies map[netip.AddrPort]*replySocket
	closed  bool
}

type replySocket struct {
	conn *net.UDPConn
	used time.Time
	busy int // replies being written
}

var _ Datagrams = (*TransparentUDP)(nil)

// ListenTransparentUDP listens on addr so that TPROXY can deliver datagrams for
// any address to it. It needs CAP_NET_ADMIN.
func ListenTransparentUDP(ctx context.Context, addr netip.AddrPort) (*TransparentUDP, error) {
	network, options := family("udp", addr.Addr())
	lc := net.ListenConfig{Control: setOptions(options.transparent, options.originalDst)}
	p, err := lc.ListenPacket(ctx, network, addr.String())
	if err != nil {
		return nil, fmt.Errorf("listen transparently on udp %s: %w", addr, err)
	}
	conn, ok := p.(*net.UDPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("listen transparently on udp %s: %T is no UDP socket", addr, p), p.Close())
	}
	if err := setBuffer(conn, receiveBuffer); err != nil {
		return nil, errors.Join(fmt.Errorf("listen transparently on udp %s: %w", addr, err), conn.Close())
	}
	return &TransparentUDP{
		conn: conn, network: network, replies: map[netip.AddrPort]*replySocket{},
		listen: net.ListenConfig{Control: setOptions(options.transparent, sockopt{unix.SOL_SOCKET, unix.SO_REUSEADDR, "SO_REUSEADDR"})},
	}, nil
}

// receiveBuffer holds some 10,000 queries, as many as the kernel lets two keys' sandboxes
// send at once: a program with hundreds of threads sends its queries in one moment, and what does not fit is lost until the clients ask
// again after seconds. The kernel counts a small datagram as 768 bytes, and doubles
// what it is asked for.
const receiveBuffer = 4 << 20

// setBuffer sets the size of a socket's receive buffer, beyond net.core.rmem_max.
func setBuffer(c *net.UDPConn, size int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size)
	})
	if failed != nil {
		failed = fmt.Errorf("set SO_RCVBUFFORCE: %w", failed)
	}
	return errors.Join(err, failed)
}

// LocalAddr is where the socket listens.
func (u *TransparentUDP) LocalAddr() net.Addr { return u.conn.LocalAddr() }

// ReadQuery implements Datagrams.
func (u *TransparentUDP) ReadQuery(buf []byte) (n int, src, dst netip.AddrPort, err error) {
	var oob [128]byte
	n, oobn, flags, src, err := u.conn.ReadMsgUDPAddrPort(buf, oob[:])
	if err != nil {
		return 0, src, dst, err
	}
	src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return 0, src, dst, errors.New("the datagram is larger than any query")
	}
	dst, err = originalDst(oob[:oobn])
	return n, src, dst, err
}

// originalDst reads the destination a datagram had before TPROXY redirected it.
func originalDst(oob []byte) (netip.AddrPort, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("parse control messages: %w", err)
	}
	for i := range messages {
		sa, err := unix.ParseOrigDstAddr(&messages[i])
		if err != nil {
			continue
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
		case *unix.SockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)), nil
		}
	}
	return netip.AddrPort{}, errors.New("the kernel did not say where the datagram was going")
}

// Reply implements Datagrams.
func (u *TransparentUDP) Reply(msg []byte, from, to netip.AddrPort) error {
	s, err := u.take(from)
	if err != nil {
		return fmt.Errorf("reply as %s: %w", from, err)
	}
	_, err = s.conn.WriteToUDPAddrPort(msg, to)
	return errors.Join(err, u.put(from, s))
}

// take returns the socket bound to a server's address, marked busy. When all
// places are taken by busy ones, it is a socket for one reply.
func (u *TransparentUDP) take(from netip.AddrPort) (*replySocket, error) {
	now := time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil, net.ErrClosed
	}
	s, ok := u.replies[from]
	if !ok {
		p, err := u.listen.ListenPacket(context.Background(), u.network, from.String())
		if err != nil {
			return nil, err
		}
		conn, isUDP := p.(*net.UDPConn)
		if !isUDP {
			return nil, errors.Join(fmt.Errorf("%T is no UDP socket", p), p.Close())
		}
		s = &replySocket{conn: conn}
		u.makeRoom(now)
		if len(u.replies) < maxReplySockets {
			u.replies[from] = s
		}
	}
	s.used = now
	s.busy++
	return s, nil
}

// put ends one use of a socket.
func (u *TransparentUDP) put(from netip.AddrPort, s *replySocket) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	s.busy--
	if u.replies[from] == s {
		return nil
	}
	if err := s.conn.Close(); !errors.Is(err, net.ErrClosed) { // Close was quicker
		return err
	}
	return nil
}

// makeRoom closes the sockets that were idle for long, and the longest idle one
// if there are too many still. It must be called with mu held.
func (u *TransparentUDP) makeRoom(now time.Time) {
	var oldest netip.AddrPort
	for addr, s := range u.replies {
		switch {
		case s.busy > 0:
		case now.Sub(s.used) > replySocketIdle:
			s.conn.Close()
			delete(u.replies, addr)
		case !oldest.IsValid() || s.used.Before(u.replies[oldest].used):
			oldest = addr
		}
	}
	if s := u.replies[oldest]; s != nil && len(u.replies) >= maxReplySockets {
		s.conn.Close()
		delete(u.replies, oldest)
	}
}

// Close implements io.Closer. The sockets of replies still being written are
// closed with the rest.
func (u *TransparentUDP) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	err := u.conn.Close()
	for addr, s := range u.replies {
		err = errors.Join(err, s.conn.Close())
		delete(u.replies, addr)
	}
	return err
}

// sockopt is a boolean socket option.
type sockopt struct {
	level, option int
	name          string
}

type familyOptions struct{ transparent, originalDst sockopt }

// family returns the network of one address family and its options (ip(7), ipv6(7)).
func family(proto string, a netip.Addr) (network string, o familyOptions) {
	if a.Is4() {
		return proto + "4", familyOptions{
			sockopt{unix.SOL_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT"},
			sockopt{unix.SOL_IP, unix.IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"},
		}
	}
	return proto + "6", familyOptions{
		sockopt{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, "IPV6_TRANSPARENT"},
		sockopt{unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, "IPV6_RECVORIGDSTADDR"},
	}
}

// setOptions is a net.ListenConfig.Control that switches options on.
func setOptions(options ...sockopt) func(network, address string, raw syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) {
			for _, o := range options {
				if serr := unix.SetsockoptInt(int(fd), o.level, o.option, 1); serr != nil {
					failed = errors.Join(failed, fmt.Errorf("set %s: %w", o.name, serr))
				}
			}
		})
		return errors.Join(err, failed)
	}
}
