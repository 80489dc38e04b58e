package resolver

import (
	"sync"
	"time"
)

// Limits of the cache. An answer that is larger than any of use is not kept, so
// that the cache as a whole is bounded: some 40 MB when full of the largest.
const (
	cacheEntries = 10_000
	cacheLargest = 4 << 10
)

// cache keeps the upstreams' answers for all sandboxes. What an individual one
// may have of an answer is decided after.
type cache struct {
	mu      sync.Mutex // guards entries
	entries map[question]*answers
}

func newCache() *cache { return &cache{entries: map[question]*answers{}} }

func (c *cache) get(q question) (*answers, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.entries[q]
	if ok && !time.Now().Before(a.expires) {
		delete(c.entries, q)
		return nil, false
	}
	return a, ok
}

func (c *cache) put(q question, a *answers) {
	if a.size > cacheLargest {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.entries[q]; !known && len(c.entries) >= cacheEntries {
		c.evict()
	}
	c.entries[q] = a
}

// evict drops the soonest to expire of a few entries that the map's order, which
// is random, brings up; it must be called with mu held.
func (c *cache) evict() {
	var victim question
	var soonest time.Time
	looked := 0
	for q, a := range c.entries {
		if looked == 0 || a.expires.Before(soonest) {
			victim, soonest = q, a.expires
		}
		if looked++; looked == 16 {
			break
		}
	}
	delete(c.entries, victim)
}
