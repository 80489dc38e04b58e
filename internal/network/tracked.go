package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// tracked is what the connection tracker says of a flow when it begins or ends.
// Every new flow costs two of these messages, so they are read without a general
// decoder: without allocating, and in batches.
type tracked struct {
	ended             bool
	mark              uint32
	proto             policy.Proto
	src, dst          netip.AddrPort
	bytesOut, bytesIn uint64
	start, stop       uint64 // nanoseconds since 1970; 0 is unknown
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

// trackedBatch is how long events may wait for others to be read with.
const trackedBatch = 10 * time.Millisecond

// trackedSocket receives the tracker's events. It is not in the runtime's poller, which every single
// event would wake; wait blocks a thread instead.
type trackedSocket struct {
	fd   int
	stop int // an eventfd that ends wait
}

// openTracked opens a socket that receives the beginnings and ends of flows that
// carry a slot's mark and are not the proxy's. The kernel drops all others.
func openTracked() (*trackedSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := prepareTracked(fd); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open eventfd: %w", err), unix.Close(fd))
	}
	return &trackedSocket{fd: fd, stop: stop}, nil
}

// close must not be called while wait or interrupt may run.
func (s *trackedSocket) close() error { return errors.Join(unix.Close(s.fd), unix.Close(s.stop)) }

// interrupt ends wait, now or when it is called next.
func (s *trackedSocket) interrupt() {
	_, _ = unix.Write(s.stop, binary.NativeEndian.AppendUint64(nil, 1)) // fails only when it was called 2^64 times
}

// wait returns when there is an event to read, or after interrupt.
func (s *trackedSocket) wait() error {
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}, -1)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

func prepareTracked(fd int) error {
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: ctHeader},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaMark},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 5}, // no mark
		bpf.TAX{},
		bpf.LoadIndirect{Off: unix.SizeofNlAttr, Size: 4},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: markTagMask | markProxied},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: markTag, SkipTrue: 1},
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
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, eventBuffer); err != nil {
		return fmt.Errorf("enlarge the buffer: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groupsNewAndDestroy}); err != nil {
		return fmt.Errorf("join the groups: %w", err)
	}
	return nil
}

// read hands every event that waits to each. It calls lost when the kernel had
// to drop some.
func (s *trackedSocket) read(in *inbox, each func(tracked), lost func()) error {
	for {
		k, err := in.receive(s.fd)
		switch {
		case err == nil:
			for i := range k {
				parseTracked(in.message(i), each)
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

// parseTracked calls each for every beginning and end in b.
func parseTracked(b []byte, each func(tracked)) {
	for len(b) >= ctHeader {
		size := int(binary.NativeEndian.Uint32(b))
		if size < ctHeader || size > len(b) {
			return
		}
		kind := binary.NativeEndian.Uint16(b[4:])
		if kind == ctNew || kind == ctDelete {
			e := tracked{ended: kind == ctDelete}
			attributes(b[ctHeader:size], e.attribute)
			each(e)
		}
		b = tail(b, (size+3)&^3)
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
		b = tail(b, (size+3)&^3)
	}
}

func (e *tracked) attribute(kind uint16, v []byte) {
	switch kind {
	case ctaTupleOrig:
		attributes(v, e.tuple)
	case ctaMark:
		e.mark = uint32(number(v))
	case ctaCountersOrig:
		attributes(v, func(kind uint16, v []byte) { keep(&e.bytesOut, kind == ctaCountersBytes, v) })
	case ctaCountersReply:
		attributes(v, func(kind uint16, v []byte) { keep(&e.bytesIn, kind == ctaCountersBytes, v) })
	case ctaTimestamp:
		attributes(v, func(kind uint16, v []byte) {
			keep(&e.start, kind == ctaTimeStart, v)
			keep(&e.stop, kind == ctaTimeStop, v)
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
func (e *tracked) tuple(kind uint16, v []byte) {
	switch kind {
	case ctaTupleIP:
		attributes(v, func(kind uint16, v []byte) {
			switch addr, _ := netip.AddrFromSlice(v); kind {
			case ctaIP4Src, ctaIP6Src:
				e.src = netip.AddrPortFrom(addr, e.src.Port())
			case ctaIP4Dst, ctaIP6Dst:
				e.dst = netip.AddrPortFrom(addr, e.dst.Port())
			}
		})
	case ctaTupleProto:
		attributes(v, func(kind uint16, v []byte) {
			switch n := number(v); kind {
			case ctaProtoNum:
				e.proto = policy.Proto(n)
			case ctaProtoSrc:
				e.src = netip.AddrPortFrom(e.src.Addr(), uint16(n))
			case ctaProtoDst:
				e.dst = netip.AddrPortFrom(e.dst.Addr(), uint16(n))
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
