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

// limits are what the kernel lets sandboxes have together.
func (n *Network) limits() nft.Limits {
	tracker, ports, queries := n.tracked.Pool().Resource(), n.ports.Resource(), n.queries.Resource()
	half := func(entries int64) (flows, rate uint32) {
		// Less than one sandbox may have makes no sense for all of a key's.
		flows = max(uint32(entries/2), n.cfg.MaxFlows)
		return flows, max(uint32(entries/2/nft.RememberWait), n.cfg.MaxNewFlows)
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
func (n *Network) measure() {
	have := n.cfg.entries
	if have == 0 {
		var err error
		if have, err = sysctl.Number(trackerMax); err != nil {
			have = 1 << 16 // the tracker is not loaded yet; share measures again
		}
	}
	whole := int64(have - have/hostPart)
	if n.tracked == nil {
		n.tracked = share.NewMeter(share.Tracker.Of(whole, int64(n.cfg.MaxFlows)))
		n.pinning = share.NewRates(share.Pins.Of(pinRate, 0), pinBurst)
		n.queries = newQueries(n.cfg.MaxQueries)
		n.ports = share.NewPool(share.SourcePorts.Of(int64(n.cfg.SourcePorts.Len()), 0))
	}
	n.tracked.Resize(whole)
}

// Pools count what the kernel refused for the limits of a key and of all, for metrics.
func (n *Network) Pools() []*share.Pool {
	return []*share.Pool{n.tracked.Pool(), n.ports, n.queries, n.pinning.Pool()}
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

// keyNumber is the number of a key; 0 is nobody's.
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
func (n *Network) overShare(out *flowlog.Event, c nft.Class) bool {
	pool, scope, l := n.tracked.Pool(), share.Key, n.limits()
	most, rate := l.KeyFlows, l.KeyRate
	switch c {
	case nft.ClassKeyFlows:
	case nft.ClassAllFlows:
		scope, most, rate = share.Server, l.AllFlows, l.AllRate
	case nft.ClassKeyPorts:
		pool, most, rate = n.ports, l.KeyPorts, 0
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
