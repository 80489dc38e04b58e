package share

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rates bounds how often each key may do something. Every key has a bucket of its
// own, so the resource's Whole is what one key may do in a second.
type Rates struct {
	r       Resource
	burst   int
	pool    *Pool // of nothing; it counts the refusals
	mu      sync.Mutex
	buckets map[string]*bucket
	swept   time.Time
}

type bucket struct {
	*rate.Limiter
	used time.Time
}

// rememberBucket is how long an unused bucket is kept. A bucket is full again after
// burst/Whole seconds, which must be less.
const rememberBucket = 2 * time.Minute

// NewRates returns buckets that refill with r.Whole a second and hold burst.
func NewRates(r Resource, burst int) *Rates {
	return &Rates{r: r, burst: burst, pool: NewPool(r), buckets: map[string]*bucket{}}
}

// Pool returns the count of refusals, for metrics.
func (s *Rates) Pool() *Pool { return s.pool }

// Allow takes n from the key's bucket, or takes nothing and returns how long the
// key has to wait for them and a [*Full].
func (s *Rates) Allow(key string, n int) (time.Duration, error) {
	now := time.Now()
	r := s.of(key, now).ReserveN(now, n)
	if r.OK() && r.DelayFrom(now) == 0 {
		return 0, nil
	}
	s.pool.refuse(Key)
	full := &Full{s.r, Key, s.r.Whole}
	if !r.OK() {
		return rememberBucket, full
	}
	wait := r.DelayFrom(now)
	r.CancelAt(now)
	return wait, full
}

func (s *Rates) of(key string, now time.Time) *rate.Limiter {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.swept) > rememberBucket {
		s.swept = now
		for k, b := range s.buckets {
			if now.Sub(b.used) > rememberBucket {
				delete(s.buckets, k)
			}
		}
	}
	b := s.buckets[key]
	if b == nil {
		b = &bucket{Limiter: rate.NewLimiter(rate.Limit(s.r.Whole), s.burst)}
		s.buckets[key] = b
	}
	b.used = now
	return b.Limiter
}
