package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
)

// Snapshot is the stored state of a sandbox: files, memory and processes. Its ID
// is a template for Create.
type Snapshot struct {
	ID    string
	Names []string
}

// Snapshot stores the sandbox's state under a name, or none, while it goes on.
func (s *Sandbox) Snapshot(ctx context.Context, name string) (Snapshot, error) {
	in := struct {
		Name string `json:"name,omitempty"`
	}{name}
	var out control.Snapshot
	if err := s.do(ctx, "snapshot sandbox", call{method: http.MethodPost, path: "/snapshots", in: in, out: &out}); err != nil {
		return Snapshot{}, err
	}
	return Snapshot{ID: out.SnapshotID, Names: out.Names}, nil
}

// Snapshots returns the snapshots of the caller's, newest first: those made of one
// sandbox, or with an empty ID all.
func (cl *Client) Snapshots(ctx context.Context, sandbox string) ([]Snapshot, error) {
	query := url.Values{}
	if sandbox != "" {
		query.Set("sandboxID", sandbox)
	}
	listed, err := pages[control.Snapshot](ctx, cl, "/snapshots", query)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var all []Snapshot
	for _, s := range listed {
		all = append(all, Snapshot{ID: s.SnapshotID, Names: s.Names})
	}
	return all, nil
}

// DeleteSnapshot removes a snapshot; sandboxes made from it go on.
func (cl *Client) DeleteSnapshot(ctx context.Context, id string) error {
	if _, err := cl.do(ctx, call{method: http.MethodDelete, path: "/templates/" + url.PathEscape(id)}); err != nil {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	return nil
}

// Fork starts copies of the running sandbox, each with an address, tokens and
// randomness of its own, that live for timeout (0: the server's default). It
// returns the copies that run, also beside an error of others.
func (s *Sandbox) Fork(ctx context.Context, count int, timeout time.Duration) ([]*Sandbox, error) {
	in := struct {
		Count   int   `json:"count"`
		Timeout int64 `json:"timeout,omitempty"`
	}{count, seconds(timeout)}
	var out []control.Forked
	if err := s.do(ctx, "fork sandbox", call{method: http.MethodPost, path: "/fork", in: in, out: &out}); err != nil {
		return nil, err
	}
	var copies []*Sandbox
	var failed []error
	for i := range out {
		if e := out[i].Error; e != (control.Error{}) {
			failed = append(failed, fmt.Errorf("fork sandbox: %w", &Error{Status: e.Code, Message: e.Message}))
			continue
		}
		copies = append(copies, s.client.sandbox(out[i].Sandbox))
	}
	return copies, errors.Join(failed...)
}
