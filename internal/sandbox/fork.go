package sandbox

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Fork starts copies of a sandbox as it is now, with its processes, files, rules
// and metadata. Each copy has its own ID, address, host name and tokens. The
// original goes on; it is stopped only while its memory is copied. A paused one
// can be copied too, and stays paused. The results are in no order.
func (m *Manager) Fork(ctx context.Context, owner string, id ID, req ForkRequest) ([]Forked, error) {
	d, err := m.cfg.lifetime(req.Timeout)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	src, o, err := m.original(ctx, owner, id)
	if err != nil {
		return nil, err
	}
	defer o.close()
	out := make([]Forked, req.Count)
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() { out[i].Record, out[i].Err = m.duplicate(ctx, &src, o, d) })
	}
	wg.Wait()
	if req.Strict {
		if err := m.allOrNone(ctx, out); err != nil {
			return nil, err
		}
	}
	m.cfg.Log.Info("sandbox forked", "sandbox", id, "copies", len(out), "took", time.Since(began))
	return out, nil
}

// original is the origin of a sandbox's copies: a checkpoint that lasts until it is
// closed. Only this process reads it, so it need not reach the disk.
func (m *Manager) original(ctx context.Context, owner string, id ID) (Record, *origin, error) {
	e, err := m.table.hold(owner, id)
	if err != nil {
		return Record{}, nil, err
	}
	defer e.op.Unlock()
	rec := e.view.Load().rec
	if rec.State != Running {
		o, err := m.launch.fromPaused(ctx, &rec)
		return rec, o, err
	}
	room, err := m.reserve(rec.Owner, Running) // else there may be no copy to make a checkpoint for
	if err != nil {
		return Record{}, nil, err
	}
	defer room.release()
	size := m.launch.footprint(ctx, id)
	written, err := m.launch.space.Reserve(rec.Owner, size)
	if err != nil {
		return Record{}, nil, err
	}
	defer written()
	img, err := m.launch.imageOf(ctx, rec.image(), rec.ImageRef)
	if err != nil {
		return Record{}, nil, cannot(err, "Sandbox %q cannot be copied", string(id))
	}
	leave, err := turn(ctx, m.launch.starts, rec.Owner)
	if err != nil {
		return Record{}, nil, err
	}
	defer leave()
	dir, remove, err := m.launch.vault.Temporary(func(dir string) error {
		return m.cfg.Runtime.Checkpoint(context.WithoutCancel(ctx), id, dir)
	})
	if err != nil {
		return Record{}, nil, m.launch.space.Explain(err)
	}
	return rec, &origin{
		launcher: m.launch, owner: rec.Owner, img: img, resources: rec.Resources,
		dir: dir, memory: size, token: rec.ControlToken, pins: m.cfg.Network.Pins(id), release: remove,
	}, nil
}

// duplicate starts one copy.
func (m *Manager) duplicate(ctx context.Context, src *Record, o *origin, lifetime time.Duration) (rec Record, err error) {
	room, err := m.reserve(src.Owner, Running)
	if err != nil {
		return Record{}, err
	}
	defer room.release()
	p, err := policy.Compile(src.Egress, m.cfg.Operator, 1)
	if err != nil {
		return Record{}, err
	}
	var undo Cleanup
	defer undo.OnError(ctx, &err)
	up, err := o.Start(ctx, sandboxid.New(), p)
	if err != nil {
		return Record{}, m.launch.space.Explain(err)
	}
	undo.Add("sandbox", up.discard)
	rec = copiedRecord(src, up)
	rec.Timeout, rec.Expires = lifetime, time.Now().Add(lifetime).UTC()
	rec.Runtime = m.cfg.Runtime.Name()
	if err := up.claim(ctx, &rec, p); err != nil {
		return Record{}, err
	}
	if err := m.record(ctx, &rec, p, room); err != nil {
		return Record{}, err
	}
	m.announce(ctx, &rec, Event{Name: "fork", Detail: "of " + string(src.ID)})
	return rec, nil
}

// copiedRecord is a copy's record: what users gave is the original's, what names
// or opens a sandbox is new.
func copiedRecord(src *Record, up *started) Record {
	now := time.Now().UTC()
	rec := *src
	rec.Revision, rec.ID, rec.Lease, rec.Checkpoint = 0, up.id, up.lease, ""
	rec.Pins = nil                                     // they are in the network's slot now
	rec.Domains, rec.Links, rec.LinkKey = nil, nil, "" // a name, and a link, leads to one sandbox
	rec.State, rec.Created, rec.Started, rec.Generation = Running, now, now, 1
	rec.Metadata, rec.EnvVars = maps.Clone(src.Metadata), maps.Clone(src.EnvVars)
	rec.ControlToken = newControlToken(up.controlToken)
	if src.AccessToken != "" {
		rec.AccessToken = sandboxid.NewToken()
	}
	if src.TrafficToken != "" {
		rec.TrafficToken = sandboxid.NewToken()
	}
	return rec
}

// allOrNone kills the copies that run when one does not.
func (m *Manager) allOrNone(ctx context.Context, copies []Forked) error {
	var failed error
	for i := range copies {
		if failed == nil {
			failed = copies[i].Err
		}
	}
	if failed == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	for i := range copies {
		if copies[i].Err != nil {
			continue
		}
		if err := m.remove(ctx, copies[i].Record.ID, Event{Name: "kill", Detail: "another copy could not be started"}); err != nil && !errs.Is(err, errs.NotFound) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}
