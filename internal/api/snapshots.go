package api

import (
	"context"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// maxCopies bounds one fork.
const maxCopies = 100

func (s *server) snapshots() (Snapshots, error) {
	if s.Snapshots == nil {
		return nil, errs.New(errs.Unimplemented, "this server does not support snapshots, forks and resets")
	}
	return s.Snapshots, nil
}

// CreateSnapshot stores a sandbox's state.
func (s *server) CreateSnapshot(ctx context.Context, r control.CreateSnapshotRequestObject) (control.CreateSnapshotResponseObject, error) {
	snapshots, err := s.snapshots()
	if err != nil {
		return nil, err
	}
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	name := ""
	if r.Body != nil {
		name = r.Body.Name
	}
	snap, err := snapshots.CreateSnapshot(ctx, owner(ctx), id, name)
	if err != nil {
		return nil, err
	}
	return control.CreateSnapshot201JSONResponse(snapshotOf(&snap)), nil
}

func snapshotOf(s *sandbox.Snapshot) control.Snapshot {
	return control.Snapshot{SnapshotID: s.ID, Names: append([]string{}, s.Names...)}
}

// ListSnapshots returns a page of snapshots.
func (s *server) ListSnapshots(ctx context.Context, r control.ListSnapshotsRequestObject) (control.ListSnapshotsResponseObject, error) {
	snapshots, err := s.snapshots()
	if err != nil {
		return nil, err
	}
	req := sandbox.SnapshotsRequest{Owner: owner(ctx), Name: r.Params.Name, Cursor: r.Params.NextToken}
	if req.Limit, err = pageLimit(r.Params.Limit); err != nil {
		return nil, err
	}
	if r.Params.SandboxID != "" {
		if req.Sandbox, err = sandboxID(r.Params.SandboxID); err != nil {
			return nil, err
		}
	}
	found, next, err := snapshots.ListSnapshots(ctx, req)
	if err != nil {
		return nil, err
	}
	list := make([]control.Snapshot, len(found))
	for i := range found {
		list[i] = snapshotOf(&found[i])
	}
	return snapshotPage{list, next}, nil
}

// ForkSandbox starts copies and says of each whether it runs.
func (s *server) ForkSandbox(ctx context.Context, r control.ForkSandboxRequestObject) (control.ForkSandboxResponseObject, error) {
	var body control.ForkSandboxJSONRequestBody
	if r.Body != nil {
		body = *r.Body
	}
	forked, err := s.fork(ctx, r.SandboxID, copies{body.Count, body.Timeout, false})
	if err != nil {
		return nil, err
	}
	list := make(control.ForkSandbox201JSONResponse, len(forked))
	for i := range forked {
		if forked[i].Err != nil {
			list[i].Error = s.describe(ctx, "fork "+r.SandboxID, forked[i].Err)
			continue
		}
		list[i].Sandbox = s.sandboxOf(&forked[i].Record)
	}
	return list, nil
}

// CloneSandbox starts copies and returns those that run.
func (s *server) CloneSandbox(ctx context.Context, r control.CloneSandboxRequestObject) (control.CloneSandboxResponseObject, error) {
	var body control.CloneSandboxJSONRequestBody
	if r.Body != nil {
		body = *r.Body
	}
	forked, err := s.fork(ctx, r.SandboxID, copies{body.Count, body.Timeout, body.Strict})
	if err != nil {
		return nil, err
	}
	out := control.CloneSandbox201JSONResponse{Sandboxes: []control.Clone{}}
	for i := range forked {
		if err := forked[i].Err; err != nil {
			s.describe(ctx, "clone "+r.SandboxID, err) // into the log
			continue
		}
		out.Sandboxes = append(out.Sandboxes, s.cloneOf(&forked[i].Record))
	}
	return out, nil
}

// copies is what both dialects ask of a fork.
type copies struct {
	count   *int
	timeout *int64
	strict  bool
}

func (s *server) fork(ctx context.Context, rawID string, c copies) ([]sandbox.Forked, error) {
	snapshots, err := s.snapshots()
	if err != nil {
		return nil, err
	}
	id, err := sandboxID(rawID)
	if err != nil {
		return nil, err
	}
	req := sandbox.ForkRequest{Count: 1, Strict: c.strict}
	if c.count != nil {
		req.Count = *c.count
	}
	if req.Count < 1 || req.Count > maxCopies {
		return nil, errs.New(errs.Invalid, "count is %d, it must be 1 to %d", req.Count, maxCopies)
	}
	if req.Timeout, err = seconds("timeout", c.timeout); err != nil {
		return nil, err
	}
	return snapshots.Fork(ctx, owner(ctx), id, req)
}

// ResetSandbox starts a sandbox over.
func (s *server) ResetSandbox(ctx context.Context, r control.ResetSandboxRequestObject) (control.ResetSandboxResponseObject, error) {
	snapshots, err := s.snapshots()
	if err != nil {
		return nil, err
	}
	var body control.ResetSandboxJSONRequestBody
	if r.Body != nil {
		body = *r.Body
	}
	req := sandbox.ResetRequest{Resume: body.Resume == nil || *body.Resume}
	if req.Timeout, err = seconds("timeout", body.Timeout); err != nil {
		return nil, err
	}
	rec, err := s.get(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	// Whether ports are public may change here, the rest may not.
	req.AllowPublicTraffic = body.AllowPublicTraffic
	if req.AllowPublicTraffic == nil {
		req.AllowPublicTraffic = body.Network.AllowPublicTraffic
	}
	body.Network.AllowPublicTraffic = nil
	if err := unchanged(&rec, body.Secure, nil, &body.Network); err != nil {
		return nil, err
	}
	rec, err = snapshots.Reset(ctx, owner(ctx), rec.ID, req)
	if err != nil {
		return nil, err
	}
	return control.ResetSandbox200JSONResponse{TrafficAccessToken: rec.TrafficToken}, nil
}
