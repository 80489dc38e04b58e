package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

// Trial is one case while it runs: it makes sandboxes, carries out steps and
// judges them.
type Trial struct {
	suite  *suite
	c      Case
	ctx    context.Context // of the case, with its time
	result Result
	fresh  []*Subject // ended with the case
}

// stopped ends a case that cannot go on; its problem has been noted.
type stopped struct{}

// within runs part of a case, bounded in time.
func (t *Trial) within(ctx context.Context, run func(*Trial)) {
	began := time.Now()
	limit := t.c.Within
	if limit == 0 {
		limit = caseTime
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	t.ctx = ctx
	defer func() {
		p := recover()
		if _, ok := p.(stopped); p != nil && !ok {
			panic(p)
		}
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		for _, s := range t.fresh {
			if err := s.end(cleanup); err != nil {
				t.fail("end the sandbox", err)
			}
		}
		t.fresh = nil
		t.result.Took += time.Since(began)
	}()
	run(t)
}

// add notes a step.
func (t *Trial) add(s Step) {
	s.Verdict = Pass
	if len(s.Problems) > 0 {
		s.Verdict, t.result.Verdict = Fail, Fail
	}
	t.result.Steps = append(t.result.Steps, s)
	if t.suite.opts.Progress != nil {
		t.suite.opts.Progress(t.result, s)
	}
}

// fail notes a step that could not be carried out.
func (t *Trial) fail(tried string, err error) {
	t.add(Step{Tried: tried, Arrived: "-", Logged: "-", Problems: []string{err.Error()}})
}

// must ends the case when something it needs does not work.
func (t *Trial) must(doing string, err error) {
	if err != nil {
		t.fail(doing, err)
		panic(stopped{})
	}
}

// Later runs the rest of the case when so much time has passed, after all other
// cases.
func (t *Trial) Later(d time.Duration, run func(*Trial)) {
	t.suite.later = append(t.suite.later, postponed{due: time.Now().Add(d), trial: t, kept: t.fresh, run: run})
	t.fresh = nil
}

// Sandbox returns a sandbox under the rules, shared with other cases that need
// the same: it must be left as it is.
func (t *Trial) Sandbox(n client.Network) *Subject {
	key, err := json.Marshal(n)
	t.must("describe the rules", err)
	if s, ok := t.suite.subjects[string(key)]; ok {
		if s.stale {
			t.must("start the probe again", s.startProbe(t.ctx))
		}
		return s
	}
	s, err := t.suite.newSubject(t.ctx, client.CreateOptions{Network: n, Timeout: 10 * time.Minute})
	t.must("start a sandbox", err)
	t.suite.subjects[string(key)] = s
	return s
}

// Fresh returns a sandbox of the case's own.
func (t *Trial) Fresh(n client.Network) *Subject {
	s, err := t.suite.newSubject(t.ctx, client.CreateOptions{Network: n, Timeout: 10 * time.Minute})
	t.must("start a sandbox", err)
	t.fresh = append(t.fresh, s)
	return s
}

// Try is what one step does and what must come of it.
type Try struct {
	What string // the line of the table
	By   *Subject
	// Orders are carried out at the same time; Do is for what is no order. Below
	// gives the orders to the probe of Subject.Takeover.
	Orders []probe.Order
	Below  bool
	Do     func(ctx context.Context) error

	// Reaches is what must arrive. Nothing else may leave the host, but DNS
	// questions for names that By's rules list and for Asks. With neither Reaches
	// nor Asks, nothing at all may leave.
	Reaches []Arrival
	Asks    []string
	// May lists what may arrive and need not.
	May []Arrival
	// Never lists texts that must not leave in any form, wherever to.
	Never []string
	// Answer judges what each order saw; nil accepts anything but a hang.
	Answer func(probe.Outcome) error
	// AnswerEach judges where the orders are to see different things.
	AnswerEach func(i int, got probe.Outcome) error
	// Log is what the flow log must say, once for each order unless LogOnce, or
	// LogLines times: all questions of one look-up of a denied name are one line.
	Log      Want
	LogOnce  bool
	LogLines int
	// Slow is how long the orders may take; 0 is three seconds.
	Slow time.Duration
}

// Want is a line of the flow log, by verdict and one of the reasons; the zero
// value wants none.
type Want struct {
	Verdict string
	Reasons []string
	Name    string // if not empty, the name in the line
}

func denied(reasons ...string) Want  { return Want{Verdict: string(client.Denied), Reasons: reasons} }
func allowed(reasons ...string) Want { return Want{Verdict: string(client.Allowed), Reasons: reasons} }

// Try carries out a step and notes what came of it. It returns what the orders saw.
func (t *Trial) Try(try Try) []probe.Outcome {
	step := Step{Tried: try.What}
	problem := func(format string, args ...any) {
		step.Problems = append(step.Problems, fmt.Sprintf(format, args...))
	}
	seq, err := t.begin(try.By)
	t.must(try.What, err)
	began := time.Now()
	outcomes, err := t.carryOut(try)
	if err != nil {
		problem("%v", err)
	}
	slow := try.Slow
	if slow == 0 {
		slow = 3 * time.Second
	}
	if took := time.Since(began); took > slow+2*time.Second { // the machine's load is not the product's
		problem("it took %s", took.Round(time.Millisecond))
	}
	for i, got := range outcomes {
		if err := judge(try, i, got, slow); err != nil {
			problem("order %d: %v: %s", i, err, describe(got))
		}
	}
	// The log first: what it waits for has left the host by then.
	step.Logged, err = t.logged(try, seq)
	if err != nil {
		problem("%v", err)
	}
	step.Arrived, err = t.arrived(try)
	if err != nil {
		problem("%v", err)
	}
	t.add(step)
	return outcomes
}

// begin marks the moment on the wire and in the flow log.
func (t *Trial) begin(by *Subject) (seq int64, err error) {
	if t.suite.stand != nil {
		t.suite.wire.begin(t.suite.stand.lab.Recorder())
	}
	if by == nil {
		return 0, nil
	}
	last, err := by.Events(t.ctx, client.EventOptions{Limit: 1})
	if err != nil || len(last) == 0 {
		return 0, err
	}
	return last[len(last)-1].Seq, nil
}

func (t *Trial) carryOut(try Try) (out []probe.Outcome, err error) {
	if len(try.Orders) > 0 {
		p := try.By.inside
		if try.Below {
			p = try.By.below
		}
		if out, err = p.do(t.ctx, try.Orders); err != nil {
			return nil, err
		}
	}
	if try.Do != nil {
		err = try.Do(t.ctx)
	}
	return out, err
}

func judge(try Try, i int, got probe.Outcome, slow time.Duration) error {
	switch {
	case got.Took > slow:
		return fmt.Errorf("it took %s, the most is %s", got.Took.Round(time.Millisecond), slow)
	case try.AnswerEach != nil:
		return try.AnswerEach(i, got)
	case try.Answer != nil:
		return try.Answer(got)
	}
	return nil
}

// describe shows an outcome in a problem.
func describe(got probe.Outcome) string {
	said := got.Received
	for _, r := range got.Replies {
		said = append(append(said, '|'), r...)
	}
	if len(said) > 120 {
		said = append(slices.Clone(said[:120]), "…"...)
	}
	return fmt.Sprintf("connected %v, secured %v, sent %d, ended by %q after %s, received %q",
		got.Connected, got.Secured, got.Sent, got.End, got.Took.Round(time.Millisecond), said)
}

// logged waits for the line that the flow log must have.
func (t *Trial) logged(try Try, since int64) (string, error) {
	if try.Log.Verdict == "" || try.By == nil {
		return "-", nil
	}
	need := max(1, len(try.Orders))
	switch {
	case try.LogOnce:
		need = 1
	case try.LogLines > 0:
		need = try.LogLines
	}
	var events []client.Event
	for deadline := time.Now().Add(8 * time.Second); ; {
		var err error
		if events, err = try.By.Events(t.ctx, client.EventOptions{Since: since}); err != nil {
			return "-", err
		}
		first, n := "", 0
		for _, e := range events {
			if string(e.Verdict) == try.Log.Verdict && slices.Contains(try.Log.Reasons, e.Reason) && (try.Log.Name == "" || e.Name == try.Log.Name) {
				if n++; first == "" {
					first = string(e.Verdict) + " " + e.Reason
				}
				if e.Rule.Id == "" {
					return first, fmt.Errorf("the line of the flow log names no rule: %+v", e)
				}
			}
		}
		if n >= need {
			return first, nil
		}
		if time.Now().After(deadline) {
			return "-", fmt.Errorf("the flow log has %d of %d lines %s %s%s; it has %s", n, need,
				try.Log.Verdict, strings.Join(try.Log.Reasons, "/"), try.Log.Name, eventsText(events))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func eventsText(events []client.Event) string {
	if len(events) == 0 {
		return "nothing"
	}
	var out []string
	for _, e := range events[max(0, len(events)-6):] {
		out = append(out, fmt.Sprintf("[%s %s %s %s %s %s %q]", e.Layer, e.Verdict, e.Reason, e.Protocol, e.Destination, e.Name, e.Detail))
	}
	return strings.Join(out, " ")
}

// arrived judges what the recorder saw in the step.
func (t *Trial) arrived(try Try) (string, error) {
	if t.suite.stand == nil {
		return "-", nil
	}
	l := t.suite.stand.lab
	seen := t.suite.wire.since(l.Recorder())
	var problems []error
	if err := seen.Err(); err != nil {
		problems = append(problems, err)
	}
	for _, a := range try.Reaches {
		there := seen.To(a.At)
		if a.At.Is4() && len(there.Packets()) == 0 {
			there = seen.To(l.Twin6(a.At))
		}
		switch {
		case len(there.Packets()) == 0:
			problems = append(problems, fmt.Errorf("nothing arrived at %s", a.At))
		case a.Text != "" && !there.Contains([]byte(a.Text)):
			problems = append(problems, fmt.Errorf("%q did not arrive at %s", a.Text, a.At))
		}
	}
	asked := func(name string) bool {
		if len(try.Reaches) == 0 && len(try.Asks) == 0 {
			return false
		}
		return slices.Contains(try.Asks, name) || try.By != nil && listed(try.By.network, name)
	}
	if err := stray(seen, l, slices.Concat(try.Reaches, try.May), asked).None(); err != nil {
		problems = append(problems, fmt.Errorf("not expected: %w", err))
	}
	for _, text := range try.Never {
		if carries(seen, text) {
			problems = append(problems, fmt.Errorf("%q left the host", text))
		}
	}
	return summary(seen), errors.Join(problems...)
}

// listed reports whether a name is in the allow list. It is written apart from
// the product's matcher, which it checks.
func listed(n client.Network, name string) bool {
	for _, entry := range n.AllowOut {
		entry, _, _ = strings.Cut(strings.ToLower(entry), ":")
		parent, wild := strings.CutPrefix(entry, "*")
		if entry == name || wild && strings.HasSuffix(name, parent) && name != parent {
			return true
		}
	}
	return len(n.DenyOut) == 0 // nothing is denied: any name may be asked
}
