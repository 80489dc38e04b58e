package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
	"github.com/cordonhq/cordon/internal/errs"
)

// Pause writes a sandbox's memory and files to disk and frees everything else
// it held. When it fails, the sandbox still runs. Pausing a paused one is
// errs.Conflict.
//
// The processes are stopped first and never run again here: what a checkpoint
// does not hold has not happened. The record changes when the checkpoint is on
// disk; a server that is killed before leaves a stopped sandbox, which the next
// one lets go on, and a server that is killed after leaves processes that
// nobody's record speaks of, which the next one destroys.
func (m *Manager) Pause(ctx context.Context, owner string, id ID) error {
	e, err := m.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	ctx = context.WithoutCancel(ctx)
	began, v := time.Now(), e.view.Load()
	if v.rec.State != Running {
		return errs.New(errs.Conflict, "Sandbox %q is already %s", string(id), v.rec.State)
	}
	place, err := m.reservePaused(v.rec.Owner)
	if err != nil {
		return err
	}
	defer place.release()
	leave, err := turn(ctx, m.starts, v.rec.Owner)
	if err != nil {
		return err
	}
	defer leave()
	written, err := m.space.Reserve(v.rec.Owner, m.footprint(ctx, id))
	if err != nil {
		return err
	}
	defer written()
	size, err := m.suspend(ctx, e)
	if err != nil {
		return err
	}
	closeOnce(v.done)
	if err := m.stop(ctx, v); err != nil {
		m.cfg.Log.Error("paused sandbox not freed", "sandbox", id, "err", err)
	}
	rec := e.view.Load().rec
	m.event(ctx, &rec, Event{Name: "pause"})
	m.cfg.Log.Info("sandbox paused", "sandbox", id, "bytes", size, "took", time.Since(began))
	return nil
}

// suspend stops a sandbox's processes, puts a checkpoint of them on disk and
// records it. After an error they run again and nothing is left.
func (m *Manager) suspend(ctx context.Context, e *entry) (size int64, err error) {
	v := e.view.Load()
	if err := m.cfg.Runtime.Pause(ctx, v.rec.ID); err != nil {
		return 0, fmt.Errorf("stop the processes: %w", err)
	}
	var undo Cleanup
	undo.Add("stop", func(ctx context.Context) error { return m.cfg.Runtime.Resume(ctx, v.rec.ID) })
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run(ctx))
		}
	}()
	name, size, err := m.checkpoint(ctx, &v.rec)
	if err != nil {
		return 0, err
	}
	undo.Add("checkpoint", func(context.Context) error { return m.vault.Drop(name) })
	next := *v
	next.rec.State, next.rec.Lease, next.rec.Checkpoint = Paused, Lease{}, name
	next.rec.Pins = m.cfg.Network.Pins(next.rec.ID)
	if err := m.save(ctx, e, next); err != nil {
		return 0, errors.Join(err, m.restate(ctx, e, *v))
	}
	return size, nil
}

// checkpoint puts a sandbox's memory, processes and files on disk.
func (m *Manager) checkpoint(ctx context.Context, rec *Record) (name string, size int64, err error) {
	name = checkpoint.NewName()
	man, err := m.vault.Keep(name, checkpoint.Manifest{Token: rec.ControlToken}, func(dir string) error {
		return m.cfg.Runtime.Checkpoint(ctx, rec.ID, dir)
	})
	return name, man.Bytes(), m.space.Explain(err)
}

// restate writes a record again after a write that failed, for a write that
// failed may have reached the disk all the same.
func (m *Manager) restate(ctx context.Context, e *entry, v view) error {
	all, err := m.cfg.Store.Sandboxes(ctx)
	if err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	for _, stored := range all {
		if stored.ID == v.rec.ID && stored.Revision != v.rec.Revision {
			v.rec.Revision = stored.Revision
			return m.save(ctx, e, v)
		}
	}
	return nil
}
