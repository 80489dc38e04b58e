package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Pause writes a sandbox's memory and files to disk and frees everything else
// it held. When it fails, the sandbox still runs. Pausing a paused one is
// errs.Conflict.
func (m *Manager) Pause(ctx context.Context, owner string, id ID) error {
	if _, err := m.owned(owner, id); err != nil {
		return err
	}
	e, err := m.hold(id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	ctx = context.WithoutCancel(ctx)
	began, v := time.Now(), e.view.Load()
	if v.rec.State != Running {
		return errs.New(errs.Conflict, "Sandbox %q is already %s", string(id), v.rec.State)
	}
	if err := m.checkpoint(ctx, id); err != nil {
		return err
	}
	// From here on the snapshot is whole. The record says paused before the
	// processes go, so that a crash leaves one of the two, never neither.
	next := *v
	next.rec.State, next.rec.Lease = Paused, Lease{}
	if err := m.save(ctx, e, next); err != nil {
		return errors.Join(err, os.RemoveAll(m.snapshotDir(id)))
	}
	closeOnce(v.done)
	if err := m.stop(ctx, v); err != nil {
		m.cfg.Log.Error("paused sandbox not freed", "sandbox", id, "err", err)
	}
	m.event(ctx, &next.rec, Event{Name: "pause"})
	m.cfg.Log.Info("sandbox paused", "sandbox", id, "took", time.Since(began))
	return nil
}

// checkpoint writes the snapshot beside its place and renames it when whole.
func (m *Manager) checkpoint(ctx context.Context, id ID) error {
	dir := m.snapshotDir(id)
	tmp := dir + ".partial"
	if err := errors.Join(os.RemoveAll(tmp), os.RemoveAll(dir), os.MkdirAll(tmp, 0o700)); err != nil {
		return fmt.Errorf("make snapshot directory: %w", err)
	}
	if err := m.cfg.Runtime.Checkpoint(ctx, id, tmp, true); err != nil {
		return errors.Join(fmt.Errorf("checkpoint: %w", err), os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, dir); err != nil {
		return errors.Join(fmt.Errorf("keep snapshot: %w", err), os.RemoveAll(tmp))
	}
	return nil
}

// Connect makes sure a sandbox runs for at least timeout from now (0: the
// default), resuming it when it is paused. It never shortens the time left.
func (m *Manager) Connect(ctx context.Context, owner string, id ID, timeout time.Duration) (rec Record, resumed bool, err error) {
	d, err := m.timeout(timeout)
	if err != nil {
		return Record{}, false, err
	}
	if _, err := m.owned(owner, id); err != nil {
		return Record{}, false, err
	}
	e, err := m.hold(id)
	if err != nil {
		return Record{}, false, err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	if next.rec.State == Paused {
		rec, err := m.resume(ctx, e, next, d)
		return rec, true, err
	}
	if until := time.Now().Add(d).UTC(); until.After(next.rec.Expires) {
		next.rec.Expires = until
		if err := m.save(ctx, e, next); err != nil {
			return Record{}, false, err
		}
	}
	return e.view.Load().rec, false, nil
}

// resume restores a paused sandbox into a fresh network slot, under its stored
// rules from the first packet on. When it fails the sandbox stays paused.
func (m *Manager) resume(ctx context.Context, e *entry, next view, d time.Duration) (rec Record, err error) {
	began := time.Now()
	img, err := m.cfg.Images.Resolve(ctx, next.rec.Template)
	if err != nil {
		return Record{}, err
	}
	if err := m.restorable(&next.rec, img); err != nil {
		return Record{}, err
	}
	if err := m.reserve(); err != nil {
		return Record{}, err
	}
	defer m.unreserve()
	var undo Cleanup
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run(context.WithoutCancel(ctx)))
		}
	}()
	up := &started{id: next.rec.ID, controlToken: next.rec.ControlToken, resources: next.rec.Resources}
	if up.lease, err = m.cfg.Network.Acquire(ctx, up.id); err != nil {
		return Record{}, fmt.Errorf("acquire network slot: %w", err)
	}
	undo.Add("sandbox", func(ctx context.Context) error { return m.discard(ctx, up) })
	next.rec.Lease = up.lease
	if next.policy, err = policy.Compile(next.rec.Egress, m.cfg.Operator, next.rec.Generation); err != nil {
		return Record{}, err
	}
	if err := m.cfg.Network.Apply(ctx, up.lease, next.policy); err != nil {
		return Record{}, fmt.Errorf("apply policy: %w", err)
	}
	if err := m.cfg.Runtime.Restore(ctx, m.runtimeSpec(up, img), m.snapshotDir(up.id)); err != nil {
		return Record{}, fmt.Errorf("restore: %w", err)
	}
	if err := m.reinit(ctx, &next.rec, img); err != nil {
		return Record{}, err
	}
	now := time.Now().UTC()
	next.rec.State, next.rec.Started, next.rec.Expires = Running, now, now.Add(d)
	next.done = make(chan struct{})
	if err := m.save(ctx, e, next); err != nil {
		return Record{}, err
	}
	if err := os.RemoveAll(m.snapshotDir(up.id)); err != nil {
		m.cfg.Log.Warn("used snapshot not removed", "sandbox", up.id, "err", err)
	}
	m.spawn(func(ctx context.Context) { m.watch(ctx, up.id) })
	rec = e.view.Load().rec
	m.event(ctx, &rec, Event{Name: "resume"})
	m.cfg.Log.Info("sandbox resumed", "sandbox", rec.ID, "took", time.Since(began))
	return rec, nil
}

// reinit waits for a restored agent and tells it who and when it is now.
func (m *Manager) reinit(ctx context.Context, rec *Record, img Image) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.StartTimeout)
	defer cancel()
	if err := m.cfg.Agents.WaitReady(ctx, rec.Agent()); err != nil {
		return fmt.Errorf("wait for agent: %w", err)
	}
	return m.initAgent(ctx, rec, img)
}

// restorable says why a snapshot cannot be restored here, before anything is tried.
func (m *Manager) restorable(rec *Record, img Image) error {
	if now := m.cfg.Runtime.Name(); rec.Runtime != now {
		return errs.New(errs.Conflict, "Sandbox %q was paused by runtime %s and cannot be resumed by %s", string(rec.ID), rec.Runtime, now)
	}
	if rec.ImageRef != img.Digest {
		return errs.New(errs.Conflict, "Sandbox %q was paused on another build of template %q (%s, now %s): it cannot be resumed", string(rec.ID), rec.Template, rec.ImageRef, img.Digest)
	}
	return nil
}
