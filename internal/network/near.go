package network

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
	vish "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
)

// near is what lies around the machine and is always blocked with it: its own
// addresses, those that others know it by (behind a one-to-one NAT no link has them, and
// the router leads a packet to them back to the machine), what it reaches without a
// router, and the NAT64 forms of all always blocked IPv4 ranges in the network's own
// prefix. It is replaced, never changed.
type near struct {
	own    map[netip.Addr]struct{}
	ranges []netip.Prefix // beside own, sorted
	table  bart.Lite      // of ranges
}

// SetNAT64 tells the network's own NAT64 prefixes (RFC 7050), which replace those told
// before.
func (n *Network) SetNAT64(prefixes []netip.Prefix) error {
	n.nat64.Store(&prefixes)
	return n.readAddrs()
}

// IsHost reports whether addr is the machine's own or near it, as it was read last.
// The kernel asks its own tables; this is for the packages that judge what a name resolves to.
func (n *Network) IsHost(addr netip.Addr) bool {
	around := n.around.Load()
	addr = addr.Unmap()
	if _, own := around.own[addr]; own {
		return true
	}
	return around.table.Contains(addr)
}

// readAddrs reads what is around the machine, and tells the kernel what changed.
func (n *Network) readAddrs() error {
	n.nearMu.Lock()
	defer n.nearMu.Unlock()
	next, err := n.look()
	if err != nil {
		return err
	}
	was := n.around.Load()
	if was != nil && slices.Equal(was.ranges, next.ranges) && maps.Equal(was.own, next.own) {
		return nil
	}
	if was != nil && n.isOpen() == nil && !slices.Equal(was.ranges, next.ranges) { // Reconcile fills the sets of a new table
		err = n.kern.do(func(b *nft.Batch) { n.table().SetNear(b, next.ranges) })
	}
	if err == nil {
		n.around.Store(next)
	}
	return err
}

func (n *Network) look() (*near, error) {
	list, err := n.link.AddrList(nil, vish.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := &near{own: make(map[netip.Addr]struct{}, len(list))}
	found := map[netip.Prefix]struct{}{}
	note := func(p netip.Prefix) {
		found[p.Masked()] = struct{}{}
		for _, t := range policy.Translations(p.Masked(), n.nat64Prefixes()...) {
			found[t] = struct{}{}
		}
	}
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		out.own[addr] = struct{}{}
		ones, _ := a.Mask.Size()
		p := netip.PrefixFrom(addr, ones)
		if !global(p) {
			continue
		}
		if addr.Is4() { // the kernel knows the address itself, not its IPv6 forms
			note(netip.PrefixFrom(addr, 32))
		}
		if onLink(p) {
			note(p)
		}
	}
	for _, p := range n.cfg.PublicAddresses {
		note(p)
	}
	if err := n.onLinkRoutes(note); err != nil {
		return nil, err
	}
	for _, r := range policy.Floor() {
		for _, prefix := range n.nat64Prefixes() {
			if t, ok := policy.Embed(r.Prefix, prefix); ok {
				found[t] = struct{}{}
			}
		}
	}
	out.ranges = slices.SortedFunc(maps.Keys(found), func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	for _, p := range out.ranges {
		out.table.Insert(p)
	}
	return out, nil
}

func (n *Network) nat64Prefixes() []netip.Prefix {
	if p := n.nat64.Load(); p != nil {
		return *p
	}
	return nil
}

// onLinkRoutes notes networks that the machine reaches without a router and has no
// address of the same length in, as with DHCPv6: those that the kernel or a router's
// advertisement made a route for. A route that was configured, by hand or by a VPN, leads anywhere.
func (m *machine) onLinkRoutes(note func(netip.Prefix)) error {
	for _, family := range []int{vish.FAMILY_V4, vish.FAMILY_V6} {
		routes, err := m.link.RouteListFiltered(family, &vish.Route{Table: unix.RT_TABLE_MAIN}, vish.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil || r.Gw != nil || r.Via != nil || len(r.MultiPath) > 0 || r.Protocol != unix.RTPROT_KERNEL && r.Protocol != unix.RTPROT_RA {
				continue
			}
			ip, ok := netip.AddrFromSlice(r.Dst.IP)
			ones, _ := r.Dst.Mask.Size()
			if p := netip.PrefixFrom(ip.Unmap(), ones); ok && global(p) && onLink(p) {
				note(p)
			}
		}
	}
	return nil
}

// global reports whether addresses of p may be reached over the internet: the others
// are always blocked anyway.
func global(p netip.Prefix) bool {
	return p.Addr().IsGlobalUnicast() && !p.Addr().IsPrivate()
}

// onLink reports whether p is a network of usual size: a longer one is a single
// address, a shorter one no link's.
func onLink(p netip.Prefix) bool {
	if p.Addr().Is4() {
		return p.Bits() >= 16 && p.Bits() < 32
	}
	return p.Bits() >= 32 && p.Bits() < 128
}

// CheckPublic returns a sentence where the machine has no global address and the
// configuration does not say which one others know it by.
func CheckPublic(configured []netip.Prefix) []string {
	if len(configured) > 0 {
		return nil
	}
	h, err := vish.NewHandle()
	if err != nil {
		return []string{fmt.Sprintf("open route netlink: %v", err)}
	}
	defer h.Close()
	r, ok := slot.DefaultRoute(h, vish.FAMILY_V4)
	if !ok {
		return nil // there is no way out that could lead back
	}
	list, err := h.AddrList(nil, vish.FAMILY_V4)
	if err != nil {
		return []string{fmt.Sprintf("list addresses: %v", err)}
	}
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if ok && a.LinkIndex == r.LinkIndex && addr.Unmap().IsPrivate() {
			return []string{fmt.Sprintf("The address of this machine, %s, is private: which one others reach it by is not known here. If a router passes that on to this machine"+
				" (a cloud's public address, port forwarding), sandboxes may reach the machine by it: set network.public_addresses.", addr.Unmap())}
		}
	}
	return nil
}
