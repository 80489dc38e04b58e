package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/nftables"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// How long a pin is trusted before its name is asked for again, how long the kernel
// keeps one that was not confirmed, and how many there are: the cap bounds what a
// sandbox can make the kernel hold by asking for many names.
const (
	minPinLife  = 30 * time.Second
	maxPinLife  = time.Hour
	pinKept     = 24 * time.Hour
	maxPinNames = 16
	maxUnpinned = 256
)

// Each pin is a transaction of the kernel's, which makes one after the other. An answer
// can have thousands of addresses, a name thousands of ports, and answers that are kept
// cost nothing, so what the sandboxes of a key have pinned in a second is limited.
const (
	pinRate  = 1000
	pinBurst = 2048
)

// pinKey is a destination that a name was resolved to.
type pinKey struct {
	addr netip.Addr
	port uint16
}

// pin is why a destination is admitted: the names that led there. The kernel hands
// its connections to the proxy, which asks Pinned which names still count.
type pin struct {
	names []pinName // the last one was pinned last
	kept  time.Time // when the kernel forgets it
}

// pinName is a name, until when it counts without being asked for again, and when
// it was last found to have the address; both are zero after a resume or a restart.
type pinName struct {
	name            string
	until, verified time.Time
}

// pinTable is what the resolver pinned in a slot. Who changes live holds the slot's lock
// and mu; a reader needs one of them.
type pinTable struct {
	mu   sync.Mutex // for readers who cannot wait for the slot's, which is held for long
	live map[pinKey]pin
	prog *nft.Program // whose sets hold them; nil when its policy has no pins
	gone unpinned
}

func (t *pinTable) set(k pinKey, p pin) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live == nil {
		t.live = map[pinKey]pin{}
	}
	t.live[k] = p
}

func (t *pinTable) remove(k pinKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, k)
}

// named returns the name that was pinned to dst last.
func (t *pinTable) named(dst netip.AddrPort) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	names := t.live[pinKey{dst.Addr(), dst.Port()}].names
	if len(names) == 0 {
		return ""
	}
	return names[len(names)-1].name
}

// unpinned remembers the last names that lost an address, for the reason of a refusal.
type unpinned struct {
	mu    sync.Mutex // guards names; apart from the slot's, which is held for long
	names map[pinKey]string
}

func (u *unpinned) add(k pinKey, name string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.names == nil || len(u.names) >= maxUnpinned {
		u.names = map[pinKey]string{}
	}
	u.names[k] = name
}

func (u *unpinned) remove(k pinKey) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.names, k)
}

func (u *unpinned) of(dst netip.AddrPort) string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.names[pinKey{dst.Addr(), dst.Port()}]
}

// Pin hands TCP connections of sandbox id to addr on ports to the proxy, because the
// resolver answered name with addr and rules like "host:port" allow that name there.
// It does nothing when the policy in force has no rule with a port. An error of kind
// errs.Exhausted says that the sandbox's key pins too fast. For ttl, kept between 30
// seconds and one hour, the name counts as it is; later it has to be pinned again.
func (n *Network) Pin(id sandbox.ID, name string, addr netip.Addr, ports []uint16, ttl time.Duration) error {
	now := time.Now()
	entry := pinName{name, now.Add(min(max(ttl, minPinLife), maxPinLife)), now}
	return n.withPins(id, func(s *slotState) error {
		for _, port := range ports {
			err := n.pinOne(s, pinKey{addr.Unmap().WithZone(""), port}, entry, true)
			if errs.Is(err, errs.Exhausted) {
				return err
			}
			if err != nil {
				return fmt.Errorf("pin %s to %s port %d: %w", name, addr, port, err)
			}
		}
		return nil
	})
}

// withPins calls f with the slot of a sandbox locked, if its policy has pins.
func (n *Network) withPins(id sandbox.ID, f func(*slotState) error) error {
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
	return f(s)
}

// Pinned returns the names that are pinned to dst for sandbox id: those that count, and
// those that are due to be asked for again. If none is left, lost is a name that was
// pinned there until it no longer had the address.
func (n *Network) Pinned(id sandbox.ID, dst netip.AddrPort) (names, due []string, lost string) {
	err := n.withPins(id, func(s *slotState) error {
		now := time.Now()
		for _, p := range s.pins.live[pinKey{dst.Addr(), dst.Port()}].names {
			if p.until.After(now) {
				names = append(names, p.name)
			} else {
				due = append(due, p.name)
			}
		}
		lost = s.pins.gone.of(dst)
		return nil
	})
	if err != nil {
		return nil, nil, ""
	}
	return names, due, lost
}

// Confirm puts off the next question for a name that could not be asked for, if it
// was found to have the address within the last hour, and reports whether it did.
func (n *Network) Confirm(id sandbox.ID, name string, dst netip.AddrPort) (confirmed bool) {
	_ = n.withPins(id, func(s *slotState) error { // without a slot nothing is confirmed
		now := time.Now()
		names := s.pins.live[pinKey{dst.Addr(), dst.Port()}].names
		i := slices.IndexFunc(names, func(p pinName) bool { return p.name == name })
		if confirmed = i >= 0 && now.Sub(names[i].verified) < maxPinLife; confirmed {
			names[i].until = now.Add(minPinLife)
		}
		return nil
	})
	return confirmed
}

// Unpin takes back what Pin opened at dst for a name, because it no longer has the
// address. Connections that are open stay.
func (n *Network) Unpin(id sandbox.ID, name string, dst netip.AddrPort) error {
	return n.withPins(id, func(s *slotState) error {
		k := pinKey{dst.Addr(), dst.Port()}
		was, ok := s.pins.live[k]
		if !ok {
			return nil
		}
		was.names = slices.DeleteFunc(slices.Clone(was.names), func(p pinName) bool { return p.name == name })
		if len(was.names) > 0 {
			s.pins.set(k, was)
			return nil
		}
		s.pins.gone.add(k, name)
		return s.dropPin(n.kern, k)
	})
}

// dropPin removes a pin. The caller holds s.mu.
func (s *slotState) dropPin(kern *kernel, k pinKey) error {
	set, elem := s.pins.live[k].element(s.pins.prog, k)
	s.pins.remove(k)
	err := kern.do(func(b *nft.Batch) { b.Remove(set, elem) })
	if absent(err) { // it ran out
		return nil
	}
	return err
}

// pinOne adds a name to a pin; paced: within what the key may have pinned in a second.
// The caller holds s.mu.
func (n *Network) pinOne(s *slotState, k pinKey, entry pinName, paced bool) error {
	now := time.Now()
	was, known := s.pins.live[k]
	known = known && was.kept.After(now)
	next := pin{kept: was.kept}
	for _, p := range was.names {
		if p.name != entry.name {
			next.names = append(next.names, p)
		} else if p.until.After(entry.until) {
			entry.until = p.until
		}
	}
	next.names = append(next.names, entry)
	next.names = next.names[max(0, len(next.names)-maxPinNames):]
	s.pins.gone.remove(k)
	// The kernel holds the pin for long, so that most answers change nothing there.
	if known && was.kept.Sub(now) > pinKept/2 && was.names[len(was.names)-1].name == entry.name {
		s.pins.set(k, next)
		return nil
	}
	if paced {
		if _, err := n.pinning.Allow(strconv.Itoa(int(s.key)), 1); err != nil {
			return errs.New(errs.Exhausted, "%s", err.Error())
		}
	}
	if !known {
		if err := s.makeRoom(n.kern, now); err != nil {
			return err
		}
	}
	next.kept = now.Add(pinKept)
	set, elem := next.element(s.pins.prog, k)
	add := func(b *nft.Batch) { b.Add(set, []nftables.SetElement{elem}) }
	err := n.kern.do(func(b *nft.Batch) {
		if known { // adding an element again leaves its timeout on kernels before 6.12
			b.Remove(set, elem)
		}
		add(b)
	})
	if known && absent(err) { // it ran out meanwhile
		err = n.kern.do(add)
	}
	if err != nil {
		return err
	}
	s.pins.set(k, next)
	return nil
}

// makeRoom makes room for one more pin: it forgets those that the kernel forgot,
// and if there are none, the one that was confirmed longest ago.
func (s *slotState) makeRoom(kern *kernel, now time.Time) error {
	if len(s.pins.live) < nft.MaxPins {
		return nil
	}
	var oldest pinKey
	var last time.Time
	for k, p := range s.pins.live {
		if !p.kept.After(now) {
			s.pins.remove(k)
			continue
		}
		if at := p.verified(); !oldest.addr.IsValid() || at.Before(last) {
			oldest, last = k, at
		}
	}
	if len(s.pins.live) < nft.MaxPins {
		return nil
	}
	return s.dropPin(kern, oldest)
}

// verified is when one of its names was last found to have the address.
func (p pin) verified() (last time.Time) {
	for _, name := range p.names {
		if name.verified.After(last) {
			last = name.verified
		}
	}
	return last
}

// element encodes a pin for the set of a program that it belongs to.
func (p pin) element(of *nft.Program, k pinKey) (*nftables.Set, nftables.SetElement) {
	return of.Pin(netip.AddrPortFrom(k.addr, k.port), max(time.Until(p.kept).Round(time.Second), time.Second), p.names[len(p.names)-1].name)
}

// livePins returns the pins that a new policy keeps: those of names that it allows there.
func livePins(s *slotState, p *policy.Compiled) map[pinKey]pin {
	if !p.Kernel().Pins || len(s.pins.live) == 0 {
		return nil
	}
	now := time.Now()
	kept := map[pinKey]pin{}
	for k, v := range s.pins.live {
		v.names = slices.DeleteFunc(slices.Clone(v.names), func(n pinName) bool { return !allowsPin(p, k, n.name) })
		if len(v.names) > 0 && v.kept.After(now) {
			kept[k] = v
		}
	}
	return kept
}

// allowsPin reports whether a policy opens a destination for a name.
func allowsPin(p *policy.Compiled, k pinKey, name string) bool {
	return p.Decide(policy.Flow{Proto: policy.TCP, Dst: netip.AddrPortFrom(k.addr, k.port), Name: name}).Allow
}

func addPins(b *nft.Batch, prog *nft.Program, live map[pinKey]pin) {
	for k, v := range live {
		set, elem := v.element(prog, k)
		b.Add(set, []nftables.SetElement{elem})
	}
}

// adopt makes the pins of a program that is now in force the slot's.
func (t *pinTable) adopt(live map[pinKey]pin, prog *nft.Program) {
	t.mu.Lock()
	t.live = live
	t.mu.Unlock()
	t.prog = nil
	if prog.Pins {
		t.prog = prog
		prog.Forget()
	}
}

// maxSavedPins is how many pins go along with a sandbox: those confirmed last.
const maxSavedPins = 512

// Pins returns what Repin gives to a later life of the sandbox, or to a copy of it.
func (n *Network) Pins(id sandbox.ID) (out []sandbox.Pin) {
	err := n.withPins(id, func(s *slotState) error {
		for k, p := range s.pins.live {
			for _, name := range p.names {
				out = append(out, sandbox.Pin{Name: name.name, Dst: netip.AddrPortFrom(k.addr, k.port), Verified: name.verified})
			}
		}
		return nil
	})
	if err != nil {
		return nil
	}
	slices.SortFunc(out, func(a, b sandbox.Pin) int { return b.Verified.Compare(a.Verified) })
	return out[:min(len(out), maxSavedPins)]
}

// Repin gives a sandbox pins of another life or of its original. Each name is asked
// for again before its first use. What the policy in force does not allow is left out.
func (n *Network) Repin(l sandbox.Lease, pins []sandbox.Pin) error {
	if len(pins) == 0 {
		return nil
	}
	return n.withPins(l.Sandbox, func(s *slotState) error {
		p := n.owners[s.Num].Load()
		if p == nil || p.policy == nil {
			return nil
		}
		for _, pin := range pins[:min(len(pins), maxSavedPins)] {
			k := pinKey{pin.Dst.Addr().Unmap().WithZone(""), pin.Dst.Port()}
			if !k.addr.IsValid() || !allowsPin(p.policy, k, pin.Name) {
				continue
			}
			if err := n.pinOne(s, k, pinName{name: pin.Name, verified: pin.Verified}, false); err != nil {
				return fmt.Errorf("pin %s to %s again: %w", pin.Name, pin.Dst, err)
			}
		}
		return nil
	})
}

// explainPin says in the event of a refusal what a name has to do with the address: it
// was pinned there and no longer has it, or it is, and the packet was UDP.
func (s *slotState) explainPin(out *flowlog.Event, p *policy.Compiled, proto policy.Proto) {
	switch {
	case p == nil:
	case out.Reason == policy.ReasonNoName:
		if name := s.pins.gone.of(out.Dst); name != "" {
			out.Reason, out.Name, out.Detail = policy.ReasonPinExpired, name, fmt.Sprintf("the pin of %s expired: it no longer has this address", name)
		}
	case out.Reason == policy.ReasonDenyAddr && proto == policy.UDP:
		name := s.pins.named(out.Dst)
		if v := p.Decide(policy.Flow{Proto: proto, Dst: out.Dst, Name: name}); name != "" && v.Reason == policy.ReasonNameTCP {
			out.Reason, out.Name, out.Detail = v.Reason, name, "rules with names are for TCP: UDP needs the address in allowOut"
		}
	}
}
