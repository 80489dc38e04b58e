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

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/network/sysctl"
)

// prepareHost sets what the rules need outside of the table.
func (m *machine) prepareHost() error {
	lo, err := m.link.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := m.link.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	if err := m.enableForwarding(); err != nil {
		return err
	}
	if err := m.loadTracker(); err != nil {
		return err
	}
	for _, key := range []string{trackerBytes, trackerTimes} {
		if err := sysctl.Write(key, "1"); err != nil {
			m.cfg.Log.Warn("the flow log will miss figures", "err", err)
		}
	}
	if err := m.reserveSourcePorts(); err != nil {
		return err
	}
	if err := m.routeMarked(lo); err != nil {
		return err
	}
	return m.loadGuard()
}

// The tracker's settings: bytes of each flow for the flow log, and how long it lived.
const trackerBytes, trackerTimes = "net/netfilter/nf_conntrack_acct", "net/netfilter/nf_conntrack_timestamp"

// loadTracker makes the kernel load its connection tracker where that is a module, as in
// most distributions: its settings are not there before the first rule that needs it.
// The rule is gone with the transaction that makes it.
func (m *machine) loadTracker() error {
	err := m.kern.do(func(b *nft.Batch) { nft.LoadTracker(b, m.cfg.Name) })
	if err != nil {
		return fmt.Errorf("load the connection tracker: %w", err)
	}
	for end := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		if sysctl.Exists(trackerMax) {
			return nil
		}
		if time.Now().After(end) {
			return errors.New("load the connection tracker: the kernel has the rule, but no settings in /proc/sys/net/netfilter: sudo modprobe nf_conntrack")
		}
	}
}

// enableForwarding makes the host a router. Its other links forward then too, by
// the machine's own rules; the table touches only packets of sandboxes.
func (m *machine) enableForwarding() error {
	if err := sysctl.Write("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if !m.v6 {
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
			if err := sysctl.Write(strings.TrimPrefix(p, "/proc/sys/"), "2"); err != nil {
				return err
			}
		}
	}
	return sysctl.Write("net/ipv6/conf/all/forwarding", "1")
}

// routeMarked makes packets with our mark local, so that the transparent sockets
// get them. The rule names our subnet as the source: with src_valid_mark set (as
// WireGuard's scripts do) the reverse path check would find it too otherwise and
// drop every packet.
func (m *machine) routeMarked(lo netlink.Link) error {
	for _, f := range m.families() {
		route := &netlink.Route{
			Family: f.id, LinkIndex: lo.Attrs().Index, Table: m.cfg.RouteTable,
			Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Dst: f.all,
		}
		if err := m.link.RouteReplace(route); err != nil {
			return fmt.Errorf("add local route in table %d: %w", m.cfg.RouteTable, err)
		}
		if err := m.link.RuleAdd(m.markRule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule for mark %#x: %w", m.cfg.Mark, err)
		}
	}
	return nil
}

// familySetup is one address family of the transparent path.
type familySetup struct {
	id       int
	all, src *net.IPNet
}

func (m *machine) families() []familySetup {
	out := []familySetup{{netlink.FAMILY_V4, slot.Address(slot.Everything(netip.IPv4Unspecified())).IPNet, slot.Address(m.cfg.Subnet4).IPNet}}
	if slot.HaveIPv6() {
		out = append(out, familySetup{netlink.FAMILY_V6, slot.Address(slot.Everything(netip.IPv6Unspecified())).IPNet, slot.Address(m.cfg.Subnet6).IPNet})
	}
	return out
}

// familyIDs are the address families that the kernel speaks, as netlink numbers them.
func (m *machine) familyIDs() (ids []int) {
	for _, f := range m.families() {
		ids = append(ids, f.id)
	}
	return ids
}

func (m *machine) markRule(f familySetup) *netlink.Rule {
	r := netlink.NewRule()
	mask := m.cfg.Mark
	r.Family, r.Table, r.Src, r.Mark, r.Mask = f.id, m.cfg.RouteTable, f.src, m.cfg.Mark, &mask
	r.Priority = rulePriority
	return r
}

// rulePriority is before the main table (32766) and after the rules of VPNs that
// put theirs at the front.
const rulePriority = 30077

// CheckTracker looks at the connection tracker's settings while a server runs, and
// returns a sentence for each finding.
func CheckTracker() (out []string) {
	for _, c := range []struct{ key, bad, say string }{
		{trackerBytes, "0", "is 0: the flow log has no byte counts for forwarded flows. The server sets it at start; something unset it."},
		{trackerTimes, "0", "is 0: the flow log does not know how long forwarded flows lived. The server sets it at start; something unset it."},
		{"net/netfilter/nf_conntrack_helper", "1", "is 1: what a sandbox sends to the port of an old protocol, as FTP's, can make the kernel expect a connection at a port of this machine, which then misses it. Set it to 0."},
	} {
		if got, err := sysctl.Read(c.key); err == nil && got == c.bad {
			out = append(out, sysctl.Dotted(c.key)+" "+c.say)
		}
	}
	return out
}
