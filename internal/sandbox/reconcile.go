package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Reconcile adopts what an earlier server left: sandboxes that are recorded and
// still run go on; recorded ones that are gone lose their record; everything
// unrecorded is destroyed. Call it once, before Run and before any request.
func (m *Manager) Reconcile(ctx context.Context) error {
	records, err := m.cfg.Store.Sandboxes(ctx)
	if err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	if err := m.loadSnapshots(ctx, records); err != nil {
		return err
	}
	running, err := m.runningIDs(ctx)
	if err != nil {
		return err
	}
	kept := map[ID]Held{}
	for _, rec := range records {
		if rec.State == Running && !running[rec.ID] {
			m.lost(ctx, rec)
			continue
		}
		p, err := policy.Compile(rec.Egress, m.cfg.Operator, rec.Generation)
		if err != nil { // stricter rules than when it was stored: never looser than asked
			m.cfg.Log.Error("stored rules are no longer valid: sandbox destroyed", "sandbox", rec.ID, "err", err)
			m.lost(ctx, rec)
			continue
		}
		m.adopt(rec, p)
		if rec.State == Running {
			kept[rec.ID] = Held{Lease: rec.Lease, Owner: rec.Owner, Policy: p}
			delete(running, rec.ID)
		}
	}
	if err := m.cfg.Network.Reconcile(ctx, kept); err != nil {
		return fmt.Errorf("reconcile network: %w", err)
	}
	m.thaw(ctx, kept)
	for _, rec := range records {
		if _, ok := kept[rec.ID]; ok {
			m.assign(ctx, rec.ID, rec.Owner) // it is no news but after an upgrade or a crash
		}
	}
	// What is left is nobody's: spares, half-made sandboxes, half-killed ones.
	var failed []error
	for id := range running {
		m.cfg.Log.Info("orphan destroyed", "sandbox", id)
		if err := m.cfg.Runtime.Destroy(ctx, id); err != nil {
			failed = append(failed, fmt.Errorf("destroy orphan %s: %w", id, err))
		}
	}
	m.cfg.Log.Info("sandboxes adopted", "running", len(kept), "recorded", len(records))
	return errors.Join(failed...)
}

// thaw lets sandboxes go on that an earlier server had stopped for a checkpoint
// it did not finish.
func (m *Manager) thaw(ctx context.Context, kept map[ID]Held) {
	for id := range kept {
		switch err := m.cfg.Runtime.Resume(ctx, id); {
		case errs.Is(err, errs.Conflict): // it runs
		case err != nil:
			m.cfg.Log.Error("adopted sandbox may be stopped", "sandbox", id, "err", err)
		default:
			m.cfg.Log.Info("sandbox goes on after a pause that was broken off", "sandbox", id)
		}
	}
}

func (m *Manager) runningIDs(ctx context.Context) (map[ID]bool, error) {
	ids, err := m.cfg.Runtime.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	out := make(map[ID]bool, len(ids))
	for _, id := range ids {
		out[id] = true
	}
	return out, nil
}

func (m *Manager) adopt(rec Record, p *policy.Compiled) {
	m.admit(rec, p, nil)
	if rec.State != Running {
		e, err := m.entry(rec.ID)
		if err == nil {
			closeOnce(e.view.Load().done)
		}
	}
}

// lost drops the record of a sandbox that no longer exists.
func (m *Manager) lost(ctx context.Context, rec Record) {
	if err := m.cfg.Store.DeleteSandbox(ctx, rec.ID); err != nil {
		m.cfg.Log.Error("record of a lost sandbox not deleted", "sandbox", rec.ID, "err", err)
		return
	}
	m.event(ctx, &rec, Event{Name: "exit", Detail: "gone when the server started"})
	m.cfg.Log.Warn("sandbox is gone", "sandbox", rec.ID)
}
