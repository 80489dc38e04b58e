package sandbox

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Domain is a name outside the server's own domains that leads to a port of a
// sandbox.
type Domain struct {
	Name string `json:"name"` // lower-case, without a final dot
	Port uint16 `json:"port"`
}

// MaxDomains is how many one sandbox may have: each is a certificate to be had.
const MaxDomains = 16

// domains is where custom domains lead, and whose names were until lately.
type domains struct {
	proof    *DomainProof // nil: binding demands none
	operator *policy.Operator

	mu       sync.RWMutex // guards the others
	bound    map[string]bound
	released map[string]released
}

// bound is where a custom domain leads; the zero value is nowhere.
type bound struct {
	id   ID
	port uint16
}

func newDomains(proof *DomainProof, operator *policy.Operator) *domains {
	return &domains{proof: proof, operator: operator, bound: map[string]bound{}, released: map[string]released{}}
}

// Bind makes a custom domain lead to a port of a sandbox, running or paused, until
// the sandbox ends. A name that leads to the same sandbox already gets the new
// port; another's is errs.Conflict.
func (m *Manager) Bind(ctx context.Context, owner string, id ID, d Domain) (Domain, error) {
	name, err := m.domains.valid(d.Name)
	if err != nil {
		return Domain{}, err
	}
	d.Name = name
	if d.Port == 0 || d.Port == AgentPort {
		return Domain{}, errs.New(errs.Invalid, "port is %d: use 1 to 65535, but not %d, which is the agent's", d.Port, AgentPort)
	}
	v, err := m.table.find(owner, id)
	if err != nil {
		return Domain{}, err
	}
	// Without a lock, as it takes a while. The text is the key's and the name's alone, so
	// that what a record shows here is true whatever happens meanwhile.
	shown := false
	if !slices.ContainsFunc(v.rec.Domains, func(o Domain) bool { return o.Name == d.Name }) {
		if shown, err = m.domains.prove(ctx, v.rec.Owner, d.Name); err != nil {
			return Domain{}, err
		}
	}
	e, err := m.table.hold(owner, id)
	if err != nil {
		return Domain{}, err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	next.rec.Domains = slices.DeleteFunc(slices.Clone(next.rec.Domains), func(o Domain) bool { return o.Name == d.Name })
	if len(next.rec.Domains) >= MaxDomains {
		return Domain{}, errs.New(errs.Exhausted, "Sandbox %q has its limit of %d domains: remove one first", string(id), MaxDomains)
	}
	next.rec.Domains = append(next.rec.Domains, d)
	former, err := m.domains.claim(d, id, v.rec.Owner, shown)
	if err != nil {
		return Domain{}, err
	}
	if err := m.save(context.WithoutCancel(ctx), e, next); err != nil {
		m.domains.restore(d.Name, former)
		return Domain{}, err
	}
	m.cfg.Log.Info("domain bound", "sandbox", id, "host", d.Name, "port", d.Port)
	return d, nil
}

// Unbind ends what Bind began. A name that is not the sandbox's is errs.NotFound.
func (m *Manager) Unbind(ctx context.Context, owner string, id ID, name string) error {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	e, err := m.table.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	next.rec.Domains = slices.DeleteFunc(slices.Clone(next.rec.Domains), func(o Domain) bool { return o.Name == name })
	if len(next.rec.Domains) == len(e.view.Load().rec.Domains) {
		return errs.New(errs.NotFound, "domain %q is not bound to sandbox %q", name, string(id))
	}
	if err := m.save(context.WithoutCancel(ctx), e, next); err != nil {
		return err
	}
	m.domains.release(&Record{Owner: next.rec.Owner, Domains: []Domain{{Name: name}}})
	m.cfg.Log.Info("domain released", "sandbox", id, "host", name)
	return nil
}

// ByDomain looks a custom domain up in memory; name is lower-case.
func (m *Manager) ByDomain(name string) (ID, uint16, bool) { return m.domains.find(name) }

func (d *domains) find(name string) (ID, uint16, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	b, ok := d.bound[name]
	return b.id, b.port, ok
}

// valid returns the canonical form of a name that may be bound: one that the
// public DNS could hold and that is not the server's own.
func (d *domains) valid(given string) (string, error) {
	name, ok := policy.PublicName(given)
	if _, err := netip.ParseAddr(given); !ok || err == nil || !strings.Contains(name, ".") {
		return "", errs.New(errs.Invalid, "domain is %q: use a host name such as app.example.com, without scheme, port or wildcard", given)
	}
	own := []string{"localhost"}
	if d.operator != nil {
		own = append(own, d.operator.SelfDomains...)
	}
	for _, o := range own {
		if name == o || strings.HasSuffix(name, "."+o) {
			return "", errs.New(errs.Invalid, "domain is %q: names under %s are the server's own", given, o)
		}
	}
	return name, nil
}

// claim makes a name lead to an owner's sandbox, and returns where it led before.
// Without a record that was shown, the name must not be kept for another key.
func (d *domains) claim(to Domain, id ID, owner string, shown bool) (former bound, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	former, had := d.bound[to.Name]
	if had && former.id != id {
		return former, errs.New(errs.Conflict, "domain %q is bound to another sandbox", to.Name)
	}
	if !had && !shown && d.keptFrom(owner, to.Name) {
		record, text := d.proof.Record(owner, to.Name)
		return former, errs.New(errs.Conflict, "domain %q was another key's until lately: set a TXT record at %s with the text %s and try again", to.Name, record, text)
	}
	d.bound[to.Name] = bound{id, to.Port}
	return former, nil
}

// restore takes a claim back.
func (d *domains) restore(name string, former bound) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if former == (bound{}) {
		delete(d.bound, name)
		return
	}
	d.bound[name] = former
}

// add makes the domains of a record found.
func (d *domains) add(rec *Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, to := range rec.Domains {
		d.bound[to.Name] = bound{rec.ID, to.Port}
	}
}

// release makes the domains of a sandbox free, for its owner's others at first.
func (d *domains) release(rec *Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, to := range rec.Domains {
		delete(d.bound, to.Name)
		d.keepReleased(rec.Owner, to.Name)
	}
}
