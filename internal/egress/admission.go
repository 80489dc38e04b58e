package egress

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/cordonhq/cordon/internal/share"
)

// admission counts what each sandbox holds and refuses what is over a limit.
// Nothing in it waits: a sandbox at its limit costs the others nothing.
type admission struct {
	open   *share.Pool // connections, by sandbox, key and in all
	memory *share.Pool // buffered for names that are not complete

	mu      sync.Mutex // guards the rest and the fields of each tenant
	tenants map[string]*tenant
}

// Pools returns the counts of what keys share, for metrics.
func (p *Proxy) Pools() []*share.Pool { return []*share.Pool{p.open, p.memory} }

// tenant is what one sandbox holds.
type tenant struct {
	limiter   *rate.Limiter
	flows     map[*flow]struct{}
	pending   int
	idleSince time.Time // when the last flow ended
}

// tenantIdle is how long an empty tenant is kept: its limiter must remember a
// flood of short connections.
const tenantIdle = time.Minute

// admit takes f in and returns "", or the limit that refuses it.
func (p *Proxy) admit(f *flow) (limit string) {
	if p.cfg.Key != nil {
		f.key = p.cfg.Key(f.sandbox)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.tenants[f.sandbox]
	if t == nil {
		t = &tenant{limiter: rate.NewLimiter(rate.Limit(p.lim.NewPerSecond), p.lim.NewPerSecond), flows: map[*flow]struct{}{}}
		p.tenants[f.sandbox] = t
	}
	switch {
	case !t.limiter.Allow():
		return "new connections per second"
	case t.pending >= p.lim.Pending:
		return "connections that show no name"
	}
	if err := p.open.Take(f.key, f.sandbox, 1); err != nil {
		return err.Error()
	}
	t.flows[f] = struct{}{}
	t.pending++
	f.tenant, f.pending = t, true
	return ""
}

// sniffed notes that f is no longer waiting for a name.
func (p *Proxy) sniffed(f *flow) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.pending {
		f.pending = false
		f.tenant.pending--
	}
}

// leave takes f out; f that was never admitted is left alone.
func (p *Proxy) leave(f *flow) {
	if f.tenant == nil {
		return
	}
	p.sniffed(f)
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, in := f.tenant.flows[f]; in {
		delete(f.tenant.flows, f)
		p.open.Give(f.key, f.sandbox, 1)
		f.tenant.idleSince = time.Now()
	}
}

// flowsOf returns the live flows of a sandbox, of all for "".
func (p *Proxy) flowsOf(sandbox string) []*flow {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*flow
	for id, t := range p.tenants {
		if sandbox == "" || id == sandbox {
			for f := range t.flows {
				out = append(out, f)
			}
		}
	}
	return out
}

// forget drops a sandbox's counters once it holds nothing.
func (p *Proxy) forget(sandbox string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.tenants[sandbox]; t != nil && len(t.flows) == 0 {
		delete(p.tenants, sandbox)
	}
}

// sweep drops the counters of sandboxes that have been idle, until ctx ends.
func (p *Proxy) sweep(ctx context.Context) {
	tick := time.NewTicker(tenantIdle)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			p.sweepOnce(now)
		}
	}
}

func (p *Proxy) sweepOnce(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, t := range p.tenants {
		if len(t.flows) == 0 && now.Sub(t.idleSince) >= tenantIdle {
			delete(p.tenants, id)
		}
	}
}

// charge takes n bytes of sniff memory for f, or gives -n back. It reports false,
// and takes nothing, when a limit is reached.
func (f *flow) charge(n int64) bool {
	switch {
	case f.tenant == nil:
		return false
	case n < 0:
		f.p.memory.Give(f.key, f.sandbox, -n)
		return true
	}
	if err := f.p.memory.Take(f.key, f.sandbox, n); err != nil {
		f.overcharged = err.Error()
		return false
	}
	return true
}
