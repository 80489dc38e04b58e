package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Snapshot is a stored sandbox that others can be started from. It is durable
// and its owner's alone.
type Snapshot struct {
	ID      string    `json:"id"` // a template ID: "s" and 20 characters of [a-z0-9]
	Names   []string  `json:"names,omitempty"`
	Sandbox ID        `json:"sandbox"` // where it was taken from
	Owner   string    `json:"owner"`
	Created time.Time `json:"created"`

	Checkpoint string    `json:"checkpoint"` // its name in the snapshot directory
	Bytes      int64     `json:"bytes"`
	Image      string    `json:"image"`    // the template the sandbox's image is of
	ImageRef   string    `json:"imageRef"` // Image.Digest of that
	Runtime    string    `json:"runtime"`  // Runtime.Name that made it
	Resources  Resources `json:"resources"`
	Pins       []Pin     `json:"pins,omitempty"` // for sandboxes made of it whose rules allow them
}

// label is what users call it.
func (s *Snapshot) label() string {
	if len(s.Names) > 0 {
		return s.Names[0]
	}
	return s.ID
}

// called reports whether s is the owner's snapshot of that ID or name.
func (s *Snapshot) called(owner, name string) bool {
	return (owner == "" || owner == s.Owner) && (s.ID == name || slices.Contains(s.Names, name))
}

// snapshotName is what users may call a snapshot: what may stand in a template's
// name, with a tag after a colon as other services write it.
var snapshotName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}(:[A-Za-z0-9._-]{1,62})?$`)

var snapshotID = regexp.MustCompile(`^s[0-9a-z]{20}$`)

// CreateSnapshot stores a sandbox's memory, processes and files; it goes on
// running. A name the owner already gave moves to the new snapshot, under the
// old ID.
func (m *Manager) CreateSnapshot(ctx context.Context, owner string, id ID, name string) (Snapshot, error) {
	e, err := m.hold(owner, id)
	if err != nil {
		return Snapshot{}, err
	}
	defer e.op.Unlock()
	if err := m.validSnapshotName(ctx, name); err != nil {
		return Snapshot{}, err
	}
	ctx = context.WithoutCancel(ctx)
	began, rec := time.Now(), e.view.Load().rec
	place, err := m.reserveSnapshot(rec.Owner)
	if err != nil {
		return Snapshot{}, err
	}
	defer place.release()
	leave, err := turn(ctx, m.starts, rec.Owner)
	if err != nil {
		return Snapshot{}, err
	}
	checkpoint, size, err := m.copyOf(ctx, &rec)
	leave()
	if err != nil {
		return Snapshot{}, err
	}
	snap := Snapshot{
		ID: sandboxid.Name('s'), Sandbox: id, Owner: rec.Owner,
		Checkpoint: checkpoint, Bytes: size, Image: rec.image(), ImageRef: rec.ImageRef,
		Runtime: m.cfg.Runtime.Name(), Resources: rec.Resources, Pins: m.pinsOf(&rec),
	}
	if name != "" {
		snap.Names = []string{name}
	}
	if snap, err = m.publish(ctx, snap); err != nil {
		return Snapshot{}, errors.Join(err, m.vault.Drop(checkpoint))
	}
	m.event(ctx, &rec, Event{Name: "snapshot", Detail: snap.ID})
	m.cfg.Log.Info("snapshot taken", "sandbox", id, "snapshot", snap.ID, "bytes", size, "took", time.Since(began))
	return snap, nil
}

// pinsOf are the pins of a sandbox, which the network has while it runs.
func (m *Manager) pinsOf(rec *Record) []Pin {
	if rec.State == Running {
		return m.cfg.Network.Pins(rec.ID)
	}
	return rec.Pins
}

func (m *Manager) validSnapshotName(ctx context.Context, name string) error {
	switch {
	case name == "":
		return nil
	case !snapshotName.MatchString(name) || snapshotID.MatchString(name):
		return errs.New(errs.Invalid, "name %q cannot be a snapshot's: use letters, digits, '.', '_', '-' and '/', up to 63, and maybe a tag after ':'", name)
	}
	_, err := m.cfg.Images.Resolve(ctx, name)
	switch {
	case errs.Is(err, errs.NotFound):
		return nil
	case err != nil:
		return err
	}
	return errs.New(errs.Conflict, "name %q is a template's: choose another for the snapshot", name)
}

// copyOf keeps a checkpoint of a sandbox as it is now. A paused one has one
// already, whose files the copy shares: they are never written to again.
func (m *Manager) copyOf(ctx context.Context, rec *Record) (name string, size int64, err error) {
	if rec.State == Running {
		written, err := m.space.Reserve(rec.Owner, m.footprint(ctx, rec.ID))
		if err != nil {
			return "", 0, err
		}
		defer written()
		return m.checkpoint(ctx, rec)
	}
	if err := m.space.Check(rec.Owner); err != nil {
		return "", 0, err
	}
	name, man, err := m.vault.Copy(rec.Checkpoint)
	if err != nil {
		return "", 0, cannot(m.space.Explain(err), "Sandbox %q cannot be copied", string(rec.ID))
	}
	return name, man.Bytes(), nil
}

// publish stores a snapshot's record and shows it. Of two that get one name at once,
// the later has it and the checkpoint of the earlier is dropped.
func (m *Manager) publish(ctx context.Context, snap Snapshot) (Snapshot, error) {
	naming := m.namingOf(snap.Owner)
	naming.Lock()
	defer naming.Unlock()
	snap.Created = time.Now().UTC()
	m.mu.Lock()
	var old Snapshot
	for _, s := range m.snapshots {
		if len(snap.Names) > 0 && s.Owner == snap.Owner && slices.Contains(s.Names, snap.Names[0]) {
			old = s
			snap.ID = s.ID
		}
	}
	m.mu.Unlock()
	if err := m.cfg.Store.PutSnapshot(ctx, snap); err != nil {
		return Snapshot{}, fmt.Errorf("store snapshot: %w", err)
	}
	m.mu.Lock()
	m.snapshots[snap.ID] = snap
	m.mu.Unlock()
	if err := m.vault.Drop(old.Checkpoint); err != nil {
		m.cfg.Log.Warn("replaced snapshot not removed", "snapshot", snap.ID, "err", err)
	}
	return snap, nil
}

// namingOf is the lock of an owner's snapshots: names are unique for each owner, and a
// store that is slow with one owner's record holds up no other.
func (m *Manager) namingOf(owner string) *sync.Mutex {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.naming[owner] == nil {
		m.naming[owner] = new(sync.Mutex)
	}
	return m.naming[owner]
}

// snapshot finds an owner's snapshot by ID or name.
func (m *Manager) snapshot(owner, name string) (Snapshot, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s, ok := m.snapshots[name]; ok {
		return s, s.called(owner, name)
	}
	for _, s := range m.snapshots {
		if s.called(owner, name) {
			return s, true
		}
	}
	return Snapshot{}, false
}

// ambiguous reports whether more than one owner has a snapshot of a name.
func (m *Manager) ambiguous(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, s := range m.snapshots {
		if slices.Contains(s.Names, name) {
			n++
		}
	}
	return n > 1
}

// fromSnapshot is the origin of sandboxes made from a snapshot.
func (m *Manager) fromSnapshot(ctx context.Context, owner string, snap Snapshot) (*origin, error) {
	img, err := m.imageOf(ctx, snap.Image, snap.ImageRef)
	if err != nil {
		return nil, cannot(err, "Snapshot %q cannot be restored", snap.label())
	}
	o, err := m.kept(img, snap.Checkpoint, snap.Resources)
	if err != nil {
		return nil, cannot(err, "Snapshot %q cannot be restored", snap.label())
	}
	o.owner, o.snapshot, o.pins = owner, &snap, snap.Pins
	return o, nil
}

// ListSnapshots returns a page of snapshots, newest first, and the cursor of the
// next page, "" on the last.
func (m *Manager) ListSnapshots(_ context.Context, req SnapshotsRequest) (page []Snapshot, next string, err error) {
	after, err := parseCursor(req.Cursor, snapshotID.MatchString)
	if err != nil {
		return nil, "", err
	}
	order := func(a, b Snapshot) int { return b.place().compare(a.place()) }
	var all []Snapshot
	m.mu.Lock()
	for _, s := range m.snapshots {
		if req.matches(&s) && (after == nil || after.compare(s.place()) > 0) {
			all = append(all, s)
		}
	}
	m.mu.Unlock()
	slices.SortFunc(all, order)
	limit := cmp.Or(max(req.Limit, 0), pageSize)
	if len(all) > limit {
		all = all[:limit]
		next = all[limit-1].place().cursor()
	}
	return all, next, nil
}

func (req *SnapshotsRequest) matches(s *Snapshot) bool {
	return (req.Owner == "" || req.Owner == s.Owner) &&
		(req.Sandbox == "" || req.Sandbox == s.Sandbox) &&
		(req.Name == "" || s.ID == req.Name || slices.Contains(s.Names, req.Name))
}

func (s *Snapshot) place() place { return place{s.Created, s.ID} }

// DeleteSnapshot forgets a snapshot, named by ID or name. Sandboxes made from it
// live on; those being made still get it.
func (m *Manager) DeleteSnapshot(ctx context.Context, owner, name string) error {
	missing := errs.New(errs.NotFound, "Snapshot %q doesn't exist or you don't have access to it", name)
	snap, ok := m.snapshot(owner, name)
	if !ok {
		return missing
	}
	if owner == "" && m.ambiguous(name) {
		return errs.New(errs.Conflict, "several keys have a snapshot %q: name the one to delete by its ID", name)
	}
	naming := m.namingOf(snap.Owner)
	naming.Lock()
	defer naming.Unlock()
	if snap, ok = m.snapshot(snap.Owner, snap.ID); !ok { // read again: it may have been replaced or deleted
		return missing
	}
	ctx = context.WithoutCancel(ctx)
	if err := m.cfg.Store.DeleteSnapshot(ctx, snap.ID); err != nil {
		return fmt.Errorf("delete snapshot's record: %w", err)
	}
	m.mu.Lock()
	delete(m.snapshots, snap.ID)
	m.mu.Unlock()
	m.cfg.Log.Info("snapshot deleted", "snapshot", snap.ID)
	return m.vault.Drop(snap.Checkpoint)
}

// loadSnapshots reads the records and removes what nobody speaks of from the vault.
func (m *Manager) loadSnapshots(ctx context.Context, records []Record) error {
	all, err := m.cfg.Store.Snapshots(ctx)
	if err != nil {
		return fmt.Errorf("read snapshots: %w", err)
	}
	keep := m.warm.Load(m.cfg.Runtime.Restorable)
	m.mu.Lock()
	for _, s := range all {
		m.snapshots[s.ID] = s
		keep[s.Checkpoint] = true
	}
	m.mu.Unlock()
	for i := range records {
		keep[records[i].Checkpoint] = true
	}
	return m.vault.Sweep(keep)
}
