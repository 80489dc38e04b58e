// Package resolver answers the DNS queries of sandboxes: it is the only DNS server that
// they can reach. It judges the one question of each
// message, asks the operator's servers with a fresh message of its own, removes
// from the answer what would lead a sandbox astray, pins addresses for rules that
// name a port, and keeps every sandbox within a budget.
//
// Nothing of a sandbox's message but the judged name and type ever leaves the
// host: not its ID, its options, the case of its letters, nor a second record.
package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// The reasons the resolver adds to those of package policy.
const (
	ReasonLocal       policy.Reason = "local"             // answered without asking a server
	ReasonQueryType   policy.Reason = "query-type"        // a type, class or opcode that is not served
	ReasonBadName     policy.Reason = "bad-name"          // not a name that a host can have
	ReasonMalformed   policy.Reason = "malformed"         // not one well-formed question
	ReasonRebinding   policy.Reason = "rebinding"         // every address of the answer is always blocked
	ReasonRate        policy.Reason = "budget-queries"    // too many queries a second
	ReasonLabels      policy.Reason = "budget-labels"     // too many names below one rule in a minute
	ReasonConcurrency policy.Reason = "budget-concurrent" // too many queries or connections at once
	ReasonPins        policy.Reason = "budget-pins"       // too many addresses pinned for rules with a port
	ReasonUpstream    policy.Reason = "upstream"          // no upstream answered
)

// Config is what a Resolver needs. Owner, Policy, Upstreams, Flows and Log are required.
type Config struct {
	// Owner returns the sandbox that a source address belongs to, and its policy.
	Owner func(netip.Addr) (sandbox string, p *policy.Compiled, ok bool)
	// Policy returns the policy in force of a sandbox, for Resolve.
	Policy func(sandbox string) (*policy.Compiled, bool)
	// Key returns the API key that a sandbox belongs to, whose sandboxes share budgets;
	// nil: all are of one key.
	Key func(sandbox string) string
	// Upstreams are the servers to ask, in order of preference, over UDP and TCP.
	Upstreams []netip.AddrPort
	// Pin opens ports of an address to a sandbox, because name was just answered
	// with it; ttl is the life of the answer. An error of kind errs.Exhausted refuses
	// the question. Nil: rules with ports open nothing.
	Pin func(Pin) error
	// Dial reaches the upstreams; nil dials from this process's own namespace.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// IPv6 says whether the host can reach the IPv6 internet. If it cannot, no
	// sandbox is told an IPv6 address.
	IPv6 bool
	// Denial is how a denied name is answered; "" is DenialNoData.
	Denial Denial
	Budget Budget
	Flows  flowlog.Recorder
	Log    *slog.Logger
}

// Pin is an address that a name was answered with, and the ports to open there.
type Pin struct {
	Sandbox string
	Name    string // canonical
	Addr    netip.Addr
	Ports   []policy.PinPort
	TTL     time.Duration
}

// Resolver answers sandboxes' DNS queries. It is safe for concurrent use.
type Resolver struct {
	cfg     Config
	servers []*server // in the order of preference
	cache   *cache
	budgets *budgets

	mu    sync.Mutex // guards calls
	calls map[question]*call
}

// New returns a resolver; ServeUDP and ServeTCP make it answer.
func New(cfg Config) (*Resolver, error) {
	if cfg.Owner == nil || cfg.Policy == nil || cfg.Flows == nil || cfg.Log == nil {
		return nil, errors.New("resolver: Owner, Policy, Flows and Log are required")
	}
	if len(cfg.Upstreams) == 0 {
		return nil, errs.New(errs.Invalid, "dns.upstreams is empty: name at least one server, for example 8.8.8.8:53")
	}
	for _, u := range cfg.Upstreams {
		if !u.IsValid() || u.Port() == 0 {
			return nil, errs.New(errs.Invalid, "dns.upstreams holds %q: use an IP address and a port, for example 8.8.8.8:53", u)
		}
	}
	var err error
	if cfg.Denial, err = ParseDenial(string(cfg.Denial)); err != nil {
		return nil, err
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	cfg.Upstreams = slices.Clone(cfg.Upstreams)
	return &Resolver{cfg: cfg, servers: newServers(cfg.Upstreams), cache: newCache(), budgets: newBudgets(cfg.Budget, cfg.Key), calls: map[question]*call{}}, nil
}

// Resolve returns the addresses of a canonical name for the egress proxy to
// dial, those that AnswerAllowed lets through; IPv4 first. Whether the sandbox may
// use the name is the proxy's to judge. The name counts as one that leaves the host,
// and a look-up that goes upstream is charged like a sandbox's own; an error of kind
// errs.Exhausted names the limit.
func (r *Resolver) Resolve(ctx context.Context, sandbox, name string) ([]netip.Addr, error) {
	p, ok := r.cfg.Policy(sandbox)
	if !ok {
		return nil, errs.New(errs.NotFound, "sandbox %s is not known to the resolver", sandbox)
	}
	if p.IsSelf(name) {
		return []netip.Addr{policy.ServiceAddr4}, nil
	}
	if err := r.chargeShown(ctx, p, sandbox, name); err != nil {
		return nil, err
	}
	all, err := r.addresses(ctx, sandbox, name)
	var usable []netip.Addr
	for _, a := range all {
		if p.AnswerAllowed(name, a) {
			usable = append(usable, a)
		}
	}
	switch {
	case len(usable) > 0:
		return usable, nil
	case len(all) > 0:
		return nil, errs.New(errs.Forbidden, "%s resolves to %s only, which no sandbox may reach", name, all[0])
	case err != nil:
		return nil, fmt.Errorf("resolve %s: %w", name, exhausted(err))
	}
	return nil, errs.New(errs.NotFound, "%s has no address", name)
}

// addresses looks a name's addresses up, IPv4 first, both families at the same time.
func (r *Resolver) addresses(ctx context.Context, sandbox, name string) ([]netip.Addr, error) {
	type result struct {
		addrs []netip.Addr
		err   error
	}
	look := func(qtype uint16) result {
		a, err := r.lookupAddress(ctx, asking{question: question{sandbox, name, qtype}, owner: name})
		if err != nil {
			return result{err: err}
		}
		return result{addrs: a.addrs()}
	}
	if !r.cfg.IPv6 {
		four := look(dns.TypeA)
		return four.addrs, four.err
	}
	if six, ok := r.cache.get(question{sandbox, name, dns.TypeAAAA}); ok { // the rule: no goroutine then
		four := look(dns.TypeA)
		return append(four.addrs, six.addrs()...), four.err
	}
	six := make(chan result, 1)
	go func() { six <- look(dns.TypeAAAA) }()
	four, late := look(dns.TypeA), <-six
	return append(four.addrs, late.addrs...), errors.Join(four.err, late.err)
}

// transport says how a query came in.
type transport struct {
	proto policy.Proto   // TCP or UDP
	src   netip.AddrPort // the sandbox
	dst   netip.AddrPort // the server it addressed
}

// query is one message on its way through the resolver.
type query struct {
	transport
	sandbox string
	policy  *policy.Compiled
	began   time.Time
	msg     *dns.Msg // nil when it could not be read
	name    string   // canonical, or as good as it gets
	size    int      // of the message
}

// outcome is what a query came to: the reply and the line in the log.
type outcome struct {
	reply    *dns.Msg // nil: say nothing
	verdict  policy.Verdict
	failed   bool
	upstream netip.AddrPort
	detail   string // beside the code of the reply
}

// answer judges one message and returns the reply, packed, or nil for none. It
// blocks for as long as the upstreams take.
func (r *Resolver) answer(ctx context.Context, t transport, wire []byte) []byte {
	sandbox, p, ok := r.cfg.Owner(t.src.Addr().Unmap())
	if !ok {
		r.cfg.Log.Debug("dns query from an address of no sandbox", "src", t.src, "dst", t.dst)
		return nil
	}
	q := &query{transport: t, sandbox: sandbox, policy: p, began: time.Now(), size: len(wire)}
	b := r.budgets.of(sandbox)
	if err := r.budgets.queries.Take(b.key, sandbox, 1); err != nil {
		return r.finish(q, b, r.overBudget(q, b, wire, err))
	}
	out := r.decide(ctx, q, b, wire)
	r.budgets.queries.Give(b.key, sandbox, 1)
	return r.finish(q, b, out)
}

// overBudget refuses a message without reading more than its question.
func (r *Resolver) overBudget(q *query, b *budget, wire []byte, full error) outcome {
	if out, done := q.read(wire); done {
		return out
	}
	return r.refuseBudget(q, b, policy.Rule{ID: "dns", Text: "budget"}, asRefusal(ReasonConcurrency, full))
}

// refuseBudget refuses a query beyond a limit, and says which one it is. REFUSED lets
// clients ask again later.
func (r *Resolver) refuseBudget(q *query, b *budget, rule policy.Rule, err error) outcome {
	var over *refusal
	if !errors.As(err, &over) {
		over = &refusal{ReasonConcurrency, err.Error()}
	}
	if b.warn() {
		r.cfg.Log.Warn("dns budget reached", "sandbox", q.sandbox, "key", b.key, "host", q.name, "reason", over.reason, "limit", over.limit)
	}
	out := outcome{verdict: policy.Verdict{Rule: rule, Reason: over.reason}, detail: over.limit}
	if q.msg != nil { // else it is a connection
		out.reply = q.reply(dns.RcodeRefused)
		q.explain(out.reply, dns.ExtendedErrorCodeOther, over.Error())
	}
	return out
}

// decide reads and judges a message.
func (r *Resolver) decide(ctx context.Context, q *query, b *budget, wire []byte) outcome {
	if out, done := q.read(wire); done {
		return out
	}
	asked := q.msg.Question[0]
	if out, done := q.localhost(asked); done {
		return out
	}
	// The kernel sends only allowed flows here; a policy may have changed meanwhile.
	if v := q.policy.Decide(policy.Flow{Proto: q.proto, Dst: q.dst}); !v.Allow {
		return r.denyServer(q, v)
	}
	if v, ok := q.checkKind(asked); !ok {
		return q.refuse(v)
	}
	owner, attribute, ok := q.checkName(asked.Name)
	if !ok {
		return r.denyName(q, verdict(ReasonBadName, "a name of letters, digits, hyphens and dots"))
	}
	if asked.Qtype == dns.TypePTR && privateReverse(q.name) {
		return q.local(dns.RcodeNameError)
	}
	v := judge(q.policy, q.name, owner)
	if !v.Allow {
		return r.denyName(q, v)
	}
	if out, done := q.fixed(v); done {
		return out
	}
	if asked.Qtype == dns.TypeAAAA && !r.cfg.IPv6 {
		return q.local(dns.RcodeSuccess)
	}
	return r.ask(ctx, q, b, v, asking{question{q.sandbox, q.name, asked.Qtype}, owner, budgetRule(q.policy, owner, attribute, v.Rule)})
}

// verdictNow judges a name by the rules in force, for a query that they denied
// while it waited.
func (r *Resolver) verdictNow(q *query, owner string) policy.Verdict {
	if p, ok := r.cfg.Policy(q.sandbox); ok {
		q.policy = p
		if v := judge(p, q.name, owner); !v.Allow {
			return v
		}
	}
	return verdict(policy.ReasonNameDenied, "the rules changed while the query waited")
}

// ask gets the answer from the cache or the upstreams and makes it fit for the sandbox.
func (r *Resolver) ask(ctx context.Context, q *query, b *budget, v policy.Verdict, about asking) outcome {
	look := r.lookup
	if about.qtype == dns.TypeA || about.qtype == dns.TypeAAAA {
		look = r.lookupAddress
	}
	found, err := look(ctx, about)
	if over, ok := errors.AsType[*refusal](err); ok {
		return r.refuseBudget(q, b, v.Rule, over)
	}
	if _, ok := errors.AsType[*deniedError](err); ok {
		return r.denyName(q, r.verdictNow(q, about.owner))
	}
	if err != nil {
		r.cfg.Log.Debug("dns upstreams", "sandbox", q.sandbox, "host", q.name, "err", err)
		m := q.reply(dns.RcodeServerFailure)
		q.explain(m, dns.ExtendedErrorCodeNoReachableAuthority, "no upstream answered")
		return outcome{reply: m, verdict: policy.Verdict{Allow: true, Observed: v.Observed, Rule: v.Rule, Reason: ReasonUpstream}, failed: true}
	}
	m := q.reply(found.rcode)
	removed := r.fill(m, q, found)
	out := outcome{reply: m, verdict: v, upstream: found.upstream}
	if removed > 0 && len(addrsOf(m.Answer)) == 0 {
		m.Answer = slices.DeleteFunc(m.Answer, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeCNAME })
		q.explain(m, dns.ExtendedErrorCodeFiltered, "the name leads to private addresses only")
		out.verdict = policy.Verdict{Rule: policy.Rule{ID: "floor", Text: "private addresses in an answer"}, Reason: ReasonRebinding}
		return out
	}
	if err := r.pin(q, m); err != nil {
		return r.refuseBudget(q, b, v.Rule, &refusal{ReasonPins, err.Error()})
	}
	return out
}

// pin opens the ports that rules name for the addresses of the reply. The error says
// that there are too many in a second.
func (r *Resolver) pin(q *query, m *dns.Msg) error {
	if r.cfg.Pin == nil {
		return nil
	}
	ports := q.policy.PinPorts(q.name)
	if len(ports) == 0 {
		return nil
	}
	ttl := lifetime(m.Answer)
	for _, a := range addrsOf(m.Answer) {
		if a.IsLoopback() {
			continue
		}
		err := r.cfg.Pin(Pin{Sandbox: q.sandbox, Name: q.name, Addr: a, Ports: ports, TTL: ttl})
		if errs.Is(err, errs.Exhausted) {
			return err
		}
		if err != nil {
			// The kernel then keeps refusing the address.
			r.cfg.Log.Warn("dns answer not pinned", "sandbox", q.sandbox, "host", q.name, "dst", a, "err", err)
		}
	}
	return nil
}

// finish records what a query came to and packs its reply.
func (r *Resolver) finish(q *query, b *budget, out outcome) []byte {
	var wire []byte
	rcode := "no reply"
	if out.reply != nil {
		wire = q.pack(out.reply)
		rcode = dns.RcodeToString[out.reply.Rcode]
		if out.reply.Rcode == dns.RcodeSuccess && len(out.reply.Answer) == 0 {
			rcode = "NODATA"
		}
	}
	if b.isRepeat(q, out) {
		return wire
	}
	e := flowlog.Event{
		Time: q.began, Sandbox: q.sandbox, Generation: q.policy.Generation(),
		Layer: flowlog.LayerResolver, Verdict: flowlog.Denied, Rule: out.verdict.Rule, Reason: out.verdict.Reason,
		Proto: "dns", Src: q.src, Dst: q.dst, Upstream: out.upstream, Name: q.name,
		Detail: strings.TrimSpace(q.kind() + " " + rcode + " " + out.detail), BytesOut: int64(q.size), BytesIn: int64(len(wire)),
		Duration: time.Since(q.began),
	}
	if out.reply != nil {
		e.Answers = addrsOf(out.reply.Answer)
	}
	switch {
	case out.failed:
		e.Verdict = flowlog.Failed
	case out.verdict.Observed:
		e.Verdict = flowlog.Observed
	case out.verdict.Allow:
		e.Verdict = flowlog.Allowed
	}
	r.cfg.Flows.Record(e)
	return wire
}
