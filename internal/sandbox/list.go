package sandbox

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// pageSize is how many sandboxes a page holds when the caller names no limit.
const pageSize = 100

// Get returns a sandbox's record.
func (m *Manager) Get(_ context.Context, owner string, id ID) (Record, error) {
	v, err := m.table.find(owner, id)
	if err != nil {
		return Record{}, err
	}
	return v.rec, nil
}

// List returns a page of sandboxes and the cursor of the next page, "" on the
// last. The cursor names the last sandbox seen, so pages stay right while
// sandboxes come and go.
func (m *Manager) List(_ context.Context, req ListRequest) (page []Record, next string, err error) {
	after, err := parseCursor(req.Cursor, func(id string) bool { return ID(id).Valid() })
	if err != nil {
		return nil, "", err
	}
	order := func(a, b Record) int { return a.position().compare(b.position()) }
	if !req.Ascending {
		order = func(a, b Record) int { return b.position().compare(a.position()) }
	}
	var all []Record
	for _, e := range m.table.all() {
		rec := e.view.Load().rec
		if req.matches(&rec) && (after == nil || order(rec, after.record()) > 0) {
			all = append(all, rec)
		}
	}
	slices.SortFunc(all, order)
	limit := cmp.Or(max(req.Limit, 0), pageSize)
	if len(all) > limit {
		all = all[:limit]
		next = all[limit-1].position().cursor()
	}
	return all, next, nil
}

func (req *ListRequest) matches(rec *Record) bool {
	if req.Owner != "" && req.Owner != rec.Owner {
		return false
	}
	for k, v := range req.Metadata {
		if got, ok := rec.Metadata[k]; !ok || got != v {
			return false
		}
	}
	if len(req.States) > 0 && !slices.Contains(req.States, rec.State) {
		return false
	}
	if req.Template != "" && req.Template != rec.Template && req.Template != rec.TemplateID {
		return false
	}
	return req.StartedAfter.IsZero() || rec.Started.After(req.StartedAfter)
}

// position is where a sandbox or a snapshot stands in the order of a list.
type position struct {
	started time.Time
	id      string
}

func (r *Record) position() position { return position{r.Started, string(r.ID)} }

func (p position) record() Record { return Record{Started: p.started, ID: ID(p.id)} }

func (p position) compare(q position) int {
	return cmp.Or(p.started.Compare(q.started), cmp.Compare(p.id, q.id))
}

func (p position) cursor() string {
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%s %s", p.started.Format(time.RFC3339Nano), p.id))
}

func parseCursor(s string, valid func(id string) bool) (*position, error) {
	if s == "" {
		return nil, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(s)
	started, id, ok := strings.Cut(string(b), " ")
	t, timeErr := time.Parse(time.RFC3339Nano, started)
	if err != nil || !ok || timeErr != nil || !valid(id) {
		return nil, errs.New(errs.Invalid, "nextToken %q is not one this server gave: start again without it", s)
	}
	return &position{t, id}, nil
}

// Metrics returns a sandbox's resource use over the last hour, oldest first, and
// where it runs, as its agent sees it now.
func (m *Manager) Metrics(ctx context.Context, owner string, id ID) ([]Metrics, error) {
	v, err := m.table.find(owner, id)
	if err != nil {
		return nil, err
	}
	past := m.history.of(id)
	if v.rec.State != Running {
		return past, nil
	}
	sample, err := m.cfg.Agents.Metrics(ctx, v.rec.Agent())
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, err, "Sandbox %q does not answer: try again", string(id))
	}
	return append(past, sample), nil
}

// Events returns a page of lifecycle events and how many match in all.
func (m *Manager) Events(ctx context.Context, req EventsRequest) (page []Event, total int, err error) {
	all, err := m.cfg.Store.Events(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("read events: %w", err)
	}
	all = slices.DeleteFunc(all, func(e Event) bool { return !req.matches(&e) })
	if !req.Ascending {
		slices.Reverse(all)
	}
	total = len(all)
	from := min(max(req.Offset, 0), total)
	to := min(from+cmp.Or(max(req.Limit, 0), pageSize), total)
	return all[from:to], total, nil
}

func (req *EventsRequest) matches(e *Event) bool {
	return (req.Owner == "" || req.Owner == e.Owner) &&
		(req.Sandbox == "" || req.Sandbox == e.Sandbox) &&
		(req.Template == "" || req.Template == e.Template) &&
		(len(req.Names) == 0 || slices.Contains(req.Names, e.Name)) &&
		(len(req.States) == 0 || slices.Contains(req.States, e.State)) &&
		(req.From.IsZero() || !e.Time.Before(req.From)) &&
		(req.To.IsZero() || !e.Time.After(req.To))
}

// Quota returns what an owner may use and uses; of the whole server, when owner is empty.
func (m *Manager) Quota(_ context.Context, owner string) (Quota, error) {
	q := Quota{MaxSandboxes: m.cfg.MaxSandboxes, MaxLifetime: m.cfg.MaxTimeout, PerSandbox: m.cfg.Defaults}
	q.MaxPaused = m.cfg.MaxPaused
	if owner != "" {
		allowed := m.cfg.Allowance(owner)
		q.MaxSandboxes, q.MaxPaused = limited(q.MaxSandboxes, allowed.Sandboxes), limited(q.MaxPaused, allowed.Paused)
	}
	for _, e := range m.table.all() {
		v := e.view.Load()
		switch {
		case owner != "" && owner != v.rec.Owner:
		case v.rec.State == Paused:
			q.Paused++
		default:
			q.Sandboxes++
			q.CPUs += v.rec.Resources.CPUs
			q.MemoryMB += v.rec.Resources.MemoryMB
		}
	}
	return q, nil
}
