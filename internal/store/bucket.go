package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// schema is the version of the stored JSON. A field that older code may ignore
// does not change it; a changed meaning does.
const schema = 1

// envelope is the stored form of every record and event. A slot without a
// record is free.
type envelope[T any] struct {
	Schema int `json:"schema"`
	Record *T  `json:"record,omitempty"`
}

func encode[T any](v *T) ([]byte, error) { return json.Marshal(envelope[T]{schema, v}) }

func decode[T any](b []byte) (*T, error) {
	var e envelope[T]
	if err := json.Unmarshal(b, &e); err != nil {
		return nil, fmt.Errorf("decode record: %w", err)
	}
	if e.Schema != schema {
		return nil, fmt.Errorf("record has schema %d, this cordon reads schema %d: use the cordon that wrote it", e.Schema, schema)
	}
	return e.Record, nil
}

// slot is one key of the bucket as last written.
type slot[T any] struct {
	revision uint64
	id       string // empty for a free slot
	value    T
}

// bucket is a typed key-value bucket with a view in memory. The view is fed by a
// watch and, so that callers read their own writes, by every write made here;
// revisions decide which report of a slot is newer.
//
// The bucket's keys are slots, not IDs: a deleted record's slot is written empty
// and used again. Keys of its own per record would need their deletion markers
// removed some day, and the engine, rebuilding its index after a crash, then
// finds the record behind the removed marker and brings it back.
type bucket[T any] struct {
	name  string
	noun  string // what one record is called in messages
	kv    jetstream.KeyValue
	head  *head
	log   *slog.Logger
	id    func(*T) string
	clone func(T) T // deep, so that callers cannot change the view

	making sync.Mutex // held from choosing a free slot until it is written

	mu    sync.RWMutex        // guards the view, which follows
	slots map[string]slot[T]  // by key
	keys  map[string]string   // by ID
	free  map[string]struct{} // keys
}

// open loads the view and keeps it current until life ends. The engine does not
// report a damaged last record but waits for it without end: patience bounds the
// silence between two records.
func (b *bucket[T]) open(ctx, life context.Context, wg *sync.WaitGroup, patience time.Duration) error {
	b.slots, b.keys, b.free = map[string]slot[T]{}, map[string]string{}, map[string]struct{}{}
	w, err := b.kv.WatchAll(life)
	if err != nil {
		return fmt.Errorf("watch %s: %w", b.name, err)
	}
	for loaded := false; !loaded; {
		silence := time.NewTimer(patience)
		select {
		case e, ok := <-w.Updates():
			if !ok {
				return fmt.Errorf("load %s: the watch ended", b.name)
			}
			if e == nil {
				loaded = true
				break
			}
			if err := b.learn(e.Key(), e.Revision(), e.Value()); err != nil {
				return errors.Join(fmt.Errorf("load %s: %s: %w", b.name, e.Key(), err), w.Stop())
			}
		case <-silence.C:
			return errors.Join(fmt.Errorf("load %s: no answer for %v: a record cannot be read: restore the state directory from a backup", b.name, patience), w.Stop())
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("load %s: %w", b.name, ctx.Err()), w.Stop())
		}
		silence.Stop()
	}
	wg.Go(func() { b.follow(life, w) })
	return nil
}

// follow applies what the watch reports until life ends.
func (b *bucket[T]) follow(life context.Context, w jetstream.KeyWatcher) {
	for {
		select {
		case e, ok := <-w.Updates():
			if !ok {
				if life.Err() == nil {
					b.log.Error("store watch ended", "part", b.name)
				}
				return
			}
			if e == nil {
				continue
			}
			if err := b.learn(e.Key(), e.Revision(), e.Value()); err != nil {
				b.log.Error("store record unreadable", "part", b.name, "key", e.Key(), "err", err)
			}
		case <-life.Done():
			return // the connection's end closes the watch
		}
	}
}

// learn puts what is stored into the view unless the view knows something
// newer. It decodes also what was just encoded: the view then holds exactly what
// a restart will read.
func (b *bucket[T]) learn(key string, rev uint64, data []byte) error {
	b.mu.RLock()
	known := b.slots[key].revision
	b.mu.RUnlock()
	if known >= rev { // revisions start at 1
		return nil
	}
	v, err := decode[T](data)
	if err != nil {
		return err
	}
	s := slot[T]{revision: rev}
	if v != nil {
		s.id, s.value = b.id(v), *v
	}
	b.mu.Lock()
	b.place(key, s)
	b.mu.Unlock()
	return b.head.reach(rev)
}

// place enters s under key. mu is held.
func (b *bucket[T]) place(key string, s slot[T]) {
	old := b.slots[key]
	if old.revision >= s.revision {
		return
	}
	if b.keys[old.id] == key {
		delete(b.keys, old.id)
	}
	b.slots[key] = s
	if s.id == "" {
		b.free[key] = struct{}{}
		return
	}
	delete(b.free, key)
	b.keys[s.id] = key
}

// all returns copies of the records.
func (b *bucket[T]) all() []slot[T] {
	b.mu.RLock()
	defer b.mu.RUnlock()
	out := make([]slot[T], 0, len(b.keys))
	for _, key := range b.keys {
		s := b.slots[key]
		s.value = b.clone(s.value)
		out = append(out, s)
	}
	return out
}

// find returns the key and revision of the slot that holds id.
func (b *bucket[T]) find(id string) (key string, rev uint64, ok bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	key, ok = b.keys[id]
	return key, b.slots[key].revision, ok
}

// vacant returns a free slot's key and revision, or the key of a new slot.
func (b *bucket[T]) vacant() (key string, rev uint64) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for key := range b.free {
		return key, b.slots[key].revision
	}
	return strconv.Itoa(len(b.slots)), 0
}

// put writes v if the stored revision is still rev; rev 0 means there must be none.
func (b *bucket[T]) put(ctx context.Context, v T, rev uint64) (uint64, error) {
	id := b.id(&v)
	data, err := b.encode(&v)
	if err != nil {
		return 0, err
	}
	if rev == 0 {
		return b.create(ctx, id, data)
	}
	key, _, ok := b.find(id)
	if !ok {
		return 0, errs.New(errs.Conflict, "%s %s was deleted meanwhile", b.noun, id)
	}
	got, err := b.kv.Update(ctx, key, data, rev)
	if errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return 0, errs.Wrap(errs.Conflict, err, "%s %s was changed meanwhile", b.noun, id)
	}
	if err != nil {
		return 0, fmt.Errorf("write %s %s: %w", b.noun, id, err)
	}
	return got, b.learn(key, got, data)
}

// create writes a record that must not exist into a free slot.
func (b *bucket[T]) create(ctx context.Context, id string, data []byte) (uint64, error) {
	b.making.Lock()
	defer b.making.Unlock()
	for {
		if _, _, ok := b.find(id); ok {
			return 0, errs.New(errs.Conflict, "%s %s exists already", b.noun, id)
		}
		key, rev := b.vacant()
		got, err := b.kv.Update(ctx, key, data, rev)
		if err == nil {
			return got, b.learn(key, got, data)
		}
		if !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			return 0, fmt.Errorf("create %s %s: %w", b.noun, id, err)
		}
		if err := b.refresh(ctx, key); err != nil { // another writer took the slot
			return 0, err
		}
	}
}

// refresh reads a slot that turned out to be newer than the view.
func (b *bucket[T]) refresh(ctx context.Context, key string) error {
	e, err := b.kv.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("read %s slot %s: %w", b.noun, key, err)
	}
	return b.learn(key, e.Revision(), e.Value())
}

// replace writes v whatever is stored under its ID.
func (b *bucket[T]) replace(ctx context.Context, v T) error {
	for {
		_, rev, _ := b.find(b.id(&v))
		_, err := b.put(ctx, v, rev)
		if !errs.Is(err, errs.Conflict) || ctx.Err() != nil {
			return err
		}
	}
}

// remove deletes the record whatever its revision.
func (b *bucket[T]) remove(ctx context.Context, id string) error {
	data, err := encode[T](nil)
	if err != nil {
		return fmt.Errorf("encode deletion: %w", err)
	}
	for {
		key, rev, ok := b.find(id)
		if !ok {
			return nil
		}
		got, err := b.kv.Update(ctx, key, data, rev)
		if err == nil {
			return b.learn(key, got, data)
		}
		if !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			return fmt.Errorf("delete %s %s: %w", b.noun, id, err)
		}
		if err := b.refresh(ctx, key); err != nil { // written meanwhile: the deletion is newer still
			return err
		}
	}
}

func (b *bucket[T]) encode(v *T) ([]byte, error) {
	data, err := encode(v)
	if err != nil {
		return nil, fmt.Errorf("encode %s %s: %w", b.noun, b.id(v), err)
	}
	if len(data) > maxValue {
		return nil, errs.New(errs.Invalid, "the record of %s %s is %d bytes, the limit is %d: shorten its metadata, environment or network rules",
			b.noun, b.id(v), len(data), maxValue)
	}
	return data, nil
}

var keyForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)

func validKey(k string) bool { return keyForm.MatchString(k) }

// cloneRecord copies what a record points to.
func cloneRecord(r sandbox.Record) sandbox.Record {
	r.Metadata = maps.Clone(r.Metadata)
	r.EnvVars = maps.Clone(r.EnvVars)
	r.Domains = slices.Clone(r.Domains)
	r.Egress.AllowOut = slices.Clone(r.Egress.AllowOut)
	r.Egress.DenyOut = slices.Clone(r.Egress.DenyOut)
	r.Egress.AllowInternetAccess = clonePtr(r.Egress.AllowInternetAccess)
	r.Pins = slices.Clone(r.Pins)
	r.HTTPSPorts = slices.Clone(r.HTTPSPorts)
	r.AllowIn = slices.Clone(r.AllowIn)
	r.Links = slices.Clone(r.Links)
	r.AllowPublicTraffic = clonePtr(r.AllowPublicTraffic)
	return r
}

func cloneSnapshot(r sandbox.Snapshot) sandbox.Snapshot {
	r.Names = slices.Clone(r.Names)
	r.Pins = slices.Clone(r.Pins)
	return r
}

func clonePtr[T any](p *T) *T {
	if p == nil {
		return nil
	}
	v := *p
	return &v
}

// sortBy orders by time, then by ID.
func sortBy[T any](s []T, key func(T) (time.Time, string)) {
	slices.SortFunc(s, func(a, b T) int {
		at, aid := key(a)
		bt, bid := key(b)
		return cmp.Or(at.Compare(bt), cmp.Compare(aid, bid))
	})
}
