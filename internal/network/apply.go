package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// bigProgram is the number of elements above which a program's sets are filled
// beforehand, in transactions of bigChunk, so that the one that swaps them in
// stays short. Nothing refers to them until then.
const bigProgram, bigChunk = 2000, 4000

// Apply implements sandbox.Network. Policies of one slot are applied one at a time.
func (n *Network) Apply(_ context.Context, l sandbox.Lease, p *policy.Compiled) error {
	if p == nil {
		return errs.New(errs.Invalid, "network: no policy to apply to sandbox %s", l.Sandbox)
	}
	s, err := n.held(l)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired {
		return errs.New(errs.NotFound, "sandbox %s holds no network slot %d", l.Sandbox, l.Slot)
	}
	again := s.applied
	if err := n.install(s, p); err != nil {
		return fmt.Errorf("apply policy to slot %s: %w", s.Lease.Link, err)
	}
	n.setPolicy(s, p)
	if !again {
		return nil // nothing has passed yet that could be refused now
	}
	if err := n.cutRefused(s, p); err != nil {
		// The policy is in force: every packet of those flows is judged by it, and
		// what is refused is answered with a reset. Only answers still in flight
		// could pass, so this is worth an error line, not a rollback.
		n.cfg.Log.Error("cut flows that the new policy refuses", "sandbox", l.Sandbox, "err", err)
	}
	return nil
}

// setPolicy publishes the policy to Owner. The caller holds s.mu.
func (n *Network) setPolicy(s *slotState, p *policy.Compiled) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if was := n.owners[s.Num].Load(); was != nil {
		n.owners[s.Num].Store(&owner{id: was.id, policy: p, gone: was.gone})
	}
}

// install puts a policy in force, or leaves the former one. The caller holds s.mu.
func (n *Network) install(s *slotState, p *policy.Compiled) error {
	former := markOf(s.Num, s.gen)
	s.tries++ // names and marks are never used twice, also when this fails
	mark := markOf(s.Num, s.tries)
	prog := n.compile(s, mark, p.Kernel())
	live := livePins(s, p)
	big := prog.size() > bigProgram
	if big {
		if err := n.fillAhead(prog); err != nil {
			return err
		}
	}
	err := n.kern.do(func(tx *transaction) {
		if !s.applied {
			n.addQuota(tx, s)
		}
		n.addProgram(tx, s, prog, big)
		if s.applied {
			tx.remove(n.namedSet(setMarks), n.markElement(s, former))
			n.deleteSets(tx, s.sets)
		} else {
			tx.add(n.namedSet(setKeys), []nftables.SetElement{keyElement(s)})
			tx.add(n.namedSet(setSlots), []nftables.SetElement{n.slotElement(s)})
		}
		tx.add(n.namedSet(setMarks), []nftables.SetElement{n.markElement(s, mark)})
		n.addPins(tx, prog, live)
	})
	if err != nil {
		if big {
			err = errors.Join(err, n.dropSets(prog.sets))
		}
		return err
	}
	s.gen, s.applied, s.sets = s.tries, true, prog.setNames()
	s.pins.adopt(live, prog)
	return nil
}

// addProgram queues a slot's sets and rules in place of its former rules.
func (n *Network) addProgram(tx *transaction, s *slotState, prog *program, filled bool) {
	if !filled {
		for i, set := range prog.sets {
			tx.set(set, prog.elems[i])
		}
	}
	c := n.chain(s.chain())
	tx.AddChain(c)
	tx.FlushChain(c)
	tx.rules(c, prog.rules...)
}

// fillAhead makes a program's sets before anything refers to them.
func (n *Network) fillAhead(prog *program) error {
	for i, set := range prog.sets {
		elems := prog.elems[i]
		err := n.kern.do(func(tx *transaction) { tx.set(set, elems[:min(len(elems), bigChunk)]) })
		for at := bigChunk; err == nil && at < len(elems); at += bigChunk {
			// An interval's start and end may fall into two transactions: until the
			// second, the set says too much, and nobody reads it.
			err = n.kern.do(func(tx *transaction) { tx.add(set, elems[at:min(len(elems), at+bigChunk)]) })
		}
		if err != nil {
			return errors.Join(fmt.Errorf("fill set %s: %w", set.Name, err), n.dropSets(prog.sets[:i+1]))
		}
	}
	return nil
}

// dropSets deletes sets that nothing refers to; absent ones are skipped.
func (n *Network) dropSets(sets []*nftables.Set) error {
	var all error
	for _, set := range sets {
		if err := n.kern.do(func(tx *transaction) { tx.DelSet(set) }); err != nil && !absent(err) {
			all = errors.Join(all, fmt.Errorf("delete set %s: %w", set.Name, err))
		}
	}
	return all
}

func (n *Network) deleteSets(tx *transaction, names []string) {
	for _, name := range names {
		tx.DelSet(&nftables.Set{Table: n.table(), Name: name})
	}
}

func (p *program) setNames() []string {
	names := make([]string, len(p.sets))
	for i, s := range p.sets {
		names[i] = s.Name
	}
	return names
}

func (s *slotState) chain() string { return fmt.Sprintf("s%d", s.Num) }

func (n *Network) slotElement(s *slotState) nftables.SetElement {
	return nftables.SetElement{
		Key:         native(s.Index),
		VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: s.chain()},
	}
}

func (n *Network) markElement(s *slotState, mark uint32) nftables.SetElement {
	return nftables.SetElement{Key: native(s.Index), Val: native(mark)}
}

// admit lets the slot's addresses pass the pin chain.
func (n *Network) admit(s *slotState) error {
	return n.kern.do(func(tx *transaction) { n.addOwn(tx, s) })
}

func (n *Network) addOwn(tx *transaction, s *slotState) {
	own4, own6 := ownKeys(s)
	tx.add(n.namedSet(setOwn4), own4)
	tx.add(n.namedSet(setOwn6), own6)
}

// withdraw takes everything away that lets the slot's packets pass. The caller
// holds s.mu.
func (n *Network) withdraw(s *slotState) error {
	return n.kern.do(func(tx *transaction) {
		own4, own6 := ownKeys(s)
		tx.remove(n.namedSet(setOwn4), own4...)
		if len(own6) > 0 {
			tx.remove(n.namedSet(setOwn6), own6...)
		}
		if !s.applied {
			return
		}
		tx.remove(n.namedSet(setSlots), n.slotElement(s))
		tx.remove(n.namedSet(setKeys), keyElement(s))
		tx.remove(n.namedSet(setMarks), n.markElement(s, markOf(s.Num, s.gen)))
		tx.FlushChain(n.chain(s.chain()))
		tx.DelChain(n.chain(s.chain()))
		n.deleteSets(tx, s.sets)
		n.deleteQuota(tx, s)
	})
}
