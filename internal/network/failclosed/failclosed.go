// Package failclosed drops what a sandbox sends when no nftables rule has cleared it. It
// hides a program of eBPF on each link and the routing rules that belong to it.
//
// All programs of a machine share nftables, and "nft flush ruleset" takes every table
// away. So the program marks whatever comes by a sandbox's link, before netfilter sees
// it, and a routing rule drops marked packets, whether they lead on or to the host
// itself. The table's first rule takes the mark away. Without the table the mark stays,
// and the packet has no route.
package failclosed

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/slot"
)

const (
	filterName     = "cordon"
	filterPriority = 1 // of the filter on a link
)

// Guard is the loaded program. It stays in the kernel while a link has it.
type Guard struct {
	program *ebpf.Program
	bit     uint32
}

// Load loads the program, which marks packets with bit.
func Load(bit uint32) (*Guard, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: filterName, Type: ebpf.SchedCLS, Instructions: instructions(bit), License: "Apache-2.0",
	})
	if err != nil {
		return nil, fmt.Errorf("load the program that marks packets: %w", err)
	}
	return &Guard{program: p, bit: bit}, nil
}

// instructions mark a packet and let it go on. Multicast and broadcast of IPv4 are
// dropped here: both are delivered without a look at the routing rules, and no policy
// allows either.
func instructions(bit uint32) asm.Instructions {
	const (
		skbMark, skbProtocol = 8, 16   // in struct __sk_buff (linux/bpf.h)
		daddr                = 14 + 16 // RFC 791, 3.1, behind an Ethernet header
		multicast            = 224
		next, drop           = -1, 2 // TC_ACT_UNSPEC, TC_ACT_SHOT (linux/pkt_cls.h)
	)
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1), // where LoadAbs looks for the packet
		asm.LoadMem(asm.R0, asm.R6, skbProtocol, asm.Word),
		asm.HostTo(asm.BE, asm.R0, asm.Half),
		asm.JNE.Imm(asm.R0, unix.ETH_P_IP, "mark"),
		asm.LoadAbs(daddr, asm.Byte), // ends the program when the packet is shorter: no IP then
		asm.JLT.Imm(asm.R0, multicast, "mark"),
		asm.Mov.Imm(asm.R0, drop),
		asm.Return(),
		asm.Mov.Imm32(asm.R1, int32(bit)).WithSymbol("mark"),
		asm.StoreMem(asm.R6, skbMark, asm.R1, asm.Word),
		asm.Mov.Imm(asm.R0, next),
		asm.Return(),
	}
}

// Close lets go of the program; links that have it keep it. A nil Guard may be closed.
func (g *Guard) Close() error {
	if g == nil {
		return nil
	}
	return g.program.Close()
}

// Attach makes the program mark what comes by a link. It may be called again.
func (g *Guard) Attach(h *netlink.Handle, link int) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: link, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: filterPriority,
		},
		Fd: g.program.FD(), Name: filterName, DirectAction: true,
	}
	if err := h.FilterReplace(filter); err != nil {
		return fmt.Errorf("add the filter that marks packets: %w", err)
	}
	return nil
}

// Try reports why this kernel cannot have the guard; nil if it can. It tries in a
// namespace of its own.
func Try() error {
	ns, err := slot.NewNetns()
	if err != nil {
		return err
	}
	defer ns.Close()
	const bit, lo = 1 << 29, 1
	g, err := Load(bit)
	if err != nil {
		return err
	}
	defer g.Close()
	return slot.Inside(ns, func(h *netlink.Handle) error {
		return errors.Join(g.Attach(h, lo), g.Route(h, netlink.FAMILY_V4))
	})
}
