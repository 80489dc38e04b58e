package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The wire between the two namespaces: documentation addresses (RFC 5737, RFC
// 3849), so that a packet that did get out by a mistake would be nobody's.
var (
	hostAddr4     = netip.MustParsePrefix("203.0.113.2/24")
	gatewayAddr4  = netip.MustParsePrefix("203.0.113.1/24")
	hostAddr6     = netip.MustParsePrefix("2001:db8:113::2/64")
	gatewayAddr6  = netip.MustParsePrefix("2001:db8:113::1/64")
	hostLink      = "uplink" // the host's end
	internetLink  = "edge"   // the internet's end
	defaultRoute4 = netip.MustParsePrefix("0.0.0.0/0")
	defaultRoute6 = netip.MustParsePrefix("::/0")
)

// localPrefixes are the ranges whose every address the internet answers for,
// beside the addresses that occur in the zone. The private ones let a test see
// that a floor, and not a missing route, kept a sandbox away from them.
var localPrefixes = []netip.Prefix{
	netip.MustParsePrefix("1.1.1.0/24"),
	netip.MustParsePrefix("8.8.8.0/24"),
	netip.MustParsePrefix("8.8.4.0/24"),
	netip.MustParsePrefix("198.51.100.0/24"), // TEST-NET-2: the fictional servers
	netip.MustParsePrefix("10.0.0.0/24"),
	netip.MustParsePrefix("169.254.169.254/32"),
}

var localPrefixes6 = []netip.Prefix{
	netip.MustParsePrefix("2001:4860:4860::/64"), // dns.google
	netip.MustParsePrefix("2606:4700:4700::/64"), // one.one.one.one
	mappedPrefix6, // every IPv4 server's IPv6 twin
	netip.MustParsePrefix("fd00:ec2::254/128"),
}

// mappedPrefix6 holds the IPv6 address of each server: its IPv4 address in the
// last 32 bits.
var mappedPrefix6 = netip.MustParsePrefix("2001:db8:80::/96")

// twin6 is the IPv6 address of the server at an IPv4 address.
func twin6(a netip.Addr) netip.Addr {
	b, v4 := mappedPrefix6.Addr().As16(), a.As4()
	copy(b[12:], v4[:])
	return netip.AddrFrom16(b)
}

func loopbackUp(n *Netns) error {
	h, err := netlink.NewHandleAt(n.handle())
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("look up lo: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// wire joins the two namespaces by one veth pair, still down: the recorder has
// to listen before the first packet.
func wire(host, internet *Netns) error {
	h, err := netlink.NewHandleAt(internet.handle())
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = internetLink
	// Not the index that the other end gets: for a link whose peer has its own
	// index the kernel thinks there is no peer, and takes up to a second to
	// notice that it has a carrier (linkwatch_urgent_event).
	attrs.Index = 77
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: hostLink, PeerNamespace: netlink.NsFd(host.FD())}
	if err := h.LinkAdd(pair); err != nil {
		return fmt.Errorf("create the wire between host and internet: %w", err)
	}
	return nil
}

// end is one end of the wire.
type end struct {
	ns      *Netns
	link    string
	addrs   []netip.Prefix
	routes  []netip.Prefix // by gateway of the same family
	gateway []netip.Addr
}

// configure brings an end up with its addresses and routes.
func (e end) configure() error {
	if err := e.ns.Do(func() error { return quietLink(e.link) }); err != nil {
		return err
	}
	h, err := netlink.NewHandleAt(e.ns.handle())
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(e.link)
	if err != nil {
		return fmt.Errorf("look up %s: %w", e.link, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", e.link, err)
	}
	for _, a := range e.addrs {
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // usable at once; there is nobody to collide with
		}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, e.link, err)
		}
	}
	for i, dst := range e.routes {
		r := &netlink.Route{Dst: ipNet(dst), Gw: e.gateway[i].AsSlice(), LinkIndex: link.Attrs().Index}
		if err := h.RouteAdd(r); err != nil {
			return fmt.Errorf("route %s by %s: %w", dst, e.gateway[i], err)
		}
	}
	return nil
}

// quietLink keeps IPv6 from chattering on a link by itself. It is called in the
// link's namespace; a kernel without IPv6 has no such files.
func quietLink(link string) error {
	dir := filepath.Join("/proc/sys/net/ipv6/conf", link)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, key := range []string{"accept_ra", "router_solicitations", "dad_transmits"} {
		if err := os.WriteFile(filepath.Join(dir, key), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("set %s of %s: %w", key, link, err)
		}
	}
	return nil
}

// ownAddresses makes every address of the prefixes local to the internet, as
// routes of type local rather than thousands of addresses.
func ownAddresses(n *Netns, prefixes []netip.Prefix) error {
	h, err := netlink.NewHandleAt(n.handle())
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("look up lo: %w", err)
	}
	for _, p := range prefixes {
		r := &netlink.Route{
			Dst: ipNet(p), LinkIndex: lo.Attrs().Index,
			Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("make %s local: %w", p, err)
		}
	}
	for _, set := range []struct{ path, value string }{
		// Replies over UDP leave from the address that was asked, which is on no link.
		{"/proc/sys/net/ipv6/ip_nonlocal_bind", "1"},
		// Every unreachable address says so, at once.
		{"/proc/sys/net/ipv4/icmp_ratelimit", "0"},
		{"/proc/sys/net/ipv6/icmp/ratelimit", "0"},
	} {
		err := n.Do(func() error { return os.WriteFile(set.path, []byte(set.value), 0o644) })
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return fmt.Errorf("set %s: %w", set.path, err)
		}
	}
	return nil
}

// unreachable answers host-unreachable for every address the internet does not
// own. It does not forward, and without this it would drop such packets, and
// tests would wait for a timeout where a real network answers.
func unreachable(n *Netns) error {
	c, err := nftables.New(nftables.WithNetNSFd(n.FD()))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"})
	chain := c.AddChain(&nftables.Chain{
		Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
	})
	for _, kind := range []byte{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST} {
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind, 0, 0, 0}},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}})
	}
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_HOST_UNREACH},
	}})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("load the internet's nftables rules: %w", err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
