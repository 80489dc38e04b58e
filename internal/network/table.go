package network

import (
	"fmt"
	"slices"

	"github.com/google/nftables"

	"github.com/cordonhq/cordon/internal/network/nft"
)

// table describes the nftables table as it is to be now.
func (n *Network) table() nft.Table {
	c := n.cfg
	return nft.Table{
		Name: c.Name, Links: n.plan.Prefix(), Subnet4: c.Subnet4, Subnet6: c.Subnet6, Slots: n.plan.Capacity(),
		ProxyPort: c.ProxyPort, DNSPort: c.DNSPort, Mark: c.Mark, FirstPort: c.SourcePorts.First, LastPort: c.SourcePorts.Last,
		LogGroup: c.NFLogGroup, MaxFlows: c.MaxFlows, MaxNewFlows: c.MaxNewFlows, MaxBytesOut: c.MaxBytesOut, Limits: n.limits(),
	}
}

// hasTable reports whether the kernel has the table.
func (k *kernel) hasTable(name string) (there bool, err error) {
	err = k.read(func(c *nftables.Conn) error {
		tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
		there = slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == name })
		return err
	})
	return there, err
}

// hide fills the chain in which a flow gets the host's address and a port.
func (n *Network) hide() error {
	batch, err := n.table().SourcePortRules()
	if err != nil {
		return err
	}
	if err := sendBatch(batch); err != nil {
		return fmt.Errorf("set the rules for source ports: %w", err)
	}
	n.hidden.Store(true)
	return nil
}

// rules are what the nftables rules know of a slot.
func (s *slotState) rules() nft.Slot {
	return nft.Slot{
		Num: s.Num, Index: s.Index, MAC: s.MAC, Addr4: s.Lease.Addr4.Addr(), Addr6: s.Lease.Addr6.Addr(), Key: s.key, Spent: s.spent,
	}
}
