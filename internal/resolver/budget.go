package resolver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/time/rate"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/share"
)

// Budget limits what one sandbox may ask for. Zero fields have defaults. What a
// sandbox asks for beyond the rate or beyond Concurrent waits for a while before it is
// refused; answers that are kept, or given without asking a server, cost nothing.
type Budget struct {
	// QueriesPerSecond is the lasting rate, Burst what may come at once; 100 and 300.
	// The A and the AAAA record of a name are one query.
	QueriesPerSecond float64
	Burst            int
	// Concurrent is how many queries may be asked upstream at a time; 100.
	Concurrent int
	// Waiting is how many queries may be in hand, waiting or not; 1024.
	Waiting int
	// Connections is how many TCP connections may be open; 20.
	Connections int
	// LabelsPerMinute is how many distinct names below one wildcard may leave the host
	// in any minute, in strict mode: asked for, or shown by the proxy; 100. At up to 250
	// octets a name it is also the speed of a tunnel below an allowed wildcard.
	LabelsPerMinute int
}

// perKey is how many times the rate and the names of one sandbox an API key may have,
// over all its sandboxes.
const perKey = 10

// What the server has for all keys, each of which gets a share.
const (
	serverQueries     = 8192 // in hand; each is a goroutine
	serverConcurrent  = 2048 // asked upstream; each is a socket
	serverConnections = 2048 // TCP
)

func (b Budget) withDefaults() Budget {
	b.QueriesPerSecond = cmp.Or(b.QueriesPerSecond, 100)
	b.Burst = cmp.Or(b.Burst, 300)
	b.Concurrent = cmp.Or(b.Concurrent, 100)
	b.Waiting = cmp.Or(b.Waiting, 1024)
	b.Connections = cmp.Or(b.Connections, 20)
	b.LabelsPerMinute = cmp.Or(b.LabelsPerMinute, 100)
	return b
}

// maxWait is how long a query waits for the budget. Clients give up, or ask again,
// after five seconds.
const maxWait = 4 * time.Second

// forgetAfter is how long an idle sandbox's counters are kept: longer than any
// of them remembers.
const forgetAfter = 2 * time.Minute

// refusal is the error of a query beyond a limit.
type refusal struct {
	reason policy.Reason
	limit  string // which one, with its number
}

func (e *refusal) Error() string { return "dns budget: " + e.limit }

// asRefusal makes a refusal of what a gate, a pool or a wait returned; other errors,
// which are the context's, stay what they are.
func asRefusal(reason policy.Reason, err error) error {
	if full, ok := errors.AsType[*share.Full](err); ok {
		return &refusal{reason, full.Error()}
	}
	return err
}

// budgets holds the counters of each sandbox and of each key.
type budgets struct {
	limits  Budget
	seed    maphash.Seed
	keyOf   func(sandbox string) string
	queries *share.Pool  // in hand
	asking  *share.Gate  // upstream
	rates   *share.Rates // queries a second
	conns   *share.Pool  // over TCP

	mu    sync.Mutex // guards all below
	bySbx map[string]*budget
	byKey map[string]*labels
	swept time.Time
}

func newBudgets(limits Budget, keyOf func(string) string) *budgets {
	l := limits.withDefaults()
	if keyOf == nil {
		keyOf = func(string) string { return "" }
	}
	return &budgets{
		limits: l, seed: maphash.MakeSeed(), keyOf: keyOf,
		queries: share.NewPool(share.DNSQueries.Of(serverQueries, int64(l.Waiting))),
		asking:  share.NewGate(share.DNSHandlers.Of(serverConcurrent, 0), serverQueries, maxWait),
		rates:   share.NewRates(share.DNSRate.Of(max(1, int64(perKey*l.QueriesPerSecond)), 0), perKey*l.Burst),
		conns:   share.NewPool(share.DNSConnections.Of(serverConnections, int64(l.Connections))),
		bySbx:   map[string]*budget{}, byKey: map[string]*labels{},
	}
}

// Pools returns the counts of what keys share, for metrics.
func (r *Resolver) Pools() []*share.Pool {
	s := r.budgets
	return []*share.Pool{s.queries, s.asking.Pool(), s.rates.Pool(), s.conns}
}

// of returns the counters of a sandbox.
func (s *budgets) of(sandbox string) *budget {
	now := time.Now()
	s.mu.Lock()
	b, ok := s.bySbx[sandbox]
	s.mu.Unlock()
	if !ok || b.key == "" { // a copy asks before the server knows whose it is
		key := s.keyOf(sandbox) // may look into other parts of the server, which have locks of their own
		s.mu.Lock()
		b = s.add(sandbox, key, now)
		s.mu.Unlock()
	}
	b.touch(now)
	return b
}

// add makes the counters of a sandbox, unless they are there, and forgets idle
// ones; it must be called with mu held.
func (s *budgets) add(sandbox, key string, now time.Time) *budget {
	if now.Sub(s.swept) > forgetAfter {
		s.swept = now
		keys := map[string]bool{}
		for id, b := range s.bySbx {
			if b.idle(now) {
				delete(s.bySbx, id)
			} else {
				keys[b.key] = true
			}
		}
		for k := range s.byKey {
			if !keys[k] {
				delete(s.byKey, k)
			}
		}
	}
	was, ok := s.bySbx[sandbox]
	if ok && (was.key != "" || key == "") {
		return was
	}
	shared := s.byKey[key]
	if shared == nil {
		shared = newLabels(s.seed, perKey*s.limits.LabelsPerMinute)
		s.byKey[key] = shared
	}
	b := &budget{
		limits: s.limits, sandbox: sandbox, key: key, used: now,
		rate:  rate.NewLimiter(rate.Limit(s.limits.QueriesPerSecond), s.limits.Burst),
		slots: make(chan struct{}, s.limits.Concurrent),
		names: newLabels(s.seed, s.limits.LabelsPerMinute), keyNames: shared,
		paid: map[string]*payment{}, denied: map[lookupKey]*lookupSeen{},
	}
	if ok { // its key is known by now
		b.rate, b.slots, b.names = was.rate, was.slots, was.names
	}
	s.bySbx[sandbox] = b
	return b
}

// budget is what one sandbox has used.
type budget struct {
	limits       Budget
	sandbox, key string
	rate         *rate.Limiter
	slots        chan struct{} // one for each query that is asked upstream
	names        *labels
	keyNames     *labels // of all sandboxes of the key

	mu     sync.Mutex // guards all below
	used   time.Time
	calls  int // look-ups that wait or are under way
	paid   map[string]*payment
	warned time.Time
	denied map[lookupKey]*lookupSeen // the look-ups of denied names
}

func (b *budget) touch(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used = now
}

func (b *budget) idle(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls == 0 && now.Sub(b.used) > forgetAfter
}

// begin counts a look-up, if there is room; end must follow then.
func (b *budget) begin() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.calls >= b.limits.Waiting {
		return &refusal{ReasonConcurrency, fmt.Sprintf("%d queries of this sandbox are waiting", b.calls)}
	}
	b.calls++
	return nil
}

func (b *budget) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls--
	b.used = time.Now()
}

// enter waits until a query may be asked upstream and returns what must be called
// when it was. The error is a *refusal, or the context's.
func (s *budgets) enter(ctx context.Context, b *budget, q question) (leave func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	if err := s.pay(ctx, b, q.name, q.qtype); err != nil {
		return nil, err
	}
	select {
	case b.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, &refusal{ReasonConcurrency, fmt.Sprintf("%d queries of this sandbox at a time, and this one waited %s", b.limits.Concurrent, maxWait)}
	}
	give, err := s.asking.Enter(ctx, b.key, b.sandbox)
	if err != nil {
		<-b.slots
		if errors.Is(err, context.DeadlineExceeded) {
			err = &refusal{ReasonConcurrency, fmt.Sprintf("%s: this one waited %s", share.DNSHandlers.What, maxWait)}
		}
		return nil, asRefusal(ReasonConcurrency, err)
	}
	return func() { give(); <-b.slots }, nil
}

// payment is what the queries for a name cost: both address families together one
// query, whichever comes first.
type payment struct {
	types []uint16      // what it was for
	done  chan struct{} // closed when the rest is settled
	err   error
	until time.Time // after which another payment is due
}

const (
	oneLookup   = 2 * time.Second // between the queries of one look-up
	maxPayments = 2048
)

// pay takes a query for a name from the rates, waiting for its turn. The second
// address family of a name just paid for is free.
func (s *budgets) pay(ctx context.Context, b *budget, name string, qtype uint16) error {
	p, settled := b.payment(name, qtype)
	if settled {
		select {
		case <-p.done:
			return p.err
		case <-ctx.Done():
			return b.tooFast()
		}
	}
	p.err = s.take(ctx, b)
	b.mu.Lock()
	p.until = time.Now().Add(oneLookup)
	b.mu.Unlock()
	close(p.done)
	return p.err
}

// payment returns the payment that covers a query, or a new one, which the caller
// has to settle.
func (b *budget) payment(name string, qtype uint16) (p *payment, settled bool) {
	now := time.Now()
	address := func(t uint16) bool { return t == dns.TypeA || t == dns.TypeAAAA }
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.paid[name]; p != nil && len(p.types) == 1 && p.types[0] != qtype && address(p.types[0]) && address(qtype) &&
		(p.until.IsZero() || now.Before(p.until)) {
		p.types = append(p.types, qtype)
		return p, true
	}
	if len(b.paid) >= maxPayments {
		for n, old := range b.paid {
			if !old.until.IsZero() && now.After(old.until) {
				delete(b.paid, n)
			}
		}
	}
	p = &payment{types: []uint16{qtype}, done: make(chan struct{})}
	if len(b.paid) < maxPayments {
		b.paid[name] = p
	}
	return p, false
}

// take takes one query from the rate of the sandbox and from that of its key.
func (s *budgets) take(ctx context.Context, b *budget) error {
	now := time.Now()
	turn := b.rate.ReserveN(now, 1)
	if wait := turn.DelayFrom(now); wait > 0 {
		deadline, _ := ctx.Deadline()
		if !now.Add(wait).Before(deadline) { // at that moment it could go either way
			turn.CancelAt(now)
			return b.tooFast()
		}
		if err := sleep(ctx, wait); err != nil {
			return b.tooFast()
		}
	}
	return asRefusal(ReasonRate, s.rates.Wait(ctx, b.key, 1))
}

func (b *budget) tooFast() error {
	return &refusal{ReasonRate, fmt.Sprintf("%g queries of this sandbox in a second (network.limits.dns_queries), and this one would wait over %s", b.limits.QueriesPerSecond, maxWait)}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// label counts a name below a rule in the windows of the sandbox and of its key. It
// waits if there will be room soon.
func (b *budget) label(ctx context.Context, rule, name string) error {
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	for _, w := range []struct {
		*labels
		whose string
	}{{b.names, "sandbox"}, {b.keyNames, "API key"}} {
		if !w.count(ctx, rule, name) {
			return &refusal{ReasonLabels, fmt.Sprintf("%d different names below %s in a minute, of this %s", w.most, rule, w.whose)}
		}
	}
	return nil
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
