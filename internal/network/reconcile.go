package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// Reconcile implements sandbox.Network. The table is replaced in one transaction
// that ends with the rules of every kept lease, so that there is no moment without
// rules and no moment with the wrong ones, whatever an earlier version left.
func (n *Network) Reconcile(_ context.Context, inUse map[sandbox.ID]sandbox.Held) error {
	if n.isOpen() == nil {
		return errs.New(errs.Conflict, "the network is reconciled already")
	}
	kept, err := n.adopt(inUse)
	if err != nil {
		return err
	}
	if err := n.alone(); err != nil {
		return err
	}
	if err := n.prepareHost(); err != nil {
		return fmt.Errorf("prepare the host: %w", err)
	}
	n.fitTracker()
	links, err := n.ourLinks()
	if err != nil {
		return err
	}
	for _, k := range kept {
		if err := n.restore(k.slot, links); err != nil {
			return fmt.Errorf("adopt the network of sandbox %s: %w", k.id, err)
		}
	}
	n.readBack(kept)
	if err := n.replaceTable(kept); err != nil {
		return fmt.Errorf("set up table %s: %w", n.table().Table().Name, err)
	}
	n.publish(kept)
	for _, k := range kept {
		if k.policy == nil {
			continue
		}
		if err := n.cutRefused(k.slot, k.policy); err != nil {
			return fmt.Errorf("judge the live flows of sandbox %s: %w", k.id, err)
		}
	}
	return n.removeUnheld(links)
}

// adopted is a kept lease.
type adopted struct {
	id     sandbox.ID
	slot   *slotState
	policy *policy.Compiled
}

// adopt checks the leases against the configuration.
func (n *Network) adopt(inUse map[sandbox.ID]sandbox.Held) ([]adopted, error) {
	var kept []adopted
	taken := map[int]sandbox.ID{}
	for _, id := range slices.Sorted(maps.Keys(inUse)) {
		l := inUse[id].Lease
		if l.Slot < 0 || l.Slot >= n.plan.Capacity() {
			return nil, errs.New(errs.Conflict, "sandbox %s holds network slot %d, but network.subnet4 %s has %d: configure the former network", id, l.Slot, n.cfg.Subnet4, n.plan.Capacity())
		}
		want := n.plan.Lease(l.Slot, l.Addr6.IsValid())
		want.Sandbox = l.Sandbox
		if l != want {
			return nil, errs.New(errs.Conflict, "sandbox %s has address %s on link %s, but the configuration gives its slot %s on %s: configure the former network", id, l.Addr4, l.Link, want.Addr4, want.Link)
		}
		if other, twice := taken[l.Slot]; twice {
			return nil, errs.New(errs.Conflict, "sandboxes %s and %s both hold network slot %d", other, id, l.Slot)
		}
		taken[l.Slot] = id
		l.Sandbox = ""
		s := &slotState{Slot: n.plan.Slot(l.Slot, l.Addr6.IsValid()), key: n.keyNumber(inUse[id].Owner)}
		kept = append(kept, adopted{id: id, slot: s, policy: inUse[id].Policy})
	}
	return kept, nil
}

// ourLinks returns the links with our prefix, by name.
func (m *machine) ourLinks() (map[string]netlink.Link, error) {
	all, err := m.link.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := map[string]netlink.Link{}
	for _, l := range all {
		if _, ours := m.plan.Number(l.Attrs().Name); ours {
			out[l.Attrs().Name] = l
		}
	}
	return out, nil
}

// restore finds a kept slot's link and namespace, or makes them anew when the
// machine was restarted or they were deleted.
func (m *machine) restore(s *slotState, links map[string]netlink.Link) error {
	link, linked := links[s.Lease.Link]
	delete(links, s.Lease.Link) // what stays in links is to be removed
	if linked && slot.IsNetns(s.Lease.NetNS) {
		s.Index = uint32(link.Attrs().Index)
		return m.attachGuard(int(s.Index)) // an earlier version may not have
	}
	if err := s.Destroy(m.link); err != nil {
		return err
	}
	return s.Build(m.link, m.attachGuard)
}

// readBack learns from the table of an earlier process which marks its flows
// carry and which addresses its resolver pinned; those are asked for again before
// they count. Whatever cannot be read is
// learned again from the traffic: flows are judged anew, names resolved anew.
func (n *Network) readBack(kept []adopted) {
	byLink, bySlot := map[uint32]*slotState{}, map[int]*slotState{}
	for _, k := range kept {
		byLink[k.slot.Index], bySlot[k.slot.Num] = k.slot, k.slot
	}
	there, err := n.kern.hasTable(n.table().Table().Name)
	if err == nil && !there {
		return
	}
	err = n.kern.read(func(c *nftables.Conn) error {
		t := n.table()
		marks, err := c.GetSetElements(t.Set(nft.SetMarks))
		if err != nil {
			return err
		}
		for _, e := range marks {
			link, gen, ok := nft.ReadMark(e)
			if s := byLink[link]; ok && s != nil {
				s.tries = gen
			}
		}
		if err := readSpent(c, t.Table(), bySlot); err != nil {
			return err
		}
		sets, err := c.GetSets(t.Table())
		if err != nil {
			return err
		}
		return readPins(c, sets, bySlot)
	})
	if err != nil {
		n.cfg.Log.Warn("read the former rules", "err", err)
	}
}

// readSpent learns what the sandboxes of an earlier process had used of their budgets.
func readSpent(c *nftables.Conn, t *nftables.Table, bySlot map[int]*slotState) error {
	objs, err := c.GetNamedObjects(t)
	if err != nil {
		return fmt.Errorf("read the budgets: %w", err)
	}
	for _, o := range objs {
		num, spent, ok := nft.ReadQuota(o)
		if s := bySlot[num]; ok && s != nil {
			s.spent = spent
		}
	}
	return nil
}

func readPins(c *nftables.Conn, sets []*nftables.Set, bySlot map[int]*slotState) error {
	for _, set := range sets {
		num, ok := nft.ReadPinSet(set.Name)
		s := bySlot[num]
		if !ok || s == nil {
			continue
		}
		elems, err := c.GetSetElements(set)
		if err != nil {
			return err
		}
		for _, e := range elems {
			dst, ok := nft.ReadPin(e)
			if !ok || e.Comment == "" {
				continue
			}
			s.pins.set(pinKey{dst.Addr(), dst.Port()}, pin{names: []pinName{{name: e.Comment}}, kept: time.Now().Add(e.Expires)})
		}
	}
	return nil
}

// replaceTable makes the table anew, with the kept slots.
func (n *Network) replaceTable(kept []adopted) error {
	type built struct {
		slot *slotState
		prog *nft.Program
		live map[pinKey]pin
	}
	t := n.table()
	var all []built
	for _, k := range kept {
		b := built{slot: k.slot}
		if k.policy != nil {
			k.slot.tries++
			b.prog = t.Program(k.slot.rules(), k.slot.tries, k.policy.Kernel())
			b.live = livePins(k.slot, k.policy)
		}
		all = append(all, b)
	}
	n.hidden.Store(false)
	n.nearMu.Lock() // what is near the machine must not change between here and there
	var denied map[netip.AddrPort]int
	if m := n.denied.Load(); m != nil {
		denied = *m
	}
	err := n.kern.do(func(b *nft.Batch) {
		t.Make(b, n.around.Load().ranges, denied)
		for _, a := range all {
			t.Admit(b, a.slot.rules())
			if a.prog != nil {
				t.Enforce(b, a.slot.rules(), a.prog, nil, false)
				addPins(b, a.prog, a.live)
			}
		}
	})
	if err == nil && denied != nil {
		n.deniedInForce = denied
	}
	n.nearMu.Unlock()
	if err != nil {
		return err
	}
	for _, a := range all {
		if a.prog != nil {
			a.slot.adopt(a.prog, a.live)
		}
	}
	return n.hide()
}

// publish makes the kept leases known and opens the network for new ones.
func (n *Network) publish(kept []adopted) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, k := range kept {
		n.slots[k.slot.Num] = k.slot
		n.byID[k.id] = k.slot
		n.byLink[k.slot.Index] = k.slot
		n.owners[k.slot.Num].Store(&owner{id: k.id, policy: k.policy})
		n.next = max(n.next, (k.slot.Num+1)%n.plan.Capacity())
	}
}

// removeUnheld removes slots that no lease holds, and opens the network.
func (n *Network) removeUnheld(links map[string]netlink.Link) error {
	files, err := os.ReadDir(n.plan.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list namespaces: %w", err)
	}
	unheld := map[int]bool{}
	for _, f := range files {
		if i, ours := n.plan.Number(f.Name()); ours {
			unheld[i] = true
		}
	}
	for name := range links {
		i, _ := n.plan.Number(name)
		unheld[i] = true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range unheld {
		if n.slots[i] != nil {
			continue
		}
		// Its addresses are admitted nowhere: the new table has no entry for it. Deleting
		// takes a while each, so it is left to Run.
		s := &slotState{Slot: n.plan.Slot(i, true), retired: true}
		n.slots[i] = s
		n.trash = append(n.trash, s)
	}
	n.open = true
	close(n.opened)
	return nil
}
