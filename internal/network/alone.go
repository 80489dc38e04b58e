package network

import (
	"fmt"
	"net/netip"
	"regexp"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
)

// anyServers is the form of a link's name of any server: plan.prefix and a number.
var anyServers = regexp.MustCompile(`^cd([a-z0-9]{1,6})-\d+$`)

// alone refuses to start where the sandboxes' subnets are in use: the later of two
// servers would take the earlier one's addresses and get its sandboxes' packets.
func (m *machine) alone() error {
	links, err := m.link.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := m.link.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if err := m.judgeRoute(r, names[r.LinkIndex]); err != nil {
				return err
			}
		}
	}
	return nil
}

// judgeRoute refuses a route into our subnets by a link that is not ours. One that
// leads to more than them, as to a company's 10.0.0.0/8, only loses that part.
func (m *machine) judgeRoute(r netlink.Route, link string) error {
	if _, ours := m.plan.Number(link); ours || link == "" || r.Dst == nil {
		return nil
	}
	ip, ok := netip.AddrFromSlice(r.Dst.IP)
	ones, _ := r.Dst.Mask.Size()
	dst := netip.PrefixFrom(ip.Unmap(), ones)
	subnet := m.cfg.Subnet4
	if dst.Addr().Is6() {
		subnet = m.cfg.Subnet6
	}
	if !ok || ones == 0 || !dst.Overlaps(subnet) {
		return nil
	}
	if ones < subnet.Bits() {
		m.cfg.Log.Warn("part of a network that this machine reaches is the sandboxes' own: set network.subnet4 to another one if it is needed",
			"network", dst, "link", link, "subnet", subnet)
		return nil
	}
	if m := anyServers.FindStringSubmatch(link); m != nil {
		return errs.New(errs.Conflict, "the sandboxes of another cordon server, %s, have addresses in %s: set network.subnet4 of one of the two"+
			" to another network, for example 10.224.0.0/16; if that server is no more, delete its links named cd%s-*", m[1], subnet, m[1])
	}
	return errs.New(errs.Conflict, "link %s leads to %s, which is in the sandboxes' network %s: set network.subnet4 to a network that this machine does not use,"+
		" for example 10.224.0.0/16", link, dst, subnet)
}
