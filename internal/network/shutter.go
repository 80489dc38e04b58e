package network

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The program of the second lock; shut.go says what it is for.

const (
	shutName     = "cordon"
	shutPriority = 1 // of our filter on a link
)

// shutter is the loaded program; it stays while a link has it.
type shutter struct{ fd int }

func (s *shutter) close() {
	if s != nil {
		_ = unix.Close(s.fd)
	}
}

// instruction is one of eBPF (RFC 9669, section 3).
type instruction struct {
	op   uint8
	regs uint8 // source << 4 | destination
	off  int16
	imm  int32
}

// loadShutter loads the program. Multicast and broadcast are dropped by it, as IPv4
// delivers both without asking the routing rules, and no policy allows either.
func loadShutter(bit uint32) (*shutter, error) {
	const (
		skbMark, skbProtocol = 8, 16   // in struct __sk_buff
		daddr                = 14 + 16 // behind an Ethernet header
		multicast            = 224
		next, drop           = -1, 2 // TC_ACT_UNSPEC, TC_ACT_SHOT
	)
	program := []instruction{
		{op: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X, regs: 1<<4 | 6},
		{op: unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W, regs: 6 << 4, off: skbProtocol},
		{op: unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K, off: 4, imm: int32(bigEndian(unix.ETH_P_IP))},
		{op: unix.BPF_LD | unix.BPF_ABS | unix.BPF_B, imm: daddr}, // ends the program when the packet is shorter: no IP then
		{op: unix.BPF_JMP | unix.BPF_JLT | unix.BPF_K, off: 2, imm: multicast},
		{op: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K, imm: drop},
		{op: unix.BPF_JMP | unix.BPF_EXIT},
		{op: unix.BPF_ALU | unix.BPF_MOV | unix.BPF_K, regs: 1, imm: int32(bit)},
		{op: unix.BPF_STX | unix.BPF_MEM | unix.BPF_W, regs: 1<<4 | 6, off: skbMark},
		{op: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K, imm: next},
		{op: unix.BPF_JMP | unix.BPF_EXIT},
	}
	license := []byte("Apache-2.0\x00")
	attr := struct { // union bpf_attr for BPF_PROG_LOAD, as far as it is used
		kind, count       uint32
		program, license  uint64
		logLevel, logSize uint32
		log               uint64
		version, flags    uint32
		name              [unix.BPF_OBJ_NAME_LEN]byte
	}{
		kind: unix.BPF_PROG_TYPE_SCHED_CLS, count: uint32(len(program)),
		program: uint64(uintptr(unsafe.Pointer(&program[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	copy(attr.name[:], shutName)
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if errno != 0 {
		return nil, fmt.Errorf("load the program that marks packets: %w", errno)
	}
	unix.CloseOnExec(int(fd))
	return &shutter{fd: int(fd)}, nil
}

// attach makes the program mark what comes by a link. It may be called again.
func (s *shutter) attach(h *netlink.Handle, link int) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: link, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: shutPriority,
		},
		Fd: s.fd, Name: shutName, DirectAction: true,
	}
	if err := h.FilterReplace(filter); err != nil {
		return fmt.Errorf("add the filter that marks packets: %w", err)
	}
	return nil
}
