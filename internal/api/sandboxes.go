package api

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// CreateSandbox starts a sandbox.
func (s *server) CreateSandbox(ctx context.Context, r control.CreateSandboxRequestObject) (control.CreateSandboxResponseObject, error) {
	req, err := createRequest(r.Body)
	if err != nil {
		return nil, err
	}
	created, err := s.create(ctx, req)
	return control.CreateSandbox201JSONResponse(created), err
}

// CreateSandboxV2 starts a sandbox whose agent always demands its token.
func (s *server) CreateSandboxV2(ctx context.Context, r control.CreateSandboxV2RequestObject) (control.CreateSandboxV2ResponseObject, error) {
	req, err := createRequest(r.Body)
	if err != nil {
		return nil, err
	}
	req.Secure = true
	created, err := s.create(ctx, req)
	return control.CreateSandboxV2201JSONResponse(created), err
}

func (s *server) create(ctx context.Context, req sandbox.CreateRequest) (control.Sandbox, error) {
	req.Owner = callerOf(ctx).ID
	rec, err := s.Sandboxes.Create(ctx, req)
	if err != nil {
		return control.Sandbox{}, err
	}
	return s.sandboxOf(&rec), nil
}

// ListRunningSandboxes lists all running sandboxes.
func (s *server) ListRunningSandboxes(ctx context.Context, r control.ListRunningSandboxesRequestObject) (control.ListRunningSandboxesResponseObject, error) {
	metadata, err := metadataFilter(r.Params.Metadata)
	if err != nil {
		return nil, err
	}
	req := sandbox.ListRequest{
		Owner: owner(ctx), Metadata: metadata, Limit: maxPage,
		States: []sandbox.State{sandbox.Running},
	}
	list := control.ListRunningSandboxes200JSONResponse{}
	for {
		recs, next, err := s.Sandboxes.List(ctx, req)
		if err != nil {
			return nil, err
		}
		list = append(list, listOf(recs)...)
		if next == "" {
			return list, nil
		}
		req.Cursor = next
	}
}

// ListSandboxes returns a page of sandboxes.
func (s *server) ListSandboxes(ctx context.Context, r control.ListSandboxesRequestObject) (control.ListSandboxesResponseObject, error) {
	p := r.Params
	metadata, err := metadataFilter(p.Metadata)
	if err != nil {
		return nil, err
	}
	states, err := statesOf(p.State)
	if err != nil {
		return nil, err
	}
	limit, err := pageLimit(p.Limit)
	if err != nil {
		return nil, err
	}
	if p.Order != "" && !p.Order.Valid() {
		return nil, errs.New(errs.Invalid, "parameter order is %q: use asc or desc", p.Order)
	}
	recs, next, err := s.Sandboxes.List(ctx, sandbox.ListRequest{
		Owner: owner(ctx), Metadata: metadata, States: states,
		Template: p.Template, StartedAfter: p.StartedAfter,
		Ascending: p.Order == control.Asc, Limit: limit, Cursor: p.NextToken,
	})
	if err != nil {
		return nil, err
	}
	return sandboxPage{listOf(recs), next}, nil
}

// GetSandbox returns everything about a sandbox.
func (s *server) GetSandbox(ctx context.Context, r control.GetSandboxRequestObject) (control.GetSandboxResponseObject, error) {
	rec, err := s.get(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	return control.GetSandbox200JSONResponse(s.detailOf(&rec)), nil
}

func (s *server) get(ctx context.Context, rawID string) (sandbox.Record, error) {
	id, err := sandboxID(rawID)
	if err != nil {
		return sandbox.Record{}, err
	}
	return s.Sandboxes.Get(ctx, owner(ctx), id)
}

// KillSandbox ends a sandbox.
func (s *server) KillSandbox(ctx context.Context, r control.KillSandboxRequestObject) (control.KillSandboxResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	return control.KillSandbox204Response{}, s.Sandboxes.Kill(ctx, owner(ctx), id)
}

// ConnectSandbox makes sure a sandbox runs.
func (s *server) ConnectSandbox(ctx context.Context, r control.ConnectSandboxRequestObject) (control.ConnectSandboxResponseObject, error) {
	connected, resumed, err := s.connect(ctx, r.SandboxID, r.Body)
	if resumed {
		return control.ConnectSandbox201JSONResponse(connected), err
	}
	return control.ConnectSandbox200JSONResponse(connected), err
}

// ConnectSandboxV2 makes sure a sandbox runs.
func (s *server) ConnectSandboxV2(ctx context.Context, r control.ConnectSandboxV2RequestObject) (control.ConnectSandboxV2ResponseObject, error) {
	connected, resumed, err := s.connect(ctx, r.SandboxID, r.Body)
	if resumed {
		return control.ConnectSandboxV2201JSONResponse(connected), err
	}
	return control.ConnectSandboxV2200JSONResponse(connected), err
}

// ResumeSandbox resumes a paused sandbox.
func (s *server) ResumeSandbox(ctx context.Context, r control.ResumeSandboxRequestObject) (control.ResumeSandboxResponseObject, error) {
	rec, err := s.get(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if stateOf(rec.State) != control.Paused {
		return nil, errs.New(errs.Conflict, "Sandbox %q is already running", string(rec.ID))
	}
	resumed, _, err := s.connect(ctx, r.SandboxID, r.Body)
	return control.ResumeSandbox201JSONResponse(resumed), err
}

func (s *server) connect(ctx context.Context, rawID string, body *control.Connect) (control.Sandbox, bool, error) {
	none := control.Sandbox{}
	if body == nil {
		body = &control.Connect{}
	}
	if body.Timeout != nil && *body.Timeout == 0 {
		body.Timeout = nil // nothing is shortened, so this cannot mean "now"
	}
	timeout, err := seconds("timeout", body.Timeout)
	if err != nil {
		return none, false, err
	}
	if err := withMemory("memory", body.Memory); err != nil {
		return none, false, err
	}
	rec, err := s.get(ctx, rawID)
	if err != nil {
		return none, false, err
	}
	if err := unchanged(&rec, body.Secure, body.AllowPublicTraffic, &body.Network); err != nil {
		return none, false, err
	}
	rec, resumed, err := s.Sandboxes.Connect(ctx, owner(ctx), rec.ID, timeout)
	if err != nil {
		return none, false, err
	}
	return s.sandboxOf(&rec), resumed, nil
}

// unchanged refuses settings beside a connect or reset that differ from what
// the sandbox has, rather than ignoring them.
func unchanged(rec *sandbox.Record, secure, public *bool, n *control.Network) error { //nolint:gocyclo // one setting after the other
	if secure != nil && *secure != (rec.AccessToken != "") {
		return errs.New(errs.Unimplemented, "secure is set when the sandbox is created and cannot be changed")
	}
	for _, p := range []*bool{public, n.AllowPublicTraffic} {
		if p != nil && *p != rec.Public() {
			return errs.New(errs.Unimplemented, "allowPublicTraffic is set when the sandbox is created and cannot be changed")
		}
	}
	mask, origin := sandbox.MaskOf(n.MaskRequestHost)
	if (origin || n.MaskOrigin) && !rec.MaskOrigin {
		return errs.New(errs.Unimplemented, "network.maskOrigin is set when the sandbox is created and cannot be changed")
	}
	if ports, err := sandbox.ParseHTTPSPorts(n.HttpsPorts); err != nil || len(ports) > 0 && !slices.Equal(ports, rec.HTTPSPorts) {
		return errs.New(errs.Unimplemented, "network.httpsPorts is set when the sandbox is created and cannot be changed")
	}
	if mask != "" && mask != rec.MaskRequestHost {
		return errs.New(errs.Unimplemented, "network.maskRequestHost is set when the sandbox is created and cannot be changed")
	}
	if n.AllowIn != nil {
		return errs.New(errs.Unimplemented, "network.allowIn is not changed by this call: use PUT /sandboxes/{id}/network")
	}
	egress, err := egressOf(n)
	if err != nil {
		return err
	}
	if len(egress.AllowOut)+len(egress.DenyOut) > 0 || egress.AllowInternetAccess != nil || egress.DNS != "" || egress.OnDeny != "" || egress.Mode != "" {
		return errs.New(errs.Unimplemented, "egress rules are not changed by this call: use PUT /sandboxes/{id}/network")
	}
	return nil
}

// SetTimeout moves the end of a sandbox's life.
func (s *server) SetTimeout(ctx context.Context, r control.SetTimeoutRequestObject) (control.SetTimeoutResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	d, err := seconds("timeout", &r.Body.Timeout)
	if err != nil {
		return nil, err
	}
	return control.SetTimeout204Response{}, s.Sandboxes.SetTimeout(ctx, owner(ctx), id, d)
}

// RefreshSandbox extends a running sandbox's life.
func (s *server) RefreshSandbox(ctx context.Context, r control.RefreshSandboxRequestObject) (control.RefreshSandboxResponseObject, error) {
	var duration *int64
	if r.Body != nil {
		duration = r.Body.Duration
	}
	d, err := seconds("duration", duration)
	if err != nil {
		return nil, err
	}
	rec, err := s.get(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if stateOf(rec.State) == control.Paused {
		return nil, errs.New(errs.Conflict, "Sandbox %q is paused: connect to it to resume it", string(rec.ID))
	}
	_, _, err = s.Sandboxes.Connect(ctx, owner(ctx), rec.ID, d)
	return control.RefreshSandbox204Response{}, err
}

// PauseSandbox puts a sandbox to disk.
func (s *server) PauseSandbox(ctx context.Context, r control.PauseSandboxRequestObject) (control.PauseSandboxResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	if r.Body != nil {
		if err := withMemory("memory", r.Body.Memory); err != nil {
			return nil, err
		}
	}
	return control.PauseSandbox204Response{}, s.Sandboxes.Pause(ctx, owner(ctx), id)
}

// GetMetrics returns samples of resource use.
func (s *server) GetMetrics(ctx context.Context, r control.GetMetricsRequestObject) (control.GetMetricsResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	samples, err := s.Sandboxes.Metrics(ctx, owner(ctx), id)
	if err != nil {
		return nil, err
	}
	from, to := r.Params.Start, r.Params.End
	list := control.GetMetrics200JSONResponse{}
	for i := range samples {
		at := samples[i].Time.Unix()
		if at >= from && (to == 0 || at <= to) {
			list = append(list, metricOf(&samples[i]))
		}
	}
	return list, nil
}

// GetQuota returns limits and what is in use.
func (s *server) GetQuota(ctx context.Context, _ control.GetQuotaRequestObject) (control.GetQuotaResponseObject, error) {
	q, err := s.Sandboxes.Quota(ctx, owner(ctx))
	if err != nil {
		return nil, err
	}
	var out control.GetQuota200JSONResponse
	out.Limit.ConcurrentInstances = q.MaxSandboxes
	out.Limit.PausedInstances = q.MaxPaused
	out.Limit.ConcurrentVcpu = q.MaxCPUs
	out.Limit.ConcurrentRamMb = q.MaxMemoryMB
	out.Limit.MaxLengthHours = int(q.MaxLifetime / time.Hour)
	out.Limit.DiskMb = q.PerSandbox.DiskMB
	out.Limit.MaxVcpu = q.PerSandbox.CPUs
	out.Limit.MaxRamMb = q.PerSandbox.MemoryMB
	out.Usage.ConcurrentInstances = q.Sandboxes
	out.Usage.PausedInstances = q.Paused
	out.Usage.ConcurrentVcpu = q.CPUs
	out.Usage.ConcurrentRamMb = q.MemoryMB
	return out, nil
}

// ListEvents returns a page of lifecycle events.
func (s *server) ListEvents(ctx context.Context, r control.ListEventsRequestObject) (control.ListEventsResponseObject, error) {
	req, err := eventsRequest(&r.Params)
	if err != nil {
		return nil, err
	}
	req.Owner = owner(ctx)
	events, total, err := s.Sandboxes.Events(ctx, req)
	if err != nil {
		return nil, err
	}
	out := control.ListEvents200JSONResponse{
		Items:   make([]control.LifecycleEvent, len(events)),
		Total:   total,
		HasMore: req.Offset+len(events) < total,
	}
	for i, e := range events {
		out.Items[i] = control.LifecycleEvent{
			EventID: e.ID, RecordAt: e.Time.Unix(), TemplateID: e.Template, TemplateName: e.Template,
			SandboxID: string(e.Sandbox), EventName: e.Name, State: string(e.State), ErrorMsg: e.Detail,
		}
		if by := e.By; by != nil {
			out.Items[i].WokenBy = control.Waker{Method: by.Method, Path: by.Path, Port: int(by.Port), Upgrade: by.Upgrade}
			if by.Source.IsValid() {
				out.Items[i].WokenBy.Source = by.Source.String()
			}
		}
	}
	return out, nil
}

func eventsRequest(p *control.ListEventsParams) (req sandbox.EventsRequest, err error) {
	if req.Limit, err = pageLimit(p.Limit); err != nil {
		return req, err
	}
	if p.Offset < 0 {
		return req, errs.New(errs.Invalid, "parameter offset is %d, it must not be negative", p.Offset)
	}
	if p.SandboxID != "" {
		if req.Sandbox, err = sandboxID(p.SandboxID); err != nil {
			return req, err
		}
	}
	req.Template, req.Ascending, req.Offset = p.TemplateID, p.OrderAsc, p.Offset
	if p.StartTime != 0 {
		req.From = time.Unix(p.StartTime, 0)
	}
	if p.EndTime != 0 {
		// The second named is included to its end.
		req.To = time.Unix(p.EndTime+1, 0).Add(-time.Nanosecond)
	}
	if p.Events != "" {
		req.Names = strings.Split(p.Events, ",")
	}
	if p.State != "" {
		for state := range strings.SplitSeq(p.State, ",") {
			req.States = append(req.States, sandbox.State(state))
		}
	}
	return req, nil
}
