package share

import (
	"context"
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

// Wait takes n from the key's bucket as soon as it holds them; callers are served in the
// order they came. The error is a [*Full] when that would not be before ctx's deadline, else the
// context's.
func (s *Rates) Wait(ctx context.Context, key string, n int) error {
	now := time.Now()
	r := s.of(key, now).ReserveN(now, n)
	wait := r.DelayFrom(now)
	deadline, bounded := ctx.Deadline()
	if !r.OK() || bounded && wait > 0 && !now.Add(wait).Before(deadline) {
		r.CancelAt(now)
		s.pool.refuse(Key)
		return &Full{s.r, Key, s.r.Whole}
	}
	if wait == 0 {
		return nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		r.Cancel()
		return ctx.Err()
	}
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
