package store

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/share"
)

// history is the kept events in memory, where they are read from, and says which must go
// for a new one. A key loses its own oldest ones when it keeps its share, so a key whose
// sandboxes have many events does not shorten another's history.
type history struct {
	count, bytes share.Resource
	age          time.Duration
	perSandbox   int

	mu   sync.Mutex // guards the rest
	keys map[string]*kept
	used usage
}

// usage is what events take.
type usage struct{ events, bytes int64 }

func (u *usage) add(v usage, sign int64) { u.events += sign * v.events; u.bytes += sign * v.bytes }

// kept are the events of one key, oldest first.
type kept struct {
	events    []keptEvent
	used      usage
	sandboxes map[sandbox.ID]int
}

type keptEvent struct {
	sandbox.Event
	seq    uint64 // in the stream
	size   int64
	former bool // an earlier version put it under its sandbox's name alone
}

// eventOverhead is what the engine and the memory add to an event's JSON, in bytes.
const eventOverhead = 200

func newHistory(cfg Config) *history {
	return &history{
		count: share.Events.Of(cfg.MaxEvents, 0), bytes: share.Events.Of(cfg.MaxEventBytes, 0),
		age: cfg.MaxEventAge, perSandbox: int(cfg.MaxSandboxEvents), keys: map[string]*kept{},
	}
}

// add keeps an event and returns which are not kept any more, of each key.
func (h *history) add(e keptEvent, now time.Time) (dropped map[string][]keptEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	dropped = map[string][]keptEvent{}
	drop := func(key string) {
		k := h.keys[key]
		dropped[key] = append(dropped[key], k.events[0])
		h.remove(key, 0)
	}
	k := h.keys[e.Owner]
	if k == nil {
		k = &kept{sandboxes: map[sandbox.ID]int{}}
		h.keys[e.Owner] = k
	}
	one := usage{1, e.size}
	if h.beyond(k.used, one) && len(k.events) > 0 {
		// A tenth of them at once: each removal is a write to the disk.
		for n := len(k.events)/10 + 1; len(k.events) > 0 && (n > 0 || h.beyond(k.used, one)); n-- {
			drop(e.Owner)
		}
		h.keys[e.Owner] = k
	}
	for h.full(one) { // others hold all, from before keys had shares
		drop(h.largest())
		h.keys[e.Owner] = k
	}
	if k.sandboxes[e.Sandbox] >= h.perSandbox { // the stream drops it by itself
		h.remove(e.Owner, slices.IndexFunc(k.events, func(o keptEvent) bool { return o.Sandbox == e.Sandbox }))
		h.keys[e.Owner] = k
	}
	k.events = append(k.events, e)
	k.used.add(one, 1)
	h.used.add(one, 1)
	k.sandboxes[e.Sandbox]++
	h.expire(now)
	return dropped
}

// beyond reports whether a key that holds some may not have one more.
func (h *history) beyond(held, one usage) bool {
	return held.events+one.events > h.count.Most(held.events, h.used.events) || held.bytes+one.bytes > h.bytes.Most(held.bytes, h.used.bytes)
}

func (h *history) full(one usage) bool {
	return h.used.events > 0 && (h.used.events+one.events > h.count.Whole || h.used.bytes+one.bytes > h.bytes.Whole)
}

func (h *history) largest() (key string) {
	most := int64(-1)
	for name, k := range h.keys {
		if k.used.bytes > most && len(k.events) > 0 {
			key, most = name, k.used.bytes
		}
	}
	return key
}

// remove forgets the i-th event of a key. It needs h.mu.
func (h *history) remove(key string, i int) {
	k := h.keys[key]
	e := k.events[i]
	if i == 0 {
		k.events[0] = keptEvent{} // what it points to can be freed
		k.events = k.events[1:]
	} else {
		k.events = slices.Delete(k.events, i, i+1)
	}
	k.used.add(usage{1, e.size}, -1)
	h.used.add(usage{1, e.size}, -1)
	if k.sandboxes[e.Sandbox]--; k.sandboxes[e.Sandbox] == 0 {
		delete(k.sandboxes, e.Sandbox)
	}
	if len(k.events) == 0 {
		delete(h.keys, key)
	}
}

// expire forgets what is too old; the stream does so by itself.
func (h *history) expire(now time.Time) {
	for key, k := range h.keys {
		for len(k.events) > 0 && !k.events[0].Time.IsZero() && now.Sub(k.events[0].Time) > h.age {
			h.remove(key, 0)
		}
	}
}

// all returns the kept events in the order of the stream.
func (h *history) all(now time.Time) []sandbox.Event {
	h.mu.Lock()
	h.expire(now)
	events := make([]keptEvent, 0, h.used.events)
	for k := range maps.Values(h.keys) {
		events = append(events, k.events...)
	}
	h.mu.Unlock()
	slices.SortFunc(events, func(a, b keptEvent) int { return int(int64(a.seq) - int64(b.seq)) })
	out := make([]sandbox.Event, len(events))
	for i := range events {
		out[i] = events[i].Event
	}
	return out
}
