package nft

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// Outside, a flow of a sandbox has the host's address. If it had any port, a sandbox
// could open a flow from the port of one of the host's services to a client: the
// tracker would take the client's next packet to that service for an answer, and
// hand it to the sandbox. So the ports come from a range where nothing of the host
// listens (Config.SourcePorts), and the kernel chooses, not the sandbox.

// beforeOthers is a step ahead of the usual place: the first table that translates a
// flow decides about its port, and a machine's own rules often masquerade everything.
var beforeOthers = new(*nftables.ChainPriorityNATSource - 1)

// SourcePortRules replace the rules of the chain hide, where a flow gets the host's address
// and a port. The library that writes all other rules cannot write these: of a range and a
// flag it sends one only, and the kernel takes no notice of a range that no flag announces.
// A new table drops what comes to the empty chain, so there is no moment with a wrong port.
func (t Table) SourcePortRules() ([]Message, error) {
	batch := []Message{{unix.NFT_MSG_DELRULE, 0, []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: terminated(t.Table().Name)}, {Type: unix.NFTA_RULE_CHAIN, Data: terminated(chainHide)},
	}}}
	for _, p := range []policy.Proto{policy.TCP, policy.UDP, 0} {
		rule, err := t.hideRule(p)
		if err != nil {
			return nil, fmt.Errorf("write the rule for source ports: %w", err)
		}
		batch = append(batch, rule)
	}
	return batch, nil
}

// hideRule masquerades one protocol; 0 is what has no ports.
func (t Table) hideRule(p policy.Proto) (Message, error) {
	var exprs []netlink.Attribute
	list := when(l4proto(p), []expr.Any{
		&expr.Immediate{Register: reg1, Data: big16(t.FirstPort)},
		&expr.Immediate{Register: reg2, Data: big16(t.LastPort)},
	})
	const ranged, random = 1 << 1, 1 << 4 // NF_NAT_RANGE_PROTO_SPECIFIED, _RANDOM_FULLY (linux/netfilter/nf_nat.h)
	masq := []netlink.Attribute{
		{Type: unix.NFTA_MASQ_FLAGS, Data: binaryutil.BigEndian.PutUint32(ranged | random)},
		{Type: unix.NFTA_MASQ_REG_PROTO_MIN, Data: binaryutil.BigEndian.PutUint32(reg1)},
		{Type: unix.NFTA_MASQ_REG_PROTO_MAX, Data: binaryutil.BigEndian.PutUint32(reg2)},
	}
	if p == 0 {
		list, masq = nil, []netlink.Attribute{{Type: unix.NFTA_MASQ_FLAGS, Data: binaryutil.BigEndian.PutUint32(random)}}
	}
	add := func(b []byte, err error) error {
		exprs = append(exprs, netlink.Attribute{Type: netlink.Nested | unix.NFTA_LIST_ELEM, Data: b})
		return err
	}
	var all error
	for _, e := range list {
		all = errors.Join(all, add(expr.Marshal(unix.NFPROTO_INET, e)))
	}
	data, err := netlink.MarshalAttributes(masq)
	all = errors.Join(all, err, add(netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: terminated("masq")}, {Type: netlink.Nested | unix.NFTA_EXPR_DATA, Data: data},
	})))
	rule, err := netlink.MarshalAttributes(exprs)
	return Message{unix.NFT_MSG_NEWRULE, netlink.Create | netlink.Append, []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: terminated(t.Table().Name)}, {Type: unix.NFTA_RULE_CHAIN, Data: terminated(chainHide)},
		{Type: netlink.Nested | unix.NFTA_RULE_EXPRESSIONS, Data: rule},
	}}, errors.Join(all, err)
}

func terminated(s string) []byte { return append([]byte(s), 0) }

// Message is one change of the table as netlink has it.
type Message struct {
	Kind  uint16
	Flags netlink.HeaderFlags
	Attrs []netlink.Attribute
}
