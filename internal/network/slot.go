package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// guestLink is the name of a sandbox's only interface besides lo.
const guestLink = "eth0"

// plan is the arithmetic of slots: number n has the n-th /30 of subnet4 and the
// n-th /64 of subnet6. The host has the first address, the sandbox the second.
type plan struct {
	name, dir        string
	subnet4, subnet6 netip.Prefix
}

// capacity is the number of slots: what subnet4 holds, and what fits the slot
// bits of a connection mark.
func (p plan) capacity() int { return min(1<<(30-p.subnet4.Bits()), maxSlots) }

// prefix starts the name of every link of this server and of nothing else.
func (p plan) prefix() string { return "cd" + p.name + "-" }

// lease says everything about slot i but who has it.
func (p plan) lease(i int, v6 bool) sandbox.Lease {
	link := p.prefix() + strconv.Itoa(i)
	b4 := p.subnet4.Addr().As4()
	base := uint32(b4[0])<<24 | uint32(b4[1])<<16 | uint32(b4[2])<<8 | uint32(b4[3]) + 4*uint32(i)
	at := func(k uint32) netip.Addr {
		a := base + k
		return netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)})
	}
	l := sandbox.Lease{
		Slot: i, Link: link, NetNS: filepath.Join(p.dir, link), MAC: p.mac(i, 2).String(),
		Gate4: at(1), Addr4: netip.PrefixFrom(at(2), 30),
	}
	if v6 {
		b6 := p.subnet6.Addr().As16()
		b6[6], b6[7] = byte(i>>8), byte(i)
		b6[15] = 1
		l.Gate6 = netip.AddrFrom16(b6)
		b6[15] = 2
		l.Addr6 = netip.PrefixFrom(netip.AddrFrom16(b6), 64)
	}
	return l
}

// mac returns a locally administered address; side 1 is the host's, 2 the sandbox's.
func (p plan) mac(i int, side byte) net.HardwareAddr {
	h := nameHash(p.name)
	return net.HardwareAddr{0x02, byte(h >> 8), byte(h), byte(i >> 8), byte(i), side}
}

// slotOf returns the number of the slot whose sandbox has addr.
func (p plan) slotOf(addr netip.Addr) (int, bool) {
	addr = addr.Unmap()
	i := 0
	switch {
	case p.subnet4.Contains(addr):
		a, b := addr.As4(), p.subnet4.Addr().As4()
		off := (uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])) -
			(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]))
		if off%4 != 2 {
			return 0, false
		}
		i = int(off / 4)
	case p.subnet6.Contains(addr):
		a := addr.WithZone("").As16()
		i = int(a[6])<<8 | int(a[7])
		if addr != p.lease(i, true).Addr6.Addr() {
			return 0, false
		}
	default:
		return 0, false
	}
	return i, i < p.capacity()
}

// number returns the slot number in the name of one of our links.
func (p plan) number(link string) (int, bool) {
	rest, ok := strings.CutPrefix(link, p.prefix())
	i, err := strconv.Atoi(rest)
	return i, ok && err == nil && i >= 0 && i < p.capacity() && strconv.Itoa(i) == rest
}

// slot is one namespace with its veth pair, ready or leased.
type slot struct {
	num     int
	lease   sandbox.Lease // Sandbox is empty
	mac     net.HardwareAddr
	ifindex uint32 // of the host's side

	mu      sync.Mutex // serialises Apply, Pin, Rename and Release; guards what follows
	gen     uint16     // of the mark its accepted flows carry
	tries   uint16     // the highest generation used
	applied bool       // it has a chain
	sets    []string   // of its chain
	pins    pinTable
	key     uint32 // number of its owner's API key
	spent   uint64 // of Config.MaxBytesOut, by an earlier server process
	retired bool   // its rules are withdrawn
}

// createSlot makes the namespace, the veth pair, addresses and routes of slot
// number i. It removes what it made when a step fails.
func (n *Network) createSlot(i int) (_ *slot, err error) {
	s := &slot{num: i, lease: n.plan.lease(i, n.v6), mac: n.plan.mac(i, 2)}
	return s, n.build(s)
}

func (n *Network) build(s *slot) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create slot %s: %w", s.lease.Link, err), n.destroy(s))
		}
	}()
	ns, err := createNetns(s.lease.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: s.lease.Link, HardwareAddr: n.plan.mac(s.num, 1), TxQLen: 1000})
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = guestLink, s.mac, netlink.NsFd(ns)
	if mtu := n.mtu(); mtu != 0 {
		veth.MTU, veth.PeerMTU = mtu, uint32(mtu)
	}
	if err := n.link.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth pair: %w", err)
	}
	s.ifindex = uint32(veth.Attrs().Index)
	if err := n.configureHostSide(s, veth); err != nil {
		return err
	}
	if err := n.arm(ns, s); err != nil {
		return err
	}
	if err := settle(n.link, s.lease.Link, s.lease.Gate6); err != nil {
		return err
	}
	return inside(ns, func(h *netlink.Handle) error { return settle(h, guestLink, s.lease.Addr6.Addr()) })
}

// settle waits until the kernel has put a link into operation and takes packets for
// its IPv6 address, both of which it does in the background: a packet that comes
// before is lost, and a second with it.
func settle(h *netlink.Handle, name string, addr6 netip.Addr) error {
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

// inside runs fn with a connection into a namespace.
func inside(ns netns.NsHandle, fn func(*netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("enter namespace: %w", err)
	}
	defer h.Close()
	return fn(h)
}

// configureHostSide gives the host's end its addresses. The sandbox's hardware
// address is fixed, so that the first packet needs no ARP and no answer changes it.
func (n *Network) configureHostSide(s *slot, link netlink.Link) error {
	v4, v6 := "net/ipv4/conf/"+s.lease.Link+"/", "net/ipv6/conf/"+s.lease.Link+"/"
	sysctls := []struct{ key, value string }{
		{v4 + "arp_ignore", "1"},       // answer for this link's address only: the others are none of a sandbox's business
		{v4 + "accept_redirects", "0"}, // a sandbox does not route for us
		{v4 + "send_redirects", "0"},
		{v4 + "route_localnet", "0"},
		// The chain pin knows a forged source. Where there are routing rules, the kernel's
		// own check is a second look at all of them for each packet.
		{v4 + "accept_local", "1"},
	}
	if s.lease.Addr6.IsValid() {
		sysctls = append(sysctls,
			struct{ key, value string }{v6 + "accept_ra", "0"}, // a sandbox is no router
			struct{ key, value string }{v6 + "accept_redirects", "0"},
			struct{ key, value string }{v6 + "accept_dad", "0"}) // addresses are ours by construction; DAD would cost a second
	} else if haveIPv6() {
		sysctls = append(sysctls, struct{ key, value string }{v6 + "disable_ipv6", "1"})
	}
	for _, c := range sysctls {
		if err := writeSysctl(c.key, c.value); err != nil {
			return err
		}
	}
	if err := n.link.AddrAdd(link, ipNet(netip.PrefixFrom(s.lease.Gate4, s.lease.Addr4.Bits()))); err != nil {
		return fmt.Errorf("add %s: %w", s.lease.Gate4, err)
	}
	if s.lease.Gate6.IsValid() {
		if err := n.link.AddrAdd(link, ipNet(netip.PrefixFrom(s.lease.Gate6, s.lease.Addr6.Bits()))); err != nil {
			return fmt.Errorf("add %s: %w", s.lease.Gate6, err)
		}
	}
	if err := n.shut(s); err != nil {
		return err
	}
	if err := n.link.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", s.lease.Link, err)
	}
	for _, a := range []netip.Prefix{s.lease.Addr4, s.lease.Addr6} {
		if !a.IsValid() {
			continue
		}
		err := n.link.NeighSet(&netlink.Neigh{
			LinkIndex: int(s.ifindex), State: netlink.NUD_PERMANENT, IP: a.Addr().AsSlice(), HardwareAddr: s.mac,
		})
		if err != nil {
			return fmt.Errorf("fix neighbour %s: %w", a.Addr(), err)
		}
	}
	return nil
}

// arm gives the sandbox's end of a slot its addresses, routes and the gateways'
// hardware address. gVisor takes addresses and routes away when it starts: its stack
// owns them then.
func (n *Network) arm(ns netns.NsHandle, s *slot) error {
	return inside(ns, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo in the namespace: %w", err)
		}
		if err := h.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bring up lo in the namespace: %w", err)
		}
		link, err := h.LinkByName(guestLink)
		if err != nil {
			return fmt.Errorf("find %s in the namespace: %w", guestLink, err)
		}
		return n.address(h, link, s)
	})
}

func (n *Network) address(h *netlink.Handle, link netlink.Link, s *slot) error {
	l := s.lease
	addrs := []netip.Prefix{l.Addr4}
	gates := []netip.Addr{l.Gate4}
	if l.Addr6.IsValid() {
		addrs, gates = append(addrs, l.Addr6), append(gates, l.Gate6)
	}
	for _, a := range addrs {
		if err := h.AddrReplace(link, ipNet(a)); err != nil {
			return fmt.Errorf("add %s in the namespace: %w", a, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s in the namespace: %w", guestLink, err)
	}
	for _, g := range gates {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.AsSlice(), Dst: ipNet(everything(g)).IPNet}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("add default route by %s in the namespace: %w", g, err)
		}
		err := h.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: g.AsSlice(), HardwareAddr: n.plan.mac(s.num, 1),
		})
		if err != nil {
			return fmt.Errorf("fix neighbour %s in the namespace: %w", g, err)
		}
	}
	return nil
}

// everything is the default route's destination in addr's family.
func everything(addr netip.Addr) netip.Prefix {
	if addr.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// ipNet is an address as netlink wants it, in use at once (no duplicate address
// detection: addresses are unique by construction).
func ipNet(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// createNetns makes an empty network namespace and binds it to path.
func createNetns(path string) (netns.NsHandle, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return netns.None(), fmt.Errorf("make the namespaces' directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0)
	if err != nil {
		return netns.None(), fmt.Errorf("make the namespace's file: %w", err)
	}
	f.Close()
	done := make(chan error, 1)
	go func() { done <- bindNewNetns(path) }()
	if err := <-done; err != nil {
		return netns.None(), err
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), fmt.Errorf("open namespace %s: %w", path, err)
	}
	return ns, nil
}

// bindNewNetns must be the last call of its goroutine: a thread that cannot go
// back to its namespace stays locked and ends with the goroutine. Letting every
// thread end would do as well, were it not for the first one: it cannot end, and
// /proc/self would show the sandbox's namespace as the server's.
func bindNewNetns(path string) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		return fmt.Errorf("open this thread's namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare network namespace: %w", err)
	}
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		err = fmt.Errorf("bind namespace to %s: %w", path, err)
		return errors.Join(err, netns.Set(home))
	}
	if err := netns.Set(home); err != nil {
		return fmt.Errorf("go back to this thread's namespace: %w", err)
	}
	runtime.UnlockOSThread()
	return nil
}

// destroy removes a slot from the kernel; what is absent already is no error.
// Deleting a link waits for a grace period of the kernel (some 30 ms): never call
// it on a request's path.
func (n *Network) destroy(s *slot) error {
	return errors.Join(n.deleteLink(s.lease.Link), removeNetns(s.lease.NetNS))
}

func (n *Network) deleteLink(name string) error {
	link, err := n.link.LinkByName(name)
	if err == nil {
		err = n.link.LinkDel(link)
	}
	var gone netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &gone) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

func removeNetns(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace: %w", err)
	}
	return nil
}
