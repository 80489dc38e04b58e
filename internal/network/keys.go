package network

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/share"
)

// What API keys share in the kernel: the tracker's table, and the ports that their flows
// to one destination have outside. The kernel counts by the number of a key, which
// setKeys has for each link.
const (
	classKeyFlows class = "key_flows" // the key's share of the tracker
	classAllFlows class = "all_flows" // all sandboxes'
	classKeyPorts class = "key_ports" // the key's share of the ports towards one destination
)

// hostPart of the tracker's table is the machine's own: one in so many.
const hostPart = 4

// allKeys is the number that stands for all of them.
const allKeys = 1<<32 - 1

// limits are what the kernel lets sandboxes have. An entry of the tracker stays a while
// after its flow has ended, when the kernel does not count it any more: so one half of a
// share is for flows that live, and how fast they may begin follows from the other.
type limits struct {
	keyFlows, allFlows uint32 // that live
	keyRate, allRate   uint32 // that begin in a second
	keyPorts           uint32 // to one destination
	destinations       uint32 // that are counted
}

func (n *Network) limits() limits {
	tracker, ports := n.tracked.Pool().Resource(), n.ports.Resource()
	half := func(entries int64) (flows, rate uint32) {
		// Less than one sandbox may have makes no sense for all of a key's.
		flows = max(uint32(entries/2), n.cfg.MaxFlows)
		return flows, max(uint32(entries/2/rememberWait), n.cfg.MaxNewFlows)
	}
	var l limits
	l.keyFlows, l.keyRate = half(tracker.Alone())
	l.allFlows, l.allRate = half(tracker.Whole)
	l.keyPorts = uint32(ports.Alone())
	l.destinations = min(max(l.allFlows, 1<<16), 1<<20)
	return l
}

// measure learns how much there is to share.
func (n *Network) measure() {
	have := n.cfg.entries
	if have == 0 {
		var err error
		if have, err = sysctl.Number(trackerMax); err != nil {
			have = 1 << 16 // the tracker is not loaded yet; share measures again
		}
	}
	whole := int64(have - have/hostPart)
	if n.tracked == nil {
		n.tracked = share.NewMeter(share.Tracker.Of(whole, int64(n.cfg.MaxFlows)))
		n.pinning = share.NewRates(share.Pins.Of(pinRate, 0), pinBurst)
		n.queries = newQueries(n.cfg.MaxQueries)
		n.ports = share.NewPool(share.SourcePorts.Of(int64(n.cfg.SourcePorts.Len()), 0))
	}
	n.tracked.Resize(whole)
}

// Pools count what the kernel refused for the limits of a key and of all, for metrics.
func (n *Network) Pools() []*share.Pool {
	return []*share.Pool{n.tracked.Pool(), n.ports, n.queries, n.pinning.Pool()}
}

// Own implements sandbox.Network.
func (n *Network) Own(l sandbox.Lease, owner string) error {
	s, err := n.held(l)
	if err != nil {
		return err
	}
	key := n.keyNumber(owner)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.applied && s.key != key {
		return errs.New(errs.Conflict, "sandbox %s is another key's already", l.Sandbox)
	}
	s.key = key
	return nil
}

// keyNumber is the number of a key; 0 is nobody's.
func (n *Network) keyNumber(owner string) uint32 {
	if owner == "" {
		return 0
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, known := n.keys[owner]; !known {
		n.keys[owner] = uint32(len(n.keys) + 1)
	}
	return n.keys[owner]
}

func keyElement(s *slotState) nftables.SetElement {
	return nftables.SetElement{Key: native(s.Index), Val: native(s.key)}
}

// addShares fills the chain that counts what is new, and those that refuse it.
func (n *Network) addShares(tx *transaction) {
	l := n.limits()
	tx.rules(n.chain(chainCount),
		when(tooMany(n.cfg.MaxFlows), goTo(classLimit.chain())),
		markByKey(),
		when(loadMark(), counted(setShares, connlimit(l.keyFlows)), goTo(classKeyFlows.chain())),
		when(loadMark(), counted(setShareRates, rate(l.keyRate)), goTo(classKeyFlows.chain())),
		when(markAll()),
		when(loadMark(), counted(setShares, connlimit(l.allFlows)), goTo(classAllFlows.chain())),
		when(loadMark(), counted(setShareRates, rate(l.allRate)), goTo(classAllFlows.chain())),
		when(clearMark()))
	for _, c := range []class{classKeyFlows, classAllFlows, classKeyPorts} {
		tx.rules(n.chain(c.chain()), when(clearMark()))
	}
	for _, c := range []class{classKeyFlows, classAllFlows, classKeyPorts} {
		tx.rules(n.chain(c.chain()), logs(n.cfg.NFLogGroup, string(c)), when(goTo(chainRefuse)))
	}
}

// portShares refuse a flow that would take one port too many of those that all flows to
// its destination have.
func (n *Network) portShares() []rule {
	limit := connlimit(n.limits().keyPorts)
	of := func(set string, v6 bool) rule {
		return when(ported(), familyIs(v6), []expr.Any{
			loadMark()[0], &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: word(1)},
			loadDaddr(v6, word(2)), loadDport(afterAddr(v6) + 2),
		}, counted(set, limit), goTo(classKeyPorts.chain()))
	}
	return []rule{
		markByKey(),
		of(setPorts4, false), of(setPorts6, true), when(clearMark()),
	}
}

// markByKey puts the number of the API key that a link's sandbox is of into the packet's
// mark: nft(8) cannot list a rule that counts by what a map says.
func markByKey() rule {
	return []expr.Any{
		loadIif(), &expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: setKeys},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
	}
}

func loadMark() []expr.Any { return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}} }

// markAll is markByKey for what all keys have.
func markAll() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: reg1, Data: native(allKeys)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
	}
}

// counted keeps a limit for each value of what starts at reg1, and matches beyond it.
func counted(set string, limit expr.Any) []expr.Any {
	op := uint32(unix.NFT_DYNSET_OP_ADD)
	if _, timed := limit.(*expr.Limit); timed {
		op = unix.NFT_DYNSET_OP_UPDATE
	}
	return []expr.Any{&expr.Dynset{SrcRegKey: reg1, SetName: set, Operation: op, Exprs: []expr.Any{limit}}}
}

func connlimit(n uint32) expr.Any { return &expr.Connlimit{Count: n, Flags: expr.NFT_CONNLIMIT_F_INV} }

func rate(perSecond uint32) expr.Any {
	return &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(perSecond), Unit: expr.LimitTimeSecond, Burst: perSecond, Over: true}
}

// overShare names the share behind a refusal; false when it was none.
func (n *Network) overShare(out *flowlog.Event, c class) bool {
	pool, scope, l := n.tracked.Pool(), share.Key, n.limits()
	most, rate := l.keyFlows, l.keyRate
	switch c {
	case classKeyFlows:
	case classAllFlows:
		scope, most, rate = share.Server, l.allFlows, l.allRate
	case classKeyPorts:
		pool, most, rate = n.ports, l.keyPorts, 0
	case classLimit:
		pool.Refused(share.Sandbox)
		return false // judgeRefusal names it
	default:
		return false
	}
	pool.Refused(scope)
	r := pool.Resource()
	text := fmt.Sprintf("%s of one API key: %d", r.What, most)
	if scope == share.Server {
		text = fmt.Sprintf("%s of all sandboxes: %d", r.What, most)
	}
	if rate > 0 {
		text += fmt.Sprintf(", and %d new ones in a second", rate)
	}
	out.Rule, out.Reason = policy.Rule{ID: "limit." + r.Name + "." + string(scope), Text: text}, ReasonTooMany
	return true
}
