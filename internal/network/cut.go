package network

import (
	"net/netip"

	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
)

// flowsOf returns the flows that the slot's rules accepted, under any policy.
func (n *Network) flowsOf(s *slotState) ([]conntrack.Flow, error) {
	mark, mask := nft.OfSlot(s.Num)
	flows, err := n.ct.Flows(conntrack.Mark{Value: mark, Mask: mask})
	kept := flows[:0]
	for _, f := range flows { // another server's slot may have the same number
		if src := conntrack.Src(f).Addr(); src == s.Lease.Addr4.Addr() || src == s.Lease.Addr6.Addr() {
			kept = append(kept, f)
		}
	}
	return kept, err
}

// cutRefused ends the kernel's flows that p refuses, also where a name could admit
// them now: what they say was not looked at from the start. The proxy's flows are
// the proxy's to judge: it knows their names. The caller holds s.mu.
func (n *Network) cutRefused(s *slotState, p *policy.Compiled) error {
	flows, err := n.flowsOf(s)
	if err != nil {
		return err
	}
	var refused []conntrack.Flow
	for _, f := range flows {
		if _, proxied, _ := nft.SlotOfMark(f.Mark); !proxied && !p.Decide(policy.Flow{Proto: conntrack.Proto(f), Dst: conntrack.Dst(f)}).Allow {
			refused = append(refused, f)
		}
	}
	return n.ct.Cut(s.link(), refused)
}

// cutAll ends every flow the slot's rules accepted.
func (n *Network) cutAll(s *slotState) error {
	if s.inForce == nil {
		return nil
	}
	flows, err := n.flowsOf(s)
	if err != nil {
		return err
	}
	return n.ct.Cut(s.link(), flows)
}

func (s *slotState) link() conntrack.Link { return conntrack.Link{Index: s.Index, MAC: s.MAC} }

// forgetFlows makes the kernel forget whatever it knows of the addresses of
// slots, flows that the host or the proxy opened or ended included.
func (n *Network) forgetFlows(slots []*slotState) error {
	addrs := map[netip.Addr]bool{}
	for _, s := range slots {
		addrs[s.Lease.Addr4.Addr()] = true
		if s.Lease.Addr6.IsValid() {
			addrs[s.Lease.Addr6.Addr()] = true
		}
	}
	return n.ct.ForgetAddrs(addrs)
}
