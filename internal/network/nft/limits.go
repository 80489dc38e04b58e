package nft

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// The classes of refusals by a budget.
const (
	ClassBytesOut Class = "bytes" // Config.MaxBytesOut is used up
	ClassNewFlows Class = "rate"  // Config.MaxNewFlows
)

const setRates = "rates"

// addBudgets fills the chains that refuse what a budget no longer covers.
func (t Table) addBudgets(b *Batch) {
	refuse := func(c Class) []Rule {
		return []Rule{logs(t.LogGroup, string(c)), when(goTo(chainRefuse))}
	}
	if t.MaxBytesOut > 0 {
		// A bare reset is let on to the slot's rules: it takes nothing out, and tells the
		// other end, or the proxy, that the sandbox was told that the flow is over.
		b.addChain(t.chain(ClassBytesOut.chain()))
		b.rules(t.chain(ClassBytesOut.chain()), when(bareReset(), returns()))
		b.rules(t.chain(ClassBytesOut.chain()), refuse(ClassBytesOut)...)
	}
	if t.MaxNewFlows > 0 {
		b.AddSet(t.Set(setRates), nil)
		b.addChain(t.chain(ClassNewFlows.chain()))
		b.rules(t.chain(ClassNewFlows.chain()), refuse(ClassNewFlows)...)
	}
}

// paced refuses the flows of a slot that come too fast.
func (t Table) paced() []Rule {
	if t.MaxNewFlows == 0 {
		return nil
	}
	return []Rule{when(tooFast(t.MaxNewFlows), goTo(ClassNewFlows.chain()))}
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

// The classes of refusals by what API keys share: the tracker's table, and the ports that
// their flows to one destination have outside. The kernel counts by the number of a key,
// which setKeys has for each link.
const (
	ClassKeyFlows Class = "key_flows" // the key's share of the tracker
	ClassAllFlows Class = "all_flows" // all sandboxes'
	ClassKeyPorts Class = "key_ports" // the key's share of the ports towards one destination
)

// allKeys is the number that stands for all of them.
const allKeys = 1<<32 - 1

// addShares fills the chain that counts what is new, and those that refuse it.
func (t Table) addShares(b *Batch) {
	l := t.Limits
	b.rules(t.chain(chainCount),
		when(tooMany(t.MaxFlows), goTo(ClassLimit.chain())),
		markByKey(),
		when(loadMark(), counted(setShares, connlimit(l.KeyFlows)), goTo(ClassKeyFlows.chain())),
		when(loadMark(), counted(setShareRates, rate(l.KeyRate)), goTo(ClassKeyFlows.chain())),
		when(markAll()),
		when(loadMark(), counted(setShares, connlimit(l.AllFlows)), goTo(ClassAllFlows.chain())),
		when(loadMark(), counted(setShareRates, rate(l.AllRate)), goTo(ClassAllFlows.chain())),
		when(clearMark()))
	for _, c := range []Class{ClassKeyFlows, ClassAllFlows, ClassKeyPorts} {
		b.rules(t.chain(c.chain()), when(clearMark()))
	}
	for _, c := range []Class{ClassKeyFlows, ClassAllFlows, ClassKeyPorts} {
		b.rules(t.chain(c.chain()), logs(t.LogGroup, string(c)), when(goTo(chainRefuse)))
	}
}

// portShares refuse a flow that would take one port too many of those that all flows to
// its destination have.
func (t Table) portShares() []Rule {
	limit := connlimit(t.Limits.KeyPorts)
	of := func(set string, v6 bool) Rule {
		return when(ported(), familyIs(v6), []expr.Any{
			loadMark()[0], &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: word(1)},
			loadDaddr(v6, word(2)), loadDport(afterAddr(v6) + 2),
		}, counted(set, limit), goTo(ClassKeyPorts.chain()))
	}
	return []Rule{
		markByKey(),
		of(setPorts4, false), of(setPorts6, true), when(clearMark()),
	}
}

// markByKey puts the number of the API key that a link's sandbox is of into the packet's
// mark: nft(8) cannot list a rule that counts by what a map says.
func markByKey() Rule {
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

// The classes of queries that are dropped.
const (
	ClassQueries    Class = "queries"     // a sandbox's
	ClassKeyQueries Class = "key_queries" // a key's
)

const setQueryRates, setKeyQueryRates = "query_rates", "key_query_rates"

// addQueries fills the chains that drop queries beyond a rate.
func (t Table) addQueries(b *Batch) {
	b.rules(t.chain(ClassKeyQueries.chain()), when(clearMark()))
	for _, c := range []Class{ClassQueries, ClassKeyQueries} {
		b.rules(t.chain(c.chain()), logs(t.LogGroup, string(c)), when(count(counterRefused), drop()))
	}
}

// pacedQueries lead there.
func (t Table) pacedQueries() []Rule {
	udp := l4proto(policy.UDP)
	return []Rule{
		when(udp, []expr.Any{loadIif()}, counted(setQueryRates, rate(t.Limits.Queries)), goTo(ClassQueries.chain())),
		when(udp, markByKey()),
		when(udp, loadMark(), counted(setKeyQueryRates, rate(t.Limits.KeyQueries)), goTo(ClassKeyQueries.chain())),
		when(clearMark()),
	}
}

// SetDenied replaces the destinations that are denied because the operator denies a name
// of theirs; port 0 stands for every port and protocol.
func (t Table) SetDenied(b *Batch, denied map[netip.AddrPort]int) {
	for name, elems := range deniedElements(denied) {
		s := t.Set(name)
		b.flushSet(s)
		b.Add(s, elems)
	}
}

// SetNear replaces the ranges around the machine.
func (t Table) SetNear(b *Batch, near []netip.Prefix) {
	for i, name := range []string{setNear4, setNear6} {
		s := t.Set(name)
		b.flushSet(s)
		b.Add(s, prefixElements(near, i == 1))
	}
}

// deniedElements are the elements of the sets, by name.
func deniedElements(denied map[netip.AddrPort]int) map[string][]nftables.SetElement {
	out := map[string][]nftables.SetElement{setDenied4: nil, setDenied6: nil, setDeniedPorts4: nil, setDeniedPorts6: nil}
	for dst := range denied {
		name := setDenied4
		switch a := dst.Addr(); {
		case dst.Port() == 0 && a.Is6():
			name = setDenied6
		case dst.Port() != 0 && a.Is4():
			name = setDeniedPorts4
		case dst.Port() != 0:
			name = setDeniedPorts6
		}
		key := dst.Addr().AsSlice()
		if dst.Port() != 0 {
			key = withPort(dst.Addr(), dst.Port())
		}
		out[name] = append(out[name], nftables.SetElement{Key: key})
	}
	return out
}

// addDenied fills the chain. Where a name decides, on the proxy's ports, it returns: the
// address may be others' too.
func (t Table) addDenied(b *Batch) {
	no := goTo(ClassDeny.chain())
	b.rules(t.chain(chainDenied),
		when(l4proto(policy.TCP), dport(80), returns()),
		when(l4proto(policy.TCP), dport(443), returns()),
		when(daddrInSet(setDenied4, false, false), no),
		when(daddrInSet(setDenied6, true, false), no),
		when(ported(), daddrInSet(setDeniedPorts4, false, true), no),
		when(ported(), daddrInSet(setDeniedPorts6, true, true), no))
}

// RememberWait and RememberClosed are the seconds that the tracker remembers a TCP connection
// after its end. As long its source port is taken towards that destination, so the range of
// source ports over these is how many connections in a second one destination can have.
const RememberWait, RememberClosed = 1, 1

// rememberLive is the kernel's own default for one that is silent, five days.
const rememberLive = 5 * 24 * 3600

// brief is the object that says so. Its other times are the kernel's defaults.
func (t Table) brief() nftables.Obj {
	return &nftables.NamedObj{Table: t.Table(), Name: timeoutBrief, Type: nftables.ObjTypeCtTimeout, Obj: &expr.CtTimeout{
		L4Proto: unix.IPPROTO_TCP,
		Policy: expr.CtStatePolicyTimeout{
			expr.CtStateTCPESTABLISHED: rememberLive, expr.CtStateTCPTIMEWAIT: RememberWait, expr.CtStateTCPCLOSE: RememberClosed,
		},
	}}
}

// LoadTracker makes a rule that needs the connection tracker, which the kernel loads for it
// where it is a module, and takes it away again.
func LoadTracker(b *Batch, server string) {
	t := &nftables.Table{Name: "cordon_" + server + "_load", Family: nftables.TableFamilyINet}
	b.addTable(t)
	c := b.addChain(&nftables.Chain{Name: "load", Table: t})
	b.rules(c, when(ctStateAny(expr.CtStateBitNEW), accept()))
	b.DelTable(t)
}
