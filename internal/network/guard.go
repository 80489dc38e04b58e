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
func (m *machine) guardBit() uint32 { return bits.RotateLeft32(m.cfg.Mark, 1) }

// loadGuard loads the fail-closed guard and puts its routing rules in place. A kernel
// that cannot have it is logged, here and by doctor.
func (m *machine) loadGuard() error {
	g, err := failclosed.Load(m.guardBit())
	if err == nil {
		err = failclosed.Try()
	}
	if err != nil {
		m.cfg.Log.Warn("this kernel lacks what the fail-closed guard needs: if the nftables rules are flushed, the sandboxes are open until the server has put them back", "err", err)
		return g.Close()
	}
	m.guard = g
	return m.routeGuard()
}

// routeGuard puts the guard's routing rules in place again if they were removed.
func (m *machine) routeGuard() error {
	if m.guard == nil {
		return nil
	}
	return m.guard.Route(m.link, m.familyIDs()...)
}

// attachGuard puts the guard on a link.
func (m *machine) attachGuard(link int) error {
	if m.guard == nil {
		return nil
	}
	return m.guard.Attach(m.link, link)
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
