package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// sandboxOf is what a client needs to use a sandbox.
func (s *server) sandboxOf(rec *sandbox.Record) control.Sandbox {
	return control.Sandbox{
		SandboxID:          string(rec.ID),
		TemplateID:         rec.TemplateID,
		Alias:              rec.Template,
		ClientID:           clientID,
		EnvdVersion:        EnvdVersion,
		EnvdAccessToken:    rec.AccessToken,
		TrafficAccessToken: rec.TrafficToken,
		Domain:             s.Domain,
	}
}

func (s *server) cloneOf(rec *sandbox.Record) control.Clone {
	return control.Clone{
		SandboxID:          string(rec.ID),
		TemplateID:         rec.TemplateID,
		EnvdVersion:        EnvdVersion,
		EnvdAccessToken:    rec.AccessToken,
		TrafficAccessToken: rec.TrafficToken,
		Domain:             s.Domain,
	}
}

func listedOf(rec *sandbox.Record) control.ListedSandbox {
	return control.ListedSandbox{
		SandboxID:   string(rec.ID),
		TemplateID:  rec.TemplateID,
		Alias:       rec.Template,
		ClientID:    clientID,
		StartedAt:   rec.Started.UTC(),
		EndAt:       rec.Expires.UTC(),
		CpuCount:    rec.Resources.CPUs,
		MemoryMB:    rec.Resources.MemoryMB,
		DiskSizeMB:  rec.Resources.DiskMB,
		State:       stateOf(rec.State),
		EnvdVersion: EnvdVersion,
		Metadata:    rec.Metadata,
	}
}

func listOf(recs []sandbox.Record) []control.ListedSandbox {
	list := make([]control.ListedSandbox, len(recs))
	for i := range recs {
		list[i] = listedOf(&recs[i])
	}
	return list
}

func (s *server) detailOf(rec *sandbox.Record) control.SandboxDetail {
	l := listedOf(rec)
	return control.SandboxDetail{
		SandboxID: l.SandboxID, TemplateID: l.TemplateID, Alias: l.Alias, ClientID: l.ClientID,
		StartedAt: l.StartedAt, EndAt: l.EndAt, State: l.State,
		CpuCount: l.CpuCount, MemoryMB: l.MemoryMB, DiskSizeMB: l.DiskSizeMB,
		EnvdVersion: l.EnvdVersion, Metadata: l.Metadata,
		EnvdAccessToken:     rec.AccessToken,
		Domain:              s.Domain,
		AllowInternetAccess: rec.Egress.AllowInternetAccess,
		Network:             networkOf(rec),
		Lifecycle: control.Lifecycle{
			OnTimeout:  control.LifecycleOnTimeout(rec.OnTimeout),
			AutoResume: rec.AutoResume, AutoResumeOn: string(rec.AutoResumeOn), IdleTimeout: int64(rec.IdleTimeout / time.Second),
		},
	}
}

// networkOf returns what was asked of the network, nil when nothing was.
func networkOf(rec *sandbox.Record) *control.NetworkInfo {
	e := &rec.Egress
	if len(e.AllowOut)+len(e.DenyOut) == 0 && e.DNS == "" && e.OnDeny == "" && e.Mode == "" &&
		rec.AllowPublicTraffic == nil && rec.MaskRequestHost == "" && len(rec.HTTPSPorts) == 0 && rec.AllowIn == nil {
		return nil
	}
	return &control.NetworkInfo{
		AllowOut:           e.AllowOut,
		DenyOut:            e.DenyOut,
		AllowPublicTraffic: rec.AllowPublicTraffic,
		MaskRequestHost:    rec.MaskRequestHost,
		MaskOrigin:         rec.MaskOrigin,
		HttpsPorts:         portsOf(rec.HTTPSPorts),
		AllowIn:            sourcesOf(rec),
		Dns:                string(e.DNS),
		OnDeny:             string(e.OnDeny),
		Mode:               string(e.Mode),
		Generation:         int64(rec.Generation),
	}
}

func portsOf(ports []uint16) []int {
	var out []int
	for _, p := range ports {
		out = append(out, int(p))
	}
	return out
}

// sourcesOf tells an empty list, which lets nobody in, from none at all.
func sourcesOf(rec *sandbox.Record) *[]string {
	if rec.AllowIn == nil {
		return nil
	}
	out := make([]string, len(rec.AllowIn))
	for i, p := range rec.AllowIn {
		out[i] = p.String()
	}
	return &out
}

// stateOf maps a state to one of the two that clients know.
func stateOf(s sandbox.State) control.SandboxState {
	if s == sandbox.Paused {
		return control.Paused
	}
	return control.Running
}

func metricOf(m *sandbox.Metrics) control.Metric {
	return control.Metric{
		Timestamp:     m.Time.UTC(),
		TimestampUnix: m.Time.Unix(),
		CpuCount:      m.CPUCount,
		CpuUsedPct:    m.CPUUsedPct,
		MemUsed:       m.MemUsed,
		MemTotal:      m.MemTotal,
		MemCache:      m.MemCache,
		DiskUsed:      m.DiskUsed,
		DiskTotal:     m.DiskTotal,
	}
}

func networkEventOf(e *flowlog.Event) control.NetworkEvent {
	return control.NetworkEvent{
		Seq:         int64(e.Seq),
		Time:        e.Time.UTC(),
		SandboxID:   e.Sandbox,
		Generation:  int64(e.Generation),
		Layer:       control.NetworkEventLayer(e.Layer),
		Verdict:     control.NetworkEventVerdict(e.Verdict),
		Rule:        ruleOf(e.Rule),
		Reason:      string(e.Reason),
		Protocol:    e.Proto,
		Source:      addrOf(e.Src),
		Destination: addrOf(e.Dst),
		Upstream:    addrOf(e.Upstream),
		Name:        e.Name,
		Answers:     textsOf(e.Answers),
		Detail:      e.Detail,
		BytesOut:    e.BytesOut,
		BytesIn:     e.BytesIn,
		DurationMs:  float64(e.Duration) / float64(time.Millisecond),
	}
}

func textsOf(addrs []netip.Addr) []string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return out
}

func ruleOf(r policy.Rule) control.Rule { return control.Rule{Id: r.ID, Text: r.Text} }

func addrOf(a netip.AddrPort) string {
	switch {
	case !a.IsValid():
		return ""
	case a.Port() == 0: // ICMP
		return a.Addr().String()
	}
	return a.String()
}

// page is a list with the token of the next page in a header that is absent on
// the last page.
type page[T any] struct {
	items []T
	next  string
}

func (p page[T]) write(w http.ResponseWriter) error {
	text, err := json.Marshal(p.items)
	if err != nil {
		return fmt.Errorf("encode page: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	if p.next != "" {
		w.Header().Set("X-Next-Token", p.next)
	}
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(text) // the caller may be gone
	return nil
}

type sandboxPage page[control.ListedSandbox]

func (p sandboxPage) VisitListSandboxesResponse(w http.ResponseWriter) error {
	return page[control.ListedSandbox](p).write(w)
}

type snapshotPage page[control.Snapshot]

func (p snapshotPage) VisitListSnapshotsResponse(w http.ResponseWriter) error {
	return page[control.Snapshot](p).write(w)
}

// eventStream answers with server-sent events as they come.
type eventStream struct {
	ctx    context.Context
	events <-chan flowlog.Event
	// gone reports whether the sandbox has ended, and with it the stream.
	gone func() bool
}

// The times of a stream: how long a silence lasts before a comment fills it, so
// that proxies keep the connection, and how long a client may not read.
const (
	streamPulse    = 15 * time.Second
	streamDeadline = 30 * time.Second
)

// VisitListNetworkEventsResponse streams until the caller or the sandbox is gone.
func (s eventStream) VisitListNetworkEventsResponse(w http.ResponseWriter) error {
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // nginx would hold events back
	w.WriteHeader(http.StatusOK)
	send := func(format string, args ...any) bool {
		rc := http.NewResponseController(w)
		_ = rc.SetWriteDeadline(time.Now().Add(streamDeadline)) // unknown to a test's writer
		_, err := fmt.Fprintf(w, format, args...)
		return err == nil && rc.Flush() == nil
	}
	pulse := time.NewTicker(streamPulse)
	defer pulse.Stop()
	for ok := send(": following\n\n"); ok; {
		select {
		case e, open := <-s.events:
			if !open {
				return nil
			}
			text, err := json.Marshal(networkEventOf(&e))
			if err != nil { // plain values: cannot be
				panic(err)
			}
			ok = send("id: %d\nevent: flow\ndata: %s\n\n", e.Seq, text)
		case <-pulse.C:
			if s.gone() {
				send("event: end\ndata: {}\n\n")
				return nil
			}
			ok = send(": pulse\n\n")
		case <-s.ctx.Done():
			return nil
		}
	}
	return nil
}
