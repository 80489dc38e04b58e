package network

import (
	"errors"
	"maps"
	"net/netip"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
)

// Denied tells whether a destination is that of a name which the operator denies, and
// the number of the entry; see SetDenied.
func (n *Network) Denied(dst netip.AddrPort) (entry int, ok bool) {
	m := n.denied.Load()
	if m == nil {
		return 0, false
	}
	addr := dst.Addr().Unmap()
	if entry, ok = (*m)[netip.AddrPortFrom(addr, 0)]; !ok {
		entry, ok = (*m)[netip.AddrPortFrom(addr, dst.Port())]
	}
	return entry, ok
}

// SetDenied replaces the destinations of names that the operator denies, each with the
// number of its entry; port 0 stands for every port and protocol. Flows that lead to new
// ones end.
func (n *Network) SetDenied(all map[netip.AddrPort]int) error {
	next := map[netip.AddrPort]int{}
	for dst, entry := range all {
		addr := dst.Addr().Unmap()
		next[netip.AddrPortFrom(addr, dst.Port())] = entry
		for _, t := range policy.Translations(netip.PrefixFrom(addr, addr.BitLen()), n.nat64Prefixes()...) {
			if t.IsSingleIP() { // 6to4 forms are whole networks, which are no longer routed (RFC 7526)
				next[netip.AddrPortFrom(t.Addr(), dst.Port())] = entry
			}
		}
	}
	was, err := n.storeDenied(next)
	if err != nil || was == nil {
		return err
	}
	for dst := range next {
		if _, known := was[dst]; known {
			continue
		}
		if err := n.cutDenied(); err != nil {
			n.nearMu.Lock()
			defer n.nearMu.Unlock()
			n.deniedInForce = nil // the next time cuts what is left
			return err
		}
		return nil
	}
	return nil
}

// storeDenied makes next what the proxy denies, and then what the kernel does. It returns
// what the kernel denied before; nil: the same.
func (n *Network) storeDenied(next map[netip.AddrPort]int) (was map[netip.AddrPort]int, err error) {
	n.nearMu.Lock()
	defer n.nearMu.Unlock()
	n.denied.Store(&next)
	if was = n.deniedInForce; was != nil && maps.Equal(was, next) || n.isOpen() != nil {
		return nil, nil // Reconcile fills the sets and cuts
	}
	if was == nil {
		was = map[netip.AddrPort]int{}
	}
	err = n.kern.do(func(b *nft.Batch) { n.table().SetDenied(b, next) })
	if err == nil {
		n.deniedInForce = next
	}
	return was, err
}

// cutDenied ends the flows that are denied now.
func (n *Network) cutDenied() error {
	n.mu.Lock()
	slots := make([]*slotState, 0, len(n.byID))
	for _, s := range n.byID {
		slots = append(slots, s)
	}
	n.mu.Unlock()
	var all error
	for _, s := range slots {
		s.mu.Lock()
		if o := n.owners[s.Num].Load(); !s.retired && s.inForce != nil && o != nil && o.policy != nil {
			all = errors.Join(all, n.cutRefused(s, o.policy))
		}
		s.mu.Unlock()
	}
	return all
}
