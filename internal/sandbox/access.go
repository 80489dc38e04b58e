package sandbox

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Link is a signed public URL that is in force. The URL itself is not kept: it can
// be computed from the record's LinkKey.
type Link struct {
	ID      string    `json:"id"`
	Port    uint16    `json:"port"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"` // whole seconds
}

// The limits of links. The time is what S3 and GCS give a signed URL.
const (
	MaxLinks    = 100 // of one sandbox at a time
	MaxLinkLife = 7 * 24 * time.Hour
)

// maxSources bounds the list of sources of one sandbox.
const maxSources = 1000

// ParseSources reads a list of addresses and CIDRs; field is what to call it in an
// error. Nil stays nil, which allows every source; an empty list allows none.
func ParseSources(field string, list []string) ([]netip.Prefix, error) {
	if list == nil {
		return nil, nil
	}
	if len(list) > maxSources {
		return nil, errs.New(errs.Invalid, "%s has %d entries, it may have %d: use wider CIDRs", field, len(list), maxSources)
	}
	out := make([]netip.Prefix, 0, len(list))
	for i, s := range list {
		p, err := parseSource(s)
		if err != nil {
			return nil, errs.New(errs.Invalid, "%s[%d] is %q, it must be an IP address or a CIDR such as 10.0.0.0/8 or 2001:db8::/32", field, i, s[:min(len(s), 64)])
		}
		out = append(out, p)
	}
	return out, nil
}

func parseSource(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		addr, addrErr := netip.ParseAddr(s)
		if addrErr != nil || addr.Zone() != "" {
			return netip.Prefix{}, err
		}
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	}
	if p.Addr().Is4In6() { // clients are seen with their IPv4 address
		if p.Bits() < 96 {
			return netip.Prefix{}, errs.New(errs.Invalid, "an IPv4-mapped CIDR is at least /96")
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// inForce returns the links whose time is not over.
func inForce(links []Link) []Link {
	now := time.Now()
	return slices.DeleteFunc(slices.Clone(links), func(l Link) bool { return !now.Before(l.Expires) })
}

// HasLink reports whether the link of this ID is in force, its time aside.
func (r *Record) HasLink(id string) bool {
	return slices.ContainsFunc(r.Links, func(l Link) bool { return l.ID == id })
}

// LinkRequest asks for a signed URL of one port, in force for Life.
type LinkRequest struct {
	Port uint16
	Life time.Duration
}

// CreateLink makes a signed URL for a port of a sandbox that is not public, and
// returns the record with the key to sign it with.
func (m *Manager) CreateLink(ctx context.Context, owner string, id ID, req LinkRequest) (Record, Link, error) {
	if req.Port == 0 || req.Port == AgentPort {
		return Record{}, Link{}, errs.New(errs.Invalid, "port is %d: use 1 to 65535, but not the agent's %d, which has an access token of its own", req.Port, AgentPort)
	}
	if req.Life < time.Second || req.Life > MaxLinkLife {
		return Record{}, Link{}, errs.New(errs.Invalid, "ttl is %d seconds, it must be 1 to %d", int64(req.Life.Seconds()), int64(MaxLinkLife.Seconds()))
	}
	e, err := m.table.hold(owner, id)
	if err != nil {
		return Record{}, Link{}, err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	if next.rec.Public() {
		return Record{}, Link{}, errs.New(errs.Conflict, "Sandbox %q is public: its ports need no signed URL. Create it with network.allowPublicTraffic false", string(id))
	}
	kept := inForce(next.rec.Links)
	if len(kept) >= MaxLinks {
		return Record{}, Link{}, errs.New(errs.Exhausted, "Sandbox %q has its limit of %d signed URLs: revoke some", string(id), MaxLinks)
	}
	now := time.Now()
	link := Link{ID: sandboxid.NewToken()[:16], Port: req.Port, Created: now.UTC(), Expires: now.Add(req.Life + time.Second - 1).UTC().Truncate(time.Second)}
	next.rec.Links = append(kept, link)
	if next.rec.LinkKey == "" {
		next.rec.LinkKey = sandboxid.NewToken() + sandboxid.NewToken()
	}
	if err := m.save(ctx, e, next); err != nil {
		return Record{}, Link{}, err
	}
	m.cfg.Log.Info("link made", "sandbox", id, "link", link.ID, "port", req.Port, "expires", link.Expires)
	return e.view.Load().rec, link, nil
}

// Links returns a sandbox's links that are in force.
func (m *Manager) Links(_ context.Context, owner string, id ID) ([]Link, error) {
	v, err := m.table.find(owner, id)
	if err != nil {
		return nil, err
	}
	return inForce(v.rec.Links), nil
}

// RevokeLinks takes one link back, or all when link is empty. When it returns nil
// they open nothing any more, and what was open through them is ended.
func (m *Manager) RevokeLinks(ctx context.Context, owner string, id ID, link string) error {
	e, err := m.table.hold(owner, id)
	if err != nil {
		return err
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	if link != "" && !next.rec.HasLink(link) {
		return errs.New(errs.NotFound, "Sandbox %q has no link %q", string(id), link)
	}
	next.rec.Links = slices.DeleteFunc(slices.Clone(next.rec.Links), func(l Link) bool { return link == "" || l.ID == link })
	if err := m.save(context.WithoutCancel(ctx), e, next); err != nil {
		return err
	}
	m.changes.publish(id, AccessChanged)
	m.cfg.Log.Info("links revoked", "sandbox", id, "link", link)
	return nil
}

// Wake resumes a paused sandbox that a request arrived for, for its idle time if it
// has one, else for the lifetime it was made with.
func (m *Manager) Wake(ctx context.Context, id ID, by Waker) error {
	v, err := m.table.find("", id)
	if err != nil {
		return err
	}
	if !v.rec.AutoResume {
		return errs.New(errs.Conflict, "Sandbox %q is not resumed by requests", string(id))
	}
	_, _, err = m.connect(ctx, "", id, min(cmp.Or(v.rec.IdleTimeout, v.rec.Timeout), m.cfg.MaxTimeout), &by)
	return err
}

// touchPatience bounds the write that moves the end of a sandbox's life: a request
// may be waiting for it.
const touchPatience = 2 * time.Second

// Touch tells that a sandbox is in use: one with an idle time lives at least
// that long from now. The record is written when a tenth of the idle time would be
// gained, so that traffic costs few writes. It reports whether the sandbox's end is
// that far away now.
func (m *Manager) Touch(ctx context.Context, id ID) bool {
	v, err := m.table.find("", id)
	if err != nil || v.rec.IdleTimeout == 0 || v.rec.State != Running {
		return false
	}
	e, err := m.table.entry(id)
	if err != nil || time.Until(v.rec.Expires) > v.rec.IdleTimeout*9/10 || !e.op.TryLock() {
		return err == nil // another call is changing it: it pauses it, say, or does the same
	}
	defer e.op.Unlock()
	next := *e.view.Load()
	until := time.Now().Add(next.rec.IdleTimeout).UTC()
	if next.rec.State != Running || !until.After(next.rec.Expires) {
		return next.rec.State == Running
	}
	if _, err := m.table.entry(id); err != nil {
		return false
	}
	next.rec.Expires = until
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), touchPatience)
	defer cancel()
	if err := m.save(ctx, e, next); err != nil {
		m.cfg.Log.Warn("end of life not moved", "sandbox", id, "err", err)
		return false
	}
	return true
}
