package api

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// maxLogLines is how many log lines an answer has at most.
const maxLogLines = 1000

// logLevels are the levels of log lines, the lowest first.
var logLevels = []control.SandboxLogEntryLevel{
	control.SandboxLogEntryLevelDebug, control.SandboxLogEntryLevelInfo, control.SandboxLogEntryLevelWarn, control.SandboxLogEntryLevelError,
}

// GetSandboxLogs answers as clients of the first version read it: each line is a JSON
// object of its own.
func (s *server) GetSandboxLogs(ctx context.Context, r control.GetSandboxLogsRequestObject) (control.GetSandboxLogsResponseObject, error) {
	limit, err := logLimit(r.Params.Limit)
	if err != nil {
		return nil, err
	}
	entries, err := s.logs(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	entries = since(entries, r.Params.Start)
	out := control.GetSandboxLogs200JSONResponse{LogEntries: entries[:min(limit, len(entries))]}
	out.Logs = make([]control.SandboxLog, len(out.LogEntries))
	for i, e := range out.LogEntries {
		line := map[string]string{"level": string(e.Level), "message": e.Message}
		maps.Copy(line, e.Fields)
		b, err := json.Marshal(line)
		if err != nil {
			return nil, err
		}
		out.Logs[i] = control.SandboxLog{Timestamp: e.Timestamp, Line: string(b)}
	}
	return out, nil
}

// GetSandboxLogsV2 answers a page in either direction.
func (s *server) GetSandboxLogsV2(ctx context.Context, r control.GetSandboxLogsV2RequestObject) (control.GetSandboxLogsV2ResponseObject, error) {
	p := r.Params
	limit, err := logLimit(p.Limit)
	if err != nil {
		return nil, err
	}
	if p.Direction != "" && !p.Direction.Valid() {
		return nil, errs.New(errs.Invalid, "parameter direction is %q: use forward or backward", p.Direction)
	}
	lowest := slices.Index(logLevels, control.SandboxLogEntryLevel(p.Level))
	if p.Level != "" && lowest < 0 {
		return nil, errs.New(errs.Invalid, "parameter level is %q: use debug, info, warn or error", p.Level)
	}
	entries, err := s.logs(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	entries = slices.DeleteFunc(entries, func(e control.SandboxLogEntry) bool {
		return slices.Index(logLevels, e.Level) < lowest || !strings.Contains(e.Message, p.Search)
	})
	if p.Direction == control.Backward {
		if p.Cursor != 0 {
			entries = slices.DeleteFunc(entries, func(e control.SandboxLogEntry) bool { return e.Timestamp.UnixMilli() > p.Cursor })
		}
		slices.Reverse(entries)
	} else {
		entries = since(entries, p.Cursor)
	}
	return control.GetSandboxLogsV2200JSONResponse{Logs: entries[:min(limit, len(entries))]}, nil
}

// since drops the lines before a time in Unix milliseconds.
func since(entries []control.SandboxLogEntry, ms int64) []control.SandboxLogEntry {
	return slices.DeleteFunc(entries, func(e control.SandboxLogEntry) bool { return e.Timestamp.UnixMilli() < ms })
}

func logLimit(n int) (int, error) {
	if n < 0 {
		return 0, errs.New(errs.Invalid, "parameter limit is %d, it must be at least 1", n)
	}
	return min(cmp.Or(n, maxLogLines), maxLogLines), nil
}

// logs are the steps in a sandbox's life, also after its end, and while it lives the
// verdicts about its flows, by time.
func (s *server) logs(ctx context.Context, id string) ([]control.SandboxLogEntry, error) {
	sandboxID, err := sandboxID(id)
	if err != nil {
		return nil, err
	}
	events, _, err := s.Sandboxes.Events(ctx, sandbox.EventsRequest{Owner: owner(ctx), Sandbox: sandboxID, Ascending: true, Limit: maxLogLines})
	if err != nil {
		return nil, err
	}
	out := make([]control.SandboxLogEntry, 0, len(events))
	for i := range events {
		out = append(out, lifeLine(&events[i]))
	}
	switch _, err := s.Sandboxes.Get(ctx, owner(ctx), sandboxID); {
	case err == nil:
		flows := s.Flows.Events(flowlog.Filter{Sandbox: string(sandboxID)})
		for i := range flows {
			out = append(out, flowLine(&flows[i]))
		}
	case len(events) == 0 || !errs.Is(err, errs.NotFound):
		return nil, err
	}
	slices.SortStableFunc(out, func(a, b control.SandboxLogEntry) int { return a.Timestamp.Compare(b.Timestamp) })
	return out, nil
}

// lifeLine is a step in a sandbox's life as a log line.
func lifeLine(e *sandbox.Event) control.SandboxLogEntry {
	out := control.SandboxLogEntry{
		Timestamp: e.Time.UTC(), Level: control.SandboxLogEntryLevelInfo, Message: "sandbox: " + e.Name,
		Fields: map[string]string{"logger": "sandbox", "event": e.Name},
	}
	switch e.Name {
	case "exit":
		out.Level = control.SandboxLogEntryLevelWarn
	case "oom":
		out.Level = control.SandboxLogEntryLevelError
	}
	if e.Detail != "" {
		out.Message += ": " + e.Detail
	}
	return out
}

// flowLine is a verdict as a log line. What is allowed is the usual, and there may be
// much of it.
func flowLine(e *flowlog.Event) control.SandboxLogEntry {
	out := control.SandboxLogEntry{
		Timestamp: e.Time.UTC(), Level: control.SandboxLogEntryLevelDebug,
		Fields: map[string]string{"logger": "network", "verdict": string(e.Verdict), "protocol": e.Proto},
	}
	if e.Verdict == flowlog.Denied || e.Verdict == flowlog.Failed {
		out.Level = control.SandboxLogEntryLevelWarn
	}
	words := []string{string(e.Verdict), e.Proto, e.Name}
	if dst := addrOf(e.Dst); dst != "" {
		out.Fields["destination"] = dst
		words = append(words, "at "+dst)
	}
	if e.Name != "" {
		out.Fields["name"] = e.Name
	}
	if e.Rule.ID != "" {
		out.Fields["rule"] = strings.TrimSpace(e.Rule.ID + " " + e.Rule.Text)
		words = append(words, "by "+out.Fields["rule"])
	}
	if e.Detail != "" {
		words = append(words, "("+e.Detail+")")
	}
	if e.Verdict == flowlog.Closed {
		out.Fields["duration"] = e.Duration.Round(time.Millisecond).String()
	}
	out.Message = strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " ")
	return out
}
