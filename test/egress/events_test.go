package egress_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/cordonhq/cordon/client"
)

// verdict is what the flow log must say about an attempt.
type verdict struct {
	Verdict string // "allow", "deny", "observe"
	Rule    string // its ID
	Reason  string
}

func (v verdict) String() string { return v.Verdict + " " + v.Rule + " " + v.Reason }

// check is an attempt and all that must come of it.
type check struct {
	try
	class string
	verdict
	server string // who must have answered, if it matters
}

// run tries and compares, with the flow log too.
func (g *guest) run(checks ...check) {
	g.t.Helper()
	for _, c := range checks {
		since := g.lastSeq()
		if c.Kind == "dns" && c.verdict.Verdict == "deny" {
			since = g.beforeLookup(c.class)
		}
		o := g.try(c.try)
		if o.Class != c.class {
			g.t.Errorf("%s: got %s, want %s", c.try, o, c.class)
			continue
		}
		if c.server != "" && o.Server != c.server {
			g.t.Errorf("%s: %s answered, want %s", c.try, o.Server, c.server)
		}
		if c.verdict != (verdict{}) {
			g.logged(since, c)
		}
	}
}

// beforeLookup is the number of the newest event that is older than a look-up can be:
// questions for a denied name shortly after another belong to the same look-up, which
// is one event.
func (g *guest) beforeLookup(class string) (seq int64) {
	g.t.Helper()
	within := time.Second
	if class == "REFUSED" {
		within = 5 * time.Second
	}
	for _, e := range g.events(client.EventOptions{}) {
		if time.Since(e.Time) > within {
			seq = max(seq, e.Seq)
		}
	}
	return seq
}

// lastSeq is the number of the newest event.
func (g *guest) lastSeq() int64 {
	g.t.Helper()
	events := g.events(client.EventOptions{Limit: 1})
	if len(events) == 0 {
		return 0
	}
	return events[0].Seq
}

func (g *guest) events(o client.EventOptions) []client.Event {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 10*time.Second)
	defer cancel()
	events, err := g.Events(ctx, o)
	if err != nil {
		g.t.Fatal(err)
	}
	return events
}

// logged waits until the flow log has the verdict about an attempt.
func (g *guest) logged(since int64, c check) {
	g.t.Helper()
	var events []client.Event
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		events = g.events(client.EventOptions{Since: since})
		for _, e := range events {
			if c.about(&e) && (verdict{string(e.Verdict), e.Rule.Id, e.Reason}) == c.verdict {
				return
			}
		}
	}
	g.t.Errorf("%s: the flow log does not say %q but\n%s", c.try, c.verdict, list(events))
}

// about reports whether an event is about the attempt itself, not about a
// question that it needed first.
func (y try) about(e *client.Event) bool {
	if e.Layer != "kernel" && (y.Kind == "dns") != (e.Protocol == "dns") {
		return false
	}
	host, port, err := net.SplitHostPort(y.Addr)
	if err != nil {
		return false
	}
	if net.ParseIP(host) != nil {
		return e.Destination == net.JoinHostPort(host, port) && (y.Kind != "dns" || e.Layer == "kernel" || e.Name == y.Name)
	}
	return strings.HasSuffix(e.Destination, ":"+port) && (e.Name == host || e.Layer == "kernel")
}

func list(events []client.Event) string {
	var b strings.Builder
	for _, e := range events {
		fmt.Fprintf(&b, "\t%s\n", line(&e))
	}
	return b.String()
}

func line(e *client.Event) string {
	return fmt.Sprintf("%s %s %s %s %s: %s %q %s, generation %d, %s", e.Layer, e.Verdict, e.Protocol, e.Destination, e.Name, e.Rule.Id, e.Rule.Text, e.Reason, e.Generation, e.Detail)
}
