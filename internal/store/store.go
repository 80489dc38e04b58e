// Package store keeps records durably in an embedded NATS JetStream server without a
// listener: it has its files and their lock, compare-and-set by revision, and the
// in-memory view that answers every read. Callers see typed
// records and errs kinds; nothing outside this package knows of NATS.
package store

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

var _ sandbox.Store = (*Store)(nil)

// Names of the buckets and of the stream. They are part of the state format.
const (
	sandboxBucket  = "sandboxes"
	keyBucket      = "keys"
	snapshotBucket = "snapshots"
	eventStream    = "events"
)

// Config says where the records live. Zero values are replaced by the defaults
// the fields name.
type Config struct {
	// Dir belongs to the store alone. It is created when missing.
	Dir string
	// Log gets the store engine's messages at debug level; nil discards them.
	Log *slog.Logger
	// MaxEvents, MaxEventBytes and MaxEventAge bound the lifecycle events that are
	// kept, whichever is reached first: 20,000 events, 32 MiB, 7 days. Of the first two
	// each key has a share; one that is alone has half.
	MaxEvents     int64
	MaxEventBytes int64
	MaxEventAge   time.Duration
	// MaxSandboxEvents is how many of these may be one sandbox's, 1,000 by default:
	// whoever changes one's rules over and over loses his own history, not others'.
	MaxSandboxEvents int64

	patience time.Duration // longest silence while loading; tests shorten it
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.MaxEvents <= 0 {
		c.MaxEvents = 20_000
	}
	if c.MaxEventBytes <= 0 {
		c.MaxEventBytes = 32 << 20
	}
	if c.MaxEventAge <= 0 {
		c.MaxEventAge = 7 * 24 * time.Hour
	}
	if c.MaxSandboxEvents <= 0 {
		c.MaxSandboxEvents = 1000
	}
	if c.patience <= 0 {
		c.patience = 20 * time.Second
	}
	return c
}

// Store keeps records durably. A write is on disk when its call returns; reads
// are served from memory and see every write that returned before.
type Store struct {
	cfg       Config
	eng       *engine
	sandboxes *bucket[sandbox.Record]
	keys      *bucket[auth.Key]
	snapshots *bucket[sandbox.Snapshot]
	events    jetstream.Stream
	history   *history

	stop context.CancelFunc // ends the watches
	wg   sync.WaitGroup     // of the watches
	once sync.Once          // Close
}

// Open takes the directory's lock, starts the engine and loads the records. It
// returns errs.Conflict when another process holds the directory, and an error
// that names the directory and the fix when its contents are foreign, damaged or
// of a newer version. ctx bounds opening only; Close ends the store.
func Open(ctx context.Context, cfg Config) (s *Store, err error) {
	cfg = cfg.withDefaults()
	if cfg.Dir == "" {
		return nil, errs.New(errs.Invalid, "store: no directory is configured: set one, for example /var/lib/cordon/store")
	}
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	s = &Store{cfg: cfg, stop: stop}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
			s = nil
		}
	}()
	if s.eng, err = startEngine(ctx, cfg); err != nil {
		return s, err
	}
	if err := s.openBuckets(ctx, life); err != nil {
		return s, err
	}
	if s.events, err = s.eng.openEvents(ctx, cfg); err != nil {
		return s, err
	}
	if err := s.loadEvents(ctx); err != nil {
		return s, err
	}
	return s, s.eng.markReady(sandboxBucket, keyBucket, snapshotBucket, eventStream)
}

func (s *Store) openBuckets(ctx, life context.Context) error {
	kv, h, err := s.eng.openKV(ctx, sandboxBucket)
	if err != nil {
		return err
	}
	s.sandboxes = &bucket[sandbox.Record]{name: sandboxBucket, noun: "sandbox", kv: kv, head: h, log: s.cfg.Log,
		id: func(r *sandbox.Record) string { return string(r.ID) }, clone: cloneRecord}
	kv, h, err = s.eng.openKV(ctx, keyBucket)
	if err != nil {
		return err
	}
	s.keys = &bucket[auth.Key]{name: keyBucket, noun: "key", kv: kv, head: h, log: s.cfg.Log,
		id: func(k *auth.Key) string { return k.ID }, clone: func(k auth.Key) auth.Key { return k }}
	kv, h, err = s.eng.openKV(ctx, snapshotBucket)
	if err != nil {
		return err
	}
	s.snapshots = &bucket[sandbox.Snapshot]{name: snapshotBucket, noun: "snapshot", kv: kv, head: h, log: s.cfg.Log,
		id: func(r *sandbox.Snapshot) string { return r.ID }, clone: cloneSnapshot}
	if err := s.sandboxes.open(ctx, life, &s.wg, s.cfg.patience); err != nil {
		return err
	}
	if err := s.snapshots.open(ctx, life, &s.wg, s.cfg.patience); err != nil {
		return err
	}
	return s.keys.open(ctx, life, &s.wg, s.cfg.patience)
}

// Close stops the engine and frees the directory. It may be called more than
// once; calls that are under way return an error.
func (s *Store) Close() error {
	var err error
	s.once.Do(func() {
		s.stop()
		if s.eng != nil {
			err = s.eng.close()
		}
		s.wg.Wait()
	})
	return err
}

// Sandboxes returns every record in its newest revision, oldest sandbox first.
// The records are the caller's to change.
func (s *Store) Sandboxes(ctx context.Context) ([]sandbox.Record, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	all := s.sandboxes.all()
	out := make([]sandbox.Record, 0, len(all))
	for _, e := range all {
		e.value.Revision = e.revision
		out = append(out, e.value)
	}
	sortBy(out, func(r sandbox.Record) (time.Time, string) { return r.Created, string(r.ID) })
	return out, nil
}

// PutSandbox implements sandbox.Store.
func (s *Store) PutSandbox(ctx context.Context, r sandbox.Record) (uint64, error) {
	if !r.ID.Valid() {
		return 0, errs.New(errs.Invalid, "sandbox ID %q is not of the form i and 20 of [0-9a-z]", r.ID)
	}
	return s.sandboxes.put(ctx, r, r.Revision)
}

// DeleteSandbox implements sandbox.Store.
func (s *Store) DeleteSandbox(ctx context.Context, id sandbox.ID) error {
	if !id.Valid() {
		return errs.New(errs.Invalid, "sandbox ID %q is not of the form i and 20 of [0-9a-z]", id)
	}
	return s.sandboxes.remove(ctx, string(id))
}

// Snapshots implements sandbox.Store.
func (s *Store) Snapshots(ctx context.Context) ([]sandbox.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	all := s.snapshots.all()
	out := make([]sandbox.Snapshot, 0, len(all))
	for _, e := range all {
		out = append(out, e.value)
	}
	sortBy(out, func(r sandbox.Snapshot) (time.Time, string) { return r.Created, r.ID })
	return out, nil
}

// PutSnapshot implements sandbox.Store.
func (s *Store) PutSnapshot(ctx context.Context, r sandbox.Snapshot) error {
	if !validKey(r.ID) {
		return errs.New(errs.Invalid, "snapshot ID %q may only have letters, digits, - and _", r.ID)
	}
	return s.snapshots.replace(ctx, r)
}

// DeleteSnapshot implements sandbox.Store.
func (s *Store) DeleteSnapshot(ctx context.Context, id string) error {
	if !validKey(id) {
		return errs.New(errs.Invalid, "snapshot ID %q may only have letters, digits, - and _", id)
	}
	return s.snapshots.remove(ctx, id)
}

// PutKey writes a key, replacing an earlier one of the same ID.
func (s *Store) PutKey(ctx context.Context, k auth.Key) error {
	if !validKey(k.ID) {
		return errs.New(errs.Invalid, "key ID %q may only have letters, digits, - and _", k.ID)
	}
	return s.keys.replace(ctx, k)
}

// Keys returns every key, oldest first.
func (s *Store) Keys(ctx context.Context) ([]auth.Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	all := s.keys.all()
	out := make([]auth.Key, 0, len(all))
	for _, e := range all {
		out = append(out, e.value)
	}
	sortBy(out, func(k auth.Key) (time.Time, string) { return k.Created, k.ID })
	return out, nil
}

// DeleteKey removes a key; removing an absent one is not an error.
func (s *Store) DeleteKey(ctx context.Context, id string) error {
	if !validKey(id) {
		return errs.New(errs.Invalid, "key ID %q may only have letters, digits, - and _", id)
	}
	return s.keys.remove(ctx, id)
}
