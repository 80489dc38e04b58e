package failclosed

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The rule that drops marked packets must stand before the one for the host's own
// addresses, which the kernel puts at 0 and where all packets for the host end. So the guard's
// is at 0, and the kernel's is put there again behind it.
const (
	localAt   = 0 // of the rule for the host's own addresses
	LocalWait = 1 // where that rule is while the guard's is put before it
)

// Route puts the routing rules of families in place, if they are not. A family is
// netlink.FAMILY_V4 or FAMILY_V6.
func (g *Guard) Route(h *netlink.Handle, families ...int) error {
	for _, f := range families {
		if err := route(h, f, g.bit); err != nil {
			return fmt.Errorf("add the routing rule that drops marked packets: %w", err)
		}
	}
	return nil
}

// Rule drops the packets of a family that have the mark bit.
func Rule(family int, bit uint32) *netlink.Rule {
	r := netlink.NewRule()
	mask := bit
	r.Family, r.Priority, r.Mark, r.Mask, r.Type = family, localAt, bit, &mask, unix.RTN_BLACKHOLE
	r.Protocol = unix.RTPROT_KERNEL // programs that remove rules they do not know leave these alone
	return r
}

func localRule(family, priority int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = family, priority, unix.RT_TABLE_LOCAL, unix.RTPROT_KERNEL
	return r
}

// inPlace reports whether the rule for bit stands before that for local addresses.
func inPlace(rules []netlink.Rule, bit uint32) bool {
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

// route puts the rule before that for local addresses. New rules go behind those with
// the same priority, so the latter makes way and comes back; at no moment is there none.
func route(h *netlink.Handle, family int, bit uint32) error {
	rules, err := h.RuleList(family)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	if inPlace(rules, bit) {
		return nil
	}
	type step struct {
		do   func(*netlink.Rule) error
		rule *netlink.Rule
		fine unix.Errno
	}
	steps := []step{{h.RuleAdd, Rule(family, bit), unix.EEXIST}}
	if len(rules) > 0 && rules[0].Priority == localAt { // else the rule was moved before, and there is room
		anyProtocol := localRule(family, localAt)
		anyProtocol.Protocol = unix.RTPROT_UNSPEC
		steps = []step{
			{h.RuleAdd, localRule(family, LocalWait), unix.EEXIST},
			{h.RuleDel, anyProtocol, unix.ENOENT},
			{h.RuleDel, Rule(family, bit), unix.ENOENT},
			{h.RuleAdd, Rule(family, bit), unix.EEXIST},
			{h.RuleAdd, localRule(family, localAt), unix.EEXIST},
			{h.RuleDel, localRule(family, LocalWait), unix.ENOENT},
		}
	}
	for _, s := range steps {
		if err := s.do(s.rule); err != nil && !errors.Is(err, s.fine) {
			return err
		}
	}
	return nil
}

// Check reports what is missing of the guard with mark bit: on a link of a sandbox, or
// among the routing rules of families.
func Check(h *netlink.Handle, bit uint32, families []int, links []netlink.Link) error {
	for _, f := range families {
		rules, err := h.RuleList(f)
		if err != nil {
			return fmt.Errorf("list routing rules: %w", err)
		}
		if !inPlace(rules, bit) {
			return fmt.Errorf("the routing rule for mark %#x is missing or too late", bit)
		}
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagUp == 0 {
			continue // being made: the filter comes before it is up
		}
		filters, err := h.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		if err != nil {
			return fmt.Errorf("list the filters of %s: %w", l.Attrs().Name, err)
		}
		if !slices.ContainsFunc(filters, func(f netlink.Filter) bool { b, ok := f.(*netlink.BpfFilter); return ok && b.Name == filterName }) {
			return fmt.Errorf("link %s lacks the filter that marks packets", l.Attrs().Name)
		}
	}
	return nil
}
