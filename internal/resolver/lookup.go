package resolver

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// call is a look-up under way: of one sandbox, never shared with another, as it
// would tell one what the other asks.
type call struct {
	done  chan struct{} // closed when the rest is set
	found *answers
	err   error
}

// asking is a question with what it is judged and charged by.
type asking struct {
	question
	owner string // the host name that rules list
	rule  string // the wildcard whose names are counted; empty for none
}

// lookup answers a question from the cache or from the upstreams. Equal questions of a
// sandbox are asked and charged once, however many wait for the answer.
func (r *Resolver) lookup(ctx context.Context, q asking) (*answers, error) {
	if a, ok := r.cache.get(q.question); ok {
		return a, nil
	}
	c, err := r.join(ctx, q)
	if err != nil {
		return nil, err
	}
	select {
	case <-c.done:
		return c.found, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// join returns the call for a question, which it begins if there is none.
func (r *Resolver) join(ctx context.Context, q asking) (*call, error) {
	b := r.budgets.of(q.sandbox)
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.calls[q.question]; ok {
		return c, nil
	}
	if err := b.begin(); err != nil {
		return nil, err
	}
	c := &call{done: make(chan struct{})}
	r.calls[q.question] = c
	// The call outlives the one that began it: others may be waiting.
	ctx = context.WithoutCancel(ctx)
	go func() {
		c.found, c.err = r.run(ctx, b, q)
		r.mu.Lock()
		delete(r.calls, q.question)
		r.mu.Unlock()
		b.end()
		close(c.done)
	}()
	return c, nil
}

// run pays for a question, asks it, and keeps the answer.
func (r *Resolver) run(ctx context.Context, b *budget, q asking) (*answers, error) {
	if q.rule != "" {
		if err := b.label(ctx, q.rule, q.name); err != nil {
			return nil, err
		}
	}
	leave, err := r.budgets.enter(ctx, b, q.question)
	if err != nil {
		return nil, err
	}
	defer leave()
	// It may have waited for seconds, and the rules may be others now.
	if p, ok := r.cfg.Policy(q.sandbox); !ok || !judge(p, q.name, q.owner).Allow {
		return nil, &deniedError{}
	}
	ctx, cancel := context.WithTimeout(ctx, totalTimeout)
	defer cancel()
	a, err := r.exchange(ctx, q.question)
	if err != nil {
		return nil, err
	}
	r.cache.put(q.question, a)
	return a, nil
}

// deniedError is the error of a question that the rules deny by now.
type deniedError struct{}

func (*deniedError) Error() string { return "the sandbox's rules deny the name since it was asked for" }

// How long an address that was found waits for the other family's answer (RFC 8305
// section 3 calls it the resolution delay), and how often the wait is looked at.
const (
	otherFamily = 300 * time.Millisecond
	lookAgain   = 50 * time.Millisecond
)

// lookupAddress is lookup for A and AAAA. Programs wait for both answers, and a C
// library fails when one of them does; so where a name has an address of one family,
// an upstream's failure to answer for the other is no data.
func (r *Resolver) lookupAddress(ctx context.Context, q asking) (*answers, error) {
	if !r.cfg.IPv6 { // then nothing asks for AAAA
		return r.lookup(ctx, q)
	}
	other := q
	other.qtype = dns.TypeA
	if q.qtype == dns.TypeA {
		other.qtype = dns.TypeAAAA
	}
	found, err := r.lookupBefore(ctx, q, other.question)
	if err == nil && found.rcode == dns.RcodeSuccess {
		return found, nil
	}
	switch err.(type) { //nolint:errorlint // they are never wrapped
	case *refusal, *deniedError:
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, err
	}
	if a, failed := r.lookup(ctx, other); failed == nil && len(a.addrs()) > 0 {
		return noData(a), nil
	}
	return found, err
}

// lookupBefore is lookup, but a question for AAAA waits no longer than otherFamily
// once the A record is known.
func (r *Resolver) lookupBefore(ctx context.Context, q asking, other question) (*answers, error) {
	if a, ok := r.cache.get(q.question); ok {
		return a, nil
	}
	if q.qtype != dns.TypeAAAA {
		return r.lookup(ctx, q)
	}
	c, err := r.join(ctx, q)
	if err != nil {
		return nil, err
	}
	t := time.NewTimer(otherFamily)
	defer t.Stop()
	for {
		select {
		case <-c.done:
			return c.found, c.err
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-t.C:
			if a, ok := r.cache.get(other); ok && len(a.addrs()) > 0 {
				return noData(a), nil
			}
			t.Reset(lookAgain)
		}
	}
}

// noData is the answer for one family of a name that has an address of the other.
func noData(a *answers) *answers {
	return &answers{rcode: dns.RcodeSuccess, upstream: a.upstream, stored: a.stored, expires: time.Now().Add(minTTL)}
}

// budgetRule returns the rule below which distinct names are counted, or "" for none: a
// wildcard that the name matched, or any rule when the name has attribute labels, which
// the sandbox can choose freely. "*" lists every name, so nothing is smuggled past it.
func budgetRule(p *policy.Compiled, owner string, attribute bool, listed policy.Rule) string {
	if p.DNS() != policy.DNSStrict || p.Mode() == policy.ModeObserve {
		return ""
	}
	rule, wild := p.WildcardOf(owner)
	switch {
	case wild && rule.Text == "*":
		return ""
	case wild:
		return cutPort(rule.Text)
	case attribute:
		return cutPort(listed.Text)
	}
	return ""
}

// cutPort is a rule without its port: rules for several ports of one name are one
// way for names to leave.
func cutPort(rule string) string {
	name, _, _ := strings.Cut(rule, ":")
	return strings.ToLower(name)
}

// exhausted is err as callers outside the package see it.
func exhausted(err error) error {
	if over, ok := errors.AsType[*refusal](err); ok {
		return errs.Wrap(errs.Exhausted, err, "%s", over.Error())
	}
	return err
}

// chargeShown counts a name that leaves the host in a connection below its wildcard, like a
// question for it, unless the sandbox asked for it a moment ago.
func (r *Resolver) chargeShown(ctx context.Context, p *policy.Compiled, sandbox, name string) error {
	rule := budgetRule(p, name, false, policy.Rule{})
	if rule == "" {
		return nil
	}
	return exhausted(r.budgets.of(sandbox).label(ctx, rule, name))
}

// Has reports whether a name still has an address that a sandbox was told, by the
// answer that is kept or by asking again, and for how long that answer counts. An error
// means that it could not be found out.
func (r *Resolver) Has(ctx context.Context, sandbox, name string, addr netip.Addr) (ttl time.Duration, has bool, err error) {
	p, ok := r.cfg.Policy(sandbox)
	if !ok {
		return 0, false, errs.New(errs.NotFound, "sandbox %s is not known to the resolver", sandbox)
	}
	if !p.DecideQuery(name).Allow || !p.AnswerAllowed(name, addr) {
		return 0, false, nil
	}
	q := asking{question{sandbox, name, dns.TypeA}, name, budgetRule(p, name, false, policy.Rule{})}
	if addr.Is6() {
		q.qtype = dns.TypeAAAA
	}
	found, err := r.lookup(ctx, q)
	if err != nil {
		return 0, false, exhausted(err)
	}
	return time.Until(found.expires), slices.Contains(found.addrs(), addr), nil
}
