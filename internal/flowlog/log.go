package flowlog

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
)

// Config says how much a Log keeps. Zero fields take the defaults named.
type Config struct {
	PerSandbox    int // events kept of one sandbox; 4096
	Total         int // events kept of all sandboxes; 65,536
	FollowerQueue int // events that wait for one slow follower; 1024
	// Owner returns the API key whose sandbox it is, "" while that is not known; nil: all
	// are one key's. It must answer from memory and not call the log.
	Owner func(sandbox string) string
	// Metrics is where the counters are registered; nil: nowhere.
	Metrics prometheus.Registerer
}

// What a sandbox chose (names, request lines) is cut to these lengths, in octets.
const (
	maxName   = 255
	maxDetail = 512
)

// defaultLimit is how many events a Filter without a Limit selects.
const defaultLimit = 1000

// Log is the bounded record of verdicts. It is safe for concurrent use.
//
// Events are immutable once recorded and shared by pointer, so that readers hold
// the lock only for a copy of pointers and a Record waits for nothing longer.
type Log struct {
	cfg      Config
	counters *counters

	mu        sync.Mutex // guards all below
	seq       uint64
	kept      int // events in all rings
	rings     map[string]*ring
	owners    map[string]*owned    // by API key
	gone      map[string]time.Time // sandboxes forgotten lately
	swept     time.Time            // when gone was looked through
	followers map[*follower]struct{}
}

var _ Recorder = (*Log)(nil)

// New returns an empty log.
func New(c Config) (*Log, error) {
	c.PerSandbox = cmp.Or(c.PerSandbox, 4096)
	c.Total = cmp.Or(c.Total, 65536)
	c.FollowerQueue = cmp.Or(c.FollowerQueue, 1024)
	if c.PerSandbox < 0 || c.Total < 0 || c.FollowerQueue < 0 {
		return nil, fmt.Errorf("flow log sizes must be positive: per sandbox %d, total %d, queue %d", c.PerSandbox, c.Total, c.FollowerQueue)
	}
	counters, err := newCounters(c.Metrics)
	if err != nil {
		return nil, fmt.Errorf("register flow counters: %w", err)
	}
	return &Log{
		cfg:      c,
		counters: counters,
		// Sequence numbers go on over a restart, so that a follower that comes
		// back with the last one it saw misses nothing: the clock is ahead of
		// them below 100,000 events a second, and JavaScript reads them exactly
		// (under 2^53) until the year 4800.
		seq:       uint64(time.Now().Unix()) * 100_000,
		rings:     map[string]*ring{},
		owners:    map[string]*owned{},
		gone:      map[string]time.Time{},
		followers: map[*follower]struct{}{},
	}, nil
}

// Record implements Recorder. A zero Time becomes now.
func (l *Log) Record(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time = e.Time.UTC()
	e.Name = printable(e.Name, maxName)
	e.Detail = printable(e.Detail, maxDetail)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	e.Seq = l.seq
	l.keep(&e)
	l.counters.count(&e)
	for f := range l.followers {
		if f.filter.matches(&e) && !f.offer(&e) {
			l.counters.lost.Inc()
		}
	}
}

// Lost counts n verdicts that a recorder had to drop before it could Record
// them, for example because the kernel's log buffer was full.
func (l *Log) Lost(n uint64) { l.counters.lost.Add(float64(n)) }

// Events returns the kept events that match f, oldest first.
func (l *Log) Events(f Filter) []Event {
	l.mu.Lock()
	found := l.copyRings(f.Sandbox)
	l.mu.Unlock()
	return values(f.choose(found))
}

// late is how long after its sandbox's end an event may still come: the kernel
// reports the end of a flow when its tracker gives it up.
const late = 10 * time.Minute

// Forget drops what is kept of a sandbox that has ended, and keeps nothing more of
// it: what still comes is counted and sent to followers, who keep what they were sent.
func (l *Log) Forget(sandbox string) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone[sandbox] = now
	if now.Sub(l.swept) > late {
		l.swept = now
		maps.DeleteFunc(l.gone, func(_ string, at time.Time) bool { return now.Sub(at) > late })
	}
	if r, ok := l.rings[sandbox]; ok {
		l.leave(r)
		l.kept -= r.len()
		delete(l.rings, sandbox)
	}
}

// owned is what the log keeps of one key's sandboxes.
type owned struct{ rings, kept int }

// enter counts a ring, with what is in it, for the key that its sandbox is of.
func (l *Log) enter(r *ring, owner string) {
	o := l.owners[owner]
	if o == nil {
		o = &owned{}
		l.owners[owner] = o
	}
	r.owner, r.of = owner, o
	o.rings++
	o.kept += r.len()
}

func (l *Log) leave(r *ring) {
	r.of.rings--
	r.of.kept -= r.len()
	if r.of.rings == 0 {
		delete(l.owners, r.owner)
	}
}

// ring returns the sandbox's ring, counted for its key as soon as that is known.
func (l *Log) ring(sandbox string) *ring {
	r, ok := l.rings[sandbox]
	if ok && r.owner != "" {
		return r
	}
	owner := ""
	if l.cfg.Owner != nil {
		owner = l.cfg.Owner(sandbox)
	}
	switch {
	case !ok:
		r = &ring{}
		l.rings[sandbox] = r
		l.enter(r, owner)
	case owner != "":
		l.leave(r)
		l.enter(r, owner)
	}
	return r
}

// drop drops a ring's oldest event.
func (l *Log) drop(r *ring) {
	r.drop()
	r.of.kept--
	l.kept--
}

// keep puts e into its sandbox's ring. At the total cap the key that has most pays with
// the oldest event of its largest ring, so a key with many noisy sandboxes cannot push
// another's events out of the log. The sandbox whose event it is pays itself where it has
// more than its part of its key's, which needs no search.
func (l *Log) keep(e *Event) {
	if _, gone := l.gone[e.Sandbox]; gone {
		return // nothing would ever drop it
	}
	r := l.ring(e.Sandbox)
	for r.len() >= l.cfg.PerSandbox || (l.kept >= l.cfg.Total && r.of.kept > l.cfg.Total/len(l.owners) && r.len() > r.of.kept/r.of.rings) {
		l.drop(r)
	}
	for l.kept >= l.cfg.Total {
		name, largest := l.largest()
		l.drop(largest)
		if largest.len() == 0 && largest != r {
			l.leave(largest)
			delete(l.rings, name)
		}
	}
	r.push(e)
	r.of.kept++
	l.kept++
}

// largest is the largest ring of the key that has most.
func (l *Log) largest() (string, *ring) {
	var name string
	var largest *ring
	for n, r := range l.rings {
		if largest == nil || r.of.kept > largest.of.kept || r.of == largest.of && r.len() > largest.len() {
			name, largest = n, r
		}
	}
	return name, largest
}

// copyRings returns the kept events of one sandbox in order, or of all in no order.
func (l *Log) copyRings(sandbox string) []*Event {
	if sandbox != "" {
		r, ok := l.rings[sandbox]
		if !ok {
			return nil
		}
		return r.appendTo(nil)
	}
	all := make([]*Event, 0, l.kept)
	for _, r := range l.rings {
		all = r.appendTo(all)
	}
	return all
}

// choose keeps what f selects of found, sorted, the newest Limit of them.
func (f Filter) choose(found []*Event) []*Event {
	found = slices.DeleteFunc(found, func(e *Event) bool { return !f.matches(e) })
	slices.SortFunc(found, func(a, b *Event) int { return cmp.Compare(a.Seq, b.Seq) })
	limit := f.Limit
	if limit <= 0 {
		limit = defaultLimit
	}
	return found[max(0, len(found)-limit):]
}

func (f Filter) matches(e *Event) bool {
	return (f.Sandbox == "" || f.Sandbox == e.Sandbox) &&
		(f.Verdict == "" || f.Verdict == e.Verdict) && e.Seq > f.Since
}

func values(events []*Event) []Event {
	out := make([]Event, len(events))
	for i, e := range events {
		out[i] = *e
	}
	return out
}

// ring is a queue over a slice that grows as needed: a sandbox with ten flows
// holds ten pointers. The newest event is the last; dropped ones are in front.
type ring struct {
	events []*Event
	head   int // events[:head] are dropped and nil

	owner string // the API key whose sandbox it is; "" while that is not known
	of    *owned // its key's
}

func (r *ring) len() int { return len(r.events) - r.head }

func (r *ring) push(e *Event) {
	if r.head > 0 && len(r.events) == cap(r.events) && r.head >= len(r.events)/2 {
		n := copy(r.events, r.events[r.head:])
		clear(r.events[n:])
		r.events, r.head = r.events[:n], 0
	}
	r.events = append(r.events, e)
}

func (r *ring) drop() {
	r.events[r.head] = nil
	r.head++
}

func (r *ring) appendTo(to []*Event) []*Event { return append(to, r.events[r.head:]...) }

// follower is one reader of new events.
type follower struct {
	filter Filter
	queue  chan queued
	missed uint64 // since the last event that found room; guarded by Log.mu
}

type queued struct {
	event  *Event
	missed uint64 // events lost just before this one
}

// offer queues e unless the follower is too far behind.
func (f *follower) offer(e *Event) bool {
	select {
	case f.queue <- queued{e, f.missed}:
		f.missed = 0
		return true
	default:
		f.missed++
		return false
	}
}

// Follow sends the events that match f, first the kept ones, then new ones as
// they come, until ctx ends; then the channel is closed. A follower that does not
// keep up loses events, and sees how many in the next event's Detail.
func (l *Log) Follow(ctx context.Context, f Filter) <-chan Event {
	fo := &follower{filter: f, queue: make(chan queued, l.cfg.FollowerQueue)}
	l.mu.Lock()
	kept := l.copyRings(f.Sandbox) // and from here on, every new one: no gap, none twice
	l.followers[fo] = struct{}{}
	l.mu.Unlock()

	out := make(chan Event)
	go l.feed(ctx, fo, feeding{f.choose(kept), out})
	return out
}

// feeding is what one follower's goroutine sends first, and where to.
type feeding struct {
	kept []*Event
	out  chan<- Event
}

// feed runs until ctx ends.
func (l *Log) feed(ctx context.Context, fo *follower, to feeding) {
	defer close(to.out)
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.followers, fo)
	}()
	for _, e := range to.kept {
		select {
		case to.out <- *e:
		case <-ctx.Done():
			return
		}
	}
	to.kept = nil
	for {
		select {
		case q := <-fo.queue:
			select {
			case to.out <- q.value():
			case <-ctx.Done():
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

func (q queued) value() Event {
	e := *q.event
	if q.missed > 0 {
		e.Detail = strings.TrimSpace(fmt.Sprintf("(%d events lost before this one) %s", q.missed, e.Detail))
	}
	return e
}

// printable returns its own copy of s, cut to max octets, with what a terminal
// would act on replaced. The copy matters: s may be a piece of a large buffer
// that the log would otherwise keep alive.
func printable(s string, max int) string {
	if s == "" {
		return ""
	}
	if len(s) > max {
		s = s[:max-3] + "..."
	}
	if plain(s) { // nearly all are
		return strings.Clone(s)
	}
	return strings.Clone(strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s))
}

// plain reports whether s is printable ASCII.
func plain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
