package network

import (
	"errors"
	"fmt"
	"time"

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
var beforeOthers = nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource - 1)

// hide fills chainHide, where a flow gets the host's address and a port. The library
// that writes all other rules cannot write this one: of a range and a flag it sends one
// only, and the kernel takes no notice of a range that no flag announces. A new table
// drops what comes to the empty chain, so there is no moment with a wrong port.
func (n *Network) hide() error {
	flush := batchMessage{unix.NFT_MSG_DELRULE, 0, []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: terminated(n.table().Name)}, {Type: unix.NFTA_RULE_CHAIN, Data: terminated(chainHide)},
	}}
	batch := []batchMessage{flush}
	for _, p := range []policy.Proto{policy.TCP, policy.UDP, 0} {
		rule, err := n.hideRule(p)
		if err != nil {
			return fmt.Errorf("write the rule for source ports: %w", err)
		}
		batch = append(batch, rule)
	}
	if err := sendBatch(batch); err != nil {
		return fmt.Errorf("set the rules for source ports: %w", err)
	}
	n.hidden.Store(true)
	return nil
}

// hideRule masquerades one protocol; 0 is what has no ports.
func (n *Network) hideRule(p policy.Proto) (batchMessage, error) {
	var exprs []netlink.Attribute
	list := when(l4proto(p), []expr.Any{
		&expr.Immediate{Register: reg1, Data: big16(n.cfg.SourcePorts.First)},
		&expr.Immediate{Register: reg2, Data: big16(n.cfg.SourcePorts.Last)},
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
	return batchMessage{unix.NFT_MSG_NEWRULE, netlink.Create | netlink.Append, []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: terminated(n.table().Name)}, {Type: unix.NFTA_RULE_CHAIN, Data: terminated(chainHide)},
		{Type: netlink.Nested | unix.NFTA_RULE_EXPRESSIONS, Data: rule},
	}}, errors.Join(all, err)
}

func terminated(s string) []byte { return append([]byte(s), 0) }

// batchMessage is one change of the table.
type batchMessage struct {
	kind  uint16
	flags netlink.HeaderFlags
	attrs []netlink.Attribute
}

// sendBatch makes changes of an inet table that take effect together.
func sendBatch(batch []batchMessage) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(transactionTimeout)); err != nil {
		return err
	}
	// struct nfgenmsg: family, version, and the subsystem that a batch is for.
	edge := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	msgs := []netlink.Message{{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: edge}}
	for _, m := range batch {
		data, err := netlink.MarshalAttributes(m.attrs)
		if err != nil {
			return err
		}
		msgs = append(msgs, netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | m.kind), Flags: netlink.Request | netlink.Acknowledge | m.flags},
			Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, data...),
		})
	}
	msgs = append(msgs, netlink.Message{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: edge})
	if _, err := c.SendMessages(msgs); err != nil {
		return err
	}
	for answered := 0; answered < len(batch); {
		answers, err := c.Receive() // an error of the kernel's, if it is one
		if err != nil {
			return err
		}
		answered += len(answers)
	}
	return nil
}
