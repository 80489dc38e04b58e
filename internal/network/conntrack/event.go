// Package conntrack reads events of the kernel's connection tracker, lists flows and ends
// them. It hides netlink, the messages' form, and what it takes for both ends of a
// connection to learn that it is over.
package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// Event is what the connection tracker says of a flow when it begins or ends. Every new
// flow costs two of these messages, so they are read without a general decoder: without
// allocating, and in batches.
type Event struct {
	Ended             bool
	Mark              uint32
	Proto             policy.Proto
	Src, Dst          netip.AddrPort // of the direction that the flow was opened in
	BytesOut, BytesIn uint64         // in that direction and against it; set when the flow ended
	Start, Stop       uint64         // nanoseconds since 1970; 0 is unknown
}

// The numbers of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctNew, ctDelete = unix.NFNL_SUBSYS_CTNETLINK << 8, unix.NFNL_SUBSYS_CTNETLINK<<8 | 2

	ctaTupleOrig, ctaMark, ctaCountersOrig, ctaCountersReply, ctaTimestamp = 1, 8, 9, 10, 20

	ctaTupleIP, ctaTupleProto                  = 1, 2
	ctaIP4Src, ctaIP4Dst, ctaIP6Src, ctaIP6Dst = 1, 2, 3, 4
	ctaProtoNum, ctaProtoSrc, ctaProtoDst      = 1, 2, 3
	ctaCountersBytes                           = 2
	ctaTimeStart, ctaTimeStop                  = 1, 2
)

// ctHeader is a netlink header and an nfgenmsg, in octets.
const ctHeader = unix.SizeofNlMsghdr + 4

// Multicast groups of the connection tracker (linux/netfilter/nfnetlink.h).
const groupsNewAndDestroy = 1<<(unix.NFNLGRP_CONNTRACK_NEW-1) | 1<<(unix.NFNLGRP_CONNTRACK_DESTROY-1)

// gather is how long events may wait for others to be read with.
const gather = 10 * time.Millisecond

// Mark tells flows by their connection mark: those with Value in the bits of Mask.
type Mark struct{ Value, Mask uint32 }

// Watch hands record the beginning and the end of each flow with a mark, until ctx ends;
// the kernel drops the events of other flows, and of those whose mark is 0. lost is called when the kernel had to drop
// some because the buffer, of so many octets, was full.
func Watch(ctx context.Context, of Mark, buffer int, record func(Event), lost func()) error {
	s, err := open(of, buffer)
	if err != nil {
		return fmt.Errorf("follow flows: %w", err)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(interrupted); s.interrupt() })
	defer func() {
		if !stop() {
			<-interrupted
		}
		_ = s.close()
	}()
	in := newInbox()
	for {
		if err := s.wait(); err != nil {
			return fmt.Errorf("wait for flows: %w", err)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err := s.read(in, record, lost); err != nil {
			return fmt.Errorf("follow flows: %w", err)
		}
		select { // let some gather
		case <-ctx.Done():
			return nil
		case <-time.After(gather):
		}
	}
}

// socket receives the tracker's events. It is not in the runtime's poller, which every
// single event would wake; wait blocks a thread instead.
type socket struct {
	fd   int
	stop int // an eventfd that ends wait
}

func open(of Mark, buffer int) (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := prepare(fd, of, buffer); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open eventfd: %w", err), unix.Close(fd))
	}
	return &socket{fd: fd, stop: stop}, nil
}

// close must not be called while wait or interrupt may run.
func (s *socket) close() error { return errors.Join(unix.Close(s.fd), unix.Close(s.stop)) }

// interrupt ends wait, now or when it is called next.
func (s *socket) interrupt() {
	_, _ = unix.Write(s.stop, binary.NativeEndian.AppendUint64(nil, 1)) // fails only when it was called 2^64 times
}

// wait returns when there is an event to read, or after interrupt.
func (s *socket) wait() error {
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}, -1)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

func prepare(fd int, of Mark, buffer int) error {
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: ctHeader},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaMark},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 5}, // no mark
		bpf.TAX{},
		bpf.LoadIndirect{Off: unix.SizeofNlAttr, Size: 4},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: of.Mask},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: of.Value, SkipTrue: 1},
		bpf.RetConstant{Val: 1<<32 - 1},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return fmt.Errorf("assemble filter: %w", err)
	}
	program := make([]unix.SockFilter, len(filter))
	for i, in := range filter {
		program[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}); err != nil {
		return fmt.Errorf("attach filter: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer); err != nil {
		return fmt.Errorf("enlarge the buffer: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groupsNewAndDestroy}); err != nil {
		return fmt.Errorf("join the groups: %w", err)
	}
	return nil
}

// read hands every event that waits to each. It calls lost when the kernel had
// to drop some.
func (s *socket) read(in *inbox, each func(Event), lost func()) error {
	for {
		k, err := in.receive(s.fd)
		switch {
		case err == nil:
			for i := range k {
				parse(in.message(i), each)
			}
			if k < len(in.headers) {
				return nil // that was all; what comes now wakes wait
			}
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ENOBUFS):
			lost()
		case !errors.Is(err, unix.EINTR):
			return err
		}
	}
}

// parse calls each for every beginning and end in b.
func parse(b []byte, each func(Event)) {
	for len(b) >= ctHeader {
		size := int(binary.NativeEndian.Uint32(b))
		if size < ctHeader || size > len(b) {
			return
		}
		kind := binary.NativeEndian.Uint16(b[4:])
		if kind == ctNew || kind == ctDelete {
			e := Event{Ended: kind == ctDelete}
			attributes(b[ctHeader:size], e.attribute)
			each(e)
		}
		b = b[min((size+3)&^3, len(b)):]
	}
}

// attributes calls each for every netlink attribute in b, without its flags.
func attributes(b []byte, each func(kind uint16, value []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:size])
		b = b[min((size+3)&^3, len(b)):]
	}
}

func (e *Event) attribute(kind uint16, v []byte) {
	switch kind {
	case ctaTupleOrig:
		attributes(v, e.tuple)
	case ctaMark:
		e.Mark = uint32(number(v))
	case ctaCountersOrig:
		attributes(v, func(kind uint16, v []byte) { keep(&e.BytesOut, kind == ctaCountersBytes, v) })
	case ctaCountersReply:
		attributes(v, func(kind uint16, v []byte) { keep(&e.BytesIn, kind == ctaCountersBytes, v) })
	case ctaTimestamp:
		attributes(v, func(kind uint16, v []byte) {
			keep(&e.Start, kind == ctaTimeStart, v)
			keep(&e.Stop, kind == ctaTimeStop, v)
		})
	}
}

func keep(to *uint64, it bool, v []byte) {
	if it {
		*to = number(v)
	}
}

// tuple reads one direction's addresses and ports. An ICMP flow has none of the
// latter.
func (e *Event) tuple(kind uint16, v []byte) {
	switch kind {
	case ctaTupleIP:
		attributes(v, func(kind uint16, v []byte) {
			switch addr, _ := netip.AddrFromSlice(v); kind {
			case ctaIP4Src, ctaIP6Src:
				e.Src = netip.AddrPortFrom(addr, e.Src.Port())
			case ctaIP4Dst, ctaIP6Dst:
				e.Dst = netip.AddrPortFrom(addr, e.Dst.Port())
			}
		})
	case ctaTupleProto:
		attributes(v, func(kind uint16, v []byte) {
			switch n := number(v); kind {
			case ctaProtoNum:
				e.Proto = policy.Proto(n)
			case ctaProtoSrc:
				e.Src = netip.AddrPortFrom(e.Src.Addr(), uint16(n))
			case ctaProtoDst:
				e.Dst = netip.AddrPortFrom(e.Dst.Addr(), uint16(n))
			}
		})
	}
}

// number is a value in network order of up to eight octets.
func number(v []byte) (n uint64) {
	for _, b := range v[:min(len(v), 8)] {
		n = n<<8 | uint64(b)
	}
	return n
}
