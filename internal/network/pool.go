package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// Acquire implements sandbox.Network.
func (n *Network) Acquire(ctx context.Context, id sandbox.ID) (sandbox.Lease, error) {
	if err := n.isOpen(); err != nil {
		return sandbox.Lease{}, err
	}
	if !id.Valid() {
		return sandbox.Lease{}, errs.New(errs.Invalid, "sandbox ID %q is not valid", id)
	}
	var s *slotState
	select {
	case s = <-n.ready:
		n.poke()
	default:
		var err error
		if s, err = n.prepare(); err != nil {
			return sandbox.Lease{}, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byID[id] != nil {
		n.trash = append(n.trash, s)
		n.poke()
		return sandbox.Lease{}, errs.New(errs.Conflict, "sandbox %s holds a network slot already", id)
	}
	return n.give(s, id), nil
}

// give makes id the owner of s. The caller holds n.mu.
func (n *Network) give(s *slotState, id sandbox.ID) sandbox.Lease {
	n.byID[id] = s
	n.owners[s.Num].Store(&owner{id: id})
	l := s.Lease
	l.Sandbox = id
	return l
}

// Release implements sandbox.Network.
func (n *Network) Release(_ context.Context, l sandbox.Lease) error {
	s, err := n.held(l)
	if errs.Is(err, errs.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired {
		return nil
	}
	if err := n.withdraw(s); err != nil {
		return fmt.Errorf("release slot %s: %w", s.Lease.Link, err)
	}
	s.retired = true
	n.mu.Lock()
	delete(n.byID, l.Sandbox)
	if was := n.owners[s.Num].Load(); was != nil {
		n.owners[s.Num].Store(&owner{id: was.id, policy: was.policy, gone: true})
	}
	n.trash = append(n.trash, s)
	n.mu.Unlock()
	n.poke()
	if err := n.cutAll(s); err != nil {
		// Not an error of the release: no packet of the sandbox passes any more, and
		// the trash is emptied only after its flows are gone.
		n.cfg.Log.Warn("cut flows of a released slot", "sandbox", l.Sandbox, "err", err)
	}
	return nil
}

// prepare makes a slot of the next free number and lets its addresses through to
// the chains, where it is dropped for want of a policy.
func (n *Network) prepare() (*slotState, error) {
	i, err := n.reserve()
	if err != nil {
		return nil, err
	}
	s := &slotState{Slot: n.plan.Slot(i, n.v6)}
	err = s.Build(n.link, n.attachGuard)
	if err == nil {
		if err = n.admit(s); err != nil {
			err = errors.Join(err, s.Destroy(n.link))
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		delete(n.slots, i)
		n.resting[i] = time.Now().Add(n.cfg.Quarantine)
		return nil, err
	}
	n.slots[i] = s
	n.byLink[s.Index] = s
	return s, nil
}

// reserve takes the next slot number. Numbers go round, and one that was in use
// rests before it is used again.
func (n *Network) reserve() (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now, size := time.Now(), n.plan.Capacity()
	for range size {
		i := n.next
		n.next = (n.next + 1) % size
		if _, taken := n.slots[i]; taken {
			continue
		}
		if now.Before(n.resting[i]) {
			continue
		}
		delete(n.resting, i)
		n.slots[i] = nil // reserved
		return i, nil
	}
	return 0, errs.New(errs.Exhausted, "all %d network slots of %s are in use or resting; give network.subnet4 a larger network", size, n.cfg.Subnet4)
}

// keepPool fills the pool whenever it is not full.
func (n *Network) keepPool(ctx context.Context) error {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
		case <-n.wake:
		}
		wait := time.Second
		for len(n.ready) < cap(n.ready) && ctx.Err() == nil {
			s, err := n.prepare()
			if err != nil {
				n.cfg.Log.Error("fill the pool of network slots", "err", err)
				wait = 5 * time.Second
				break
			}
			n.ready <- s // keepPool is the only sender: there is room
		}
		pause.Reset(wait)
	}
}

// emptyTrash deletes released slots.
func (n *Network) emptyTrash(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := n.deleteReleased(); err != nil {
			n.cfg.Log.Error("delete released network slots", "err", err)
		}
	}
}

// deleteReleased deletes what is in the trash, once. Flows are forgotten first:
// what is left of them must not meet the next owner of an address.
func (n *Network) deleteReleased() error {
	n.mu.Lock()
	batch := n.trash
	n.trash = nil
	n.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	if err := n.forgetFlows(batch); err != nil {
		n.mu.Lock()
		n.trash = append(n.trash, batch...) // for the next time
		n.mu.Unlock()
		return err
	}
	var err error
	for _, s := range batch {
		s.mu.Lock()
		if !s.retired { // never leased: its addresses are still admitted
			err = errors.Join(err, n.withdraw(s))
		}
		s.mu.Unlock()
		err = errors.Join(err, s.Destroy(n.link))
		n.mu.Lock()
		delete(n.slots, s.Num)
		delete(n.byLink, s.Index)
		n.resting[s.Num] = time.Now().Add(n.cfg.Quarantine)
		n.mu.Unlock()
	}
	return err
}
