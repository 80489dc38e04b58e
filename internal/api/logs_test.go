package api_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
)

// TestLogs reads a sandbox's log lines as command lines and dashboards do.
func TestLogs(t *testing.T) {
	b := newBench(t)
	id, other := b.create(`{}`), b.create(`{}`)
	early := flow(id, "allowed.test", flowlog.Allowed)
	early.Time = time.Now().Add(-time.Hour)
	b.flows.Record(early)
	late := flow(id, "denied.test", flowlog.Denied)
	late.Time = time.Now().Add(time.Hour)
	b.flows.Record(late)
	b.flows.Record(flow(other, "another's.test", flowlog.Denied))
	path := "/sandboxes/" + id + "/logs"
	r := b.do("GET", path, "")
	b.want(r, 200, "")
	var lines []string
	for _, l := range r.body["logs"].([]any) {
		var line struct{ Level, Logger, Message string }
		if err := json.Unmarshal([]byte(l.(map[string]any)["line"].(string)), &line); err != nil {
			t.Fatal(err)
		}
		if _, err := time.Parse(time.RFC3339, l.(map[string]any)["timestamp"].(string)); err != nil {
			t.Error(err)
		}
		lines = append(lines, line.Level+" "+line.Logger+" "+line.Message)
	}
	got := strings.Join(lines, "\n")
	first, last := "debug network allow tls allowed.test at 192.0.2.7:443", "warn network deny tls denied.test at 192.0.2.7:443"
	if !strings.HasPrefix(got, first) || !strings.HasSuffix(got, last) || !strings.Contains(got, "info sandbox sandbox: create") || strings.Contains(got, "another") {
		t.Errorf("the lines are\n%s\nwant %q, the create and %q", got, first, last)
	}
	if n := len(r.body["logEntries"].([]any)); n != len(lines) {
		t.Errorf("%d entries and %d lines", n, len(lines))
	}
	count := func(path string) int {
		t.Helper()
		r := b.do("GET", path, "")
		b.want(r, 200, "")
		return len(r.body["logs"].([]any))
	}
	now := time.Now().Add(30 * time.Minute).UnixMilli()
	for query, want := range map[string]int{
		path + fmt.Sprintf("?start=%d", now):                                  1,
		path + fmt.Sprintf("?start=%d", now+7_200_000):                        0,
		path + "?limit=2":                                                     2,
		"/v2" + path + "?level=warn":                                          1,
		"/v2" + path + "?search=allowed":                                      1,
		"/v2" + path + fmt.Sprintf("?cursor=%d&direction=backward", now):      len(lines) - 1,
		"/v2" + path + fmt.Sprintf("?cursor=%d&direction=forward", now):       1,
		"/v2" + path + "?direction=backward&limit=1&level=warn&search=denied": 1,
	} {
		if got := count(query); got != want {
			t.Errorf("%s: %d lines, want %d", query, got, want)
		}
	}
	b.want(b.do("GET", "/v2"+path+"?direction=up", ""), 400, "direction")
	b.want(b.do("GET", "/v2"+path+"?level=loud", ""), 400, "level")
	b.want(b.do("GET", path+"?limit=-1", ""), 400, "limit")
	b.want(b.do("GET", "/sandboxes/i00000000000000000000/logs", ""), 404, "")
	b.want(b.do("DELETE", "/sandboxes/"+id, ""), 204, "")
	if n := count(path); n < 2 {
		t.Errorf("%d lines after the end, want its create and its kill", n)
	}
}
