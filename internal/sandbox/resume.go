package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Connect makes sure a sandbox runs for at least timeout from now (0: the
// default), resuming it when it is paused. It never shortens the time left.
func (m *Manager) Connect(ctx context.Context, owner string, id ID, timeout time.Duration) (rec Record, resumed bool, err error) {
	return m.connect(ctx, owner, id, timeout, nil)
}

// connect is Connect by a request that arrived for the sandbox, nil for an API call.
func (m *Manager) connect(ctx context.Context, owner string, id ID, timeout time.Duration, by *Waker) (rec Record, resumed bool, err error) {
	d, err := m.cfg.lifetime(timeout)
	if err != nil {
		return Record{}, false, err
	}
	e, err := m.table.hold(owner, id)
	if err != nil {
		return Record{}, false, err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	if next.rec.State == Paused {
		rec, err := m.resume(ctx, e, next, d, by)
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
func (m *Manager) resume(ctx context.Context, e *entry, next view, lifetime time.Duration, by *Waker) (rec Record, err error) {
	began, id, used := time.Now(), next.rec.ID, next.rec.Checkpoint
	o, err := m.launch.fromPaused(ctx, &next.rec)
	if err != nil {
		return Record{}, err
	}
	defer o.close()
	if err := m.launch.space.Check(next.rec.Owner); err != nil {
		return Record{}, err
	}
	room, err := m.reserve(next.rec.Owner, Running)
	if err != nil {
		return Record{}, err
	}
	defer room.release()
	if next.policy, err = policy.Compile(next.rec.Egress, m.cfg.Operator, next.rec.Generation); err != nil {
		return Record{}, err
	}
	var undo Cleanup
	defer undo.OnError(ctx, &err)
	up, err := o.Start(ctx, id, next.policy)
	if err != nil {
		return Record{}, err
	}
	undo.Add("sandbox", up.discard)
	if err := up.claim(ctx, &next.rec, next.policy); err != nil {
		return Record{}, err
	}
	next.run(up, lifetime)
	if err := m.save(ctx, e, next); err != nil {
		old := *e.view.Load()
		return Record{}, errors.Join(err, m.restate(context.WithoutCancel(ctx), e, old))
	}
	if err := m.launch.vault.Drop(used); err != nil {
		m.cfg.Log.Warn("used checkpoint not removed", "sandbox", id, "err", err)
	}
	rec = e.view.Load().rec
	m.announce(ctx, &rec, Event{Name: "resume", By: by})
	m.cfg.Log.Info("sandbox resumed", "sandbox", rec.ID, "took", time.Since(began))
	return rec, nil
}

// run makes a view that of a sandbox that runs from now on for a lifetime.
func (v *view) run(up *started, lifetime time.Duration) {
	now := time.Now().UTC()
	v.rec.Lease, v.rec.Checkpoint, v.rec.Pins = up.lease, "", nil
	v.rec.State, v.rec.Started, v.rec.Expires = Running, now, now.Add(lifetime)
	v.done = make(chan struct{})
}

// fromPaused is the origin of a paused sandbox. It says why one cannot be resumed
// here before anything is tried.
func (l *launcher) fromPaused(ctx context.Context, rec *Record) (*origin, error) {
	img, err := l.imageOf(ctx, rec.image(), rec.ImageRef)
	if err == nil {
		var o *origin
		if o, err = l.fromCheckpoint(rec.Owner, img, rec.Resources, rec.Checkpoint); err == nil {
			o.pins = rec.Pins
			return o, nil
		}
	}
	return nil, cannot(err, "Sandbox %q cannot be resumed", string(rec.ID))
}

// cannot puts what cannot be done before why, where the why is for the user.
func cannot(err error, format string, args ...any) error {
	var why *errs.Error
	if !errors.As(err, &why) || why.Kind == errs.Internal {
		return fmt.Errorf(format+": %w", append(args, err)...)
	}
	kind := why.Kind
	if kind == errs.NotFound { // what is missing is not what was asked for
		kind = errs.Conflict
	}
	return errs.Wrap(kind, err, "%s: %s", fmt.Sprintf(format, args...), why.Msg)
}
