package ingress

import (
	"errors"
	"net/http"
	"net/netip"
	"sync"

	"github.com/cordonhq/cordon/internal/share"
)

// What is under way is bounded three ways: by sandbox and API key, so that one key's
// sandboxes leave room for others'; by the source's part of one sandbox, so that one
// client does not shut out the others; and by what the heads of requests take of
// memory, which HTTP/2 lets a client multiply on one connection.

const (
	// sourcePart is the part of a sandbox's exchanges that one source may hold, and
	// sourceLeast what it may hold in any case.
	sourcePart, sourceLeast = 4, 64
	// fieldCost is what a field takes of memory beside its octets.
	fieldCost = 96
)

// Pools returns the counts of what keys share, for metrics.
func (in *Ingress) Pools() []*share.Pool { return []*share.Pool{in.exchanges} }

// occupy counts one more request or tunnel of a source, until depart. It returns a
// refusal, and has counted nothing, when a limit is reached. The zero address is of a
// client that a trusted proxy does not name.
func (b *backend) occupy(from netip.Addr) *refusal {
	t := b.target
	if err := b.in.exchanges.Take(t.Owner, t.ID, 1); err != nil {
		var full *share.Full
		if errors.As(err, &full) && full.Scope != share.Sandbox {
			return noShare(t.ID, full)
		}
		return tooMany(t.ID, b.in.cfg.Limits.ConnsPerSandbox)
	}
	if limit := max(b.in.cfg.Limits.ConnsPerSandbox/sourcePart, sourceLeast); !b.guests.arrive(sourceOf(from), limit) {
		b.in.exchanges.Give(t.Owner, t.ID, 1)
		return tooManyOfSource(t.ID, limit)
	}
	b.inflight.Add(1)
	return nil
}

// vacate ends what occupy began.
func (b *backend) vacate(from netip.Addr) {
	b.inflight.Add(-1)
	b.in.exchanges.Give(b.target.Owner, b.target.ID, 1)
	b.guests.leave(sourceOf(from))
}

func (s *guests) arrive(from netip.Prefix, limit int) bool {
	if !from.IsValid() {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sources[from] >= limit {
		return false
	}
	if s.sources == nil {
		s.sources = map[netip.Prefix]int{}
	}
	s.sources[from]++
	return true
}

func (s *guests) leave(from netip.Prefix) {
	if !from.IsValid() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sources[from]--; s.sources[from] <= 0 {
		delete(s.sources, from)
	}
}

// heads counts what requests under way hold of memory by their heads.
type heads struct {
	perSource, all, streams int64

	mu     sync.Mutex // guards the rest
	used   int64
	source map[netip.Prefix]headUse
}

// headUse is what one source has under way.
type headUse struct{ bytes, requests int64 }

// enter counts a request until leave, which gets the same. It returns a refusal, and
// has counted nothing, when the source or all sources together have too much.
func (h *heads) enter(from netip.Prefix, bytes int64) *refusal {
	h.mu.Lock()
	defer h.mu.Unlock()
	use := h.source[from]
	switch {
	case h.used+bytes > h.all:
		return headsFull("all clients together", h.all)
	case !from.IsValid(): // a trusted proxy does not say who it is
		h.used += bytes
		return nil
	case use.bytes+bytes > h.perSource:
		return headsFull("your address", h.perSource)
	case use.requests >= h.streams:
		return requestsFull(h.streams)
	}
	h.used += bytes
	h.source[from] = headUse{use.bytes + bytes, use.requests + 1}
	return nil
}

func (h *heads) leave(from netip.Prefix, bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.used -= bytes
	if !from.IsValid() {
		return
	}
	use := h.source[from]
	if use.requests--; use.requests <= 0 {
		delete(h.source, from)
		return
	}
	use.bytes -= bytes
	h.source[from] = use
}

func (h *heads) held() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.used
}

// fieldsMost is how many fields a request may have.
const fieldsMost = 1000

// headSize returns about what the head of a request takes of memory, and how many
// fields it has.
func headSize(r *http.Request) (bytes int64, fields int) {
	n := len(r.RequestURI) + len(r.Host) + len(r.Method)
	for name, values := range r.Header {
		fields += len(values)
		for _, v := range values {
			n += len(name) + len(v) + fieldCost
		}
	}
	return int64(n), fields
}
