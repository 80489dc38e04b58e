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
// one lets go on, and a server that is killed after leaves processes without a
// running sandbox's record, which the next one destroys.
func (m *Manager) Pause(ctx context.Context, owner string, id ID) error {
	e, err := m.table.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	ctx = context.WithoutCancel(ctx)
	began, v := time.Now(), e.view.Load()
	if v.rec.State != Running {
		return errs.New(errs.Conflict, "Sandbox %q is already %s", string(id), v.rec.State)
	}
	room, err := m.reserve(v.rec.Owner, Paused)
	if err != nil {
		return err
	}
	defer room.release()
	leave, err := turn(ctx, m.launch.starts, v.rec.Owner)
	if err != nil {
		return err
	}
	defer leave()
	written, err := m.launch.space.Reserve(v.rec.Owner, m.launch.footprint(ctx, id))
	if err != nil {
		return err
	}
	defer written()
	size, err := m.suspend(ctx, e)
	if err != nil {
		return err
	}
	v.end()
	if err := m.stop(ctx, v); err != nil {
		m.cfg.Log.Error("paused sandbox not freed", "sandbox", id, "err", err)
	}
	rec := e.view.Load().rec
	m.events.add(ctx, &rec, Event{Name: "pause"})
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
	defer undo.OnError(ctx, &err)
	name, size, err := m.launch.checkpoint(ctx, v.rec.ID, checkpoint.Manifest{Token: v.rec.ControlToken})
	if err != nil {
		return 0, err
	}
	undo.Add("checkpoint", func(context.Context) error { return m.launch.vault.Drop(name) })
	next := *v
	next.rec.State, next.rec.Lease, next.rec.Checkpoint = Paused, Lease{}, name
	next.rec.Pins = m.cfg.Network.Pins(next.rec.ID)
	if err := m.save(ctx, e, next); err != nil {
		return 0, errors.Join(err, m.restate(ctx, e, *v))
	}
	return size, nil
}
