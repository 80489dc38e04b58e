package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// haveIPv6 reports whether the kernel speaks IPv6 at all.
func haveIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func hasDefaultRoute6(h *netlink.Handle) bool {
	r, ok := defaultRoute(h, netlink.FAMILY_V6)
	return ok && r.Type == unix.RTN_UNICAST
}

func defaultRoute(h *netlink.Handle, family int) (netlink.Route, bool) {
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
func (n *Network) mtu() int {
	const usual, least = 1500, 1280
	r, ok := defaultRoute(n.link, netlink.FAMILY_V4)
	if !ok {
		return 0
	}
	l, err := n.link.LinkByIndex(r.LinkIndex)
	if err != nil || l.Attrs().MTU >= usual || l.Attrs().MTU < least {
		return 0
	}
	return l.Attrs().MTU
}

// prepareHost sets what the rules need outside of the table.
func (n *Network) prepareHost() error {
	lo, err := n.link.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := n.link.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	if err := n.enableForwarding(); err != nil {
		return err
	}
	if err := n.loadTracker(); err != nil {
		return err
	}
	for _, key := range []string{trackerBytes, trackerTimes} {
		if err := writeSysctl(key, "1"); err != nil {
			n.cfg.Log.Warn("the flow log will miss figures", "err", err)
		}
	}
	n.share()
	if err := n.reserveSourcePorts(); err != nil {
		return err
	}
	if err := n.routeMarked(lo); err != nil {
		return err
	}
	return n.prepareShut()
}

// The tracker's settings: bytes of each flow for the flow log, and how long it lived.
const trackerBytes, trackerTimes = "net/netfilter/nf_conntrack_acct", "net/netfilter/nf_conntrack_timestamp"

// loadTracker makes the kernel load its connection tracker where that is a module, as in
// most distributions: its settings are not there before the first rule that needs it.
// The rule is gone with the transaction that makes it.
func (n *Network) loadTracker() error {
	err := n.kern.do(func(tx *transaction) {
		t := &nftables.Table{Name: n.table().Name + "_load", Family: nftables.TableFamilyINet}
		tx.AddTable(t)
		c := &nftables.Chain{Name: "load", Table: t}
		tx.AddChain(c)
		tx.rules(c, when(ctStateAny(expr.CtStateBitNEW), accept()))
		tx.DelTable(t)
	})
	if err != nil {
		return fmt.Errorf("load the connection tracker: %w", err)
	}
	for end := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat("/proc/sys/" + trackerMax); err == nil {
			return nil
		}
		if time.Now().After(end) {
			return errors.New("load the connection tracker: the kernel has the rule, but no settings in /proc/sys/net/netfilter: sudo modprobe nf_conntrack")
		}
	}
}

// enableForwarding makes the host a router. Its other links forward then too, by
// the rules of whoever owns them; ours touch no packet that is not a sandbox's.
func (n *Network) enableForwarding() error {
	if err := writeSysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if !n.v6 {
		return nil
	}
	// A router ignores router advertisements unless told twice (2): without this the
	// host would lose a default route it learned from one.
	paths, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
	if err != nil {
		return err
	}
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == "1" {
			if err := writeSysctl(strings.TrimPrefix(p, "/proc/sys/"), "2"); err != nil {
				return err
			}
		}
	}
	return writeSysctl("net/ipv6/conf/all/forwarding", "1")
}

// routeMarked makes packets with our mark local, so that the transparent sockets
// get them. The rule names our subnet as the source: with src_valid_mark set (as
// WireGuard's scripts do) the reverse path check would find it too otherwise and
// drop every packet.
func (n *Network) routeMarked(lo netlink.Link) error {
	for _, f := range n.families() {
		route := &netlink.Route{
			Family: f.id, LinkIndex: lo.Attrs().Index, Table: n.cfg.RouteTable,
			Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Dst: f.all,
		}
		if err := n.link.RouteReplace(route); err != nil {
			return fmt.Errorf("add local route in table %d: %w", n.cfg.RouteTable, err)
		}
		if err := n.link.RuleAdd(n.markRule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule for mark %#x: %w", n.cfg.Mark, err)
		}
	}
	return nil
}

// familySetup is one address family of the transparent path.
type familySetup struct {
	id       int
	all, src *net.IPNet
}

func (n *Network) families() []familySetup {
	out := []familySetup{{netlink.FAMILY_V4, ipNet(everything(netip.IPv4Unspecified())).IPNet, ipNet(n.cfg.Subnet4).IPNet}}
	if haveIPv6() {
		out = append(out, familySetup{netlink.FAMILY_V6, ipNet(everything(netip.IPv6Unspecified())).IPNet, ipNet(n.cfg.Subnet6).IPNet})
	}
	return out
}

func (n *Network) markRule(f familySetup) *netlink.Rule {
	r := netlink.NewRule()
	mask := n.cfg.Mark
	r.Family, r.Table, r.Src, r.Mark, r.Mask = f.id, n.cfg.RouteTable, f.src, n.cfg.Mark, &mask
	r.Priority = rulePriority
	return r
}

// rulePriority is before the main table (32766) and after the rules of VPNs that
// put theirs at the front.
const rulePriority = 30077

// Check looks for what would keep sandboxes from the network although our own
// rules allow it, and returns a sentence for each finding, with what to do.
func (n *Network) Check() []string {
	var out []string
	var chains []*nftables.Chain
	err := n.kern.read(func(c *nftables.Conn) (err error) {
		chains, err = c.ListChains()
		return err
	})
	if err != nil {
		out = append(out, fmt.Sprintf("The nftables rules of this machine cannot be listed (%v).", err))
	}
	for _, c := range chains {
		if c.Table.Name == n.table().Name || c.Hooknum == nil || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		where := fmt.Sprintf("The chain %s of table %s drops by default", c.Name, c.Table.Name)
		switch *c.Hooknum {
		case *nftables.ChainHookForward:
			out = append(out, fmt.Sprintf("%s what is forwarded: accept traffic from and to links named %q there"+
				" (with Docker: iptables -I DOCKER-USER -i '%s+' -j ACCEPT, and the same with -o).", where, n.plan.prefix()+"*", n.plan.prefix()))
		case *nftables.ChainHookInput:
			out = append(out, fmt.Sprintf("%s what reaches this machine: accept packets from links named %q with mark %#x/%#x there,"+
				" they go to the proxy and the resolver.", where, n.plan.prefix()+"*", n.cfg.Mark, n.cfg.Mark))
		}
	}
	for _, f := range []string{"ip_tables_names", "ip6_tables_names"} {
		if b, err := os.ReadFile("/proc/thread-self/net/" + f); err == nil && strings.Contains(string(b), "filter") {
			out = append(out, "Legacy iptables rules are loaded; they cannot be listed from here. Check that FORWARD lets links named "+n.plan.prefix()+"* pass.")
			break
		}
	}
	out = append(append(out, CheckSourcePorts(n.cfg.SourcePorts)...), CheckReserved(n.cfg.SourcePorts)...)
	return append(out, n.checkKernel()...)
}

func readSysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// CheckTracker looks at the connection tracker's settings while a server runs, and
// returns a sentence for each finding.
func CheckTracker() (out []string) {
	for _, c := range []struct{ key, bad, say string }{
		{trackerBytes, "0", "is 0: the flow log has no byte counts for forwarded flows. The server sets it at start; something unset it."},
		{trackerTimes, "0", "is 0: the flow log does not know how long forwarded flows lived. The server sets it at start; something unset it."},
		{"net/netfilter/nf_conntrack_helper", "1", "is 1: what a sandbox sends to the port of an old protocol, as FTP's, can make the kernel expect a connection at a port of this machine, which then misses it. Set it to 0."},
	} {
		if readSysctl(c.key) == c.bad {
			out = append(out, strings.ReplaceAll(c.key, "/", ".")+" "+c.say)
		}
	}
	return out
}

// checkKernel looks at kernel settings.
func (n *Network) checkKernel() []string {
	var out []string
	if readSysctl("net/ipv4/ip_forward") == "0" {
		out = append(out, "net.ipv4.ip_forward is 0: allowed traffic of sandboxes is not forwarded. The server sets it at start; something unset it.")
	}
	out = append(out, CheckTracker()...)
	if n.cfg.IPv6 == IPv6Auto && !n.v6 {
		out = append(out, "This machine has no IPv6 default route: sandboxes get IPv4 only.")
	}
	return out
}
