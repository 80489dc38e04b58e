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
	if err := m.snapshots.load(ctx); err != nil {
		return err
	}
	if err := m.launch.vault.Sweep(m.checkpoints(records)); err != nil {
		return err
	}
	running, err := runningIDs(ctx, m.cfg.Runtime)
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
		m.domains.add(&rec)
		v := m.table.add(rec, p, nil)
		if rec.State != Running {
			v.end()
		} else {
			kept[rec.ID] = Held{Lease: rec.Lease, Owner: rec.Owner, Policy: p}
			delete(running, rec.ID)
		}
	}
	if err := m.cfg.Network.Reconcile(ctx, kept); err != nil {
		return fmt.Errorf("reconcile network: %w", err)
	}
	thaw(ctx, &m.cfg, kept)
	for _, rec := range records {
		if _, ok := kept[rec.ID]; ok {
			m.host.assign(ctx, rec.ID, rec.Owner) // it is no news but after an upgrade or a crash
		}
	}
	// What is left has no record: spares, half-made sandboxes, half-killed ones.
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
func thaw(ctx context.Context, cfg *Config, kept map[ID]Held) {
	for id := range kept {
		switch err := cfg.Runtime.Resume(ctx, id); {
		case errs.Is(err, errs.Conflict): // it runs
		case err != nil:
			cfg.Log.Error("adopted sandbox may be stopped", "sandbox", id, "err", err)
		default:
			cfg.Log.Info("sandbox goes on after a pause that was broken off", "sandbox", id)
		}
	}
}

func runningIDs(ctx context.Context, r Runtime) (map[ID]bool, error) {
	ids, err := r.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	out := make(map[ID]bool, len(ids))
	for _, id := range ids {
		out[id] = true
	}
	return out, nil
}

// checkpoints returns the names of those that are needed: by paused sandboxes, by snapshots
// and for images with a start command.
func (m *Manager) checkpoints(records []Record) map[string]bool {
	keep := m.launch.warm.Load(m.cfg.Runtime.Restorable)
	for i := range records {
		keep[records[i].Checkpoint] = true
	}
	for _, s := range m.snapshots.all() {
		keep[s.Checkpoint] = true
	}
	return keep
}

// lost drops the record of a sandbox that no longer exists.
func (m *Manager) lost(ctx context.Context, rec Record) {
	if err := m.cfg.Store.DeleteSandbox(ctx, rec.ID); err != nil {
		m.cfg.Log.Error("record of a lost sandbox not deleted", "sandbox", rec.ID, "err", err)
		return
	}
	m.events.add(ctx, &rec, Event{Name: "exit", Detail: "gone when the server started"})
	m.cfg.Log.Warn("sandbox is gone", "sandbox", rec.ID)
}
