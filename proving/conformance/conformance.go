// Package conformance tries every known evasion of the network rules: in a small
// internet, with a throw-away server in it, a program that sends given bytes inside its
// sandboxes, and a recorder on the wire that has the last word. It is a list of
// numbered cases, each a function one can read, and a table of what was tried,
// what arrived and what the flow log said.
//
// A case passes when every step of it does. A step that is to be refused passes
// only if the recorder saw nothing leave the host, the sandbox was told within
// its time, and the flow log has the typed reason; and each case also sends the
// same bytes where they are allowed, so that a probe that cannot work proves
// nothing.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/client"
)

// Case is one numbered evasion, or group of them.
type Case struct {
	ID    int
	Group string // "TLS", "HTTP/1", "Names", "Addresses", "DNS", "Lower layers", "Ingress"
	Title string
	// Anywhere marks cases that need neither the recorder nor the lab's names, and
	// so run against any server.
	Anywhere bool
	// Secure marks cases that need TLS in front of the server.
	Secure bool
	Run    func(*Trial)
	// Within bounds the case; 0 is thirty seconds.
	Within time.Duration
}

// caseTime bounds a case that sets no time of its own.
const caseTime = 30 * time.Second

// Cases returns every case, by number.
func Cases() []Case {
	all := slices.Concat(tlsCases(), httpCases(), nameCases(), addrCases(), dnsCases(), lowerCases(), hostCases(), keyCases(), ingressCases())
	slices.SortFunc(all, func(a, b Case) int { return a.ID - b.ID })
	return all
}

// Options say what to run and with which programs. Binary and Probe are required
// unless Against is set, which needs Key and Probe.
type Options struct {
	Binary string // the cordon program that serves
	Probe  []byte // the cordon-probe program
	// Against is the API URL of a running server to test instead of one in the
	// lab; Key is an API key of it.
	Against, Key string
	Only         []int              // run only these cases; empty: all
	Progress     func(Result, Step) // told each step as it ends; may be nil
	ServerLog    string             // file for what the throw-away server logs; may be empty
}

// Verdict is the outcome of a step or case.
type Verdict string

// The verdicts.
const (
	Pass Verdict = "pass"
	Fail Verdict = "FAIL"
	Skip Verdict = "skip"
)

// Step is one line of the table.
type Step struct {
	Tried    string   `json:"tried"`
	Arrived  string   `json:"arrived"` // at the recorder
	Logged   string   `json:"logged"`  // verdict and reason in the flow log
	Verdict  Verdict  `json:"verdict"`
	Problems []string `json:"problems,omitempty"`
}

// Result is what a case came to.
type Result struct {
	Case    int           `json:"case"`
	Group   string        `json:"group"`
	Title   string        `json:"title"`
	Verdict Verdict       `json:"verdict"`
	Why     string        `json:"why,omitempty"` // of a skip
	Took    time.Duration `json:"tookNs"`
	Steps   []Step        `json:"steps"`
}

// Report is what a run came to.
type Report struct {
	Results []Result      `json:"results"`
	Took    time.Duration `json:"tookNs"`
}

// Count returns how many cases ended with a verdict.
func (r *Report) Count(v Verdict) int {
	n := 0
	for _, res := range r.Results {
		if res.Verdict == v {
			n++
		}
	}
	return n
}

// Run runs the cases and returns the report; an error means that they could not
// be run. Without Against it needs root. It leaves nothing behind.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	began := time.Now()
	s := &suite{opts: o, subjects: map[string]*Subject{}}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	report := &Report{}
	for _, c := range Cases() {
		if len(o.Only) > 0 && !slices.Contains(o.Only, c.ID) {
			continue
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		report.Results = append(report.Results, s.run(ctx, c))
	}
	s.runLater(ctx, report)
	report.Took = time.Since(began)
	if len(report.Results) == 0 {
		return nil, fmt.Errorf("no case has the number asked for: %v", o.Only)
	}
	return report, nil
}

// suite is what all cases of a run share.
type suite struct {
	opts     Options
	stand    *stand // nil with Against
	client   *client.Client
	subjects map[string]*Subject // by rules, kept for the next case
	wire     wire
	later    []postponed
}

// postponed is the second half of a case that has to wait.
type postponed struct {
	due   time.Time
	trial *Trial
	kept  []*Subject // the first half's own
	run   func(*Trial)
}

func (s *suite) open(ctx context.Context) error {
	if s.opts.Against != "" {
		c, err := client.New(client.Options{APIURL: s.opts.Against, APIKey: s.opts.Key, SandboxURL: s.opts.Against})
		s.client = c
		return err
	}
	stand, err := newStand(ctx, s.opts)
	if err != nil {
		return err
	}
	s.stand = stand
	s.client, err = stand.client()
	return err
}

func (s *suite) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // the run's own may have ended
	defer cancel()
	var err error
	for _, sub := range s.subjects {
		err = errors.Join(err, sub.end(ctx))
	}
	if s.stand != nil {
		err = errors.Join(err, s.stand.close())
	}
	return err
}

// restart kills the server without warning, does something while it is gone, and
// starts it again.
func (s *suite) restart(ctx context.Context, gone func() error) error {
	if err := s.stand.stop(syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the server: %w", err)
	}
	for _, sub := range s.subjects {
		sub.stale = true
	}
	for _, p := range s.later {
		for _, sub := range p.kept {
			sub.stale = true
		}
	}
	err := gone()
	s.stand.http.CloseIdleConnections() // to the dead
	if serr := s.stand.start(ctx); serr != nil {
		return errors.Join(err, fmt.Errorf("start the server again: %w", serr))
	}
	return err
}

// run runs one case to its end or its time, whichever is first.
func (s *suite) run(ctx context.Context, c Case) Result {
	t := &Trial{suite: s, result: Result{Case: c.ID, Group: c.Group, Title: c.Title, Verdict: Pass}, c: c}
	if why := s.lacks(c); why != "" {
		t.result.Verdict, t.result.Why = Skip, why
		return t.result
	}
	t.within(ctx, c.Run)
	return t.result
}

// lacks says what a case needs and does not have here; empty: nothing.
func (s *suite) lacks(c Case) string {
	switch {
	case s.stand != nil:
		return ""
	case !c.Anywhere:
		return "needs the lab's recorder"
	case c.Secure && !strings.HasPrefix(s.opts.Against, "https://"):
		return "needs an https URL: browsers keep such cookies of nothing else"
	}
	return ""
}

// runLater runs the postponed halves and adds their steps to the results.
func (s *suite) runLater(ctx context.Context, report *Report) {
	for _, p := range s.later {
		select {
		case <-time.After(time.Until(p.due)):
		case <-ctx.Done():
			return
		}
		p.trial.within(ctx, func(t *Trial) {
			t.fresh = p.kept
			for _, sub := range p.kept {
				if sub.stale {
					t.must("start the probe again", sub.startProbe(t.ctx))
				}
			}
			p.run(t)
		})
		for i := range report.Results {
			if report.Results[i].Case == p.trial.c.ID {
				report.Results[i] = p.trial.result
			}
		}
	}
}
