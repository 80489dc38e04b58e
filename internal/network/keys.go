package network

import (
	"fmt"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/share"
)

// What API keys share in the kernel: the tracker's table, and the ports that their flows
// to one destination have outside. The kernel counts by the number of a key, which
// setKeys has for each link.
// hostPart of the tracker's table is the machine's own: one in so many.
const hostPart = 4

// shares are what API keys share in the kernel.
type shares struct {
	conf    *Config      // the Network's
	tracked *share.Meter // entries of the tracker,
	ports   *share.Pool  // ports towards one destination,
	queries *share.Pool  // and datagrams to the resolver
	pinning *share.Rates // how fast each key may have destinations pinned
}

// limits are what the kernel lets sandboxes have together.
func (s *shares) limits() nft.Limits {
	tracker, ports, queries := s.tracked.Pool().Resource(), s.ports.Resource(), s.queries.Resource()
	half := func(entries int64) (flows, rate uint32) {
		// Less than one sandbox may have makes no sense for all of a key's.
		flows = max(uint32(entries/2), s.conf.MaxFlows)
		return flows, max(uint32(entries/2/nft.RememberWait), s.conf.MaxNewFlows)
	}
	var l nft.Limits
	l.KeyFlows, l.KeyRate = half(tracker.Alone())
	l.AllFlows, l.AllRate = half(tracker.Whole)
	l.KeyPorts = uint32(ports.Alone())
	l.Destinations = min(max(l.AllFlows, 1<<16), 1<<20)
	l.Queries, l.KeyQueries = uint32(queries.Sandbox), uint32(queries.Alone())
	return l
}

// measure learns how much there is to share.
func (s *shares) measure() {
	have := s.conf.entries
	if have == 0 {
		var err error
		if have, err = sysctl.Number(trackerMax); err != nil {
			have = 1 << 16 // the tracker is not loaded yet; fitTracker measures again
		}
	}
	whole := int64(have - have/hostPart)
	if s.tracked == nil {
		s.tracked = share.NewMeter(share.Tracker.Of(whole, int64(s.conf.MaxFlows)))
		s.pinning = share.NewRates(share.Pins.Of(pinRate, 0), pinBurst)
		s.queries = newQueries(s.conf.MaxQueries)
		s.ports = share.NewPool(share.SourcePorts.Of(int64(s.conf.SourcePorts.Len()), 0))
	}
	s.tracked.Resize(whole)
}

// Pools count what the kernel refused for the limits of a key and of all, for metrics.
func (s *shares) Pools() []*share.Pool {
	return []*share.Pool{s.tracked.Pool(), s.ports, s.queries, s.pinning.Pool()}
}

// Own implements sandbox.Network.
func (n *Network) Own(l sandbox.Lease, owner string) error {
	s, err := n.held(l)
	if err != nil {
		return err
	}
	key := n.keyNumber(owner)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inForce != nil && s.key != key {
		return errs.New(errs.Conflict, "sandbox %s is another key's already", l.Sandbox)
	}
	s.key = key
	return nil
}

// keyNumber is the number of a key; 0 stands for no key.
func (n *Network) keyNumber(owner string) uint32 {
	if owner == "" {
		return 0
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, known := n.keys[owner]; !known {
		n.keys[owner] = uint32(len(n.keys) + 1)
	}
	return n.keys[owner]
}

// overShare names the share behind a refusal; false when it was none.
func (s *shares) overShare(out *flowlog.Event, c nft.Class) bool {
	pool, scope, l := s.tracked.Pool(), share.Key, s.limits()
	most, rate := l.KeyFlows, l.KeyRate
	switch c {
	case nft.ClassKeyFlows:
	case nft.ClassAllFlows:
		scope, most, rate = share.Server, l.AllFlows, l.AllRate
	case nft.ClassKeyPorts:
		pool, most, rate = s.ports, l.KeyPorts, 0
	case nft.ClassLimit:
		pool.Refused(share.Sandbox)
		return false // judgeRefusal names it
	default:
		return false
	}
	pool.Refused(scope)
	r := pool.Resource()
	text := fmt.Sprintf("%s of one API key: %d", r.What, most)
	if scope == share.Server {
		text = fmt.Sprintf("%s of all sandboxes: %d", r.What, most)
	}
	if rate > 0 {
		text += fmt.Sprintf(", and %d new ones in a second", rate)
	}
	out.Rule, out.Reason = policy.Rule{ID: "limit." + r.Name + "." + string(scope), Text: text}, ReasonTooMany
	return true
}
