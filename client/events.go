package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"github.com/cordonhq/cordon/api/gen/control"
)

// Event is one verdict about a flow or DNS query of a sandbox.
type Event = control.NetworkEvent

// The verdicts of events. Observed: allowed only because the mode is observe.
// Closed: the end of an allowed flow. Failed: allowed, but not reachable.
const (
	Allowed  = control.NetworkEventVerdictAllow
	Denied   = control.NetworkEventVerdictDeny
	Observed = control.NetworkEventVerdictObserve
	Closed   = control.NetworkEventVerdictClose
	Failed   = control.NetworkEventVerdictFail
)

// EventOptions select events; the zero value selects all that are kept.
type EventOptions struct {
	Verdict control.NetworkEventVerdict // empty: all
	Since   int64                       // only events with a greater Seq
	Limit   int                         // the newest so many; 0: 1000, and 4096 are all that is kept
}

func (o EventOptions) query() url.Values {
	q := url.Values{}
	if o.Verdict != "" {
		q.Set("verdict", string(o.Verdict))
	}
	if o.Since > 0 {
		q.Set("since", strconv.FormatInt(o.Since, 10))
	}
	if o.Limit > 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	return q
}

// Events returns the kept events, oldest first.
func (s *Sandbox) Events(ctx context.Context, o EventOptions) ([]Event, error) {
	var out []Event
	err := s.do(ctx, "list network events", call{method: http.MethodGet, path: "/network/events?" + o.query().Encode(), out: &out})
	return out, err
}

// maxEvent bounds one line of the stream, in octets.
const maxEvent = 1 << 20

// Follow yields the kept events and then new ones as they come, until the
// sandbox or ctx ends. An error is the last it yields; the end of the sandbox is
// none. To go on after an error, set Since to the last event's Seq.
func (s *Sandbox) Follow(ctx context.Context, o EventOptions) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		query := o.query()
		query.Set("follow", "true")
		path := "/sandboxes/" + url.PathEscape(s.ID) + "/network/events?" + query.Encode()
		resp, err := s.client.send(ctx, call{method: http.MethodGet, path: path})
		if err != nil {
			yield(Event{}, fmt.Errorf("follow network events: %w", err))
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, maxEvent)
		for lines.Scan() {
			if bytes.Equal(lines.Bytes(), []byte("event: end")) {
				return
			}
			data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
			if !ok {
				continue // a comment, an ID, the blank line between
			}
			var e Event
			if err := json.Unmarshal(data, &e); err != nil {
				yield(Event{}, fmt.Errorf("decode network event: %w", err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
		err = lines.Err()
		if err == nil {
			err = fmt.Errorf("the server ended the stream")
		}
		yield(Event{}, fmt.Errorf("follow network events: %w", err))
	}
}
