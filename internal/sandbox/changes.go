package sandbox

import (
	"context"
	"log/slog"
	"time"

	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Change is what happened to a sandbox, for the parts of the server that keep something
// about it.
type Change string

// The changes. A running sandbox that is killed is stopped and then gone; a paused one was
// stopped before, and a kill makes it gone.
const (
	Started       Change = "started" // it runs: it was created, copied, resumed or reset
	PolicyChanged Change = "policy"  // new rules are in force: live flows are judged anew
	AccessChanged Change = "access"  // who may reach its ports changed: clients are judged anew
	Stopped       Change = "stopped" // its network was withdrawn, as it is paused, reset or ends: live flows are cut
	Gone          Change = "gone"    // it has ended for good: what is kept about it can go
)

// changes tells subscribers of changes.
type changes struct{ subscribers []func(ID, Change) }

// Subscribe has f told of every change. Call it before Reconcile and Run. f is called by
// the call that makes the change, which returns after it: when SetNetwork returns, live
// flows have been judged by the new rules. So f does not wait, and changes no sandbox.
func (m *Manager) Subscribe(f func(ID, Change)) {
	m.changes.subscribers = append(m.changes.subscribers, f)
}

// publish tells the subscribers of a change, in the order in which they subscribed.
func (c *changes) publish(id ID, what Change) {
	for _, f := range c.subscribers {
		f(id, what)
	}
}

// events is the record of steps in sandboxes' lives.
type events struct {
	store Store
	log   *slog.Logger
}

// add records a step; a lost event is worth a warning, not a failed call.
func (s *events) add(ctx context.Context, rec *Record, ev Event) {
	ev.ID, ev.Time, ev.Sandbox, ev.Owner, ev.Template = sandboxid.NewToken(), time.Now().UTC(), rec.ID, rec.Owner, rec.Template
	if ev.State == "" {
		ev.State = rec.State
	}
	if err := s.store.AppendEvent(ctx, ev); err != nil {
		s.log.Warn("lifecycle event not kept", "sandbox", rec.ID, "err", err)
	}
}
