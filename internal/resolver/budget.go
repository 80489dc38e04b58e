package resolver

import (
	"cmp"
	"hash/maphash"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/cordonhq/cordon/internal/policy"
)

// Budget limits what one sandbox may ask for. Zero fields have defaults.
type Budget struct {
	// QueriesPerSecond is the lasting rate, Burst what may come at once; 100 and 300.
	QueriesPerSecond float64
	Burst            int
	// Concurrent is how many queries may be under way; 100.
	Concurrent int
	// Connections is how many TCP connections may be open; 20.
	Connections int
	// LabelsPerMinute is how many distinct names below one wildcard may be asked
	// for within a minute, in strict mode; 100. At up to 250 octets a name it is
	// also the speed of a tunnel below an allowed wildcard.
	LabelsPerMinute int
}

func (b Budget) withDefaults() Budget {
	b.QueriesPerSecond = cmp.Or(b.QueriesPerSecond, 100)
	b.Burst = cmp.Or(b.Burst, 300)
	b.Concurrent = cmp.Or(b.Concurrent, 100)
	b.Connections = cmp.Or(b.Connections, 20)
	b.LabelsPerMinute = cmp.Or(b.LabelsPerMinute, 100)
	return b
}

// forgetAfter is how long an idle sandbox's counters are kept: longer than any
// of them remembers.
const forgetAfter = 2 * time.Minute

// budgets holds the counters of each sandbox.
type budgets struct {
	limits Budget
	seed   maphash.Seed

	mu    sync.Mutex // guards all below
	bySbx map[string]*budget
	swept time.Time
}

func newBudgets(limits Budget) *budgets {
	return &budgets{limits: limits.withDefaults(), seed: maphash.MakeSeed(), bySbx: map[string]*budget{}}
}

// of returns the counters of a sandbox.
func (s *budgets) of(sandbox string) *budget {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.swept) > forgetAfter {
		s.swept = now
		for id, b := range s.bySbx {
			if b.idle(now) {
				delete(s.bySbx, id)
			}
		}
	}
	b, ok := s.bySbx[sandbox]
	if !ok {
		b = &budget{
			limits: s.limits, seed: s.seed,
			rate:  rate.NewLimiter(rate.Limit(s.limits.QueriesPerSecond), s.limits.Burst),
			rules: map[string]*window{}, denied: map[lookupKey]time.Time{},
		}
		s.bySbx[sandbox] = b
	}
	b.touch(now)
	return b
}

// budget is what one sandbox has used.
type budget struct {
	limits Budget
	seed   maphash.Seed
	rate   *rate.Limiter

	mu      sync.Mutex // guards all below
	used    time.Time
	running int
	conns   int
	rules   map[string]*window // by rule ID
	warned  time.Time
	denied  map[lookupKey]time.Time // when the look-ups of denied names began
}

// window counts distinct names within a minute.
type window struct {
	began time.Time
	names map[uint64]struct{} // hashes: the names themselves can be long
}

func (b *budget) touch(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used = now
}

func (b *budget) idle(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.running == 0 && b.conns == 0 && now.Sub(b.used) > forgetAfter
}

// enter takes a query in, or returns why it is one too many. leave must follow
// only if it was taken in.
func (b *budget) enter() policy.Reason {
	if !b.rate.Allow() {
		return ReasonRate
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running >= b.limits.Concurrent {
		return ReasonConcurrency
	}
	b.running++
	return ""
}

func (b *budget) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.running--
}

// open takes a TCP connection in, if there is room.
func (b *budget) open() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conns >= b.limits.Connections {
		return false
	}
	b.conns++
	return true
}

func (b *budget) closed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns--
}

// label counts a name under a rule and reports whether it is within the budget.
// A name that was counted already costs nothing.
func (b *budget) label(rule, name string) bool {
	now := time.Now()
	hash := maphash.String(b.seed, name)
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.rules[rule]
	if w == nil || now.Sub(w.began) >= time.Minute {
		w = &window{began: now, names: map[uint64]struct{}{}}
		b.rules[rule] = w
	}
	if _, known := w.names[hash]; known {
		return true
	}
	if len(w.names) >= b.limits.LabelsPerMinute {
		return false
	}
	w.names[hash] = struct{}{}
	return true
}

// warn reports whether it is time for a line in the log: once a minute.
func (b *budget) warn() bool {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.warned.IsZero() && now.Sub(b.warned) < time.Minute {
		return false
	}
	b.warned = now
	return true
}
