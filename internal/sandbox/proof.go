package sandbox

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// DomainProof decides whether a key may bind a custom domain: its owner shows that
// they control it by a TXT record whose text is made for this key and this name. A
// text that another key was told, or for another name, proves nothing.
type DomainProof struct {
	// Secret makes the texts; at least 32 octets. Another secret makes others.
	Secret []byte
	// LookupTXT asks the public DNS; net.Resolver's.
	LookupTXT func(ctx context.Context, name string) ([]string, error)
	// Without are the names, "*.name" for those below one, and "*" for all, that the
	// operator lets every key bind without a record.
	Without []string
}

const (
	// proofLabel is put before a name, proofPrefix before the text of its record.
	proofLabel  = "_cordon-challenge."
	proofPrefix = "cordon-verify="
	// proofTime bounds the look-up.
	proofTime = 5 * time.Second
	// releaseGrace is how long a name that was released is kept for the key that had
	// it: another needs the record even where the operator asks for none.
	releaseGrace = 24 * time.Hour
	// maxReleased bounds what is remembered of released names.
	maxReleased = 10_000
)

// released is a name that was bound until lately.
type released struct {
	owner string
	until time.Time
}

// Record returns the name and the text of the TXT record by which a key shows that a
// domain is its.
func (p *DomainProof) Record(owner, name string) (record, text string) {
	mac := hmac.New(sha256.New, p.Secret)
	fmt.Fprintf(mac, "domain\x00%s\x00%s", owner, name)
	token := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(mac.Sum(nil)[:20])
	return proofLabel + name, proofPrefix + strings.ToLower(token)
}

// free reports whether the operator asks for no record.
func (p *DomainProof) free(name string) bool {
	return slices.ContainsFunc(p.Without, func(w string) bool {
		w = strings.ToLower(w)
		below, wild := strings.CutPrefix(w, "*.")
		return w == "*" || w == name || wild && strings.HasSuffix(name, "."+below)
	})
}

// check asks for the record. The error says which one to set.
func (p *DomainProof) check(ctx context.Context, owner, name string) error {
	record, text := p.Record(owner, name)
	ctx, cancel := context.WithTimeout(ctx, proofTime)
	defer cancel()
	found, err := p.LookupTXT(ctx, record+".")
	if slices.Contains(found, text) {
		return nil
	}
	seen := fmt.Sprintf("it has %d other texts", len(found))
	var dns *net.DNSError
	switch {
	case err == nil && len(found) > 0:
	case err == nil, errors.As(err, &dns) && dns.IsNotFound:
		seen = "there is none"
	default:
		seen = "the look-up failed"
	}
	return errs.Wrap(errs.Conflict, err, "domain %q is not proven to be yours: set a TXT record at %s with the text %s and try again; now %s", name, record, text, seen)
}

// Proven reports whether the key that has a domain bound may have a certificate for
// it ordered: the proof must still stand. The error says which record to set.
func (m *Manager) Proven(ctx context.Context, name string) error {
	id, _, ok := m.domains.find(name)
	if !ok {
		return errs.New(errs.NotFound, "domain %q is not bound to a sandbox", name)
	}
	v, err := m.table.find("", id)
	if err != nil || m.domains.proof == nil || m.domains.proof.free(name) {
		return err
	}
	return m.domains.proof.check(ctx, v.rec.Owner, name)
}

// prove decides whether a key may bind a name to a sandbox that does not have it yet.
// It reports whether the key has shown a record, which holds whatever becomes of the
// name meanwhile; claim decides the rest.
func (d *domains) prove(ctx context.Context, owner, name string) (shown bool, err error) {
	if d.proof == nil {
		return true, nil
	}
	d.mu.RLock()
	kept := d.keptFrom(owner, name)
	d.mu.RUnlock()
	if d.proof.free(name) && !kept {
		return false, nil
	}
	return true, d.proof.check(ctx, owner, name)
}

// keptFrom reports whether a name was another key's until lately. It needs mu.
func (d *domains) keptFrom(owner, name string) bool {
	former, kept := d.released[name]
	return kept && former.owner != owner && !time.Now().After(former.until)
}

// keepReleased remembers whose a name was. Where that would be too much, a name of the
// key that released most is forgotten, so that none makes another's be. It needs
// mu.
func (d *domains) keepReleased(owner, name string) {
	now := time.Now()
	if len(d.released) >= maxReleased {
		d.forgetReleased(now)
	}
	d.released[name] = released{owner, now.Add(releaseGrace)}
}

// forgetReleased makes room for one more name.
func (d *domains) forgetReleased(now time.Time) {
	count := map[string]int{}
	most, of := "", ""
	for name, r := range d.released {
		if now.After(r.until) {
			delete(d.released, name)
			continue
		}
		if count[r.owner]++; count[r.owner] > count[of] || r.owner == of {
			most, of = name, r.owner
		}
	}
	if len(d.released) >= maxReleased {
		delete(d.released, most)
	}
}
