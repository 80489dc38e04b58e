package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
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

// snapshots are the records of snapshots. A name is unique among its owner's.
type snapshots struct {
	store Store
	vault *checkpoint.Vault
	log   *slog.Logger

	mu       sync.Mutex             // guards the others
	naming   map[string]*sync.Mutex // by owner; each is held while a name or a record changes hands, before mu
	byID     map[string]Snapshot
	reserved reserved
}

func newSnapshots(store Store, vault *checkpoint.Vault, log *slog.Logger) *snapshots {
	return &snapshots{store: store, vault: vault, log: log, naming: map[string]*sync.Mutex{}, byID: map[string]Snapshot{}, reserved: reserved{}}
}

// CreateSnapshot stores a sandbox's memory, processes and files; it goes on
// running. A name the owner already gave moves to the new snapshot, under the
// old ID.
func (m *Manager) CreateSnapshot(ctx context.Context, owner string, id ID, name string) (Snapshot, error) {
	e, err := m.table.hold(owner, id)
	if err != nil {
		return Snapshot{}, err
	}
	defer e.op.Unlock()
	if err := validSnapshotName(ctx, m.cfg.Images, name); err != nil {
		return Snapshot{}, err
	}
	ctx = context.WithoutCancel(ctx)
	began, rec := time.Now(), e.view.Load().rec
	allowed := m.cfg.Allowance(rec.Owner)
	room, err := m.snapshots.reserve(rec.Owner, limits{
		server: m.cfg.MaxSnapshots, serverFull: "this server keeps its limit of %d snapshots: delete one, or raise sandboxes.max_snapshots in the server's configuration",
		owner: allowed.Paused, ownerFull: "this API key keeps its limit of %d snapshots: delete one, or use a key that may have more (cordon key create --max-paused)", // a paused one takes as much
	})
	if err != nil {
		return Snapshot{}, err
	}
	defer room.release()
	leave, err := turn(ctx, m.launch.starts, rec.Owner)
	if err != nil {
		return Snapshot{}, err
	}
	checkpoint, size, err := m.launch.copyOf(ctx, &rec)
	leave()
	if err != nil {
		return Snapshot{}, err
	}
	snap := Snapshot{
		ID: sandboxid.Name('s'), Sandbox: id, Owner: rec.Owner,
		Checkpoint: checkpoint, Bytes: size, Image: rec.image(), ImageRef: rec.ImageRef,
		Runtime: m.cfg.Runtime.Name(), Resources: rec.Resources, Pins: rec.Pins,
	}
	if rec.State == Running {
		snap.Pins = m.cfg.Network.Pins(id)
	}
	if name != "" {
		snap.Names = []string{name}
	}
	if snap, err = m.snapshots.put(ctx, snap); err != nil {
		return Snapshot{}, errors.Join(err, m.launch.vault.Drop(checkpoint))
	}
	m.events.add(ctx, &rec, Event{Name: "snapshot", Detail: snap.ID})
	m.cfg.Log.Info("snapshot taken", "sandbox", id, "snapshot", snap.ID, "bytes", size, "took", time.Since(began))
	return snap, nil
}

func validSnapshotName(ctx context.Context, images Images, name string) error {
	switch {
	case name == "":
		return nil
	case !snapshotName.MatchString(name) || snapshotID.MatchString(name):
		return errs.New(errs.Invalid, "name %q cannot be a snapshot's: use letters, digits, '.', '_', '-' and '/', up to 63, and maybe a tag after ':'", name)
	}
	_, err := images.Resolve(ctx, name)
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
func (l *launcher) copyOf(ctx context.Context, rec *Record) (name string, size int64, err error) {
	if rec.State == Running {
		written, err := l.space.Reserve(rec.Owner, l.footprint(ctx, rec.ID))
		if err != nil {
			return "", 0, err
		}
		defer written()
		return l.checkpoint(ctx, rec.ID, checkpoint.Manifest{Token: rec.ControlToken})
	}
	if err := l.space.Check(rec.Owner); err != nil {
		return "", 0, err
	}
	name, man, err := l.vault.Copy(rec.Checkpoint)
	if err != nil {
		return "", 0, cannot(l.space.Explain(err), "Sandbox %q cannot be copied", string(rec.ID))
	}
	return name, man.Bytes(), nil
}

// fromSnapshot is the origin of sandboxes made from a snapshot.
func (l *launcher) fromSnapshot(ctx context.Context, owner string, snap Snapshot) (*origin, error) {
	img, err := l.imageOf(ctx, snap.Image, snap.ImageRef)
	if err != nil {
		return nil, cannot(err, "Snapshot %q cannot be restored", snap.label())
	}
	o, err := l.fromCheckpoint(owner, img, snap.Resources, snap.Checkpoint)
	if err != nil {
		return nil, cannot(err, "Snapshot %q cannot be restored", snap.label())
	}
	o.snapshot, o.pins = &snap, snap.Pins
	return o, nil
}

// load reads the records.
func (s *snapshots) load(ctx context.Context) error {
	all, err := s.store.Snapshots(ctx)
	if err != nil {
		return fmt.Errorf("read snapshots: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, snap := range all {
		s.byID[snap.ID] = snap
	}
	return nil
}

// all returns all snapshots, in no order.
func (s *snapshots) all() []Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.byID))
}

// reserve keeps room for one more snapshot of an owner.
func (s *snapshots) reserve(owner string, most limits) (*reservation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := map[string]int{}
	for _, snap := range s.byID {
		have[snap.Owner]++
	}
	return s.reserved.take(&s.mu, owner, have, most)
}

// put stores a snapshot's record and makes it found. Of two that get one name at once,
// the later has it and the checkpoint of the earlier is dropped.
func (s *snapshots) put(ctx context.Context, snap Snapshot) (Snapshot, error) {
	defer s.lock(snap.Owner).Unlock()
	snap.Created = time.Now().UTC()
	var old Snapshot
	for _, other := range s.all() {
		if len(snap.Names) > 0 && other.Owner == snap.Owner && slices.Contains(other.Names, snap.Names[0]) {
			old = other
			snap.ID = other.ID
		}
	}
	if err := s.store.PutSnapshot(ctx, snap); err != nil {
		return Snapshot{}, fmt.Errorf("store snapshot: %w", err)
	}
	s.mu.Lock()
	s.byID[snap.ID] = snap
	s.mu.Unlock()
	if err := s.vault.Drop(old.Checkpoint); err != nil {
		s.log.Warn("replaced snapshot not removed", "snapshot", snap.ID, "err", err)
	}
	return snap, nil
}

// lock holds an owner's snapshots as they are; the caller unlocks what it returns. A store
// that is slow with one owner's record holds up no other.
func (s *snapshots) lock(owner string) *sync.Mutex {
	s.mu.Lock()
	if s.naming[owner] == nil {
		s.naming[owner] = new(sync.Mutex)
	}
	naming := s.naming[owner]
	s.mu.Unlock()
	naming.Lock()
	return naming
}

// find looks an owner's snapshot up by ID or name.
func (s *snapshots) find(owner, name string) (Snapshot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if snap, ok := s.byID[name]; ok {
		return snap, snap.called(owner, name)
	}
	for _, snap := range s.byID {
		if snap.called(owner, name) {
			return snap, true
		}
	}
	return Snapshot{}, false
}

// ambiguous reports whether more than one owner has a snapshot of a name.
func (s *snapshots) ambiguous(name string) bool {
	n := 0
	for _, snap := range s.all() {
		if slices.Contains(snap.Names, name) {
			n++
		}
	}
	return n > 1
}

// ListSnapshots returns a page of snapshots, newest first, and the cursor of the
// next page, "" on the last.
func (m *Manager) ListSnapshots(_ context.Context, req SnapshotsRequest) (page []Snapshot, next string, err error) {
	after, err := parseCursor(req.Cursor, snapshotID.MatchString)
	if err != nil {
		return nil, "", err
	}
	order := func(a, b Snapshot) int { return b.position().compare(a.position()) }
	var all []Snapshot
	for _, s := range m.snapshots.all() {
		if req.matches(&s) && (after == nil || after.compare(s.position()) > 0) {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, order)
	limit := cmp.Or(max(req.Limit, 0), pageSize)
	if len(all) > limit {
		all = all[:limit]
		next = all[limit-1].position().cursor()
	}
	return all, next, nil
}

func (req *SnapshotsRequest) matches(s *Snapshot) bool {
	return (req.Owner == "" || req.Owner == s.Owner) &&
		(req.Sandbox == "" || req.Sandbox == s.Sandbox) &&
		(req.Name == "" || s.ID == req.Name || slices.Contains(s.Names, req.Name))
}

func (s *Snapshot) position() position { return position{s.Created, s.ID} }

// DeleteSnapshot forgets a snapshot, named by ID or name. Sandboxes made from it
// live on; those being made still get it.
func (m *Manager) DeleteSnapshot(ctx context.Context, owner, name string) error {
	missing := errs.New(errs.NotFound, "Snapshot %q doesn't exist or you don't have access to it", name)
	snap, ok := m.snapshots.find(owner, name)
	if !ok {
		return missing
	}
	if owner == "" && m.snapshots.ambiguous(name) {
		return errs.New(errs.Conflict, "several keys have a snapshot %q: name the one to delete by its ID", name)
	}
	defer m.snapshots.lock(snap.Owner).Unlock()
	if snap, ok = m.snapshots.find(snap.Owner, snap.ID); !ok { // read again: it may have been replaced or deleted
		return missing
	}
	return m.snapshots.remove(context.WithoutCancel(ctx), snap)
}

// remove forgets a snapshot whose owner's lock is held.
func (s *snapshots) remove(ctx context.Context, snap Snapshot) error {
	if err := s.store.DeleteSnapshot(ctx, snap.ID); err != nil {
		return fmt.Errorf("delete snapshot's record: %w", err)
	}
	s.mu.Lock()
	delete(s.byID, snap.ID)
	s.mu.Unlock()
	s.log.Info("snapshot deleted", "snapshot", snap.ID)
	return s.vault.Drop(snap.Checkpoint)
}
