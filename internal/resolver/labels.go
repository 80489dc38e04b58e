package resolver

import (
	"context"
	"hash/maphash"
	"sync"
	"time"
)

// labels counts distinct names below each of some rules: in any minute, at most so
// many of one rule are let through.
type labels struct {
	seed maphash.Seed
	most int

	mu    sync.Mutex // guards rules
	rules map[string]names
}

// names are those of the last minute, by their hashes, as the names can be long,
// with the time they were last let through.
type names map[uint64]time.Time

// maxRules is how many rules are many: they come and go with the policy.
const maxRules = 1024

func newLabels(seed maphash.Seed, most int) *labels {
	return &labels{seed: seed, most: most, rules: map[string]names{}}
}

// count lets a name through, or reports that it cannot be until ctx ends. A name that
// was let through within the last minute is no new one.
func (l *labels) count(ctx context.Context, rule, name string) bool {
	hash := maphash.String(l.seed, name)
	for {
		wait := l.try(rule, hash)
		if wait == 0 {
			return true
		}
		if deadline, ok := ctx.Deadline(); !ok || time.Now().Add(wait).After(deadline) || sleep(ctx, wait) != nil {
			return false
		}
	}
}

// try lets a name through, or returns how long it will be until there is room.
func (l *labels) try(rule string, hash uint64) time.Duration {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.rules[rule]
	if n == nil {
		l.sweep(now)
		n = names{}
		l.rules[rule] = n
	}
	if last, known := n[hash]; (!known || now.Sub(last) >= time.Minute) && len(n) >= l.most {
		oldest := now
		for h, last := range n {
			if now.Sub(last) >= time.Minute {
				delete(n, h)
			} else if last.Before(oldest) {
				oldest = last
			}
		}
		if len(n) >= l.most {
			return max(time.Minute-now.Sub(oldest), time.Millisecond)
		}
	}
	n[hash] = now
	return 0
}

// sweep forgets rules that no name was counted under for a minute, when there are many.
// It must be called with mu held.
func (l *labels) sweep(now time.Time) {
	if len(l.rules) < maxRules {
		return
	}
	for rule, n := range l.rules {
		for h, last := range n {
			if now.Sub(last) >= time.Minute {
				delete(n, h)
			}
		}
		if len(n) == 0 {
			delete(l.rules, rule)
		}
	}
}
