package nft

import (
	"net/netip"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/policy"
)

// Rule is one rule as the kernel runs it: expressions from left to right until one does
// not match. Each of the functions below makes some of them, and is named after what
// nft(8) prints.
type Rule = []expr.Any

// when joins conditions and statements into a rule.
func when(parts ...[]expr.Any) Rule { return slices.Concat(parts...) }

// The registers: reg1 to reg4 are 16 bytes wide; word(n) is the n-th of the 4-byte
// pieces they consist of, for keys of several fields.
const reg1, reg2 = unix.NFT_REG_1, unix.NFT_REG_2

func word(n uint32) uint32 { return unix.NFT_REG32_00 + n }

func load(e expr.Any) []expr.Any { return []expr.Any{e} }

func cmpEq(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: data} }

func cmpNe(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: data} }

func native(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func big16(v uint16) []byte { return binaryutil.BigEndian.PutUint16(v) }

// loadIif loads the index of the link a packet came by: the key of what is known
// about a slot. An index is never used twice, and quicker to look up than a name.
func loadIif() expr.Any { return &expr.Meta{Key: expr.MetaKeyIIF, Register: reg1} }

// A comparison shorter than the loaded name compares only its start.
func iifStarts(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, cmpEq([]byte(prefix))}
}

func iifStartsNot(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, cmpNe([]byte(prefix))}
}

func oifStarts(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, cmpEq([]byte(prefix))}
}

func oifStartsNot(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, cmpNe([]byte(prefix))}
}

// iifLoopback matches what comes by lo, the first link of every namespace
// (LOOPBACK_IFINDEX in the kernel's net/net_namespace.h).
func iifLoopback() []expr.Any { return []expr.Any{loadIif(), cmpEq(native(1))} }

func family(f byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1}, cmpEq([]byte{f})}
}

func familyOf(a netip.Addr) []expr.Any {
	if a.Is4() {
		return family(unix.NFPROTO_IPV4)
	}
	return family(unix.NFPROTO_IPV6)
}

func familyIs(v6 bool) []expr.Any {
	if v6 {
		return family(unix.NFPROTO_IPV6)
	}
	return family(unix.NFPROTO_IPV4)
}

func l4proto(p policy.Proto) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, cmpEq([]byte{byte(p)})}
}

// ported matches what has ports, once the chain screen has left nothing but TCP,
// UDP and echo requests.
func ported() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
		cmpNe([]byte{byte(policy.ICMP)}), cmpNe([]byte{byte(policy.ICMPv6)}),
	}
}

// payload loads len bytes of a header into a register.
func payload(base expr.PayloadBase, offset, length, register uint32) expr.Any {
	return &expr.Payload{OperationType: expr.PayloadLoad, Base: base, Offset: offset, Len: length, DestRegister: register}
}

// Header offsets: RFC 791, 8200, 9293, 768, 792, 4443; Ethernet II.
func loadSaddr(v6 bool, register uint32) expr.Any {
	if v6 {
		return payload(expr.PayloadBaseNetworkHeader, 8, 16, register)
	}
	return payload(expr.PayloadBaseNetworkHeader, 12, 4, register)
}

func loadDaddr(v6 bool, register uint32) expr.Any {
	if v6 {
		return payload(expr.PayloadBaseNetworkHeader, 24, 16, register)
	}
	return payload(expr.PayloadBaseNetworkHeader, 16, 4, register)
}

func loadDport(register uint32) expr.Any {
	return payload(expr.PayloadBaseTransportHeader, 2, 2, register)
}

func loadEtherSaddr(register uint32) expr.Any {
	return payload(expr.PayloadBaseLLHeader, 6, 6, register)
}

// dport matches a destination port of a protocol that has been matched already.
func dport(p uint16) []expr.Any { return []expr.Any{loadDport(reg1), cmpEq(big16(p))} }

// protoAndDport loads protocol and destination port, as setPorts has them; of what
// has no ports it loads something else, behind the number of its protocol.
func protoAndDport() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, loadDport(word(1))}
}

// protoPortKey is an element for protoAndDport: each field fills four octets.
func protoPortKey(p policy.Proto, port uint16) []byte {
	return []byte{byte(p), 0, 0, 0, byte(port >> 8), byte(port), 0, 0}
}

// icmpType matches the type of an ICMP or ICMPv6 message.
func icmpType(p policy.Proto, t byte) []expr.Any {
	return when(l4proto(p), load(payload(expr.PayloadBaseTransportHeader, 0, 1, reg1)), load(cmpEq([]byte{t})))
}

func hopLimit(v byte) []expr.Any {
	return []expr.Any{payload(expr.PayloadBaseNetworkHeader, 7, 1, reg1), cmpEq([]byte{v})}
}

// daddrIn matches one destination prefix.
func daddrIn(p netip.Prefix) []expr.Any {
	return when(familyOf(p.Addr()), inPrefix(loadDaddr(p.Addr().Is6(), reg1), p))
}

// saddrIn matches one source prefix.
func saddrIn(p netip.Prefix) []expr.Any {
	return when(familyOf(p.Addr()), inPrefix(loadSaddr(p.Addr().Is6(), reg1), p))
}

func inPrefix(loaded expr.Any, p netip.Prefix) []expr.Any {
	size := uint32(p.Addr().BitLen() / 8)
	switch {
	case p.Bits() == 0:
		return nil // the family says it all
	case p.IsSingleIP():
		return []expr.Any{loaded, cmpEq(p.Addr().AsSlice())}
	}
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		loaded,
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: size, Mask: mask, Xor: make([]byte, size)},
		cmpEq(p.Masked().Addr().AsSlice()),
	}
}

// in matches when what starts at reg1 is in a set.
func in(set string) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg1, SetName: set}}
}

// daddrInSet matches a destination address, and with ports the port of a protocol
// that has been matched already, in a set.
func daddrInSet(set string, v6, ports bool) []expr.Any {
	f := byte(unix.NFPROTO_IPV4)
	if v6 {
		f = unix.NFPROTO_IPV6
	}
	if !ports {
		return when(family(f), load(loadDaddr(v6, reg1)), in(set))
	}
	return when(family(f), load(loadDaddr(v6, reg1)), load(loadDport(afterAddr(v6))), in(set))
}

// afterAddr is the register behind an address that starts at reg1.
func afterAddr(v6 bool) uint32 {
	if v6 {
		return word(4)
	}
	return word(1)
}

// ctStateAny matches a connection in one of the states.
func ctStateAny(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: reg1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(bits), Xor: native(0)},
		cmpNe(native(0)),
	}
}

// ctStateNone matches a connection in none of the states, and what is no connection's.
func ctStateNone(bits uint32) []expr.Any {
	out := ctStateAny(bits)
	out[len(out)-1] = cmpEq(native(0))
	return out
}

// ownedByRoot matches packets of sockets that root made. It does not match what
// has no socket.
func ownedByRoot() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeySKUID, Register: reg1}, cmpEq(native(0))}
}

// brief makes the tracker forget a new connection soon after its end.
func brief() []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: timeoutBrief}}
}

// untold makes the tracker report nothing of a new connection: making the messages
// is work, also when the filter of our own socket drops them.
func untold() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: reg1, Data: native(0)},
		&expr.Ct{Register: reg1, SourceRegister: true, Key: expr.CtKeyEVENTMASK},
	}
}

// ctReply matches packets against the direction the connection was opened in.
func ctReply() []expr.Any {
	return []expr.Any{&expr.Ct{Register: reg1, Key: expr.CtKeyDIRECTION}, cmpEq([]byte{1})}
}

// ctReplyPortOutside matches a connection whose answers are addressed to a port outside
// of a range. The library writes the direction as four octets in network order, of
// which the kernel reads the first.
func ctReplyPortOutside(first, last uint16) []expr.Any {
	const reply = 1 << 24
	return []expr.Any{
		&expr.Ct{Register: reg1, Key: expr.CtKeyPROTODST, Direction: reply},
		&expr.Range{Op: expr.CmpOpNeq, Register: reg1, FromData: big16(first), ToData: big16(last)},
	}
}

// opensTCP matches a TCP packet that begins a connection: SYN without ACK.
func opensTCP() []expr.Any {
	const syn, ack = 0x02, 0x10 // RFC 9293, 3.1
	return when(l4proto(policy.TCP), []expr.Any{
		payload(expr.PayloadBaseTransportHeader, 13, 1, reg1),
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{syn | ack}, Xor: []byte{0}},
		cmpEq([]byte{syn}),
	})
}

// goesOnTCP matches a TCP packet that does not begin a connection.
func goesOnTCP() []expr.Any {
	out := opensTCP()
	out[len(out)-1] = cmpNe(out[len(out)-1].(*expr.Cmp).Data)
	return out
}

// ctMark matches a connection's mark. It does not match a packet that belongs to
// no connection.
func ctMark(v, mask uint32) []expr.Any {
	out := load(&expr.Ct{Register: reg1, Key: expr.CtKeyMARK})
	if mask != ^uint32(0) {
		out = append(out, &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(mask), Xor: native(0)})
	}
	return append(out, cmpEq(native(v)))
}

// setCtMark marks the connection with the slot's own mark, and the bits more.
func setCtMark(more uint32) []expr.Any {
	out := []expr.Any{
		loadIif(),
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: SetMarks},
	}
	if more != 0 {
		out = append(out, &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(^more), Xor: native(more)})
	}
	return append(out, &expr.Ct{Register: reg1, SourceRegister: true, Key: expr.CtKeyMARK})
}

// marked matches packets with the bit of the transparent sockets.
func marked(bit uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(bit), Xor: native(0)},
		cmpNe(native(0)),
	}
}

// clearMark takes every mark off the packet.
func clearMark() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: reg1, Data: native(0)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
	}
}

// setMark adds a bit to the packet's mark.
func setMark(bit uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(^bit), Xor: native(bit)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
	}
}

// tproxy hands the packet to a transparent socket: the one of its connection, or
// the listener at addr. It does not match when there is neither.
func tproxy(addr netip.AddrPort) []expr.Any {
	f := byte(unix.NFPROTO_IPV4)
	if addr.Addr().Is6() {
		f = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Immediate{Register: reg1, Data: addr.Addr().AsSlice()},
		&expr.Immediate{Register: reg2, Data: big16(addr.Port())},
		&expr.TProxy{Family: f, TableFamily: unix.NFPROTO_INET, RegAddr: reg1, RegPort: reg2},
	}
}

// daddrTypeIn matches what the host's own tables say an address is.
func daddrTypeIn(set string) []expr.Any {
	return when(load(&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true}), in(set))
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func accept() []expr.Any           { return verdict(expr.VerdictAccept, "") }
func drop() []expr.Any             { return verdict(expr.VerdictDrop, "") }
func returns() []expr.Any          { return verdict(expr.VerdictReturn, "") }
func jump(chain string) []expr.Any { return verdict(expr.VerdictJump, chain) }
func goTo(chain string) []expr.Any { return verdict(expr.VerdictGoto, chain) }
func rejectTCP() []expr.Any {
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
}

// reject answers with an ICMP or ICMPv6 error; code is one of NFT_REJECT_ICMPX_*.
func reject(code uint8) []expr.Any {
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: code}}
}

func count(name string) []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}
}

// logs sends the start of a packet to the log group, at most logRate a second for
// each slot, so that no sandbox can drown another's log lines or slow traffic.
func logs(group uint16, prefix string) Rule {
	return []expr.Any{
		loadIif(),
		&expr.Dynset{SrcRegKey: reg1, SetName: setLogs, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{
			&expr.Limit{Type: expr.LimitTypePkts, Rate: logRate, Unit: expr.LimitTimeSecond, Burst: logBurst},
		}},
		&expr.Log{
			Key:   1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN,
			Group: group, Snaplen: Snaplen, Data: []byte(prefix),
		},
	}
}

// tooMany matches a connection beyond the slot's share of the tracker's table.
func tooMany(limit uint32) []expr.Any {
	return []expr.Any{
		loadIif(),
		&expr.Dynset{SrcRegKey: reg1, SetName: setFlows, Operation: unix.NFT_DYNSET_OP_ADD, Exprs: []expr.Any{
			&expr.Connlimit{Count: limit, Flags: expr.NFT_CONNLIMIT_F_INV},
		}},
	}
}
