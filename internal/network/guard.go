package network

import (
	"errors"
	"log/slog"
	"maps"
	"math/bits"
	"slices"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/failclosed"
)

// guardBit is the mark of packets that no rule has cleared.
func (n *Network) guardBit() uint32 { return bits.RotateLeft32(n.cfg.Mark, 1) }

// loadGuard loads the fail-closed guard and puts its routing rules in place. A kernel
// that cannot have it is logged, here and by doctor.
func (n *Network) loadGuard() error {
	g, err := failclosed.Load(n.guardBit())
	if err == nil {
		err = failclosed.Try()
	}
	if err != nil {
		n.cfg.Log.Warn("this kernel lacks what the fail-closed guard needs: if the nftables rules are flushed, the sandboxes are open until the server has put them back", "err", err)
		return g.Close()
	}
	n.guard = g
	return n.routeGuard()
}

// routeGuard puts the guard's routing rules in place again if they were removed.
func (n *Network) routeGuard() error {
	if n.guard == nil {
		return nil
	}
	return n.guard.Route(n.link, n.familyIDs()...)
}

// attachGuard puts the guard on a link.
func (n *Network) attachGuard(link int) error {
	if n.guard == nil {
		return nil
	}
	return n.guard.Attach(n.link, link)
}

// CheckGuard reports why the sandboxes of the server called name, or those of one to
// come, would be open without nftables rules.
func CheckGuard(name string) error {
	if err := failclosed.Try(); err != nil {
		return err
	}
	n, err := New(Config{Name: name, Flows: unrecorded{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	links, err := n.ourLinks()
	if err == nil && len(links) > 0 {
		err = failclosed.Check(n.link, n.guardBit(), n.familyIDs(), slices.Collect(maps.Values(links)))
	}
	return errors.Join(err, n.Close())
}

// unrecorded records nothing.
type unrecorded struct{}

func (unrecorded) Record(flowlog.Event) {}
