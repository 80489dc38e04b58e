package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

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
		return fmt.Errorf("apply policy to slot %s: %w", s.lease.Link, err)
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
func (n *Network) setPolicy(s *slot, p *policy.Compiled) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if was := n.owners[s.num].Load(); was != nil {
		n.owners[s.num].Store(&owner{id: was.id, policy: p, gone: was.gone})
	}
}

// install puts a policy in force, or leaves the former one. The caller holds s.mu.
func (n *Network) install(s *slot, p *policy.Compiled) error {
	former := markOf(s.num, s.gen)
	s.tries++ // names and marks are never used twice, also when this fails
	mark := markOf(s.num, s.tries)
	prog := n.compile(s, mark, p.Kernel())
	live := n.livePins(s, p)
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
func (n *Network) addProgram(tx *transaction, s *slot, prog *program, filled bool) {
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

func (s *slot) chain() string { return fmt.Sprintf("s%d", s.num) }

func (n *Network) slotElement(s *slot) nftables.SetElement {
	return nftables.SetElement{
		Key:         native(s.ifindex),
		VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: s.chain()},
	}
}

func (n *Network) markElement(s *slot, mark uint32) nftables.SetElement {
	return nftables.SetElement{Key: native(s.ifindex), Val: native(mark)}
}

// admit lets the slot's addresses pass the pin chain.
func (n *Network) admit(s *slot) error {
	return n.kern.do(func(tx *transaction) { n.addOwn(tx, s) })
}

func (n *Network) addOwn(tx *transaction, s *slot) {
	own4, own6 := ownKeys(s)
	tx.add(n.namedSet(setOwn4), own4)
	tx.add(n.namedSet(setOwn6), own6)
}

// withdraw takes everything away that lets the slot's packets pass. The caller
// holds s.mu.
func (n *Network) withdraw(s *slot) error {
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
		tx.remove(n.namedSet(setMarks), n.markElement(s, markOf(s.num, s.gen)))
		tx.FlushChain(n.chain(s.chain()))
		tx.DelChain(n.chain(s.chain()))
		n.deleteSets(tx, s.sets)
		n.deleteQuota(tx, s)
	})
}

// Limits of pins. A name's addresses are few; the cap bounds what a sandbox can
// make the kernel hold by asking for many names.
const (
	maxPins     = 4096
	minPinLife  = 30 * time.Second
	maxPinLife  = time.Hour
	maxPinNames = 16
)

// pinKey is a destination that a name was resolved to.
type pinKey struct {
	addr netip.Addr
	port uint16
}

// pin is why a destination is admitted: the names that led there.
type pin struct {
	names   []string
	expires time.Time
}

// pinTable is what the resolver pinned in a slot. Expired entries stay while the
// table has room: they still name the flows they let in.
type pinTable struct {
	live map[pinKey]pin
	prog *program // whose sets hold them; nil when its policy has no pins
}

// Pin hands TCP connections of sandbox id to addr on ports to the proxy for ttl,
// because the resolver answered name with addr and rules like "host:port" allow
// that name there. It does nothing when the policy in force has no such rule. ttl is kept
// between 30 seconds and one hour; flows that live longer are not cut.
func (n *Network) Pin(id sandbox.ID, name string, addr netip.Addr, ports []uint16, ttl time.Duration) error {
	n.mu.Lock()
	s := n.byID[id]
	n.mu.Unlock()
	if s == nil {
		return errs.New(errs.NotFound, "sandbox %s holds no network slot", id)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired || s.pins.prog == nil {
		return nil
	}
	addr = addr.Unmap().WithZone("")
	ttl = min(max(ttl, minPinLife), maxPinLife)
	for _, port := range ports {
		if err := n.pinOne(s, pinKey{addr, port}, name, ttl); err != nil {
			return fmt.Errorf("pin %s to %s port %d: %w", name, addr, port, err)
		}
	}
	return nil
}

// Pinned returns the names that were pinned to dst for sandbox id. A pin that has
// just run out may still be among them: what the kernel let in before counts.
func (n *Network) Pinned(id sandbox.ID, dst netip.AddrPort) []string {
	n.mu.Lock()
	s := n.byID[id]
	n.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pins.names(dst)
}

func (n *Network) pinOne(s *slot, k pinKey, name string, ttl time.Duration) error {
	now := time.Now()
	was, known := s.pins.live[k]
	if !known && !s.pins.room(now) {
		return errs.New(errs.Exhausted, "%d addresses are pinned already", maxPins)
	}
	next := pin{names: was.names, expires: now.Add(ttl)}
	if next.expires.Before(was.expires) {
		next.expires = was.expires
	}
	if !slices.Contains(next.names, name) {
		next.names = append(slices.Clone(next.names), name)
		next.names = next.names[max(0, len(next.names)-maxPinNames):]
	}
	set, elem := s.pins.prog.pinElement(k, next, now)
	renew := known && was.expires.After(now)
	err := n.kern.do(func(tx *transaction) {
		if renew { // adding an element again leaves its timeout on kernels before 6.12
			tx.remove(set, elem)
		}
		tx.add(set, []nftables.SetElement{elem})
	})
	if renew && absent(err) { // it ran out meanwhile
		err = n.kern.do(func(tx *transaction) { tx.add(set, []nftables.SetElement{elem}) })
	}
	if err != nil {
		return err
	}
	if s.pins.live == nil {
		s.pins.live = map[pinKey]pin{}
	}
	s.pins.live[k] = next
	return nil
}

// room makes room for one more pin by forgetting those that ran out.
func (t *pinTable) room(now time.Time) bool {
	if len(t.live) < maxPins {
		return true
	}
	for k, p := range t.live {
		if p.expires.Before(now) {
			delete(t.live, k)
		}
	}
	return len(t.live) < maxPins
}

// names returns the names that were pinned to a destination.
func (t *pinTable) names(dst netip.AddrPort) []string {
	return t.live[pinKey{dst.Addr(), dst.Port()}].names
}

// pinElement encodes a pin for the set it belongs to. Its comment carries the last
// name, for a server that starts anew and for people who list the table.
func (p *program) pinElement(k pinKey, v pin, now time.Time) (*nftables.Set, nftables.SetElement) {
	v6 := k.addr.Is6()
	return p.kindOf(p.setName("pins", v6), setKind{v6: v6, ports: true, pins: true}),
		nftables.SetElement{Key: withPort(k.addr, k.port), Timeout: max(v.expires.Sub(now), time.Second), Comment: v.names[len(v.names)-1]}
}

// livePins returns the pins that a new policy keeps: those not run out, or still
// in use by a flow, of names that it allows there.
func (n *Network) livePins(s *slot, p *policy.Compiled) map[pinKey]pin {
	if !p.Kernel().Pins || len(s.pins.live) == 0 {
		return nil
	}
	now := time.Now()
	inUse := n.destinations(s)
	kept := map[pinKey]pin{}
	for k, v := range s.pins.live {
		dst := netip.AddrPortFrom(k.addr, k.port)
		v.names = slices.DeleteFunc(slices.Clone(v.names), func(name string) bool {
			return !p.Decide(policy.Flow{Proto: policy.TCP, Dst: dst, Name: name}).Allow
		})
		if v.expires.Before(now) && inUse[dst] {
			v.expires = now.Add(minPinLife)
		}
		if len(v.names) > 0 && v.expires.After(now) {
			kept[k] = v
		}
	}
	return kept
}

func (n *Network) addPins(tx *transaction, prog *program, live map[pinKey]pin) {
	now := time.Now()
	for k, v := range live {
		set, elem := prog.pinElement(k, v, now)
		tx.add(set, []nftables.SetElement{elem})
	}
}

// adopt makes the pins of a program that is now in force the slot's.
func (t *pinTable) adopt(live map[pinKey]pin, prog *program) {
	*t = pinTable{live: live}
	if prog.pins {
		t.prog = prog
		prog.elems, prog.rules = nil, nil // only the names are needed from here on
	}
}
