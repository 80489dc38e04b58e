package network

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/slot"
)

// The second lock. nftables has one owner for each machine, and that is not us:
// "nft flush ruleset" takes our table too. So a program of a few instructions on
// each link marks whatever a sandbox sends, before netfilter sees it, and a routing
// rule drops marked packets, whether they lead on or to the host itself. The first
// thing the table's chain pre does is to take the mark away. No table, nobody to
// take it away, no route.
//
// The rule must stand before the one for the host's own addresses, which the kernel
// puts at 0, where all packets for the host would end. It stays at 0, one behind.

// shutBit is the mark of packets that no rule has judged.
func (n *Network) shutBit() uint32 { return bits.RotateLeft32(n.cfg.Mark, 1) }

const (
	localAt    = 0 // of the rule for the host's own addresses
	localMeant = 1 // where that rule waits while ours is put before it
)

// shut attaches the program to a link. A kernel without it is told of once,
// at start, and by doctor.
func (n *Network) shut(link int) error {
	if n.shutter == nil {
		return nil
	}
	return n.shutter.attach(n.link, link)
}

// prepareShut loads the program and puts the routing rules in place.
func (n *Network) prepareShut() error {
	s, err := loadShutter(n.shutBit())
	if err == nil {
		err = TryShut()
	}
	if err != nil {
		s.close()
		n.cfg.Log.Warn("whoever flushes the nftables rules opens the sandboxes until they are put back: this kernel lacks the second lock", "err", err)
		return nil
	}
	n.shutter = s
	return n.shutRoutes()
}

// shutRoutes puts the rules in place again if somebody removed them.
func (n *Network) shutRoutes() error {
	if n.shutter == nil {
		return nil
	}
	for _, f := range n.families() {
		if err := shutFamily(n.link, f.id, n.shutBit()); err != nil {
			return fmt.Errorf("add the routing rule for packets that were not judged: %w", err)
		}
	}
	return nil
}

func shutRule(family int, bit uint32) *netlink.Rule {
	r := netlink.NewRule()
	mask := bit
	r.Family, r.Priority, r.Mark, r.Mask, r.Type = family, localAt, bit, &mask, unix.RTN_BLACKHOLE
	r.Protocol = unix.RTPROT_KERNEL // programs that clean up strangers' rules leave these alone
	return r
}

func localRule(family, priority int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = family, priority, unix.RT_TABLE_LOCAL, unix.RTPROT_KERNEL
	return r
}

// isShut reports whether the rule for bit stands before that for local addresses.
func isShut(rules []netlink.Rule, bit uint32) bool {
	for _, r := range rules {
		switch {
		case r.Mark == bit && r.Mask != nil && *r.Mask == bit && r.Table == unix.RT_TABLE_UNSPEC: // the type is not listed
			return true
		case r.Table == unix.RT_TABLE_LOCAL:
			return false
		}
	}
	return false
}

// shutFamily puts the rule before that for local addresses. New rules go behind
// those with the same priority, so the latter makes way and comes back; at no
// moment is there none.
func shutFamily(h *netlink.Handle, family int, bit uint32) error {
	rules, err := h.RuleList(family)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	if isShut(rules, bit) {
		return nil
	}
	type step struct {
		do   func(*netlink.Rule) error
		rule *netlink.Rule
		fine unix.Errno
	}
	steps := []step{{h.RuleAdd, shutRule(family, bit), unix.EEXIST}}
	if len(rules) > 0 && rules[0].Priority == localAt { // else somebody moved it, and there is room
		anybodys := localRule(family, localAt)
		anybodys.Protocol = unix.RTPROT_UNSPEC
		steps = []step{
			{h.RuleAdd, localRule(family, localMeant), unix.EEXIST},
			{h.RuleDel, anybodys, unix.ENOENT},
			{h.RuleDel, shutRule(family, bit), unix.ENOENT},
			{h.RuleAdd, shutRule(family, bit), unix.EEXIST},
			{h.RuleAdd, localRule(family, localAt), unix.EEXIST},
			{h.RuleDel, localRule(family, localMeant), unix.ENOENT},
		}
	}
	for _, s := range steps {
		if err := ignore(s.do(s.rule), s.fine); err != nil {
			return err
		}
	}
	return nil
}

func ignore(err error, what unix.Errno) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

// TryShut reports why this kernel cannot keep sandboxes closed without nftables
// rules, in a namespace of its own; nil if it can.
func TryShut() error {
	ns, err := slot.NewNetns()
	if err != nil {
		return err
	}
	defer ns.Close()
	const bit, lo = 1 << 29, 1
	s, err := loadShutter(bit)
	if err != nil {
		return err
	}
	defer s.close()
	return slot.Inside(ns, func(h *netlink.Handle) error {
		return errors.Join(s.attach(h, lo), shutFamily(h, netlink.FAMILY_V4, bit))
	})
}

// CheckShut reports why the sandboxes of the server called name, or those of one to
// come, would be open without nftables rules.
func CheckShut(name string) error {
	if err := TryShut(); err != nil {
		return err
	}
	n, err := New(Config{Name: name, Flows: nobody{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer n.Close()
	links, err := n.ourLinks()
	if err != nil || len(links) == 0 {
		return err
	}
	for _, f := range n.families() {
		rules, err := n.link.RuleList(f.id)
		if err != nil {
			return fmt.Errorf("list routing rules: %w", err)
		}
		if !isShut(rules, n.shutBit()) {
			return fmt.Errorf("the routing rule for mark %#x is missing or too late", n.shutBit())
		}
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagUp == 0 {
			continue // being made: the filter comes before it is up
		}
		filters, err := n.link.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		if err != nil {
			return fmt.Errorf("list the filters of %s: %w", l.Attrs().Name, err)
		}
		if !slices.ContainsFunc(filters, func(f netlink.Filter) bool { b, ok := f.(*netlink.BpfFilter); return ok && b.Name == shutName }) {
			return fmt.Errorf("link %s lacks the filter that marks packets", l.Attrs().Name)
		}
	}
	return nil
}

// nobody records nothing.
type nobody struct{}

func (nobody) Record(flowlog.Event) {}
