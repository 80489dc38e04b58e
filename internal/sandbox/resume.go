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
	d, err := m.timeout(timeout)
	if err != nil {
		return Record{}, false, err
	}
	e, err := m.hold(owner, id)
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
func (m *Manager) resume(ctx context.Context, e *entry, next view, d time.Duration, by *Waker) (rec Record, err error) {
	began, id := time.Now(), next.rec.ID
	o, err := m.paused(ctx, &next.rec)
	if err != nil {
		return Record{}, err
	}
	defer m.finish(o)
	if err := m.space.Check(next.rec.Owner); err != nil {
		return Record{}, err
	}
	place, err := m.reserve(next.rec.Owner)
	if err != nil {
		return Record{}, err
	}
	defer place.release()
	if next.policy, err = policy.Compile(next.rec.Egress, m.cfg.Operator, next.rec.Generation); err != nil {
		return Record{}, err
	}
	up, err := m.boot(ctx, id, o, next.policy)
	if err != nil {
		return Record{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.discard(context.WithoutCancel(ctx), up))
		}
	}()
	if err := m.initAgent(ctx, &next.rec, up.lease.agent(up.controlToken), o.img); err != nil {
		return Record{}, err
	}
	used := next.rec.Checkpoint
	m.revive(&next, up, d)
	if err := m.save(ctx, e, next); err != nil {
		old := *e.view.Load()
		return Record{}, errors.Join(err, m.restate(context.WithoutCancel(ctx), e, old))
	}
	if err := m.vault.Drop(used); err != nil {
		m.cfg.Log.Warn("used checkpoint not removed", "sandbox", id, "err", err)
	}
	m.spawn(func(ctx context.Context) { m.watch(ctx, id) })
	rec = e.view.Load().rec
	m.event(ctx, &rec, Event{Name: "resume", By: by})
	m.cfg.Log.Info("sandbox resumed", "sandbox", rec.ID, "took", time.Since(began))
	return rec, nil
}

// revive makes a view that of a sandbox that runs from now on for d.
func (m *Manager) revive(next *view, up *started, d time.Duration) {
	now := time.Now().UTC()
	next.rec.Lease, next.rec.Checkpoint, next.rec.Pins = up.lease, "", nil
	next.rec.State, next.rec.Started, next.rec.Expires = Running, now, now.Add(d)
	next.done = make(chan struct{})
}

// paused is the origin of a paused sandbox. It says why one cannot be resumed
// here before anything is tried.
func (m *Manager) paused(ctx context.Context, rec *Record) (*origin, error) {
	img, err := m.imageOf(ctx, rec.image(), rec.ImageRef)
	if err == nil {
		var o *origin
		if o, err = m.kept(img, rec.Checkpoint, rec.Resources); err == nil {
			o.owner, o.pins = rec.Owner, rec.Pins
			return o, nil
		}
	}
	return nil, cannot(err, "Sandbox %q cannot be resumed", string(rec.ID))
}

// imageOf returns a template's image if it is still the build that a checkpoint
// was made over: a checkpoint holds what differs from it, and open files of it.
func (m *Manager) imageOf(ctx context.Context, template, digest string) (Image, error) {
	img, err := m.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return Image{}, err
	}
	if img.Digest != digest {
		return Image{}, errs.New(errs.Conflict, "it was made on another build of template %q (%s, now %s)", template, digest, img.Digest)
	}
	return img, nil
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
