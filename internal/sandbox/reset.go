package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Reset starts a sandbox over from its template or snapshot, under its own ID,
// URL, rules, metadata and tokens; its processes and files are gone. Whatever
// can be known to fail is found before they go; when the start itself fails,
// so is the sandbox, and the error says so. A copy of a sandbox starts over from
// what the original was made from.
func (m *Manager) Reset(ctx context.Context, owner string, id ID, req ResetRequest) (Record, error) {
	d, err := m.timeout(req.Timeout)
	if err != nil {
		return Record{}, err
	}
	e, err := m.hold(owner, id)
	if err != nil {
		return Record{}, err
	}
	defer e.op.Unlock()
	began, v := time.Now(), e.view.Load()
	if v.rec.State != Running && !req.Resume {
		return Record{}, errs.New(errs.Conflict, "Sandbox %q is paused: connect to it first, or ask the reset to start it", string(id))
	}
	if p := req.AllowPublicTraffic; p != nil && *p && !v.rec.Public() {
		return Record{}, errs.New(errs.Conflict, "Sandbox %q is private, and a reset does not make it public: create a public one", string(id))
	}
	o, err := m.beginning(ctx, &v.rec)
	if err != nil {
		return Record{}, err
	}
	defer m.finish(o)
	rec, err := m.startOver(context.WithoutCancel(ctx), e, startOver{o, d, req.AllowPublicTraffic})
	if err != nil {
		return Record{}, err
	}
	m.event(ctx, &rec, Event{Name: "reset"})
	m.cfg.Log.Info("sandbox reset", "sandbox", id, "template", rec.Template, "took", time.Since(began))
	return rec, nil
}

// startOver is what a sandbox becomes by a reset.
type startOver struct {
	from     *origin
	lifetime time.Duration
	public   *bool // nil: as it was
}

// beginning is the origin a sandbox once started from.
func (m *Manager) beginning(ctx context.Context, rec *Record) (*origin, error) {
	if err := m.space.Check(rec.Owner); err != nil {
		return nil, err
	}
	if rec.Image == "" {
		return m.from(ctx, rec.Owner, rec.Template)
	}
	snap, ok := m.snapshot(rec.Owner, rec.TemplateID)
	if !ok {
		return nil, errs.New(errs.Conflict, "Sandbox %q cannot start over: the snapshot it was made from (%s) was deleted", string(rec.ID), rec.TemplateID)
	}
	return m.fromSnapshot(ctx, rec.Owner, snap)
}

// startOver replaces the processes of a sandbox. A paused one is given up only
// when the new ones run.
func (m *Manager) startOver(ctx context.Context, e *entry, to startOver) (rec Record, err error) {
	next := *e.view.Load()
	id, wasRunning := next.rec.ID, next.rec.State == Running
	if next.policy, err = policy.Compile(next.rec.Egress, m.cfg.Operator, next.rec.Generation); err != nil {
		return Record{}, err
	}
	if !wasRunning {
		place, err := m.reserve(next.rec.Owner)
		if err != nil {
			return Record{}, err
		}
		defer place.release()
	} else {
		closeOnce(next.done)
		if err := m.stop(ctx, &next); err != nil {
			return Record{}, errors.Join(fmt.Errorf("end the former processes: %w", err), m.lose(ctx, e))
		}
	}
	used := next.rec.Checkpoint
	if err := m.rerun(ctx, e, &next, to); err != nil {
		if wasRunning {
			err = errors.Join(cannot(err, "Sandbox %q could not be started over and is gone", string(id)), m.lose(ctx, e))
		}
		return Record{}, err
	}
	if err := m.vault.Drop(used); err != nil {
		m.cfg.Log.Warn("former checkpoint not removed", "sandbox", id, "err", err)
	}
	m.spawn(func(ctx context.Context) { m.watch(ctx, id) })
	return e.view.Load().rec, nil
}

// rerun starts a sandbox's ID anew and records that.
func (m *Manager) rerun(ctx context.Context, e *entry, next *view, to startOver) (err error) {
	o := to.from
	up, err := m.startFrom(ctx, next.rec.ID, o, next.policy)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.discard(ctx, up))
		}
	}()
	next.rec.ImageRef, next.rec.Runtime, next.rec.Resources = o.img.Digest, m.cfg.Runtime.Name(), up.resources
	next.rec.ControlToken = newControlToken(up.controlToken)
	if to.public != nil {
		next.rec.AllowPublicTraffic = to.public
		switch {
		case next.rec.Public():
			next.rec.TrafficToken = ""
		case next.rec.TrafficToken == "":
			next.rec.TrafficToken = sandboxid.NewToken()
		}
	}
	m.revive(next, up, to.lifetime)
	if err := m.claim(ctx, &next.rec, up, claimed{o.img, next.policy, o.pins}); err != nil {
		return err
	}
	return m.save(ctx, e, *next)
}

// lose drops a sandbox whose processes are gone. The caller holds it.
func (m *Manager) lose(ctx context.Context, e *entry) error {
	return m.removeHeld(ctx, e, Event{Name: "exit", Detail: "it could not be started over"})
}
