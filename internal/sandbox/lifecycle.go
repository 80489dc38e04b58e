package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Kill ends a sandbox and frees all it held. A second kill is errs.NotFound.
func (m *Manager) Kill(ctx context.Context, owner string, id ID) error {
	e, err := m.table.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	return m.removeHeld(ctx, e, Event{Name: "kill"})
}

// remove ends a sandbox: first its record, so that a crash in
// the middle leaves an orphan the next start destroys and never a record without
// a sandbox; then its network, so that nothing more leaves it; then its processes.
func (m *Manager) remove(ctx context.Context, id ID, why Event) error {
	e, err := m.table.hold("", id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	return m.removeHeld(ctx, e, why)
}

// removeHeld is remove for a caller that holds the sandbox.
func (m *Manager) removeHeld(ctx context.Context, e *entry, why Event) (err error) {
	// A client that goes away must not leave half a sandbox.
	ctx = context.WithoutCancel(ctx)
	v := e.view.Load()
	id := v.rec.ID
	unwritten := m.deleteRecord(ctx, &v.rec)
	v.end()
	err = errors.Join(m.stop(ctx, v), m.launch.vault.Drop(v.rec.Checkpoint))
	m.history.forget(id)
	if unwritten != nil {
		// A store that cannot write, on a full disk say, must not keep a sandbox alive,
		// which may be what filled it. Its files are gone now: the record may follow.
		// If not, the call fails and can be repeated.
		if again := m.deleteRecord(ctx, &v.rec); again != nil {
			return errors.Join(fmt.Errorf("delete record: %w", again), err)
		}
	}
	m.changes.publish(id, Gone)
	m.events.add(ctx, &v.rec, why)
	m.cfg.Log.Info("sandbox ended", "sandbox", id, "why", why.Name, "lived", time.Since(v.rec.Created))
	return err
}

// storePatience bounds a write that must not hold up the end of a sandbox.
const storePatience = 5 * time.Second

// deleteRecord takes a sandbox out of the store and then out of sight.
func (m *Manager) deleteRecord(ctx context.Context, rec *Record) error {
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	if err := m.cfg.Store.DeleteSandbox(ctx, rec.ID); err != nil {
		return err
	}
	m.domains.release(rec)
	m.table.remove(rec.ID)
	return nil
}

// stop withdraws the network and destroys the processes; what one step cannot
// free does not keep the other from it.
func (m *Manager) stop(ctx context.Context, v *view) error {
	var failed []error
	if v.rec.Lease.Sandbox != "" {
		if err := m.cfg.Network.Release(ctx, v.rec.Lease); err != nil {
			failed = append(failed, fmt.Errorf("release network: %w", err))
		}
		m.changes.publish(v.rec.ID, Stopped)
	}
	if err := m.cfg.Runtime.Destroy(ctx, v.rec.ID); err != nil {
		failed = append(failed, fmt.Errorf("destroy: %w", err))
	}
	return errors.Join(failed...)
}

// SetTimeout lets a sandbox live for d from now, longer or shorter than before.
func (m *Manager) SetTimeout(ctx context.Context, owner string, id ID, d time.Duration) error {
	d, err := m.cfg.lifetime(d)
	if err != nil {
		return err
	}
	e, err := m.table.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	next.rec.Expires = time.Now().Add(d).UTC()
	return m.save(ctx, e, next)
}

// SetNetwork replaces all egress rules of a sandbox and, if it is given, the list of
// who may reach its ports. When it returns nil the new rules are stored and in
// force, also for live flows; on an error the old ones are both.
func (m *Manager) SetNetwork(ctx context.Context, owner string, id ID, in NetworkUpdate) error {
	e, err := m.table.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	v := e.view.Load()
	next := *v
	leave, err := turn(ctx, m.updates, v.rec.Owner)
	if err != nil {
		return err
	}
	defer leave()
	if next.policy, err = policy.Compile(in.Egress, m.cfg.Operator, v.rec.Generation+1); err != nil {
		return err
	}
	next.rec.Egress, next.rec.Generation = in.Egress, next.policy.Generation()
	if in.AllowIn != nil {
		next.rec.AllowIn = slices.Clone(in.AllowIn)
	}
	// A client that goes away must not leave the stored and the enforced policy apart.
	ctx = context.WithoutCancel(ctx)
	if err := m.replacePolicy(ctx, e, next); err != nil {
		return err
	}
	if in.AllowIn != nil {
		m.changes.publish(id, AccessChanged)
	}
	m.events.add(ctx, &next.rec, Event{Name: "network", Detail: fmt.Sprintf("generation %d", next.rec.Generation)})
	m.cfg.Log.Info("network rules replaced", "sandbox", id, "generation", next.rec.Generation)
	return nil
}

// replacePolicy stores the new rules and puts them in force. The store comes
// first: after a crash between the two, reconciling enforces what is stored.
// A policy the kernel refuses is taken back out of the store. A paused sandbox
// is under its new rules from the resume on.
func (m *Manager) replacePolicy(ctx context.Context, e *entry, next view) error {
	old := *e.view.Load()
	if err := m.save(ctx, e, next); err != nil {
		return err
	}
	if next.rec.State != Running {
		return nil
	}
	if err := m.cfg.Network.Apply(ctx, next.rec.Lease, next.policy); err != nil {
		old.rec.Revision = e.view.Load().rec.Revision
		return errors.Join(fmt.Errorf("apply policy: %w", err), m.save(ctx, e, old))
	}
	m.changes.publish(next.rec.ID, PolicyChanged)
	return nil
}

// expire does what the sandbox asked for at the end of its time.
func (m *Manager) expire(ctx context.Context, id ID) {
	v, err := m.table.find("", id)
	if err != nil || v.rec.State != Running || time.Now().Before(v.rec.Expires) {
		return // killed, paused or prolonged meanwhile
	}
	if v.rec.IdleTimeout > 0 && m.cfg.InUse(id) && m.Touch(ctx, id) {
		return
	}
	if v.rec.OnTimeout == PauseOnTimeout {
		err = m.Pause(ctx, "", id)
		if err == nil || errs.Is(err, errs.NotFound) || errs.Is(err, errs.Conflict) {
			return
		}
		if errs.Is(err, errs.Exhausted) && m.SetTimeout(ctx, "", id, min(pauseAgain, m.cfg.MaxTimeout)) == nil { // its work is not lost for want of room
			m.cfg.Log.Warn("no room to pause at the end of its time; trying again", "sandbox", id, "err", err)
			return
		}
		m.cfg.Log.Error("pause at the end of its time; killing instead", "sandbox", id, "err", err)
	}
	if err := m.remove(ctx, id, Event{Name: "expire"}); err != nil && !errs.Is(err, errs.NotFound) {
		m.cfg.Log.Error("kill at the end of its time", "sandbox", id, "err", err)
	}
}

// pauseAgain is when a sandbox that could not be paused for want of room is tried again.
const pauseAgain = time.Minute
