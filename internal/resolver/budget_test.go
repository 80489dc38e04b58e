package resolver

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// reasonOf returns why err refuses, "" for nil.
func reasonOf(t *testing.T, err error) policy.Reason {
	t.Helper()
	var over *refusal
	if err != nil && !errors.As(err, &over) {
		t.Fatalf("got %v, want a refusal", err)
	}
	if over == nil {
		return ""
	}
	return over.reason
}

// atOnce calls f for 0 to n-1 at the same time and counts the reasons.
func atOnce(t *testing.T, n int, f func(i int) error) map[policy.Reason]int {
	t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	out := map[policy.Reason]int{}
	for _, err := range errs {
		out[reasonOf(t, err)]++
	}
	return out
}

func TestQueriesBeyondTheRateWaitTheirTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newBudgets(Budget{QueriesPerSecond: 10, Burst: 20, Concurrent: 1000}, nil)
		began := time.Now()
		ask := func(sandbox string) func(int) error {
			return func(i int) error {
				leave, err := s.enter(t.Context(), s.of(sandbox), question{sandbox, fmt.Sprint(i), dns.TypeA})
				if err == nil {
					leave()
				}
				return err
			}
		}
		// 20 at once, and 39 in the four seconds that the others wait.
		if got := atOnce(t, 100, ask("s1")); got[""] != 59 || got[ReasonRate] != 41 {
			t.Errorf("of 100 queries at once: %v", got)
		}
		if took := time.Since(began); took != maxWait-100*time.Millisecond {
			t.Errorf("the last one waited %s", took)
		}
		if got := atOnce(t, 20, ask("s2")); got[""] != 20 {
			t.Errorf("another sandbox pays for it: %v", got)
		}
	})
}

func TestBothAddressFamiliesAreOneQuery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newBudgets(Budget{QueriesPerSecond: 0.001, Burst: 10}, nil)
		b := s.of("s1")
		got := atOnce(t, 20, func(i int) error {
			return s.pay(t.Context(), b, fmt.Sprint(i/2), []uint16{dns.TypeA, dns.TypeAAAA}[i%2])
		})
		if got[""] != 20 {
			t.Errorf("ten names, both families: %v", got)
		}
		for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT} { // a third query for a name is another one
			ctx, cancel := context.WithTimeout(t.Context(), maxWait)
			if got := reasonOf(t, s.pay(ctx, b, "1", qtype)); got != ReasonRate {
				t.Errorf("%s again: %q", dns.TypeToString[qtype], got)
			}
			cancel()
			time.Sleep(oneLookup)
		}
		for i := range 3 * maxPayments {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			_ = s.pay(ctx, b, fmt.Sprint("n", i), dns.TypeA)
			cancel()
		}
		if n := len(b.paid); n > maxPayments {
			t.Errorf("%d payments are kept", n)
		}
	})
}

func TestQueriesUnderWayAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newBudgets(Budget{QueriesPerSecond: 1e6, Burst: 1e6, Concurrent: 10}, nil)
		var under, most atomic.Int32
		ask := func(took time.Duration) map[policy.Reason]int {
			return atOnce(t, 100, func(i int) error {
				leave, err := s.enter(t.Context(), s.of("s1"), question{"s1", fmt.Sprint(i), dns.TypeA})
				if err != nil {
					return err
				}
				most.Store(max(most.Load(), under.Add(1)))
				time.Sleep(took)
				under.Add(-1)
				leave()
				return nil
			})
		}
		if got := ask(200 * time.Millisecond); got[""] != 100 {
			t.Errorf("ten rounds of 200 ms: %v", got)
		}
		if got := ask(time.Second); got[""] < 40 || got[ReasonConcurrency] < 40 {
			t.Errorf("ten rounds of a second: %v", got)
		}
		if most.Load() > 10 {
			t.Errorf("%d were under way at once", most.Load())
		}
		if used := s.asking.Pool().Used(); used != 0 || len(s.of("s1").slots) != 0 {
			t.Errorf("%d and %d places were not given back", used, len(s.of("s1").slots))
		}
	})
}

// TestASandboxThatAsksBeforeItsKeyIsKnown is charged to the key from the moment it is: a
// copy's processes go on before the copy is shown to the rest of the server.
func TestASandboxThatAsksBeforeItsKeyIsKnown(t *testing.T) {
	owners := map[string]string{}
	s := newBudgets(Budget{LabelsPerMinute: 2}, func(sandbox string) string { return owners[sandbox] })
	before := s.of("s1")
	if err := before.label(t.Context(), "*.example.com", "1.example.com"); err != nil || before.key != "" {
		t.Fatalf("key %q, %v", before.key, err)
	}
	owners["s1"], owners["s2"] = "k", "k"
	one, two := s.of("s1"), s.of("s2")
	if one.key != "k" || one.keyNames != two.keyNames {
		t.Errorf("it counts for key %q, with the key's other sandboxes: %v", one.key, one.keyNames == two.keyNames)
	}
	if one.names != before.names || one.rate != before.rate || one.slots != before.slots {
		t.Error("its own counters began anew")
	}
	if s.of("s1") != one {
		t.Error("a known key is looked up again")
	}
}

func TestOneKeyLeavesRoomForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newBudgets(Budget{}, func(sandbox string) string { return sandbox[:1] })
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 60 { // sandboxes of key a, each with all it may have under way
			for j := range 100 {
				wg.Go(func() {
					leave, err := s.enter(ctx, s.of(fmt.Sprint("a", i)), question{fmt.Sprint("a", i), fmt.Sprint(j), dns.TypeA})
					if err == nil {
						<-ctx.Done()
						leave()
					}
				})
			}
		}
		time.Sleep(2 * maxWait)
		began := time.Now()
		got := atOnce(t, 100, func(i int) error {
			leave, err := s.enter(t.Context(), s.of("b1"), question{"b1", fmt.Sprint(i), dns.TypeA})
			if err == nil {
				leave()
			}
			return err
		})
		if got[""] != 100 || time.Since(began) > time.Second {
			t.Errorf("another key's queries: %v after %s", got, time.Since(began))
		}
		cancel()
		wg.Wait()
		// Queries in hand and connections are shared in the same way.
		for _, p := range []interface {
			Take(string, string, int64) error
			Give(string, string, int64)
		}{s.queries, s.conns} {
			taken := 0
			for i := 0; p.Take("a", fmt.Sprint("a", i/10), 1) == nil; i++ {
				taken++
			}
			if err := p.Take("b", "b1", 1); err != nil || taken < 100 {
				t.Errorf("after %d of one key: %v", taken, err)
			}
			p.Give("b", "b1", 1)
			p.Give("a", "", int64(taken))
		}
	})
}

func TestAtMostSoManyNamesInAnyMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 10
		l := newLabels(maphash.MakeSeed(), most)
		type passed struct {
			name string
			at   time.Time
		}
		var all []passed
		try := func(name string) bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			ok := l.count(ctx, "*.wild.test", name)
			if ok {
				all = append(all, passed{name, time.Now()})
			}
			return ok
		}
		for i := range 3000 { // old and new names, for ten minutes
			try(fmt.Sprint(i % 23))
			try(fmt.Sprint("n", i))
			time.Sleep(200 * time.Millisecond)
		}
		for i := range all {
			names := map[string]bool{}
			for _, p := range all[i:] {
				if p.at.Sub(all[i].at) < time.Minute {
					names[p.name] = true
				}
			}
			if len(names) > most {
				t.Fatalf("%d names in the minute from %s", len(names), all[i].at)
			}
		}
		if len(all) < 9*most {
			t.Errorf("%d passed in ten minutes", len(all))
		}
		// What was counted is known, and another rule is counted by itself.
		time.Sleep(time.Minute)
		for i := range most {
			if !try(fmt.Sprint(i)) {
				t.Errorf("name %d of a new minute", i)
			}
		}
		if !try("3") || try("new") || !l.count(t.Context(), "*.other.test", "new") {
			t.Error("a known name, a new one, another rule")
		}
		time.Sleep(time.Minute - time.Second) // the next place is free in a second
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if !l.count(ctx, "*.wild.test", "new") {
			t.Error("a name did not wait for its place")
		}
		for i := range 3 * maxRules {
			l.count(t.Context(), fmt.Sprint(i), "x")
			time.Sleep(100 * time.Millisecond)
		}
		if n := len(l.rules); n > maxRules+1 {
			t.Errorf("%d rules are kept", n)
		}
	})
}

func TestIdleSandboxesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newBudgets(Budget{}, func(sandbox string) string { return "key of " + sandbox })
		s.of("s1")
		busy := s.of("s2")
		if err := busy.begin(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * forgetAfter)
		s.of("s3")
		if s.bySbx["s1"] != nil || s.byKey["key of s1"] != nil || s.bySbx["s2"] != busy || s.byKey["key of s2"] == nil {
			t.Errorf("kept: %v, %v", s.bySbx, s.byKey)
		}
		busy.end()
	})
}

// TestABurstOfThreadsIsServed is what programs do: 250 threads look names up at once,
// both families each, while an answer takes 200 ms.
func TestABurstOfThreadsIsServed(t *testing.T) {
	f := newFixture(t, policy.Input{})
	f.up.set(func(u *upstream) {
		u.delay = 200 * time.Millisecond
		for i := range 250 {
			name := fmt.Sprintf("n%d.wild.test.", i)
			u.records[name+" A"] = []string{name + " 60 IN A 198.51.100.40"}
			u.records[name] = u.records[name+" A"]
		}
	})
	for _, c := range []struct {
		name   string
		format string
		asked  int // upstream, at most
	}{
		{"one name", "a.test", 2}, {"250 names", "n%d.wild.test", 500}, {"the same names, from the cache", "n%d.wild.test", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.up.questions()
			var failed atomic.Int32
			var wg sync.WaitGroup
			for i := range 250 {
				for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
					wg.Go(func() {
						name := c.format
						if strings.Contains(name, "%d") {
							name = fmt.Sprintf(name, i)
						}
						if r := f.send(t, ask(name, qtype)); r.Rcode != dns.RcodeSuccess {
							failed.Add(1)
						}
					})
				}
			}
			wg.Wait()
			if n := len(f.up.questions()); failed.Load() != 0 || n > c.asked {
				t.Errorf("%d of 500 failed, and %d were asked; want at most %d", failed.Load(), n, c.asked)
			}
		})
	}
}

func TestKeptAnswersCostNothing(t *testing.T) {
	f := newFixture(t, policy.Input{AllowOut: []string{"*.wild.test", "a.test"}, DenyOut: []string{"0.0.0.0/0"}},
		func(c *Config) { c.Budget = Budget{QueriesPerSecond: 0.001, Burst: 2, LabelsPerMinute: 1} })
	for range 50 {
		for _, name := range []string{"x.wild.test", "a.test"} {
			if r := f.send(t, ask(name, dns.TypeA)); len(r.Answer) != 1 {
				t.Fatalf("%s: got %v", name, r)
			}
		}
	}
	for i := range 50 { // nor do denials
		if r := f.send(t, ask(fmt.Sprintf("b%d.test", i), dns.TypeA)); r.Rcode != dns.RcodeSuccess {
			t.Fatalf("a denied name: %v", r)
		}
	}
}

func TestABudgetNamesItsLimit(t *testing.T) {
	var logged strings.Builder
	f := newFixture(t, policy.Input{AllowOut: []string{"*.wild.test:5432", "a.test"}, DenyOut: []string{"0.0.0.0/0"}},
		func(c *Config) {
			c.Budget.LabelsPerMinute = 1
			c.Log = textLog(&logged)
		})
	f.send(t, ask("x.wild.test", dns.TypeA))
	m := ask("y.wild.test", dns.TypeA)
	m.SetEdns0(1232, false)
	r := f.send(t, m)
	const limit = "1 different names below *.wild.test in a minute, of this sandbox"
	e := f.flows.last(t)
	if r.Rcode != dns.RcodeRefused || !strings.Contains(r.String(), limit) || e.Reason != ReasonLabels || e.Verdict != flowlog.Denied ||
		!strings.Contains(e.Detail, limit) || !strings.Contains(logged.String(), limit) {
		t.Errorf("got %v, event %+v, log %s", r, e, logged.String())
	}
}

func TestNamesShownToTheProxyAreCharged(t *testing.T) {
	rules := policy.Input{AllowOut: []string{"*.wild.test", "a.test"}, DenyOut: []string{"0.0.0.0/0"}}
	t.Run("names below a wildcard", func(t *testing.T) {
		f := newFixture(t, rules, func(c *Config) { c.Budget.LabelsPerMinute = 2 })
		f.send(t, ask("x.wild.test", dns.TypeA))
		if _, err := f.Resolve(t.Context(), "s1", "x.wild.test"); err != nil {
			t.Errorf("a name that was counted: %v", err)
		}
		if _, err := f.Resolve(t.Context(), "s1", "y.wild.test"); err != nil {
			t.Errorf("the second name: %v", err)
		}
		if _, err := f.Resolve(t.Context(), "s1", "z.wild.test"); !errs.Is(err, errs.Exhausted) || !strings.Contains(err.Error(), "2 different names") {
			t.Errorf("the third name: %v", err)
		}
		if _, err := f.Resolve(t.Context(), "s1", "a.test"); err != nil {
			t.Errorf("a name that is listed itself: %v", err)
		}
		if r := f.send(t, ask("z.wild.test", dns.TypeA)); r.Rcode != dns.RcodeRefused {
			t.Errorf("the third name, asked for: %v", r)
		}
	})
	t.Run("the rate", func(t *testing.T) {
		f := newFixture(t, policy.Input{}, func(c *Config) { c.Budget = Budget{QueriesPerSecond: 0.001, Burst: 1} })
		if _, err := f.Resolve(t.Context(), "s1", "a.test"); err != nil { // both families
			t.Error(err)
		}
		if _, err := f.Resolve(t.Context(), "s1", "b.test"); !errs.Is(err, errs.Exhausted) {
			t.Errorf("got %v", err)
		}
	})
}

// TestAQueryThatWaitedIsJudgedAgain: rules that were tightened while a query waited
// hold for it.
func TestAQueryThatWaitedIsJudgedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dialed atomic.Int32
		var now atomic.Pointer[policy.Compiled]
		open := compile(t, policy.Input{AllowOut: []string{"a.test", "b.test"}, DenyOut: []string{"0.0.0.0/0"}})
		now.Store(open)
		flows := &events{}
		r, err := New(Config{
			Owner:  func(netip.Addr) (string, *policy.Compiled, bool) { return "s1", open, true },
			Policy: func(string) (*policy.Compiled, bool) { return now.Load(), true },
			Dial: func(context.Context, string, string) (net.Conn, error) {
				dialed.Add(1)
				return nil, errors.New("no network here")
			},
			Upstreams: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}, Flows: flows, Log: textLog(&strings.Builder{}),
			Budget: Budget{QueriesPerSecond: 1, Burst: 1},
		})
		if err != nil {
			t.Fatal(err)
		}
		f := &fixture{Resolver: r, flows: flows}
		f.send(t, ask("a.test", dns.TypeA)) // takes the rate
		done := make(chan *dns.Msg)
		go func() { done <- f.send(t, ask("b.test", dns.TypeA)) }()
		time.Sleep(100 * time.Millisecond)
		now.Store(compile(t, policy.Input{AllowOut: []string{"a.test"}, DenyOut: []string{"0.0.0.0/0"}}))
		before := dialed.Load()
		m := <-done
		if e := flows.last(t); m.Rcode != dns.RcodeSuccess || dialed.Load() != before || e.Reason != policy.ReasonNameDenied || e.Verdict != flowlog.Denied {
			t.Errorf("got %v, %d dials, logged %s %s", m, dialed.Load()-before, e.Verdict, e.Reason)
		}
	})
}

func TestABrokenAnswerForOneFamilyDoesNotSpoilTheOther(t *testing.T) {
	for _, c := range []struct {
		name   string
		broken uint16
		rcode  int // -1: silence
	}{
		{"AAAA fails", dns.TypeAAAA, dns.RcodeServerFailure},
		{"AAAA says that the name does not exist", dns.TypeAAAA, dns.RcodeNameError},
		{"AAAA is refused", dns.TypeAAAA, dns.RcodeRefused},
		{"AAAA is not answered", dns.TypeAAAA, -1},
		{"A fails", dns.TypeA, dns.RcodeServerFailure},
		{"A says that the name does not exist", dns.TypeA, dns.RcodeNameError},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, policy.Input{})
			f.up.set(func(u *upstream) { u.broken = map[uint16]int{c.broken: c.rcode} })
			var replies [2]*dns.Msg
			began := time.Now()
			var wg sync.WaitGroup
			for i, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
				wg.Go(func() { replies[i] = f.send(t, ask("a.test", qtype)) })
			}
			wg.Wait()
			took := time.Since(began)
			for i, want := range []string{"198.51.100.10", "2001:db8:80::10"} {
				if c.broken == []uint16{dns.TypeA, dns.TypeAAAA}[i] {
					want = ""
				}
				if r := replies[i]; r.Rcode != dns.RcodeSuccess || answersOf(r) != want {
					t.Errorf("got %v, want %q", r, want)
				}
			}
			if took > time.Second {
				t.Errorf("it took %s", took)
			}
			if a, err := f.Resolve(t.Context(), "s1", "a.test"); err != nil || len(a) != 1 {
				t.Errorf("Resolve: %v, %v", a, err)
			}
			if c.rcode < 0 {
				return
			}
			if r := f.send(t, ask("none.test", c.broken)); r.Rcode == dns.RcodeSuccess {
				t.Errorf("a name without any address: %v", r)
			}
		})
	}
}
