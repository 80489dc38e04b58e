package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// tracker is the one connection to the connection tracker.
type tracker struct {
	mu   sync.Mutex // guards conn, and holds during a call
	conn *conntrack.Conn
}

// call runs fn on the connection, and starts with a new one after an error.
func (t *tracker) call(fn func(*conntrack.Conn) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn == nil {
		c, err := conntrack.Dial(nil)
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

func (t *tracker) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn != nil {
		_ = t.conn.Close()
		t.conn = nil
	}
}

// flowsOf returns the flows that the slot's rules accepted, under any policy.
func (n *Network) flowsOf(s *slotState) ([]conntrack.Flow, error) {
	var flows []conntrack.Flow
	err := n.ct.call(func(c *conntrack.Conn) (err error) {
		flows, err = c.DumpFilter(conntrack.NewFilter().Mark(markOf(s.Num, 0)).MarkMask(markSlot), nil)
		return err
	})
	kept := flows[:0]
	for _, f := range flows { // another server's slot may have the same number
		if src := f.TupleOrig.IP.SourceAddress; src == s.Lease.Addr4.Addr() || src == s.Lease.Addr6.Addr() {
			kept = append(kept, f)
		}
	}
	return kept, err
}

func destination(f conntrack.Flow) netip.AddrPort {
	return netip.AddrPortFrom(f.TupleOrig.IP.DestinationAddress, f.TupleOrig.Proto.DestinationPort)
}

// cutRefused ends the kernel's flows that p refuses, also where a name could admit
// them now: what they say was not looked at from the start. The proxy's flows are
// the proxy's to judge: it knows their names. The caller holds s.mu.
func (n *Network) cutRefused(s *slotState, p *policy.Compiled) error {
	flows, err := n.flowsOf(s)
	if err != nil {
		return err
	}
	var refused []conntrack.Flow
	for _, f := range flows {
		if _, proxied, _ := slotOfMark(f.Mark); !proxied && !p.Decide(policy.Flow{Proto: policy.Proto(f.TupleOrig.Proto.Protocol), Dst: destination(f)}).Allow {
			refused = append(refused, f)
		}
	}
	return n.cut(s, refused)
}

// cutAll ends every flow the slot's rules accepted.
func (n *Network) cutAll(s *slotState) error {
	if !s.applied {
		return nil
	}
	flows, err := n.flowsOf(s)
	if err != nil {
		return err
	}
	return n.cut(s, flows)
}

// cut makes the kernel forget flows. Answers from outside then belong to nobody
// and are reset by the host itself; the sandbox is nudged to send a packet, which
// the rules answer with a reset, so that a reader does not wait for ever.
func (n *Network) cut(s *slotState, flows []conntrack.Flow) error {
	var all error
	for _, f := range flows {
		if err := n.forget(f); err != nil {
			all = errors.Join(all, err)
		}
	}
	return errors.Join(all, nudge(s, flows))
}

func (n *Network) forget(f conntrack.Flow) error {
	err := n.ct.call(func(c *conntrack.Conn) error {
		err := c.Delete(conntrack.Flow{ID: f.ID, TupleOrig: f.TupleOrig, TupleReply: f.TupleReply, Zone: f.Zone})
		if errors.Is(err, unix.ENOENT) {
			return nil // it ended by itself
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("forget flow to %s: %w", destination(f), err)
	}
	return nil
}

// forgetFlows makes the kernel forget whatever it knows of the addresses of
// slots, flows that the host or the proxy opened or ended included.
func (n *Network) forgetFlows(slots []*slotState) error {
	ours := map[netip.Addr]bool{}
	for _, s := range slots {
		ours[s.Lease.Addr4.Addr()] = true
		if s.Lease.Addr6.IsValid() {
			ours[s.Lease.Addr6.Addr()] = true
		}
	}
	var flows []conntrack.Flow
	err := n.ct.call(func(c *conntrack.Conn) (err error) {
		flows, err = c.Dump(nil)
		return err
	})
	for _, f := range flows {
		if ours[f.TupleOrig.IP.SourceAddress] || ours[f.TupleOrig.IP.DestinationAddress] {
			err = errors.Join(err, n.forget(f))
		}
	}
	return err
}

// nudge sends the sandbox's end of each TCP flow a byte that is out of its window,
// as if from the other end. It answers with an acknowledgement (RFC 9293, 3.10.7.4),
// which now meets the rules and is answered with a reset that has the right
// sequence number. The packet goes straight to the link, past our own tables.
func nudge(s *slotState, flows []conntrack.Flow) error {
	fd := -1
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
	}()
	for _, f := range flows {
		t := f.TupleOrig
		if t.Proto.Protocol != uint8(policy.TCP) || over(f) {
			continue
		}
		if fd < 0 {
			var err error
			if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return fmt.Errorf("open packet socket: %w", err)
			}
		}
		packet, etherType := stray(destination(f), netip.AddrPortFrom(t.IP.SourceAddress, t.Proto.SourcePort))
		to := &unix.SockaddrLinklayer{Protocol: bigEndian(etherType), Ifindex: int(s.Index), Halen: 6}
		copy(to.Addr[:], s.MAC)
		if err := unix.Sendto(fd, packet, 0, to); err != nil && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("nudge the sandbox's end: %w", err)
		}
	}
	return nil
}

// over reports whether both ends have said goodbye: the sandbox would answer with a
// reset of its own, and the log would call that an attempt.
func over(f conntrack.Flow) bool {
	const timeWait, closed = 7, 8 // include/uapi/linux/netfilter/nf_conntrack_tcp.h
	tcp := f.ProtoInfo.TCP
	return tcp != nil && (tcp.State == timeWait || tcp.State == closed)
}

// bigEndian returns v as it lies in memory in network order.
func bigEndian(v uint16) uint16 {
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
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))
	if from.Addr().Is4() {
		ip := make([]byte, 20, 20+len(tcp))
		ip[0], ip[8], ip[9] = 0x45, 64, byte(policy.TCP)
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(tcp)))
		copy(ip[12:], src)
		copy(ip[16:], dst)
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
		return append(ip, tcp...), unix.ETH_P_IP
	}
	ip := make([]byte, 40, 40+len(tcp))
	ip[0], ip[6], ip[7] = 0x60, byte(policy.TCP), 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
	copy(ip[8:], src)
	copy(ip[24:], dst)
	return append(ip, tcp...), unix.ETH_P_IPV6
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
