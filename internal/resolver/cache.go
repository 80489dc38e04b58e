package resolver

import (
	"sync"
	"time"
)

// Limits of the cache. An answer that is larger than any of use is not kept, so
// that the cache as a whole is bounded: some 40 MB when full of the largest.
const (
	cacheEntries = 10_000
	cacheShare   = 1_000 // of them for one sandbox
	cacheLargest = 4 << 10
)

// cache keeps the upstreams' answers, for each sandbox those to its own questions.
type cache struct {
	mu     sync.Mutex // guards what follows
	shares map[string]map[question]*answers
	size   int // of all shares
}

func newCache() *cache { return &cache{shares: map[string]map[question]*answers{}} }

func (c *cache) get(q question) (*answers, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.shares[q.sandbox][q]
	if ok && !time.Now().Before(a.expires) {
		c.drop(q)
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
	if _, known := c.shares[q.sandbox][q]; !known {
		switch {
		case len(c.shares[q.sandbox]) >= cacheShare:
			c.evict(q.sandbox)
		case c.size >= cacheEntries:
			for sandbox := range c.shares { // the map's order is random
				c.evict(sandbox)
				break
			}
		}
		c.size++
	}
	if c.shares[q.sandbox] == nil {
		c.shares[q.sandbox] = map[question]*answers{}
	}
	c.shares[q.sandbox][q] = a
}

// drop forgets an entry that is there; it must be called with mu held.
func (c *cache) drop(q question) {
	delete(c.shares[q.sandbox], q)
	c.size--
	if len(c.shares[q.sandbox]) == 0 {
		delete(c.shares, q.sandbox)
	}
}

// evict drops the soonest to expire of a few entries of a sandbox that the map's
// order brings up; it must be called with mu held.
func (c *cache) evict(sandbox string) {
	var victim question
	var soonest time.Time
	looked := 0
	for q, a := range c.shares[sandbox] {
		if looked == 0 || a.expires.Before(soonest) {
			victim, soonest = q, a.expires
		}
		if looked++; looked == 16 {
			break
		}
	}
	c.drop(victim)
}
