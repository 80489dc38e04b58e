package network

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// The table. A packet from a sandbox goes from the top; "→" ends the walk.
//
//	pin (prerouting, before connection tracking)
//	    not one of our links → out of our sight
//	    link, hardware and network address belong together → on
//	    anything else → drop, logged as "spoof"
//	pre (prerouting, after connection tracking)
//	    link @slots → s<n>; no entry: link, then drop
//	s<n> (one per slot under a policy, rules.go)
//	    the flow carries the slot's mark: accepted before under this policy → on
//	    link, screen, the operator's denials, floor, rules → ok, proxy or no_…
//	link    an answer to what the host opened → answer; neighbour discovery → on
//	answer  opens a TCP connection → drop; → on
//	ok      port 53 → dns; a flow of the proxy → proxy; too many flows → no_limit;
//	        mark the flow → on
//	dns     queries over UDP come too fast → no_queries, no_key_queries, which drop
//	proxy, dns   a new flow too many → no_limit
//	proxy, proxied, dns   hand to the transparent socket; nobody listens → no_proxy
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

	chainCount      = "count"       // returns unless there is one flow too many
	chainAnswer     = "answer"      // an answer by a flow that the other end opened
	chainHide       = "hide"        // gets the host's address
	chainLink       = "link"        // what needs no policy: answers to the host, neighbour discovery
	chainScreen     = "screen"      // what no policy can allow; returns for the rest
	chainInward     = "inward"      // forwarded to a slot
	chainFloor      = "floor"       // returns unless the destination is in the floor
	chainFloorNames = "floor_names" // the same, for policies where a name may open it
	chainDenied     = "denied"      // returns unless the operator denies a name that the address is of
	chainHostOpen   = "host_open"   // ok for what is the host's; returns for the rest
	chainHostHole   = "host_hole"   // likewise with hole
	chainHole       = "hole"        // ok, but TCP 80 and 443 go to the proxy
	chainOK         = "ok"
	chainProxy      = "proxy"
	chainProxied    = "proxied" // proxy for a flow that is marked already
	chainDNS        = "dns"
	chainRefuse     = "refuse"

	setSlots, setMarks, setLogs, setFlows = "slots", "marks", "logs", "flows"
	setKeys, setShares, setShareRates     = "keys", "shares", "share_rates" // keys.go
	setPorts4, setPorts6                  = "ports4", "ports6"
	setOwn4, setOwn6                      = "own4", "own6"
	setFloor4, setFloor6                  = "floor4", "floor6"
	setNear4, setNear6                    = "near4", "near6"     // near.go
	setDenied4, setDenied6                = "denied4", "denied6" // denied.go
	setDeniedPorts4, setDeniedPorts6      = "denied_ports4", "denied_ports6"
	setHost                               = "host"  // address types that are the host's own
	setPorts                              = "ports" // where the transparent sockets listen

	counterRefused = "refused"

	timeoutBrief = "brief" // how long the tracker remembers what has ended

	logRate, logBurst, logSnaplen = 50, 100, 128
)

// class is why a packet was refused; "no_" and the class is the chain that does
// it, and the class is the prefix in the log.
type class string

const (
	classSpoof    class = "spoof"
	classProtocol class = "protocol"
	classFloor    class = "floor"
	classDeny     class = "deny"
	classProxy    class = "proxy" // meant for a transparent socket that is not there
	classLimit    class = "limit" // one flow too many
)

func (c class) chain() string { return "no_" + string(c) }

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
	maxSlots    = 1 << (28 - slotShift)
	markSlot    = markTagMask | (maxSlots-1)<<slotShift // what tells slots apart
)

func markOf(slot int, gen uint16) uint32 {
	return markTag | uint32(slot)<<slotShift | uint32(gen)&markGen
}

// slotOfMark returns the slot of a flow by its mark.
func slotOfMark(mark uint32) (slot int, proxied, ok bool) {
	return int(mark&^markTagMask) >> slotShift, mark&markProxied != 0, mark&markTagMask == markTag
}

func (n *Network) table() *nftables.Table {
	return &nftables.Table{Name: "cordon_" + n.cfg.Name, Family: nftables.TableFamilyINet}
}

func (n *Network) chain(name string) *nftables.Chain {
	return &nftables.Chain{Name: name, Table: n.table()}
}

// namedSet names a set that exists; what it holds is needed to encode elements.
func (n *Network) namedSet(name string) *nftables.Set {
	s := &nftables.Set{Table: n.table(), Name: name, KeyType: nftables.TypeIFIndex, KeyByteOrder: binaryutil.NativeEndian}
	switch name {
	case setSlots: // of a known size, which makes a quicker table
		s.IsMap, s.DataType, s.Size = true, nftables.TypeVerdict, uint32(n.plan.Capacity())
	case setMarks:
		s.IsMap, s.DataType = true, nftables.TypeMark
	case setKeys:
		s.IsMap, s.DataType = true, nftables.TypeMark
	case setShares:
		s.Dynamic, s.Size, s.KeyType = true, 1<<16, nftables.TypeMark
	case setShareRates, setKeyQueryRates:
		s.Dynamic, s.HasTimeout, s.Timeout, s.Size, s.KeyType = true, true, logForget, 1<<16, nftables.TypeMark
	case setPorts4, setPorts6:
		s.Dynamic, s.Size, s.Concatenation, s.KeyByteOrder = true, n.limits().destinations, true, nil
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
	case setFloor4, setNear4:
		s.Interval, s.KeyType, s.KeyByteOrder = true, nftables.TypeIPAddr, nil
	case setFloor6, setNear6:
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

// addTable queues the whole table but the slots.
func (n *Network) addTable(tx *transaction) {
	t := n.table()
	tx.AddTable(t)
	tx.DelTable(t) // whatever it was: adding it first makes deleting it legal
	tx.AddTable(t)
	tx.AddObj(&nftables.CounterObj{Table: t, Name: counterRefused})
	tx.AddObj(n.brief())
	for _, name := range []string{setSlots, setMarks, setKeys, setLogs, setFlows, setShares, setShareRates, setQueryRates, setKeyQueryRates, setPorts4, setPorts6, setOwn4, setOwn6} {
		tx.set(n.namedSet(name), nil)
	}
	var floor []policy.PrefixPort
	for _, r := range policy.Floor() {
		floor = append(floor, policy.PrefixPort{Prefix: r.Prefix})
	}
	tx.set(n.namedSet(setFloor4), intervals(ranges(floor, false)))
	tx.set(n.namedSet(setFloor6), intervals(ranges(floor, true)))
	denied := n.deniedElements()
	for _, name := range slices.Sorted(maps.Keys(denied)) {
		tx.set(n.namedSet(name), denied[name])
	}
	around := n.around.Load()
	tx.set(n.namedSet(setNear4), around.elements(false))
	tx.set(n.namedSet(setNear6), around.elements(true))
	tx.set(n.namedSet(setHost), []nftables.SetElement{
		{Key: native(unix.RTN_LOCAL)}, {Key: native(unix.RTN_BROADCAST)}, {Key: native(unix.RTN_ANYCAST)}, {Key: native(unix.RTN_MULTICAST)},
	})
	tx.set(n.namedSet(setPorts), n.transparentPorts())
	chains := []string{
		chainRefuse, classSpoof.chain(), classProtocol.chain(), classFloor.chain(), classDeny.chain(), classProxy.chain(), classLimit.chain(),
		chainCount, classKeyFlows.chain(), classAllFlows.chain(), classKeyPorts.chain(), classQueries.chain(), classKeyQueries.chain(), chainAnswer, chainHide, chainProxy, chainProxied, chainDNS, chainOK, chainDenied, chainHole, chainHostOpen, chainHostHole, chainLink, chainScreen, chainFloor, chainFloorNames, chainInward,
	}
	for _, name := range chains {
		tx.AddChain(n.chain(name))
	}
	n.addRefusals(tx)
	n.addBudgets(tx)
	n.addShares(tx)
	n.addQueries(tx)
	n.addTransparent(tx)
	n.addShared(tx)
	n.addHooks(tx)
}

// transparentPorts are the elements of setPorts: TCP and UDP, whichever is served.
func (n *Network) transparentPorts() (elems []nftables.SetElement) {
	for _, port := range []uint16{n.cfg.ProxyPort, n.cfg.DNSPort} {
		for _, p := range []policy.Proto{policy.TCP, policy.UDP} {
			if port != 0 {
				elems = append(elems, nftables.SetElement{Key: protoPortKey(p, port)})
			}
		}
	}
	return elems
}

// addRefusals fills the chains that end in a refusal.
func (n *Network) addRefusals(tx *transaction) {
	tx.rules(n.chain(chainRefuse),
		when(count(counterRefused)),
		when(l4proto(policy.TCP), rejectTCP()),
		when(l4proto(policy.UDP), reject(unix.NFT_REJECT_ICMPX_PORT_UNREACH)),
		when(reject(unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED)),
		when(drop()))
	// A denied query is answered by the resolver, which judges the server's address
	// once more. ICMP errors are limited to one a second for each
	// destination, so a client that asks two servers twice would wait for seconds.
	tx.rules(n.chain(classDeny.chain()), when(l4proto(policy.UDP), dport(53), goTo(chainDNS)))
	// What a service sends on after its client has gone belongs to no connection any
	// more, but it opens none: it is reset, and no attempt to reach the host.
	tx.rules(n.chain(classFloor.chain()), when(goesOnTCP(), daddrTypeIn(setHost), goTo(chainRefuse)))
	for _, c := range []class{classFloor, classDeny, classProxy, classLimit} {
		tx.rules(n.chain(c.chain()), logs(n.cfg.NFLogGroup, string(c)), when(goTo(chainRefuse)))
	}
	for _, c := range []class{classSpoof, classProtocol} {
		tx.rules(n.chain(c.chain()), logs(n.cfg.NFLogGroup, string(c)), when(count(counterRefused), drop()))
	}
}

// addTransparent fills the chains that hand packets to our sockets.
func (n *Network) addTransparent(tx *transaction) {
	loopback4, loopback6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	hand := func(chain string, proto policy.Proto, port uint16, mark []expr.Any) {
		for _, a := range []netip.Addr{loopback4, loopback6} {
			if port != 0 {
				tx.rules(n.chain(chain), when(familyOf(a), l4proto(proto), tproxy(netip.AddrPortFrom(a, port)), mark, setMark(n.cfg.Mark), accept()))
			}
		}
	}
	// These flows never meet the limit in chainOK, and each takes a place in the
	// tracker as well: a denied sandbox could fill it with questions alone. Whoever
	// serves them logs them, so the tracker need not tell of them.
	tx.rules(n.chain(chainDNS), n.pacedQueries()...)
	for _, name := range []string{chainProxy, chainDNS} {
		tx.rules(n.chain(name), when(ctStateAny(expr.CtStateBitNEW), jump(chainCount)))
		tx.rules(n.chain(name), when(ctStateAny(expr.CtStateBitNEW), brief(), untold()))
	}
	hand(chainProxy, policy.TCP, n.cfg.ProxyPort, setCtMark(markProxied))
	hand(chainProxied, policy.TCP, n.cfg.ProxyPort, nil)
	hand(chainDNS, policy.UDP, n.cfg.DNSPort, nil)
	hand(chainDNS, policy.TCP, n.cfg.DNSPort, nil)
	for _, name := range []string{chainProxy, chainProxied, chainDNS} {
		tx.rules(n.chain(name), when(goTo(classProxy.chain())))
	}
}

// addShared fills the chains that every slot's chain uses.
func (n *Network) addShared(tx *transaction) {
	tx.rules(n.chain(chainOK),
		// What the tracker does not know would be forwarded with a sandbox's own address.
		when(ctStateAny(expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED), drop()),
		when(l4proto(policy.UDP), dport(53), goTo(chainDNS)),
		when(l4proto(policy.TCP), dport(53), goTo(chainDNS)),
		// The proxy's connections stay with the proxy, whatever a later policy says.
		when(ctMark(markTag|markProxied, markTagMask|markProxied), goTo(chainProxy)),
		// The tracker takes any packet of a connection that it has forgotten for a new one.
		// It would leave by another port than the connection has, so it is worth nothing.
		when(ctStateAny(expr.CtStateBitNEW), goesOnTCP(), goTo(chainRefuse)))
	tx.rules(n.chain(chainOK), n.paced()...)
	tx.rules(n.chain(chainOK), when(jump(chainCount)))
	tx.rules(n.chain(chainOK), n.portShares()...)
	tx.rules(n.chain(chainOK),
		when(brief(), setCtMark(0), accept()),
		when(drop()))
	n.addDenied(tx)
	tx.rules(n.chain(chainHole), when(l4proto(policy.TCP), dport(80), goTo(chainProxy)), when(l4proto(policy.TCP), dport(443), goTo(chainProxy)), when(goTo(chainOK)))
	neighbour := func(t byte) []expr.Any { return when(icmpType(policy.ICMPv6, t), hopLimit(255)) } // RFC 4861, 7.1
	// The tracker takes the packet that opens a connection for an answer where both
	// ends send one at the same time. Only one end of our flows opens them.
	tx.rules(n.chain(chainAnswer), when(opensTCP(), drop()), when(accept()))
	tx.rules(n.chain(chainLink),
		// Not what is only related: the tracker finds the flow of an ICMP error by what
		// the error quotes, whoever sends it, and a quote can be of anybody's flow.
		when(ctReply(), ctStateAny(expr.CtStateBitESTABLISHED), goTo(chainAnswer)),
		when(neighbour(135), accept()),
		when(neighbour(136), accept()),
		when(saddrIn(linkLocal), drop())) // good for nothing else
	tx.rules(n.chain(chainScreen),
		when(jump(chainLink)),
		// Before the operator's holes: another sandbox is never reachable.
		when(daddrIn(n.cfg.Subnet4), goTo(classFloor.chain())),
		when(daddrIn(n.cfg.Subnet6), goTo(classFloor.chain())),
		when(l4proto(policy.TCP), returns()),
		when(l4proto(policy.UDP), returns()),
		when(icmpType(policy.ICMP, 8), returns()),
		when(icmpType(policy.ICMPv6, 128), returns()),
		when(goTo(classProtocol.chain())))
	inHost := [][]expr.Any{daddrTypeIn(setHost), daddrInSet(setNear4, false, false), daddrInSet(setNear6, true, false)}
	for _, m := range inHost {
		tx.rules(n.chain(chainHostOpen), when(m, goTo(chainOK)))
		tx.rules(n.chain(chainHostHole), when(m, goTo(chainHole)))
	}
	for _, m := range append(inHost, daddrInSet(setFloor4, false, false), daddrInSet(setFloor6, true, false)) {
		tx.rules(n.chain(chainFloor), when(m, goTo(classFloor.chain())))
		tx.rules(n.chain(chainFloorNames), when(m, goTo(chainProxy)))
	}
}

// hook describes a base chain. All accept what they do not name: the table speaks
// about sandboxes only.
func (n *Network) hook(name string, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	kind := nftables.ChainTypeFilter
	if name == chainPost {
		kind = nftables.ChainTypeNAT
	}
	return &nftables.Chain{Name: name, Table: n.table(), Type: kind, Hooknum: hook, Priority: &priority}
}

// addHooks fills the chains packets enter by.
func (n *Network) addHooks(tx *transaction) {
	ours := n.plan.Prefix()
	pin := tx.AddChain(n.hook(chainPin, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw))
	tx.rules(pin,
		when(iifStartsNot(ours), accept()),
		when(family(unix.NFPROTO_IPV4), ownKey(false), in(setOwn4), accept()),
		when(family(unix.NFPROTO_IPV6), ownKey(true), in(setOwn6), accept()),
		// What every stack says when a link comes up, from an address that is not in
		// use yet (duplicate address detection, MLD): not worth a line.
		when(l4proto(policy.ICMPv6), drop()),
		when(goTo(classSpoof.chain())))
	pre := tx.AddChain(n.hook(chainPre, nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle))
	tx.rules(pre,
		when(iifStartsNot(ours), accept()),
		when(clearMark()), // judged from here on; see shut.go
		when(load(loadIif()), load(&expr.Lookup{SourceRegister: reg1, IsDestRegSet: true, SetName: setSlots})),
		when(jump(chainLink)),
		when(count(counterRefused), drop()))
	fwd := tx.AddChain(n.hook(chainFwd, nftables.ChainHookForward, *nftables.ChainPriorityFilter))
	forwarded := ctMark(markTag, markTagMask|markProxied) // ok has let the flow pass
	tx.rules(fwd,
		when(oifStarts(ours), goTo(chainInward)),
		when(forwarded, accept()),
		when(iifStarts(ours), drop()))
	// A datagram has no sign of whether it opens a flow. One that is addressed to a port
	// outside of the range may be meant for a service of the host: the flow that the
	// tracker takes it for an answer to got its port from another table.
	tx.rules(n.chain(chainInward),
		when(l4proto(policy.UDP), ctReplyPortOutside(n.cfg.SourcePorts), drop()),
		when(forwarded, ctReply(), goTo(chainAnswer)),
		when(drop()))
	inp := tx.AddChain(n.hook(chainInp, nftables.ChainHookInput, *nftables.ChainPriorityFilter))
	tx.rules(inp,
		when(iifLoopback(), accept()),
		when(marked(n.cfg.Mark), accept()),
		when(protoAndDport(), in(setPorts), goTo(chainRefuse)))
	out := tx.AddChain(n.hook(chainOut, nftables.ChainHookOutput, *nftables.ChainPriorityFilter))
	tx.rules(out, // the ingress checks tokens; nobody on this machine goes round it
		when(oifStartsNot(ours), accept()),
		when(ctStateNone(expr.CtStateBitNEW), accept()),
		when(ownedByRoot(), accept()),
		when(l4proto(policy.TCP), rejectTCP()),
		when(reject(unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED)))
	post := tx.AddChain(n.hook(chainPost, nftables.ChainHookPostrouting, *beforeOthers))
	tx.rules(post,
		when(saddrIn(n.cfg.Subnet4), oifStartsNot(ours), goTo(chainHide)),
		when(saddrIn(n.cfg.Subnet6), oifStartsNot(ours), goTo(chainHide)))
	tx.rules(n.chain(chainHide), when(drop())) // until hide has filled it
}

// ownKey loads link, hardware address and network address, as own4 and own6 have them.
func ownKey(v6 bool) []expr.Any {
	return []expr.Any{loadIif(), loadEtherSaddr(word(1)), loadSaddr(v6, word(3))}
}

var linkLocal = netip.MustParsePrefix("fe80::/10")
