package nft

import (
	"github.com/google/nftables"
)

// Batch is a list of changes of nftables that the kernel makes together, in order.
type Batch struct{ changes []change }

// change is one of them; which fields are set depends on the verb.
type change struct {
	verb  verb
	table *nftables.Table
	chain *nftables.Chain
	set   *nftables.Set
	elems []nftables.SetElement
	rule  Rule
	obj   nftables.Obj
}

type verb string

const (
	addTable   verb = "add table"
	delTable   verb = "delete table"
	addObj     verb = "add object"
	delObj     verb = "delete object"
	addSet     verb = "add set"
	flushSet   verb = "flush set"
	delSet     verb = "delete set"
	addElems   verb = "add elements"
	delElems   verb = "delete elements"
	addChain   verb = "add chain"
	flushChain verb = "flush chain"
	delChain   verb = "delete chain"
	addRule    verb = "add rule"
)

// Queue hands the changes to a connection, which sends them when it is flushed. nextID
// numbers the sets that are new.
func (b *Batch) Queue(c *nftables.Conn, nextID func() uint32) error {
	for _, ch := range b.changes {
		if err := ch.queue(c, nextID); err != nil {
			return err
		}
	}
	return nil
}

func (ch change) queue(c *nftables.Conn, nextID func() uint32) (err error) {
	switch ch.verb {
	case addTable:
		c.AddTable(ch.table)
	case delTable:
		c.DelTable(ch.table)
	case addObj:
		c.AddObj(ch.obj)
	case delObj:
		c.DeleteObject(ch.obj)
	case addSet:
		ch.set.ID = nextID()
		err = c.AddSet(ch.set, nil)
	case flushSet:
		c.FlushSet(ch.set)
	case delSet:
		c.DelSet(ch.set)
	case addElems:
		err = c.SetAddElements(ch.set, ch.elems)
	case delElems:
		err = c.SetDeleteElements(ch.set, ch.elems)
	case addChain:
		c.AddChain(ch.chain)
	case flushChain:
		c.FlushChain(ch.chain)
	case delChain:
		c.DelChain(ch.chain)
	case addRule:
		c.AddRule(&nftables.Rule{Table: ch.chain.Table, Chain: ch.chain, Exprs: ch.rule})
	}
	return err
}

func (b *Batch) note(c change) { b.changes = append(b.changes, c) }

// DelTable deletes a table, which need not be there.
func (b *Batch) DelTable(t *nftables.Table) {
	b.addTable(t) // makes deleting it legal
	b.note(change{verb: delTable, table: t})
}

func (b *Batch) addTable(t *nftables.Table) { b.note(change{verb: addTable, table: t}) }
func (b *Batch) addObj(o nftables.Obj)      { b.note(change{verb: addObj, obj: o}) }
func (b *Batch) delObj(o nftables.Obj)      { b.note(change{verb: delObj, obj: o}) }

// AddSet makes a set with elements.
func (b *Batch) AddSet(s *nftables.Set, elems []nftables.SetElement) {
	b.note(change{verb: addSet, set: s})
	b.Add(s, elems)
}

// DelSet deletes a set.
func (b *Batch) DelSet(s *nftables.Set) { b.note(change{verb: delSet, set: s}) }

func (b *Batch) flushSet(s *nftables.Set) { b.note(change{verb: flushSet, set: s}) }

// elementsPerMessage keeps the widest element (IPv6 with port, both ends) below 64 KiB a
// message, the most that netlink's 16-bit attribute length can say.
const elementsPerMessage = 400

// Add puts elements into a set.
func (b *Batch) Add(s *nftables.Set, elems []nftables.SetElement) {
	for len(elems) > 0 {
		k := min(len(elems), elementsPerMessage)
		b.note(change{verb: addElems, set: s, elems: elems[:k]})
		elems = elems[k:]
	}
}

// Remove takes elements out of a set.
func (b *Batch) Remove(s *nftables.Set, elems ...nftables.SetElement) {
	b.note(change{verb: delElems, set: s, elems: elems})
}

func (b *Batch) addChain(c *nftables.Chain) *nftables.Chain {
	b.note(change{verb: addChain, chain: c})
	return c
}

func (b *Batch) flushChain(c *nftables.Chain) { b.note(change{verb: flushChain, chain: c}) }
func (b *Batch) delChain(c *nftables.Chain)   { b.note(change{verb: delChain, chain: c}) }

// rules puts rules at the end of a chain.
func (b *Batch) rules(c *nftables.Chain, rules ...Rule) {
	for _, r := range rules {
		b.note(change{verb: addRule, chain: c, rule: r})
	}
}
