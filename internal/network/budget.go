package network

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// The reasons of Config.MaxBytesOut and Config.MaxNewFlows.
const (
	ReasonBytesOut policy.Reason = "budget-bytes-out"
	ReasonNewFlows policy.Reason = "budget-new-flows"
)

// The classes of refusals by a budget.
const (
	classBytesOut class = "bytes" // Config.MaxBytesOut is used up
	classNewFlows class = "rate"  // Config.MaxNewFlows
)

const setRates = "rates"

// addBudgets fills the chains that refuse what a budget no longer covers.
func (n *Network) addBudgets(tx *transaction) {
	refuse := func(c class) []rule {
		return []rule{logs(n.cfg.NFLogGroup, string(c)), when(goTo(chainRefuse))}
	}
	if n.cfg.MaxBytesOut > 0 {
		// A bare reset is let on to the slot's rules: it takes nothing out, and tells the
		// other end, or the proxy, that the sandbox was told that the flow is over.
		tx.AddChain(n.chain(classBytesOut.chain()))
		tx.rules(n.chain(classBytesOut.chain()), when(bareReset(), returns()))
		tx.rules(n.chain(classBytesOut.chain()), refuse(classBytesOut)...)
	}
	if n.cfg.MaxNewFlows > 0 {
		tx.set(n.namedSet(setRates), nil)
		tx.AddChain(n.chain(classNewFlows.chain()))
		tx.rules(n.chain(classNewFlows.chain()), refuse(classNewFlows)...)
	}
}

// paced refuses the flows of a slot that come too fast.
func (n *Network) paced() []rule {
	if n.cfg.MaxNewFlows == 0 {
		return nil
	}
	return []rule{when(tooFast(n.cfg.MaxNewFlows), goTo(classNewFlows.chain()))}
}

// bareReset matches a TCP reset that carries nothing: no longer than an IPv6
// header and one of TCP without options.
func bareReset() []expr.Any {
	const reset, longest = 0x04, 60
	return when(l4proto(policy.TCP), []expr.Any{
		payload(expr.PayloadBaseTransportHeader, 13, 1, reg1),
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{reset}, Xor: []byte{0}},
		cmpNe([]byte{0}),
		&expr.Meta{Key: expr.MetaKeyLEN, Register: reg1},
		&expr.Byteorder{SourceRegister: reg1, DestRegister: reg1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpLte, Register: reg1, Data: binaryutil.BigEndian.PutUint32(longest)},
	})
}

// budgeted counts every packet of a flow that the sandbox opened, whether the kernel
// or the proxy passes it on, and refuses them when all is used. Answers to those
// who call the sandbox are not counted.
func (n *Network) budgeted(p *program, s *slotState) {
	if n.cfg.MaxBytesOut > 0 {
		p.rule(ctOriginal(), load(&expr.Objref{Type: unix.NFT_OBJECT_QUOTA, Name: quotaName(s.Num)}), jump(classBytesOut.chain()))
	}
}

func ctOriginal() []expr.Any {
	return []expr.Any{&expr.Ct{Register: reg1, Key: expr.CtKeyDIRECTION}, cmpEq([]byte{0})}
}

// tooFast matches a connection beyond what a slot may open in a second.
func tooFast(perSecond uint32) []expr.Any {
	return []expr.Any{
		loadIif(),
		&expr.Dynset{SrcRegKey: reg1, SetName: setRates, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{
			&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(perSecond), Unit: expr.LimitTimeSecond, Burst: perSecond, Over: true},
		}},
	}
}

func quotaName(slot int) string { return fmt.Sprintf("s%d_out", slot) }

// addQuota queues a slot's budget, less what was used before a restart.
func (n *Network) addQuota(tx *transaction, s *slotState) {
	if n.cfg.MaxBytesOut > 0 {
		tx.AddObj(n.quotaOf(s))
	}
}

// deleteQuota queues its end; the slot's rules must be gone.
func (n *Network) deleteQuota(tx *transaction, s *slotState) {
	if n.cfg.MaxBytesOut > 0 {
		tx.DeleteObject(n.quotaOf(s))
	}
}

func (n *Network) quotaOf(s *slotState) *nftables.QuotaObj {
	return &nftables.QuotaObj{Table: n.table(), Name: quotaName(s.Num), Bytes: n.cfg.MaxBytesOut, Consumed: s.spent, Over: true}
}

var quotaForm = regexp.MustCompile(`^s(\d+)_out$`)

// readSpent learns what the sandboxes of an earlier process had used.
func (n *Network) readSpent(c *nftables.Conn, bySlot map[int]*slotState) error {
	objs, err := c.GetNamedObjects(n.table())
	if err != nil {
		return fmt.Errorf("read the budgets: %w", err)
	}
	for _, o := range objs {
		named, ok := o.(*nftables.NamedObj)
		if !ok {
			continue
		}
		q, ok := named.Obj.(*expr.Quota)
		if !ok {
			continue
		}
		m := quotaForm.FindStringSubmatch(named.Name)
		if m == nil {
			continue
		}
		num, _ := strconv.Atoi(m[1])
		if s := bySlot[num]; s != nil {
			s.spent = q.Consumed
		}
	}
	return nil
}

// overBudget names the budget behind a refusal; false when it was none.
func (n *Network) overBudget(out *flowlog.Event, c class) bool {
	switch c {
	case classBytesOut:
		out.Rule, out.Reason = policy.Rule{ID: "limit", Text: fmt.Sprintf("%d bytes out of one sandbox", n.cfg.MaxBytesOut)}, ReasonBytesOut
	case classNewFlows:
		out.Rule, out.Reason = policy.Rule{ID: "limit", Text: fmt.Sprintf("%d new flows of one sandbox in a second", n.cfg.MaxNewFlows)}, ReasonNewFlows
	default:
		return false
	}
	return true
}
