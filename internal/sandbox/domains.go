package sandbox

import (
	"context"
	"net/netip"
	"slices"
	"strings"

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

// bound is where a custom domain leads; the zero value is nowhere.
type bound struct {
	id   ID
	port uint16
}

// Bind makes a custom domain lead to a port of a sandbox, running or paused, until
// the sandbox ends. A name that leads to the same sandbox already gets the new
// port; another's is errs.Conflict.
func (m *Manager) Bind(ctx context.Context, owner string, id ID, d Domain) (Domain, error) {
	name, err := m.validDomain(d.Name)
	if err != nil {
		return Domain{}, err
	}
	d.Name = name
	if d.Port == 0 || d.Port == AgentPort {
		return Domain{}, errs.New(errs.Invalid, "port is %d: use 1 to 65535, but not %d, which is the agent's", d.Port, AgentPort)
	}
	v, err := m.owned(owner, id)
	if err != nil {
		return Domain{}, err
	}
	// Without a lock, as it takes a while. The text is the key's and the name's alone, so
	// that what a record shows here is true whatever happens meanwhile.
	shown := false
	if !slices.ContainsFunc(v.rec.Domains, func(o Domain) bool { return o.Name == d.Name }) {
		if shown, err = m.prove(ctx, v.rec.Owner, d.Name); err != nil {
			return Domain{}, err
		}
	}
	e, err := m.hold(owner, id)
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
	former, err := m.claimDomain(d, id, v.rec.Owner, shown)
	if err != nil {
		return Domain{}, err
	}
	if err := m.save(context.WithoutCancel(ctx), e, next); err != nil {
		m.restoreDomain(d.Name, former)
		return Domain{}, err
	}
	m.cfg.Log.Info("domain bound", "sandbox", id, "host", d.Name, "port", d.Port)
	return d, nil
}

// Unbind ends what Bind began. A name that is not the sandbox's is errs.NotFound.
func (m *Manager) Unbind(ctx context.Context, owner string, id ID, name string) error {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	e, err := m.hold(owner, id)
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
	m.releaseDomains(&Record{Owner: next.rec.Owner, Domains: []Domain{{Name: name}}})
	m.cfg.Log.Info("domain released", "sandbox", id, "host", name)
	return nil
}

// ByDomain looks a custom domain up in memory; name is lower-case.
func (m *Manager) ByDomain(name string) (ID, uint16, bool) {
	m.domainMu.RLock()
	defer m.domainMu.RUnlock()
	b, ok := m.domains[name]
	return b.id, b.port, ok
}

// validDomain returns the canonical form of a name that may be bound: one that the
// public DNS could hold and that is not the server's own.
func (m *Manager) validDomain(given string) (string, error) {
	name, ok := policy.PublicName(given)
	if _, err := netip.ParseAddr(given); !ok || err == nil || !strings.Contains(name, ".") {
		return "", errs.New(errs.Invalid, "domain is %q: use a host name such as app.example.com, without scheme, port or wildcard", given)
	}
	own := []string{"localhost"}
	if m.cfg.Operator != nil {
		own = append(own, m.cfg.Operator.SelfDomains...)
	}
	for _, o := range own {
		if name == o || strings.HasSuffix(name, "."+o) {
			return "", errs.New(errs.Invalid, "domain is %q: names under %s are the server's own", given, o)
		}
	}
	return name, nil
}

// claimDomain makes a name lead to an owner's sandbox, and returns where it led before.
// Without a record that was shown, the name must not be kept for another key.
func (m *Manager) claimDomain(d Domain, id ID, owner string, shown bool) (former bound, err error) {
	m.domainMu.Lock()
	defer m.domainMu.Unlock()
	former, had := m.domains[d.Name]
	if had && former.id != id {
		return former, errs.New(errs.Conflict, "domain %q is bound to another sandbox", d.Name)
	}
	if !had && !shown && m.keptFrom(owner, d.Name) {
		record, text := m.cfg.Proof.Record(owner, d.Name)
		return former, errs.New(errs.Conflict, "domain %q was another key's until lately: set a TXT record at %s with the text %s and try again", d.Name, record, text)
	}
	m.domains[d.Name] = bound{id, d.Port}
	return former, nil
}

func (m *Manager) restoreDomain(name string, former bound) {
	m.domainMu.Lock()
	defer m.domainMu.Unlock()
	if former == (bound{}) {
		delete(m.domains, name)
		return
	}
	m.domains[name] = former
}

// indexDomains makes the domains of a record found.
func (m *Manager) indexDomains(rec *Record) {
	m.domainMu.Lock()
	defer m.domainMu.Unlock()
	for _, d := range rec.Domains {
		m.domains[d.Name] = bound{rec.ID, d.Port}
	}
}

// releaseDomains makes the domains of a sandbox free, for its owner's others at first.
func (m *Manager) releaseDomains(rec *Record) {
	m.domainMu.Lock()
	defer m.domainMu.Unlock()
	for _, d := range rec.Domains {
		delete(m.domains, d.Name)
		m.keepReleased(rec.Owner, d.Name)
	}
}
