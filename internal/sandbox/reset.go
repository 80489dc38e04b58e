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
	lifetime, err := m.cfg.lifetime(req.Timeout)
	if err != nil {
		return Record{}, err
	}
	e, err := m.table.hold(owner, id)
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
	defer o.close()
	next := *v
	next.rec.ImageRef, next.rec.Runtime = o.img.Digest, m.cfg.Runtime.Name()
	if req.AllowPublicTraffic != nil {
		next.rec.AllowPublicTraffic = req.AllowPublicTraffic
		switch {
		case next.rec.Public():
			next.rec.TrafficToken = ""
		case next.rec.TrafficToken == "":
			next.rec.TrafficToken = sandboxid.NewToken()
		}
	}
	ctx = context.WithoutCancel(ctx)
	if err := m.startOver(ctx, e, &next, o, lifetime); err != nil {
		return Record{}, err
	}
	if err := m.launch.vault.Drop(v.rec.Checkpoint); err != nil {
		m.cfg.Log.Warn("former checkpoint not removed", "sandbox", id, "err", err)
	}
	rec := e.view.Load().rec
	m.announce(ctx, &rec, Event{Name: "reset"})
	m.cfg.Log.Info("sandbox reset", "sandbox", id, "template", rec.Template, "took", time.Since(began))
	return rec, nil
}

// beginning is the origin a sandbox once started from.
func (m *Manager) beginning(ctx context.Context, rec *Record) (*origin, error) {
	if err := m.launch.space.Check(rec.Owner); err != nil {
		return nil, err
	}
	if rec.Image == "" {
		return m.origin(ctx, rec.Owner, rec.Template)
	}
	snap, ok := m.snapshots.find(rec.Owner, rec.TemplateID)
	if !ok {
		return nil, errs.New(errs.Conflict, "Sandbox %q cannot start over: the snapshot it was made from (%s) was deleted", string(rec.ID), rec.TemplateID)
	}
	return m.launch.fromSnapshot(ctx, rec.Owner, snap)
}

// startOver ends the processes of a sandbox and starts new ones. A running one whose new
// processes do not start is gone; a paused one is given up only when they run.
func (m *Manager) startOver(ctx context.Context, e *entry, next *view, o *origin, lifetime time.Duration) (err error) {
	if next.policy, err = policy.Compile(next.rec.Egress, m.cfg.Operator, next.rec.Generation); err != nil {
		return err
	}
	if next.rec.State != Running {
		room, err := m.reserve(next.rec.Owner, Running)
		if err != nil {
			return err
		}
		defer room.release()
		return m.rerun(ctx, e, next, o, lifetime)
	}
	next.end()
	if err = m.stop(ctx, next); err != nil {
		err = fmt.Errorf("end the former processes: %w", err)
	} else if err = m.rerun(ctx, e, next, o, lifetime); err != nil {
		err = cannot(err, "Sandbox %q could not be started over and is gone", string(next.rec.ID))
	}
	if err != nil {
		return errors.Join(err, m.removeHeld(ctx, e, Event{Name: "exit", Detail: "it could not be started over"}))
	}
	return nil
}

// rerun starts a sandbox's ID anew and records that.
func (m *Manager) rerun(ctx context.Context, e *entry, next *view, o *origin, lifetime time.Duration) (err error) {
	var undo Cleanup
	defer undo.OnError(ctx, &err)
	up, err := o.Start(ctx, next.rec.ID, next.policy)
	if err != nil {
		return err
	}
	undo.Add("sandbox", up.discard)
	next.rec.Resources, next.rec.ControlToken = up.resources, newControlToken(up.controlToken)
	next.run(up, lifetime)
	if err := up.claim(ctx, &next.rec, next.policy); err != nil {
		return err
	}
	return m.save(ctx, e, *next)
}
