// Package apitest makes a control plane without sandboxes, for tests of what talks to
// the API: its fakes keep state as the real manager and key store do.
package apitest

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/api"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Sandboxes keeps sandboxes in memory with the manager's rules about owners,
// states, timeouts and policies, but runs nothing. The fields may be set and read
// while no call is under way.
type Sandboxes struct {
	Limit   int                     // how many there may be at once
	Broken  error                   // if set, what every call returns
	Created []sandbox.CreateRequest // every request that arrived

	mu       sync.Mutex // guards all below, and Created
	records  map[sandbox.ID]*sandbox.Record
	policies map[sandbox.ID]*policy.Compiled
	events   []sandbox.Event
	snaps    []sandbox.Snapshot
}

// NewSandboxes returns none, with room for ten.
func NewSandboxes() *Sandboxes {
	return &Sandboxes{
		Limit:    10,
		records:  map[sandbox.ID]*sandbox.Record{},
		policies: map[sandbox.ID]*policy.Compiled{},
	}
}

// Len returns how many sandboxes there are.
func (f *Sandboxes) Len() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.records)
}

var (
	_ api.Sandboxes = (*Sandboxes)(nil)
	_ api.Snapshots = (*Sandboxes)(nil)
	_ api.Keys      = (*Keys)(nil)
)

func (f *Sandboxes) find(owner string, id sandbox.ID) (*sandbox.Record, error) {
	if f.Broken != nil {
		return nil, f.Broken
	}
	rec, ok := f.records[id]
	if !ok || owner != "" && owner != rec.Owner {
		return nil, errs.New(errs.NotFound, "Sandbox %q doesn't exist or you don't have access to it", string(id))
	}
	return rec, nil
}

// Create implements the API's interface.
func (f *Sandboxes) Create(_ context.Context, req sandbox.CreateRequest) (sandbox.Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Broken != nil {
		return sandbox.Record{}, f.Broken
	}
	f.Created = append(f.Created, req)
	switch {
	case req.Template == "nowhere":
		return sandbox.Record{}, errs.New(errs.NotFound, "template %q doesn't exist", req.Template)
	case len(f.records) >= f.Limit:
		return sandbox.Record{}, errs.New(errs.Exhausted, "this server runs its limit of %d sandboxes", f.Limit)
	case req.Timeout > 24*time.Hour:
		return sandbox.Record{}, errs.New(errs.Invalid, "timeout is %d seconds, this server allows at most 86400", int64(req.Timeout.Seconds()))
	}
	p, err := policy.Compile(req.Egress, nil, 1)
	if err != nil {
		return sandbox.Record{}, err
	}
	rec := &sandbox.Record{
		ID: sandboxid.New(), Owner: req.Owner, TemplateID: "tmpl1", Template: cmp.Or(req.Template, "base"),
		State: sandbox.Running, Metadata: req.Metadata, EnvVars: req.EnvVars,
		Created: time.Now(), Started: time.Now().Add(time.Duration(len(f.Created)) * time.Millisecond),
		Expires:   time.Now().Add(cmp.Or(req.Timeout, sandbox.DefaultTimeout)),
		OnTimeout: req.OnTimeout, AutoResume: req.AutoResume, IdleTimeout: req.IdleTimeout, AllowIn: req.AllowIn,
		Resources: sandbox.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024},
		Egress:    req.Egress, Generation: 1,
		AllowPublicTraffic: req.AllowPublicTraffic, MaskRequestHost: req.MaskRequestHost, MaskOrigin: req.MaskOrigin, HTTPSPorts: req.HTTPSPorts, AutoResumeOn: req.AutoResumeOn,
		ControlToken: "control-secret",
	}
	if req.Secure {
		rec.AccessToken = "access-" + string(rec.ID)
	}
	if !rec.Public() {
		rec.TrafficToken = "traffic-" + string(rec.ID)
	}
	f.records[rec.ID], f.policies[rec.ID] = rec, p
	f.event(rec, "create")
	return *rec, nil
}

func (f *Sandboxes) event(rec *sandbox.Record, name string) {
	f.events = append(f.events, sandbox.Event{
		ID: strconv.Itoa(len(f.events)), Time: time.Now(), Sandbox: rec.ID, Template: rec.Template, Name: name, State: rec.State,
	})
}

// Get implements the API's interface.
func (f *Sandboxes) Get(_ context.Context, owner string, id sandbox.ID) (sandbox.Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return sandbox.Record{}, err
	}
	return *rec, nil
}

// List implements the API's interface.
func (f *Sandboxes) List(_ context.Context, req sandbox.ListRequest) (page []sandbox.Record, next string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Broken != nil {
		return nil, "", f.Broken
	}
	var all []sandbox.Record
	for _, rec := range f.records {
		match := (req.Owner == "" || req.Owner == rec.Owner) && slices.Contains(req.States, rec.State) &&
			(req.Template == "" || req.Template == rec.Template) && rec.Started.After(req.StartedAfter)
		for k, v := range req.Metadata {
			match = match && rec.Metadata[k] == v
		}
		if match {
			all = append(all, *rec)
		}
	}
	slices.SortFunc(all, func(a, b sandbox.Record) int {
		if req.Ascending {
			a, b = b, a
		}
		return b.Started.Compare(a.Started)
	})
	from := 0
	if req.Cursor != "" {
		if from, err = strconv.Atoi(req.Cursor); err != nil || from > len(all) {
			return nil, "", errs.New(errs.Invalid, "nextToken %q is not one this server gave", req.Cursor)
		}
	}
	to := min(len(all), from+cmp.Or(req.Limit, 100))
	if to < len(all) {
		next = strconv.Itoa(to)
	}
	return all[from:to], next, nil
}

// Connect implements the API's interface.
func (f *Sandboxes) Connect(_ context.Context, owner string, id sandbox.ID, timeout time.Duration) (sandbox.Record, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return sandbox.Record{}, false, err
	}
	resumed := rec.State == sandbox.Paused
	rec.State = sandbox.Running
	if until := time.Now().Add(cmp.Or(timeout, sandbox.DefaultTimeout)); until.After(rec.Expires) {
		rec.Expires = until
	}
	return *rec, resumed, nil
}

// SetTimeout implements the API's interface.
func (f *Sandboxes) SetTimeout(_ context.Context, owner string, id sandbox.ID, d time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err == nil {
		rec.Expires = time.Now().Add(d)
	}
	return err
}

// SetNetwork implements the API's interface.
func (f *Sandboxes) SetNetwork(_ context.Context, owner string, id sandbox.ID, in sandbox.NetworkUpdate) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return err
	}
	p, err := policy.Compile(in.Egress, nil, rec.Generation+1)
	if err != nil {
		return err
	}
	rec.Egress = in.Egress
	if in.AllowIn != nil {
		rec.AllowIn = in.AllowIn
	}
	rec.Generation++
	f.policies[id] = p
	return nil
}

// Bind implements the API's interface.
func (f *Sandboxes) Bind(_ context.Context, owner string, id sandbox.ID, d sandbox.Domain) (sandbox.Domain, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return sandbox.Domain{}, err
	}
	same := func(o sandbox.Domain) bool { return o.Name == d.Name }
	for _, other := range f.records {
		if other.ID != id && slices.ContainsFunc(other.Domains, same) {
			return sandbox.Domain{}, errs.New(errs.Conflict, "domain %q is bound to another sandbox", d.Name)
		}
	}
	rec.Domains = append(slices.DeleteFunc(rec.Domains, same), d)
	return d, nil
}

// Unbind implements the API's interface.
func (f *Sandboxes) Unbind(_ context.Context, owner string, id sandbox.ID, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return err
	}
	n := len(rec.Domains)
	rec.Domains = slices.DeleteFunc(rec.Domains, func(o sandbox.Domain) bool { return o.Name == name })
	if len(rec.Domains) == n {
		return errs.New(errs.NotFound, "domain %q is not bound", name)
	}
	return nil
}

// CreateLink implements the API's interface.
func (f *Sandboxes) CreateLink(_ context.Context, owner string, id sandbox.ID, req sandbox.LinkRequest) (sandbox.Record, sandbox.Link, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return sandbox.Record{}, sandbox.Link{}, err
	}
	link := sandbox.Link{ID: "u" + strconv.Itoa(len(rec.Links)), Port: req.Port, Created: time.Now(), Expires: time.Now().Add(req.Life).Truncate(time.Second)}
	rec.LinkKey, rec.Links = "key", append(slices.Clone(rec.Links), link)
	return *rec, link, nil
}

// Links implements the API's interface.
func (f *Sandboxes) Links(_ context.Context, owner string, id sandbox.ID) ([]sandbox.Link, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return nil, err
	}
	return slices.Clone(rec.Links), nil
}

// RevokeLinks implements the API's interface.
func (f *Sandboxes) RevokeLinks(_ context.Context, owner string, id sandbox.ID, link string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return err
	}
	if link != "" && !rec.HasLink(link) {
		return errs.New(errs.NotFound, "Sandbox %q has no link %q", string(id), link)
	}
	rec.Links = slices.DeleteFunc(slices.Clone(rec.Links), func(l sandbox.Link) bool { return link == "" || l.ID == link })
	return nil
}

// Pause implements the API's interface.
func (f *Sandboxes) Pause(_ context.Context, owner string, id sandbox.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return err
	}
	if rec.State == sandbox.Paused {
		return errs.New(errs.Conflict, "Sandbox %q is already paused", string(id))
	}
	rec.State = sandbox.Paused
	f.event(rec, "pause")
	return nil
}

// Kill implements the API's interface.
func (f *Sandboxes) Kill(_ context.Context, owner string, id sandbox.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err == nil {
		f.event(rec, "kill")
		delete(f.records, id)
		delete(f.policies, id)
	}
	return err
}

// Metrics implements the API's interface.
func (f *Sandboxes) Metrics(_ context.Context, owner string, id sandbox.ID) ([]sandbox.Metrics, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(owner, id); err != nil {
		return nil, err
	}
	return []sandbox.Metrics{
		{Time: time.Unix(1000, 0), CPUCount: 2, CPUUsedPct: 12.5, MemUsed: 1, MemTotal: 2, MemCache: 3, DiskUsed: 4, DiskTotal: 5},
		{Time: time.Unix(2000, 0), CPUCount: 2},
	}, nil
}

// Events implements the API's interface.
func (f *Sandboxes) Events(_ context.Context, req sandbox.EventsRequest) ([]sandbox.Event, int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []sandbox.Event
	for _, e := range f.events {
		if (req.Sandbox == "" || req.Sandbox == e.Sandbox) && (len(req.Names) == 0 || slices.Contains(req.Names, e.Name)) {
			all = append(all, e)
		}
	}
	if !req.Ascending {
		slices.Reverse(all)
	}
	from := min(req.Offset, len(all))
	return all[from:min(len(all), from+cmp.Or(req.Limit, 10))], len(all), nil
}

// Quota implements the API's interface.
func (f *Sandboxes) Quota(context.Context, string) (sandbox.Quota, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return sandbox.Quota{MaxSandboxes: f.Limit, MaxLifetime: 24 * time.Hour, Sandboxes: len(f.records)}, nil
}

// Policy implements the API's interface.
func (f *Sandboxes) Policy(id sandbox.ID) (*policy.Compiled, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.policies[id]
	return p, ok
}

// CreateSnapshot implements the API's interface.
func (f *Sandboxes) CreateSnapshot(_ context.Context, owner string, id sandbox.ID, name string) (sandbox.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(owner, id); err != nil {
		return sandbox.Snapshot{}, err
	}
	s := sandbox.Snapshot{ID: "snap" + strconv.Itoa(len(f.snaps)) + ":default", Sandbox: id}
	if name != "" {
		s.Names = []string{name}
	}
	f.snaps = append(f.snaps, s)
	return s, nil
}

// ListSnapshots implements the API's interface.
func (f *Sandboxes) ListSnapshots(_ context.Context, req sandbox.SnapshotsRequest) ([]sandbox.Snapshot, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	from, _ := strconv.Atoi(req.Cursor)
	to := min(len(f.snaps), from+cmp.Or(req.Limit, 100))
	next := ""
	if to < len(f.snaps) {
		next = strconv.Itoa(to)
	}
	return f.snaps[from:to], next, nil
}

// DeleteSnapshot implements the API's interface.
func (f *Sandboxes) DeleteSnapshot(_ context.Context, _, snapshotID string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.snaps)
	f.snaps = slices.DeleteFunc(f.snaps, func(s sandbox.Snapshot) bool { return s.ID == snapshotID })
	if len(f.snaps) == n {
		return errs.New(errs.NotFound, "snapshot %q doesn't exist", snapshotID)
	}
	return nil
}

// Fork implements the API's interface.
func (f *Sandboxes) Fork(ctx context.Context, owner string, id sandbox.ID, req sandbox.ForkRequest) ([]sandbox.Forked, error) {
	f.mu.Lock()
	rec, err := f.find(owner, id)
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	out := make([]sandbox.Forked, req.Count)
	for i := range out {
		if i == 2 {
			out[i].Err = errors.New("disk on fire")
			continue
		}
		out[i].Record, out[i].Err = f.Create(ctx, sandbox.CreateRequest{
			Owner: rec.Owner, Template: rec.Template, Timeout: req.Timeout, Secure: rec.AccessToken != "", AllowPublicTraffic: rec.AllowPublicTraffic,
		})
	}
	return out, nil
}

// Reset implements the API's interface.
func (f *Sandboxes) Reset(_ context.Context, owner string, id sandbox.ID, req sandbox.ResetRequest) (sandbox.Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, err := f.find(owner, id)
	if err != nil {
		return sandbox.Record{}, err
	}
	if rec.State == sandbox.Paused && !req.Resume {
		return sandbox.Record{}, errs.New(errs.Conflict, "Sandbox %q is paused", string(id))
	}
	rec.State = sandbox.Running
	if req.AllowPublicTraffic != nil {
		rec.AllowPublicTraffic, rec.TrafficToken = req.AllowPublicTraffic, ""
		if !*req.AllowPublicTraffic {
			rec.TrafficToken = "traffic-after-reset"
		}
	}
	return *rec, nil
}

// Keys keeps API keys in memory.
type Keys struct {
	mu   sync.Mutex // guards keys
	keys []auth.Key
}

// Keys implements the API's interface.
func (f *Keys) Keys(context.Context) ([]auth.Key, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.keys), nil
}

// PutKey implements the API's interface.
func (f *Keys) PutKey(_ context.Context, k auth.Key) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys = append(f.keys, k)
	return nil
}

// DeleteKey implements the API's interface.
func (f *Keys) DeleteKey(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys = slices.DeleteFunc(f.keys, func(k auth.Key) bool { return k.ID == id })
	return nil
}
