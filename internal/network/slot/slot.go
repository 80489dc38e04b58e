// Package slot makes and removes what one sandbox has of the kernel's network: a
// namespace, a veth pair, addresses, routes and fixed neighbours. It hides which number,
// name and address belong together, and the netlink calls.
package slot

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// SandboxLink is the name of a sandbox's only interface besides lo.
const SandboxLink = "eth0"

// Slot is one namespace with its veth pair.
type Slot struct {
	Num   int
	Lease sandbox.Lease    // its Sandbox is empty
	MAC   net.HardwareAddr // of the sandbox's end
	Index uint32           // of the host's end among the machine's links; 0 before Build
}

// Build makes the namespace, the veth pair, addresses and routes of a slot, and sets its
// Index. Before the host's end is up, guard gets its index. Build removes what it made
// when a step fails.
func (s *Slot) Build(h *netlink.Handle, guard func(link int) error) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create slot %s: %w", s.Lease.Link, err), s.Destroy(h))
		}
	}()
	ns, err := CreateNetns(s.Lease.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: s.Lease.Link, HardwareAddr: s.gateMAC(), TxQLen: 1000})
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = SandboxLink, s.MAC, netlink.NsFd(ns)
	if mtu := mtu(h); mtu != 0 {
		veth.MTU, veth.PeerMTU = mtu, uint32(mtu)
	}
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth pair: %w", err)
	}
	s.Index = uint32(veth.Attrs().Index)
	if err := s.configureHost(h, veth, guard); err != nil {
		return err
	}
	if err := s.configureSandbox(ns); err != nil {
		return err
	}
	if err := Settle(h, s.Lease.Link, s.Lease.Gate6); err != nil {
		return err
	}
	return Inside(ns, func(h *netlink.Handle) error { return Settle(h, SandboxLink, s.Lease.Addr6.Addr()) })
}

// Settle waits until the kernel has put a link into operation and takes packets for
// its IPv6 address, both of which it does in the background: a packet that comes
// before is lost, and a second with it.
func Settle(h *netlink.Handle, name string, addr6 netip.Addr) error {
	for end := time.Now().Add(time.Second); ; time.Sleep(500 * time.Microsecond) {
		l, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("watch link %s: %w", name, err)
		}
		if l.Attrs().OperState == netlink.OperUp && isLocal(h, addr6) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("link %s does not come into operation: it is %s", name, l.Attrs().OperState)
		}
	}
}

// isLocal reports whether packets to addr are delivered; no address needs no delivery.
func isLocal(h *netlink.Handle, addr netip.Addr) bool {
	if !addr.IsValid() {
		return true
	}
	r, err := h.RouteGet(addr.AsSlice())
	return err == nil && len(r) > 0 && r[0].Type == unix.RTN_LOCAL
}

// configureHost gives the host's end its addresses. The sandbox's hardware
// address is fixed, so that the first packet needs no ARP and no answer changes it.
func (s *Slot) configureHost(h *netlink.Handle, link netlink.Link, guard func(link int) error) error {
	v4, v6 := "net/ipv4/conf/"+s.Lease.Link+"/", "net/ipv6/conf/"+s.Lease.Link+"/"
	sysctls := []struct{ key, value string }{
		{v4 + "arp_ignore", "1"},       // answer for this link's address only
		{v4 + "accept_redirects", "0"}, // a sandbox does not route for us
		{v4 + "send_redirects", "0"},
		{v4 + "route_localnet", "0"},
		// The chain pin knows a forged source. Where there are routing rules, the kernel's
		// own check is a second look at all of them for each packet.
		{v4 + "accept_local", "1"},
	}
	if s.Lease.Addr6.IsValid() {
		sysctls = append(sysctls,
			struct{ key, value string }{v6 + "accept_ra", "0"}, // a sandbox is no router
			struct{ key, value string }{v6 + "accept_redirects", "0"},
			struct{ key, value string }{v6 + "accept_dad", "0"}) // addresses are unique by construction; DAD would cost a second
	} else if HaveIPv6() {
		sysctls = append(sysctls, struct{ key, value string }{v6 + "disable_ipv6", "1"})
	}
	for _, c := range sysctls {
		if err := sysctl.Write(c.key, c.value); err != nil {
			return err
		}
	}
	if err := h.AddrAdd(link, Address(netip.PrefixFrom(s.Lease.Gate4, s.Lease.Addr4.Bits()))); err != nil {
		return fmt.Errorf("add %s: %w", s.Lease.Gate4, err)
	}
	if s.Lease.Gate6.IsValid() {
		if err := h.AddrAdd(link, Address(netip.PrefixFrom(s.Lease.Gate6, s.Lease.Addr6.Bits()))); err != nil {
			return fmt.Errorf("add %s: %w", s.Lease.Gate6, err)
		}
	}
	if err := guard(int(s.Index)); err != nil {
		return err
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", s.Lease.Link, err)
	}
	for _, a := range []netip.Prefix{s.Lease.Addr4, s.Lease.Addr6} {
		if !a.IsValid() {
			continue
		}
		err := h.NeighSet(&netlink.Neigh{
			LinkIndex: int(s.Index), State: netlink.NUD_PERMANENT, IP: a.Addr().AsSlice(), HardwareAddr: s.MAC,
		})
		if err != nil {
			return fmt.Errorf("fix neighbour %s: %w", a.Addr(), err)
		}
	}
	return nil
}

// configureSandbox gives the sandbox's end of a slot its addresses, routes and the gateways'
// hardware address. gVisor takes addresses and routes away when it starts: its stack
// owns them then.
func (s *Slot) configureSandbox(ns netns.NsHandle) error {
	return Inside(ns, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo in the namespace: %w", err)
		}
		if err := h.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bring up lo in the namespace: %w", err)
		}
		link, err := h.LinkByName(SandboxLink)
		if err != nil {
			return fmt.Errorf("find %s in the namespace: %w", SandboxLink, err)
		}
		return s.address(h, link)
	})
}

func (s *Slot) address(h *netlink.Handle, link netlink.Link) error {
	l := s.Lease
	addrs := []netip.Prefix{l.Addr4}
	gates := []netip.Addr{l.Gate4}
	if l.Addr6.IsValid() {
		addrs, gates = append(addrs, l.Addr6), append(gates, l.Gate6)
	}
	for _, a := range addrs {
		if err := h.AddrReplace(link, Address(a)); err != nil {
			return fmt.Errorf("add %s in the namespace: %w", a, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s in the namespace: %w", SandboxLink, err)
	}
	for _, g := range gates {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.AsSlice(), Dst: Address(Everything(g)).IPNet}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("add default route by %s in the namespace: %w", g, err)
		}
		err := h.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: g.AsSlice(), HardwareAddr: s.gateMAC(),
		})
		if err != nil {
			return fmt.Errorf("fix neighbour %s in the namespace: %w", g, err)
		}
	}
	return nil
}

// Everything is the default route's destination in addr's family.
func Everything(addr netip.Addr) netip.Prefix {
	if addr.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// Address is an address as netlink wants it, in use at once (no duplicate address
// detection: addresses are unique by construction).
func Address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// gateMAC is the hardware address of the host's end.
func (s *Slot) gateMAC() net.HardwareAddr {
	mac := slices.Clone(s.MAC)
	mac[len(mac)-1] = hostSide
	return mac
}

// Destroy removes a slot from the kernel; what is absent already is no error.
// Deleting a link waits for a grace period of the kernel (some 30 ms): never call
// it on a request's path.
func (s *Slot) Destroy(h *netlink.Handle) error {
	return errors.Join(deleteLink(h, s.Lease.Link), RemoveNetns(s.Lease.NetNS))
}

func deleteLink(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkDel(link)
	}
	var gone netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &gone) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// HaveIPv6 reports whether the kernel speaks IPv6 at all.
func HaveIPv6() bool { return sysctl.Exists("net/ipv6") }

// DefaultRoute returns the machine's default route of a family (netlink.FAMILY_V4 or
// FAMILY_V6), if there is one.
func DefaultRoute(h *netlink.Handle, family int) (netlink.Route, bool) {
	routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return netlink.Route{}, false
	}
	for _, r := range routes {
		if r.Dst == nil {
			return r, true
		}
		if ones, _ := r.Dst.Mask.Size(); ones == 0 {
			return r, true
		}
	}
	return netlink.Route{}, false
}

// mtu is what sandboxes' links get: the uplink's where it is smaller than usual
// (tunnels, overlays), so that no packet has to be fragmented; 0 keeps the default.
func mtu(h *netlink.Handle) int {
	const usual, least = 1500, 1280
	r, ok := DefaultRoute(h, netlink.FAMILY_V4)
	if !ok {
		return 0
	}
	l, err := h.LinkByIndex(r.LinkIndex)
	if err != nil || l.Attrs().MTU >= usual || l.Attrs().MTU < least {
		return 0
	}
	return l.Attrs().MTU
}
