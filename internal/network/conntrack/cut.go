package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"

	ct "github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/cordonhq/cordon/internal/policy"
)

// Tracker lists and ends flows. The zero value is ready for use, by several goroutines.
type Tracker struct {
	mu     sync.Mutex // guards what follows, and is held during a call
	conn   *ct.Conn
	closed bool
}

// Flow is a flow that the tracker knows.
type Flow = ct.Flow

// call runs fn on the connection, and starts with a new one after an error.
func (t *Tracker) call(fn func(*ct.Conn) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return fmt.Errorf("conntrack: %w", net.ErrClosed)
	}
	if t.conn == nil {
		c, err := ct.Dial(nil)
		if err != nil {
			return fmt.Errorf("conntrack: open netlink: %w", err)
		}
		t.conn = c
	}
	if err := fn(t.conn); err != nil {
		_ = t.conn.Close()
		t.conn = nil
		return fmt.Errorf("conntrack: %w", err)
	}
	return nil
}

// Close closes the connection to the kernel; later calls fail.
func (t *Tracker) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.conn == nil {
		return nil
	}
	err := t.conn.Close()
	t.conn = nil
	return err
}

// Flows returns the flows with a mark.
func (t *Tracker) Flows(of Mark) (flows []Flow, err error) {
	err = t.call(func(c *ct.Conn) (err error) {
		flows, err = c.DumpFilter(ct.NewFilter().Mark(of.Value).MarkMask(of.Mask), nil)
		return err
	})
	return flows, err
}

// Proto is a flow's protocol.
func Proto(f Flow) policy.Proto { return policy.Proto(f.TupleOrig.Proto.Protocol) }

// Src is where a flow was opened.
func Src(f Flow) netip.AddrPort {
	return netip.AddrPortFrom(f.TupleOrig.IP.SourceAddress, f.TupleOrig.Proto.SourcePort)
}

// Dst is where a flow leads.
func Dst(f Flow) netip.AddrPort {
	return netip.AddrPortFrom(f.TupleOrig.IP.DestinationAddress, f.TupleOrig.Proto.DestinationPort)
}

// Link is where the sandbox of flows is reached: the host's end of its veth pair, and the
// hardware address of the other.
type Link struct {
	Index uint32
	MAC   net.HardwareAddr
}

// Cut makes the kernel forget flows of a sandbox. Answers from outside then belong to no
// flow and are reset by the host itself; the sandbox is made to send a packet, which
// the rules answer with a reset, so that a reader does not wait for ever.
func (t *Tracker) Cut(at Link, flows []Flow) error {
	var all error
	for _, f := range flows {
		if err := t.Forget(f); err != nil {
			all = errors.Join(all, err)
		}
	}
	return errors.Join(all, nudge(at, flows))
}

// Forget makes the kernel forget a flow. A flow that has ended is no error.
func (t *Tracker) Forget(f Flow) error {
	err := t.call(func(c *ct.Conn) error {
		err := c.Delete(Flow{ID: f.ID, TupleOrig: f.TupleOrig, TupleReply: f.TupleReply, Zone: f.Zone})
		if errors.Is(err, unix.ENOENT) {
			return nil // it ended by itself
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("forget flow to %s: %w", Dst(f), err)
	}
	return nil
}

// ForgetAddrs makes the kernel forget every flow from or to addresses.
func (t *Tracker) ForgetAddrs(addrs map[netip.Addr]bool) error {
	var flows []Flow
	err := t.call(func(c *ct.Conn) (err error) {
		flows, err = c.Dump(nil)
		return err
	})
	for _, f := range flows {
		if addrs[f.TupleOrig.IP.SourceAddress] || addrs[f.TupleOrig.IP.DestinationAddress] {
			err = errors.Join(err, t.Forget(f))
		}
	}
	return err
}

// nudge sends the sandbox's end of each TCP flow a byte that is out of its window,
// as if from the other end. It answers with an acknowledgement (RFC 9293, 3.10.7.4),
// which now meets the rules and is answered with a reset that has the right
// sequence number. The packet goes straight to the link, past our own tables.
func nudge(at Link, flows []Flow) error {
	fd := -1
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
	}()
	for _, f := range flows {
		if Proto(f) != policy.TCP || over(f) {
			continue
		}
		if fd < 0 {
			var err error
			if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return fmt.Errorf("open packet socket: %w", err)
			}
		}
		packet, etherType := stray(Dst(f), Src(f))
		to := &unix.SockaddrLinklayer{Protocol: networkOrder(etherType), Ifindex: int(at.Index), Halen: 6}
		copy(to.Addr[:], at.MAC)
		if err := unix.Sendto(fd, packet, 0, to); err != nil && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("nudge the sandbox's end: %w", err)
		}
	}
	return nil
}

// over reports whether both ends have closed the connection: the sandbox would answer with a
// reset of its own, and the log would call that an attempt.
func over(f Flow) bool {
	const timeWait, closed = 7, 8 // include/uapi/linux/netfilter/nf_conntrack_tcp.h
	tcp := f.ProtoInfo.TCP
	return tcp != nil && (tcp.State == timeWait || tcp.State == closed)
}

// networkOrder returns v as it lies in memory in network order.
func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16([]byte{byte(v >> 8), byte(v)})
}

// stray builds a TCP segment of one byte with arbitrary sequence numbers.
func stray(from, to netip.AddrPort) (packet []byte, etherType uint16) {
	const header, flagAck, flagPush = 20, 0x10, 0x08
	tcp := make([]byte, header+1)
	binary.BigEndian.PutUint16(tcp[0:], from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], rand.Uint32())
	binary.BigEndian.PutUint32(tcp[8:], rand.Uint32())
	tcp[12] = header / 4 << 4
	tcp[13] = flagAck | flagPush
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	pseudo := append(append([]byte{}, src...), dst...)
	pseudo = append(pseudo, 0, byte(policy.TCP), 0, byte(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], ^checksum.Checksum(append(pseudo, tcp...), 0))
	if from.Addr().Is4() {
		ip := make([]byte, 20, 20+len(tcp))
		ip[0], ip[8], ip[9] = 0x45, 64, byte(policy.TCP)
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(tcp)))
		copy(ip[12:], src)
		copy(ip[16:], dst)
		binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip, 0))
		return append(ip, tcp...), unix.ETH_P_IP
	}
	ip := make([]byte, 40, 40+len(tcp))
	ip[0], ip[6], ip[7] = 0x60, byte(policy.TCP), 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
	copy(ip[8:], src)
	copy(ip[24:], dst)
	return append(ip, tcp...), unix.ETH_P_IPV6
}
