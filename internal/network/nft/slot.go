package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Slot is what the rules know of a slot.
type Slot struct {
	Num          int
	Index        uint32           // of the host's link
	MAC          net.HardwareAddr // of the sandbox's end
	Addr4, Addr6 netip.Addr       // the sandbox's; Addr6 may be missing
	Key          uint32           // number of its owner's API key
	Spent        uint64           // of Table.MaxBytesOut, under an earlier table
}

// chainOf is the name of a slot's chain.
func chainOf(slot int) string { return fmt.Sprintf("s%d", slot) }

func (t Table) slotElement(s Slot) nftables.SetElement {
	return nftables.SetElement{
		Key:         native(s.Index),
		VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: chainOf(s.Num)},
	}
}

func markElement(s Slot, mark uint32) nftables.SetElement {
	return nftables.SetElement{Key: native(s.Index), Val: native(mark)}
}

func keyElement(s Slot) nftables.SetElement {
	return nftables.SetElement{Key: native(s.Index), Val: native(s.Key)}
}

// Admit lets the slot's own addresses pass the chain pin.
func (t Table) Admit(b *Batch, s Slot) {
	own4, own6 := ownKeys(s)
	b.Add(t.Set(setOwn4), own4)
	b.Add(t.Set(setOwn6), own6)
}

// InForce is what the kernel has of a slot's program.
type InForce struct {
	Gen  uint16   // of its mark
	Sets []string // their names
}

// Enforce puts a program in force for a slot, in place of what was; was is nil when there
// is no program yet. filled says that the program's sets were made before.
func (t Table) Enforce(b *Batch, s Slot, p *Program, was *InForce, filled bool) {
	if was == nil {
		t.addQuota(b, s)
	}
	if !filled {
		for i, set := range p.Sets {
			b.AddSet(set, p.Elems[i])
		}
	}
	c := t.chain(chainOf(s.Num))
	b.addChain(c)
	b.flushChain(c)
	b.rules(c, p.rules...)
	if was != nil {
		b.Remove(t.Set(SetMarks), markElement(s, MarkOf(s.Num, was.Gen)))
		t.deleteSets(b, was.Sets)
	} else {
		b.Add(t.Set(setKeys), []nftables.SetElement{keyElement(s)})
		b.Add(t.Set(setSlots), []nftables.SetElement{t.slotElement(s)})
	}
	b.Add(t.Set(SetMarks), []nftables.SetElement{markElement(s, p.mark)})
}

// Withdraw takes everything away that lets the slot's packets pass; was is nil when no
// program is in force.
func (t Table) Withdraw(b *Batch, s Slot, was *InForce) {
	own4, own6 := ownKeys(s)
	b.Remove(t.Set(setOwn4), own4...)
	if len(own6) > 0 {
		b.Remove(t.Set(setOwn6), own6...)
	}
	if was == nil {
		return
	}
	b.Remove(t.Set(setSlots), t.slotElement(s))
	b.Remove(t.Set(setKeys), keyElement(s))
	b.Remove(t.Set(SetMarks), markElement(s, MarkOf(s.Num, was.Gen)))
	b.flushChain(t.chain(chainOf(s.Num)))
	b.delChain(t.chain(chainOf(s.Num)))
	t.deleteSets(b, was.Sets)
	t.deleteQuota(b, s)
}

func (t Table) deleteSets(b *Batch, names []string) {
	for _, name := range names {
		b.DelSet(&nftables.Set{Table: t.Table(), Name: name})
	}
}

// ownKeys are the elements of own4 and own6 that admit the slot's own addresses.
// For IPv6 the link-local one (RFC 4291, appendix A) is among them: neighbour
// discovery uses it.
func ownKeys(s Slot) (own4, own6 []nftables.SetElement) {
	key := func(a netip.Addr) nftables.SetElement {
		k := append(append(native(s.Index), s.MAC...), 0, 0)
		return nftables.SetElement{Key: append(k, a.AsSlice()...)}
	}
	own4 = []nftables.SetElement{key(s.Addr4)}
	if s.Addr6.IsValid() {
		m := s.MAC
		local := netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
		own6 = []nftables.SetElement{key(s.Addr6), key(local)}
	}
	return own4, own6
}

// A slot's budget of bytes is a named quota.
func quotaName(slot int) string { return fmt.Sprintf("s%d_out", slot) }

var quotaForm = regexp.MustCompile(`^s(\d+)_out$`)

// addQuota makes a slot's budget, less what was used before a restart.
func (t Table) addQuota(b *Batch, s Slot) {
	if t.MaxBytesOut > 0 {
		b.addObj(t.quotaOf(s))
	}
}

// deleteQuota ends it; the slot's rules must be gone.
func (t Table) deleteQuota(b *Batch, s Slot) {
	if t.MaxBytesOut > 0 {
		b.delObj(t.quotaOf(s))
	}
}

func (t Table) quotaOf(s Slot) *nftables.QuotaObj {
	return &nftables.QuotaObj{Table: t.Table(), Name: quotaName(s.Num), Bytes: t.MaxBytesOut, Consumed: s.Spent, Over: true}
}

// budgeted counts every packet of a flow that the sandbox opened, whether the kernel
// or the proxy passes it on, and refuses them when all is used. Answers to those
// who call the sandbox are not counted.
func (t Table) budgeted(p *Program, slot int) {
	if t.MaxBytesOut > 0 {
		p.rule(ctOriginal(), load(&expr.Objref{Type: unix.NFT_OBJECT_QUOTA, Name: quotaName(slot)}), jump(ClassBytesOut.chain()))
	}
}

// The functions below read what the kernel lists.

// ReadQuota returns the slot of a named quota of the table, and the bytes that were used.
func ReadQuota(o nftables.Obj) (slot int, spent uint64, ok bool) {
	named, ok := o.(*nftables.NamedObj)
	if !ok {
		return 0, 0, false
	}
	q, ok := named.Obj.(*expr.Quota)
	m := quotaForm.FindStringSubmatch(named.Name)
	if !ok || m == nil {
		return 0, 0, false
	}
	slot, _ = strconv.Atoi(m[1])
	return slot, q.Consumed, true
}

// ReadMark returns the index of a slot's link and the generation of its mark, by an element
// of the set SetMarks.
func ReadMark(e nftables.SetElement) (link uint32, gen uint16, ok bool) {
	if len(e.Key) != 4 || len(e.Val) != 4 {
		return 0, 0, false
	}
	return binaryutil.NativeEndian.Uint32(e.Key), uint16(binaryutil.NativeEndian.Uint32(e.Val) & markGen), true
}

var pinSetName = regexp.MustCompile(`^s(\d+)_\d+_pins[46]$`)

// ReadPinSet returns the slot of a set of pins, by the set's name.
func ReadPinSet(name string) (slot int, ok bool) {
	m := pinSetName.FindStringSubmatch(name)
	if m == nil {
		return 0, false
	}
	slot, _ = strconv.Atoi(m[1])
	return slot, true
}

// ReadPin returns the destination of an element of a set of pins.
func ReadPin(e nftables.SetElement) (netip.AddrPort, bool) {
	size := len(e.Key) - 4
	addr, ok := netip.AddrFromSlice(e.Key[:max(size, 0)])
	if !ok {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Key[size:])), true
}
