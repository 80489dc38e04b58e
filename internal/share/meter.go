package share

import (
	"maps"
	"sync"
)

// Meter counts a resource whose use is measured, such as memory, and not taken and given
// back. To what was measured last it adds what was promised since and is not in use yet.
type Meter struct {
	pool *Pool
	// promised is what was promised to each key. Guarded by pool.mu.
	promised map[string]int64
}

// NewMeter returns a meter of a resource that has a size.
func NewMeter(r Resource) *Meter { return &Meter{pool: NewPool(r), promised: map[string]int64{}} }

// Pool returns the count, for metrics.
func (m *Meter) Pool() *Pool { return m.pool }

// Measured replaces what was measured before: what all hold, and what each key does.
func (m *Meter) Measured(all int64, keys map[string]int64) {
	p := m.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used, p.keys = all, maps.Clone(keys)
	if p.keys == nil {
		p.keys = map[string]int64{}
	}
	for key, n := range m.promised {
		p.used += n
		p.keys[key] += n
	}
}

// MeasuredOne is Measured where one key was looked at only; the others hold the rest.
func (m *Meter) MeasuredOne(all int64, key string, held int64) {
	p := m.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used, p.keys[key] = all, held+m.promised[key]
	for _, n := range m.promised {
		p.used += n
	}
}

// Resize changes how much there is.
func (m *Meter) Resize(whole int64) {
	m.pool.mu.Lock()
	defer m.pool.mu.Unlock()
	m.pool.r.Whole = whole
}

// Promise holds n for key until the function that it returns is called: when they are in
// use and will be measured, or when they are not wanted any more. The error is a [*Full].
func (m *Meter) Promise(key string, n int64) (release func(), err error) {
	p := m.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if full := p.take(key, "", n); full != nil {
		p.refuse(full.Scope)
		return nil, full
	}
	m.promised[key] += n
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.give(key, "", n)
		if m.promised[key] -= n; m.promised[key] <= 0 {
			delete(m.promised, key)
		}
	}), nil
}
