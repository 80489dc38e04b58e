package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/failclosed"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/sysctl"
)

// Uninstall removes everything that a server of this Config's name made in the kernel:
// sandboxes' namespaces and links, the table, routing rules, and the reservation of
// source ports. What another server of the machine needs as well stays. Run must have
// ended, or never have begun.
func (n *Network) Uninstall(_ context.Context) error {
	links, err := n.ourLinks()
	if err != nil {
		return err
	}
	err = n.kern.do(func(b *nft.Batch) { b.DelTable(n.table().Table()) })
	files, lerr := os.ReadDir(n.plan.Dir)
	if lerr != nil && !errors.Is(lerr, os.ErrNotExist) {
		err = errors.Join(err, lerr)
	}
	var doomed []*slotState
	for i := range n.plan.Capacity() {
		l := n.plan.Lease(i, true)
		named := slices.ContainsFunc(files, func(f os.DirEntry) bool { return f.Name() == l.Link })
		if links[l.Link] != nil || named {
			doomed = append(doomed, &slotState{Slot: n.plan.Slot(i, true)})
		}
	}
	if len(doomed) > 0 {
		err = errors.Join(err, n.forgetFlows(doomed))
	}
	for _, s := range doomed {
		err = errors.Join(err, s.Destroy(n.link))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open = false
	clear(n.slots)
	clear(n.byID)
	clear(n.byLink)
	n.trash = nil
	for i := range n.owners {
		n.owners[i].Store(nil)
	}
	_ = os.Remove(n.plan.Dir) // other servers may use it: it stays when it is not empty
	return errors.Join(err, n.unprepareHost())
}

// unprepareHost takes back what prepareHost added. Forwarding stays as it is:
// others may have come to rely on it.
func (m *machine) unprepareHost() error {
	var all error
	for _, f := range m.families() {
		if err := m.link.RuleDel(m.markRule(f)); err != nil && !errors.Is(err, unix.ENOENT) {
			all = errors.Join(all, fmt.Errorf("delete routing rule: %w", err))
		}
		route := &netlink.Route{Family: f.id, Table: m.cfg.RouteTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Dst: f.all}
		if err := m.link.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) && !absent(err) {
			all = errors.Join(all, fmt.Errorf("delete local route: %w", err))
		}
	}
	return errors.Join(all, m.unrouteGuard(), m.unreserveSourcePorts())
}

// unrouteGuard takes the rules away, unless another server needs them.
func (m *machine) unrouteGuard() error {
	var all error
	for _, f := range m.families() {
		rules, err := m.link.RuleList(f.id)
		if err != nil {
			return fmt.Errorf("list routing rules: %w", err)
		}
		others := false
		for _, r := range rules {
			others = others || r.Priority == rulePriority
		}
		if !others {
			if err := m.link.RuleDel(failclosed.Rule(f.id, m.guardBit())); err != nil && !errors.Is(err, unix.ENOENT) {
				all = errors.Join(all, err)
			}
		}
	}
	return all
}

// unreserveSourcePorts takes the range off the list, but for what was reserved before.
func (m *machine) unreserveSourcePorts() error {
	b, err := os.ReadFile(m.reservedFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it was never reserved
	}
	if err != nil {
		return fmt.Errorf("read the former reserved ports: %w", err)
	}
	before, err := parsePorts(string(b))
	if err != nil {
		return fmt.Errorf("read the former reserved ports: %w", err)
	}
	list, err := readReserved()
	if err != nil {
		return err
	}
	var kept []PortRange
	for _, r := range list {
		kept = append(kept, without(r, m.cfg.SourcePorts)...)
	}
	for _, r := range before {
		if lo, hi := max(r.First, m.cfg.SourcePorts.First), min(r.Last, m.cfg.SourcePorts.Last); lo <= hi {
			kept = append(kept, PortRange{lo, hi})
		}
	}
	text := formatPorts(kept)
	if text == "" {
		text = "\n" // an empty write would change nothing
	}
	if err := sysctl.Write(reservedPorts, text); err != nil {
		return err
	}
	return os.Remove(m.reservedFile())
}

// without is what is left of a when b is taken away.
func without(a, b PortRange) (out []PortRange) {
	if a.Last < b.First || b.Last < a.First {
		return []PortRange{a}
	}
	if a.First < b.First {
		out = append(out, PortRange{a.First, b.First - 1})
	}
	if a.Last > b.Last {
		out = append(out, PortRange{b.Last + 1, a.Last})
	}
	return out
}
