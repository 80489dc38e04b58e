package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/nftables"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/network/nft"
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
	again := s.inForce != nil
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
	s.tries++ // names and marks are never used twice, also when this fails
	t := n.table()
	prog := t.Program(s.rules(), s.tries, p.Kernel())
	live := livePins(s, p)
	big := prog.Size() > bigProgram
	if big {
		if err := n.kern.fillAhead(prog); err != nil {
			return err
		}
	}
	err := n.kern.do(func(b *nft.Batch) {
		t.Enforce(b, s.rules(), prog, s.inForce, big)
		addPins(b, prog, live)
	})
	if err != nil {
		if big {
			err = errors.Join(err, n.kern.dropSets(prog.Sets))
		}
		return err
	}
	s.adopt(prog, live)
	return nil
}

// adopt notes that a program is in force. The caller holds s.mu.
func (s *slotState) adopt(prog *nft.Program, live map[pinKey]pin) {
	s.inForce = prog.InForce()
	s.pins.adopt(live, prog)
}

// fillAhead makes a program's sets before anything refers to them.
func (k *kernel) fillAhead(prog *nft.Program) error {
	for i, set := range prog.Sets {
		elems := prog.Elems[i]
		err := k.do(func(b *nft.Batch) { b.AddSet(set, elems[:min(len(elems), bigChunk)]) })
		for at := bigChunk; err == nil && at < len(elems); at += bigChunk {
			// An interval's start and end may fall into two transactions: until the
			// second, the set says too much, and no rule reads it.
			err = k.do(func(b *nft.Batch) { b.Add(set, elems[at:min(len(elems), at+bigChunk)]) })
		}
		if err != nil {
			return errors.Join(fmt.Errorf("fill set %s: %w", set.Name, err), k.dropSets(prog.Sets[:i+1]))
		}
	}
	return nil
}

// dropSets deletes sets that nothing refers to; absent ones are skipped.
func (k *kernel) dropSets(sets []*nftables.Set) error {
	var all error
	for _, set := range sets {
		if err := k.do(func(b *nft.Batch) { b.DelSet(set) }); err != nil && !absent(err) {
			all = errors.Join(all, fmt.Errorf("delete set %s: %w", set.Name, err))
		}
	}
	return all
}

// admit lets the slot's addresses pass to the chains that judge.
func (n *Network) admit(s *slotState) error {
	return n.kern.do(func(b *nft.Batch) { n.table().Admit(b, s.rules()) })
}

// withdraw takes everything away that lets the slot's packets pass. The caller
// holds s.mu.
func (n *Network) withdraw(s *slotState) error {
	return n.kern.do(func(b *nft.Batch) { n.table().Withdraw(b, s.rules(), s.inForce) })
}
