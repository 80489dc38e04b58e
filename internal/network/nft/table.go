// Package nft writes the nftables rules that confine sandboxes: one table, and for each slot
// a program that puts a policy's rules in the kernel's terms. It hides the table's chains,
// sets and marks. It changes nothing by itself: what it writes is a Batch.
//
// Every packet of a sandbox meets the same few chains, which are drawn below. A slot without
// a program is dropped because no entry names it: no rule has to be there for that.
package nft

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// Table describes the table of one server.
type Table struct {
	Name             string // of the server
	Links            string // what the names of its slots' links start with
	Subnet4, Subnet6 netip.Prefix
	Slots            int // at most
	ProxyPort        uint16
	DNSPort          uint16
	Mark             uint32 // the bit of packets for the transparent sockets
	FirstPort        uint16 // of the range that flows have outside
	LastPort         uint16
	LogGroup         uint16
	MaxFlows         uint32 // of one slot, that live
	MaxNewFlows      uint32 // of one slot in a second; 0: no limit
	MaxBytesOut      uint64 // of one slot in all; 0: no limit
	Limits           Limits
}

// Limits are what the kernel lets sandboxes have together. An entry of the tracker stays a
// while after its flow has ended, when the kernel does not count it any more: so one half of
// a share is for flows that live, and how fast they may begin follows from the other.
type Limits struct {
	KeyFlows, AllFlows  uint32 // that live, of one API key and of all
	KeyRate, AllRate    uint32 // that begin in a second
	KeyPorts            uint32 // of one API key, to one destination
	Destinations        uint32 // that are counted
	Queries, KeyQueries uint32 // DNS over UDP in a second, of a slot and of a key
}

// The table. A packet from a sandbox goes from the top; "→" ends the walk.
//
//	pin (prerouting, before connection tracking)
//	    not one of our links → accept
//	    link, hardware and network address belong together → on
//	    anything else → drop, logged as "spoof"
//	pre (prerouting, after connection tracking)
//	    link @slots → s<n>; no entry: link, then drop
//	s<n> (one per slot under a policy, program.go)
//	    the flow carries the slot's mark: accepted before under this policy → on
//	    link, screen, the operator's denials, blocked ranges, rules → ok, proxy or no_…
//	link    an answer to what the host opened → answer; neighbour discovery → on
//	answer  opens a TCP connection → drop; → on
//	ok      port 53 → dns; a flow of the proxy → proxy; too many flows → no_limit;
//	        mark the flow → on
//	dns     queries over UDP come too fast → no_queries, no_key_queries, which drop
//	proxy, dns   a new flow too many → no_limit
//	proxy, proxied, dns   hand to the transparent socket; none listens → no_proxy
//	no_…    log at a bounded rate, then refuse: TCP reset; UDP port unreachable, the one
//	        ICMP error that gVisor hands to a socket; else ICMP prohibited
//	fwd (forward)
//	    to one of our links: only answers to flows that ok has marked, by a port of
//	    the range that their flows have outside
//	    from one of our links: only such flows
//	inp (input)   the proxy's ports: only by the transparent path
//	out (output)   to one of our links: only answers, and what root opens
//	post (postrouting)   what leaves the host from a slot gets the host's address, and
//	    a random port of the range that is kept for it (masquerade.go)
//
// Only the first packets of a flow walk a slot's chain. Afterwards the mark
// decides, in one comparison; a new policy has a new mark, so the next packet of
// every flow is judged anew.
const (
	chainPin, chainPre, chainFwd, chainInp, chainOut, chainPost = "pin", "pre", "fwd", "inp", "out", "post"

	chainCount         = "count"       // returns unless there is one flow too many
	chainAnswer        = "answer"      // an answer by a flow that the other end opened
	chainHide          = "hide"        // gets the host's address
	chainLink          = "link"        // what needs no policy: answers to the host, neighbour discovery
	chainScreen        = "screen"      // what no policy can allow; returns for the rest
	chainInward        = "inward"      // forwarded to a slot
	chainBlocked       = "floor"       // returns unless the destination is always blocked
	chainBlockedNames  = "floor_names" // the same, for policies where a name may be an exception
	chainDenied        = "denied"      // returns unless the operator denies a name that the address is of
	chainHostOpen      = "host_open"   // ok for what is the host's; returns for the rest
	chainHostException = "host_hole"   // likewise with chainException
	chainException     = "hole"        // ok, but TCP 80 and 443 go to the proxy
	chainOK            = "ok"
	chainProxy         = "proxy"
	chainProxied       = "proxied" // proxy for a flow that is marked already
	chainDNS           = "dns"
	chainRefuse        = "refuse"

	setSlots, SetMarks, setLogs, setFlows = "slots", "marks", "logs", "flows"
	setKeys, setShares, setShareRates     = "keys", "shares", "share_rates" // limits.go
	setPorts4, setPorts6                  = "ports4", "ports6"
	setOwn4, setOwn6                      = "own4", "own6"
	setBlocked4, setBlocked6              = "floor4", "floor6"
	setNear4, setNear6                    = "near4", "near6"
	setDenied4, setDenied6                = "denied4", "denied6"
	setDeniedPorts4, setDeniedPorts6      = "denied_ports4", "denied_ports6"
	setHost                               = "host"  // address types that are the host's own
	setPorts                              = "ports" // where the transparent sockets listen

	counterRefused = "refused"

	timeoutBrief = "brief" // how long the tracker remembers what has ended

	logRate, logBurst = 50, 100
)

// MaxPins is how many destinations the resolver may have pinned in a slot for each family.
const MaxPins = 4096

// Snaplen is how much of a refused packet is in the log.
const Snaplen = 128

// logForget is how long a slot's log budget is remembered.
const logForget = time.Minute

// Class is why a packet was refused; "no_" and the class is the chain that does
// it, and the class is the prefix in the log.
type Class string

const (
	ClassSpoof    Class = "spoof"
	ClassProtocol Class = "protocol"
	ClassBlocked  Class = "floor"
	ClassDeny     Class = "deny"
	ClassProxy    Class = "proxy" // meant for a transparent socket that is not there
	ClassLimit    Class = "limit" // one flow too many
)

func (c Class) chain() string { return "no_" + string(c) }

// A connection mark is tag, slot, markProxied and generation:
//
//	31  28 27          13 12 11        0
//	  tag  | slot number |P | generation
const (
	markTag     = 0xc0000000
	markTagMask = 0xf0000000
	markProxied = 1 << 12
	markGen     = markProxied - 1
	slotShift   = 13
	markSlot    = markTagMask | (MaxSlots-1)<<slotShift // what tells slots apart
)

// MaxSlots is how many slots a mark can tell apart.
const MaxSlots = 1 << (28 - slotShift)

// Forwarded is the mark, under a mask, of all flows that the kernel forwards for slots:
// not those of the proxy.
func Forwarded() (mark, mask uint32) { return markTag, markTagMask | markProxied }

// OfSlot is the mark, under a mask, of all flows of a slot.
func OfSlot(slot int) (mark, mask uint32) { return MarkOf(slot, 0), markSlot }

// MarkOf is the mark of flows that a slot accepted under the policy of a generation.
func MarkOf(slot int, gen uint16) uint32 {
	return markTag | uint32(slot)<<slotShift | uint32(gen)&markGen
}

// slotOfMark returns the slot of a flow by its mark.
func SlotOfMark(mark uint32) (slot int, proxied, ok bool) {
	return int(mark&^markTagMask) >> slotShift, mark&markProxied != 0, mark&markTagMask == markTag
}

// Table names the table.
func (t Table) Table() *nftables.Table {
	return &nftables.Table{Name: "cordon_" + t.Name, Family: nftables.TableFamilyINet}
}

func (t Table) chain(name string) *nftables.Chain {
	return &nftables.Chain{Name: name, Table: t.Table()}
}

// Set names a set that exists; what it holds is needed to encode elements.
func (t Table) Set(name string) *nftables.Set { //nolint:gocyclo // one set after the other
	s := &nftables.Set{Table: t.Table(), Name: name, KeyType: nftables.TypeIFIndex, KeyByteOrder: binaryutil.NativeEndian}
	switch name {
	case setSlots: // of a known size, which makes a quicker table
		s.IsMap, s.DataType, s.Size = true, nftables.TypeVerdict, uint32(t.Slots)
	case SetMarks:
		s.IsMap, s.DataType = true, nftables.TypeMark
	case setKeys:
		s.IsMap, s.DataType = true, nftables.TypeMark
	case setShares:
		s.Dynamic, s.Size, s.KeyType = true, 1<<16, nftables.TypeMark
	case setShareRates, setKeyQueryRates:
		s.Dynamic, s.HasTimeout, s.Timeout, s.Size, s.KeyType = true, true, logForget, 1<<16, nftables.TypeMark
	case setPorts4, setPorts6:
		s.Dynamic, s.Size, s.Concatenation, s.KeyByteOrder = true, t.Limits.Destinations, true, nil
		addr := nftables.TypeIPAddr
		if name == setPorts6 {
			addr = nftables.TypeIP6Addr
		}
		s.KeyType = nftables.MustConcatSetType(nftables.TypeMark, nftables.TypeInetProto, addr, nftables.TypeInetService)
	case setLogs:
		s.Dynamic, s.HasTimeout, s.Timeout, s.Size = true, true, logForget, 1<<16
	case setFlows:
		s.Dynamic, s.Size = true, 1<<16
	case setRates, setQueryRates:
		s.Dynamic, s.HasTimeout, s.Timeout, s.Size = true, true, logForget, 1<<16
	case setOwn4:
		s.Concatenation, s.KeyByteOrder = true, nil
		s.KeyType = nftables.MustConcatSetType(nftables.TypeIFIndex, nftables.TypeEtherAddr, nftables.TypeIPAddr)
	case setOwn6:
		s.Concatenation, s.KeyByteOrder = true, nil
		s.KeyType = nftables.MustConcatSetType(nftables.TypeIFIndex, nftables.TypeEtherAddr, nftables.TypeIP6Addr)
	case setBlocked4, setNear4:
		s.Interval, s.KeyType, s.KeyByteOrder = true, nftables.TypeIPAddr, nil
	case setBlocked6, setNear6:
		s.Interval, s.KeyType, s.KeyByteOrder = true, nftables.TypeIP6Addr, nil
	case setDenied4:
		s.KeyType, s.KeyByteOrder = nftables.TypeIPAddr, nil
	case setDenied6:
		s.KeyType, s.KeyByteOrder = nftables.TypeIP6Addr, nil
	case setDeniedPorts4:
		s.Concatenation, s.KeyByteOrder = true, nil
		s.KeyType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	case setDeniedPorts6:
		s.Concatenation, s.KeyByteOrder = true, nil
		s.KeyType = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)
	case setHost:
		s.KeyType = nftables.TypeFIBAddr
	case setPorts:
		s.Concatenation, s.KeyByteOrder = true, nil
		s.KeyType = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	}
	return s
}

// Make makes the whole table anew, but for the slots. near are the ranges around the
// machine, denied the destinations that SetDenied documents.
func (t Table) Make(b *Batch, near []netip.Prefix, denied map[netip.AddrPort]int) {
	table := t.Table()
	b.DelTable(table) // whatever it was
	b.addTable(table)
	b.addObj(&nftables.CounterObj{Table: table, Name: counterRefused})
	b.addObj(t.brief())
	for _, name := range []string{setSlots, SetMarks, setKeys, setLogs, setFlows, setShares, setShareRates, setQueryRates, setKeyQueryRates, setPorts4, setPorts6, setOwn4, setOwn6} {
		b.AddSet(t.Set(name), nil)
	}
	var blocked []netip.Prefix
	for _, r := range policy.Floor() {
		blocked = append(blocked, r.Prefix)
	}
	b.AddSet(t.Set(setBlocked4), prefixElements(blocked, false))
	b.AddSet(t.Set(setBlocked6), prefixElements(blocked, true))
	sets := deniedElements(denied)
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		b.AddSet(t.Set(name), sets[name])
	}
	b.AddSet(t.Set(setNear4), prefixElements(near, false))
	b.AddSet(t.Set(setNear6), prefixElements(near, true))
	b.AddSet(t.Set(setHost), []nftables.SetElement{
		{Key: native(unix.RTN_LOCAL)}, {Key: native(unix.RTN_BROADCAST)}, {Key: native(unix.RTN_ANYCAST)}, {Key: native(unix.RTN_MULTICAST)},
	})
	b.AddSet(t.Set(setPorts), t.transparentPorts())
	chains := []string{
		chainRefuse, ClassSpoof.chain(), ClassProtocol.chain(), ClassBlocked.chain(), ClassDeny.chain(), ClassProxy.chain(), ClassLimit.chain(),
		chainCount, ClassKeyFlows.chain(), ClassAllFlows.chain(), ClassKeyPorts.chain(), ClassQueries.chain(), ClassKeyQueries.chain(), chainAnswer, chainHide, chainProxy, chainProxied, chainDNS, chainOK, chainDenied, chainException, chainHostOpen, chainHostException, chainLink, chainScreen, chainBlocked, chainBlockedNames, chainInward,
	}
	for _, name := range chains {
		b.addChain(t.chain(name))
	}
	t.addRefusals(b)
	t.addBudgets(b)
	t.addShares(b)
	t.addQueries(b)
	t.addTransparent(b)
	t.addShared(b)
	t.addHooks(b)
}

// transparentPorts are the elements of setPorts: TCP and UDP, whichever is served.
func (t Table) transparentPorts() (elems []nftables.SetElement) {
	for _, port := range []uint16{t.ProxyPort, t.DNSPort} {
		for _, p := range []policy.Proto{policy.TCP, policy.UDP} {
			if port != 0 {
				elems = append(elems, nftables.SetElement{Key: protoPortKey(p, port)})
			}
		}
	}
	return elems
}

// addRefusals fills the chains that end in a refusal.
func (t Table) addRefusals(b *Batch) {
	b.rules(t.chain(chainRefuse),
		when(count(counterRefused)),
		when(l4proto(policy.TCP), rejectTCP()),
		when(l4proto(policy.UDP), reject(unix.NFT_REJECT_ICMPX_PORT_UNREACH)),
		when(reject(unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED)),
		when(drop()))
	// A denied query is answered by the resolver, which judges the server's address
	// once more. ICMP errors are limited to one a second for each
	// destination, so a client that asks two servers twice would wait for seconds.
	b.rules(t.chain(ClassDeny.chain()), when(l4proto(policy.UDP), dport(53), goTo(chainDNS)))
	// What a service sends on after its client has gone belongs to no connection any
	// more, but it opens none: it is reset, and no attempt to reach the host.
	b.rules(t.chain(ClassBlocked.chain()), when(goesOnTCP(), daddrTypeIn(setHost), goTo(chainRefuse)))
	for _, c := range []Class{ClassBlocked, ClassDeny, ClassProxy, ClassLimit} {
		b.rules(t.chain(c.chain()), logs(t.LogGroup, string(c)), when(goTo(chainRefuse)))
	}
	for _, c := range []Class{ClassSpoof, ClassProtocol} {
		b.rules(t.chain(c.chain()), logs(t.LogGroup, string(c)), when(count(counterRefused), drop()))
	}
}

// addTransparent fills the chains that hand packets to our sockets.
func (t Table) addTransparent(b *Batch) {
	loopback4, loopback6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	hand := func(chain string, proto policy.Proto, port uint16, mark []expr.Any) {
		for _, a := range []netip.Addr{loopback4, loopback6} {
			if port != 0 {
				b.rules(t.chain(chain), when(familyOf(a), l4proto(proto), tproxy(netip.AddrPortFrom(a, port)), mark, setMark(t.Mark), accept()))
			}
		}
	}
	// These flows never meet the limit in chainOK, and each takes an entry of the
	// tracker as well: a denied sandbox could fill it with questions alone. The proxy and
	// the resolver log them, so the tracker need not tell of them.
	b.rules(t.chain(chainDNS), t.pacedQueries()...)
	for _, name := range []string{chainProxy, chainDNS} {
		b.rules(t.chain(name), when(ctStateAny(expr.CtStateBitNEW), jump(chainCount)))
		b.rules(t.chain(name), when(ctStateAny(expr.CtStateBitNEW), brief(), untold()))
	}
	hand(chainProxy, policy.TCP, t.ProxyPort, setCtMark(markProxied))
	hand(chainProxied, policy.TCP, t.ProxyPort, nil)
	hand(chainDNS, policy.UDP, t.DNSPort, nil)
	hand(chainDNS, policy.TCP, t.DNSPort, nil)
	for _, name := range []string{chainProxy, chainProxied, chainDNS} {
		b.rules(t.chain(name), when(goTo(ClassProxy.chain())))
	}
}

// addShared fills the chains that every slot's chain uses.
func (t Table) addShared(b *Batch) {
	b.rules(t.chain(chainOK),
		// What the tracker does not know would be forwarded with a sandbox's own address.
		when(ctStateAny(expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED), drop()),
		when(l4proto(policy.UDP), dport(53), goTo(chainDNS)),
		when(l4proto(policy.TCP), dport(53), goTo(chainDNS)),
		// The proxy's connections stay with the proxy, whatever a later policy says.
		when(ctMark(markTag|markProxied, markTagMask|markProxied), goTo(chainProxy)),
		// The tracker takes any packet of a connection that it has forgotten for a new one.
		// It would leave by another port than the connection has, so it is worth nothing.
		when(ctStateAny(expr.CtStateBitNEW), goesOnTCP(), goTo(chainRefuse)))
	b.rules(t.chain(chainOK), t.paced()...)
	b.rules(t.chain(chainOK), when(jump(chainCount)))
	b.rules(t.chain(chainOK), t.portShares()...)
	b.rules(t.chain(chainOK),
		when(brief(), setCtMark(0), accept()),
		when(drop()))
	t.addDenied(b)
	b.rules(t.chain(chainException), when(l4proto(policy.TCP), dport(80), goTo(chainProxy)), when(l4proto(policy.TCP), dport(443), goTo(chainProxy)), when(goTo(chainOK)))
	neighbour := func(t byte) []expr.Any { return when(icmpType(policy.ICMPv6, t), hopLimit(255)) } // RFC 4861, 7.1
	// The tracker takes the packet that opens a connection for an answer where both
	// ends send one at the same time. Only one end of our flows opens them.
	b.rules(t.chain(chainAnswer), when(opensTCP(), drop()), when(accept()))
	b.rules(t.chain(chainLink),
		// Not what is only related: the tracker finds the flow of an ICMP error by what
		// the error quotes, and does not ask who sends it: a quote can be of any flow.
		when(ctReply(), ctStateAny(expr.CtStateBitESTABLISHED), goTo(chainAnswer)),
		when(neighbour(135), accept()),
		when(neighbour(136), accept()),
		when(saddrIn(linkLocal), drop())) // good for nothing else
	b.rules(t.chain(chainScreen),
		when(jump(chainLink)),
		// Before the operator's exceptions: another sandbox is never reachable.
		when(daddrIn(t.Subnet4), goTo(ClassBlocked.chain())),
		when(daddrIn(t.Subnet6), goTo(ClassBlocked.chain())),
		when(l4proto(policy.TCP), returns()),
		when(l4proto(policy.UDP), returns()),
		when(icmpType(policy.ICMP, 8), returns()),
		when(icmpType(policy.ICMPv6, 128), returns()),
		when(goTo(ClassProtocol.chain())))
	inHost := [][]expr.Any{daddrTypeIn(setHost), daddrInSet(setNear4, false, false), daddrInSet(setNear6, true, false)}
	for _, m := range inHost {
		b.rules(t.chain(chainHostOpen), when(m, goTo(chainOK)))
		b.rules(t.chain(chainHostException), when(m, goTo(chainException)))
	}
	for _, m := range append(inHost, daddrInSet(setBlocked4, false, false), daddrInSet(setBlocked6, true, false)) {
		b.rules(t.chain(chainBlocked), when(m, goTo(ClassBlocked.chain())))
		b.rules(t.chain(chainBlockedNames), when(m, goTo(chainProxy)))
	}
}

// hook describes a base chain. All accept what they do not name: the table speaks
// about sandboxes only.
func (t Table) hook(name string, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	kind := nftables.ChainTypeFilter
	if name == chainPost {
		kind = nftables.ChainTypeNAT
	}
	return &nftables.Chain{Name: name, Table: t.Table(), Type: kind, Hooknum: hook, Priority: &priority}
}

// addHooks fills the chains packets enter by.
func (t Table) addHooks(b *Batch) {
	ours := t.Links
	pin := b.addChain(t.hook(chainPin, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw))
	b.rules(pin,
		when(iifStartsNot(ours), accept()),
		when(family(unix.NFPROTO_IPV4), ownKey(false), in(setOwn4), accept()),
		when(family(unix.NFPROTO_IPV6), ownKey(true), in(setOwn6), accept()),
		// What every stack says when a link comes up, from an address that is not in
		// use yet (duplicate address detection, MLD): not worth a line.
		when(l4proto(policy.ICMPv6), drop()),
		when(goTo(ClassSpoof.chain())))
	pre := b.addChain(t.hook(chainPre, nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle))
	b.rules(pre,
		when(iifStartsNot(ours), accept()),
		when(clearMark()), // the fail-closed guard set one; judged from here on
		when(load(loadIif()), load(&expr.Lookup{SourceRegister: reg1, IsDestRegSet: true, SetName: setSlots})),
		when(jump(chainLink)),
		when(count(counterRefused), drop()))
	fwd := b.addChain(t.hook(chainFwd, nftables.ChainHookForward, *nftables.ChainPriorityFilter))
	forwarded := ctMark(markTag, markTagMask|markProxied) // ok has let the flow pass
	b.rules(fwd,
		when(oifStarts(ours), goTo(chainInward)),
		when(forwarded, accept()),
		when(iifStarts(ours), drop()))
	// A datagram has no sign of whether it opens a flow. One that is addressed to a port
	// outside of the range may be meant for a service of the host: the flow that the
	// tracker takes it for an answer to got its port from another table.
	b.rules(t.chain(chainInward),
		when(l4proto(policy.UDP), ctReplyPortOutside(t.FirstPort, t.LastPort), drop()),
		when(forwarded, ctReply(), goTo(chainAnswer)),
		when(drop()))
	inp := b.addChain(t.hook(chainInp, nftables.ChainHookInput, *nftables.ChainPriorityFilter))
	b.rules(inp,
		when(iifLoopback(), accept()),
		when(marked(t.Mark), accept()),
		when(protoAndDport(), in(setPorts), goTo(chainRefuse)))
	out := b.addChain(t.hook(chainOut, nftables.ChainHookOutput, *nftables.ChainPriorityFilter))
	b.rules(out, // the ingress checks tokens; users of this machine do not go round it
		when(oifStartsNot(ours), accept()),
		when(ctStateNone(expr.CtStateBitNEW), accept()),
		when(ownedByRoot(), accept()),
		when(l4proto(policy.TCP), rejectTCP()),
		when(reject(unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED)))
	post := b.addChain(t.hook(chainPost, nftables.ChainHookPostrouting, *beforeOthers))
	b.rules(post,
		when(saddrIn(t.Subnet4), oifStartsNot(ours), goTo(chainHide)),
		when(saddrIn(t.Subnet6), oifStartsNot(ours), goTo(chainHide)))
	b.rules(t.chain(chainHide), when(drop())) // until SourcePortRules have filled it
}

// ownKey loads link, hardware address and network address, as own4 and own6 have them.
func ownKey(v6 bool) []expr.Any {
	return []expr.Any{loadIif(), loadEtherSaddr(word(1)), loadSaddr(v6, word(3))}
}

var linkLocal = netip.MustParsePrefix("fe80::/10")
