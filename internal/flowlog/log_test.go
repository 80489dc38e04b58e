package flowlog_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newLog(t testing.TB, c flowlog.Config) *flowlog.Log {
	t.Helper()
	l, err := flowlog.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func event(sandbox, name string) flowlog.Event {
	return flowlog.Event{
		Sandbox: sandbox, Layer: flowlog.LayerProxy, Verdict: flowlog.Denied,
		Reason: policy.ReasonNameDenied, Name: name,
	}
}

func names(events []flowlog.Event) (out []string) {
	for _, e := range events {
		out = append(out, e.Name)
	}
	return out
}

func TestEventsSelects(t *testing.T) {
	l := newLog(t, flowlog.Config{})
	for i, sandbox := range []string{"a", "b", "a", "b"} {
		e := event(sandbox, fmt.Sprint(i))
		if i == 2 {
			e.Verdict = flowlog.Allowed
		}
		l.Record(e)
	}
	second := l.Events(flowlog.Filter{})[1].Seq
	tests := []struct {
		name string
		in   flowlog.Filter
		want []string
	}{
		{"everything, oldest first", flowlog.Filter{}, []string{"0", "1", "2", "3"}},
		{"of one sandbox", flowlog.Filter{Sandbox: "b"}, []string{"1", "3"}},
		{"of one verdict", flowlog.Filter{Verdict: flowlog.Allowed}, []string{"2"}},
		{"after a sequence number", flowlog.Filter{Since: second}, []string{"2", "3"}},
		{"the newest two", flowlog.Filter{Limit: 2}, []string{"2", "3"}},
		{"of a sandbox nobody knows", flowlog.Filter{Sandbox: "c"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, names(l.Events(tt.in))); diff != "" {
				t.Fatal(diff)
			}
		})
	}
	l.Forget("a")
	if diff := cmp.Diff([]string{"1", "3"}, names(l.Events(flowlog.Filter{}))); diff != "" {
		t.Fatalf("after Forget: %s", diff)
	}
}

func TestALateEventKeepsNothingOfAnEndedSandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLog(t, flowlog.Config{})
		follow := l.Follow(t.Context(), flowlog.Filter{})
		l.Record(event("a", "1"))
		l.Forget("a")
		l.Record(event("a", "2"))
		if got := l.Events(flowlog.Filter{}); len(got) != 0 {
			t.Errorf("%d events are kept", len(got))
		}
		for _, want := range []string{"1", "2"} {
			if e := <-follow; e.Name != want {
				t.Errorf("a follower got %q, want %q", e.Name, want)
			}
		}
		time.Sleep(time.Hour)
		l.Forget("b")
		l.Record(event("a", "3")) // the name is not remembered for ever
		if got := l.Events(flowlog.Filter{}); len(got) != 1 {
			t.Errorf("%d events are kept, want 1", len(got))
		}
	})
}

func TestSequenceNumbersGrowOverARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newLog(t, flowlog.Config{})
		for range 1000 {
			first.Record(event("a", ""))
		}
		events := first.Events(flowlog.Filter{Limit: 1})
		time.Sleep(time.Second)
		second := newLog(t, flowlog.Config{})
		second.Record(event("a", ""))
		if got := second.Events(flowlog.Filter{Since: events[0].Seq}); len(got) != 1 {
			t.Fatalf("got %d events after the restart, want 1", len(got))
		}
		if seq := second.Events(flowlog.Filter{})[0].Seq; seq >= 1<<53 {
			t.Fatalf("sequence number %d is over 2^53", seq)
		}
	})
}

func TestOneSandboxKeepsItsNewest(t *testing.T) {
	l := newLog(t, flowlog.Config{PerSandbox: 3})
	for i := range 100 {
		l.Record(event("a", fmt.Sprint(i)))
		want := names([]flowlog.Event{event("", fmt.Sprint(i))})
		if got := names(l.Events(flowlog.Filter{Limit: 1})); !cmp.Equal(got, want) {
			t.Fatalf("newest is %v, want %v", got, want)
		}
	}
	if diff := cmp.Diff([]string{"97", "98", "99"}, names(l.Events(flowlog.Filter{}))); diff != "" {
		t.Fatal(diff)
	}
}

func TestANoisySandboxDoesNotPushOutAQuietOne(t *testing.T) {
	l := newLog(t, flowlog.Config{PerSandbox: 100, Total: 100})
	l.Record(event("quiet", "early"))
	for range 10_000 {
		l.Record(event("noisy", ""))
	}
	for i := range 40 {
		l.Record(event("third", fmt.Sprint(i)))
	}
	if got := l.Events(flowlog.Filter{Sandbox: "quiet"}); len(got) != 1 {
		t.Fatalf("the quiet sandbox has %d events, want 1", len(got))
	}
	if got := len(l.Events(flowlog.Filter{Sandbox: "third"})); got < 30 {
		t.Fatalf("the late sandbox has %d events, want its share of 33", got)
	}
	if got := len(l.Events(flowlog.Filter{})); got != 100 {
		t.Fatalf("%d events are kept, want 100", got)
	}
}

func TestMoreSandboxesThanEvents(t *testing.T) {
	l := newLog(t, flowlog.Config{Total: 10})
	for i := range 1000 {
		l.Record(event(fmt.Sprint("s", i), ""))
	}
	if got := len(l.Events(flowlog.Filter{})); got != 10 {
		t.Fatalf("%d events are kept, want 10", got)
	}
	if got := l.Events(flowlog.Filter{Limit: 1})[0].Sandbox; got != "s999" {
		t.Fatalf("the newest event is of %s, want s999", got)
	}
}

func TestWhatASandboxWroteIsMadeHarmless(t *testing.T) {
	l := newLog(t, flowlog.Config{})
	e := event("a", strings.Repeat("x", 1000))
	e.Detail = "GET /\x1b]0;owned\a\u202e\u0085\xff\n" + strings.Repeat("y", 1000)
	l.Record(e)
	got := l.Events(flowlog.Filter{})[0]
	if len(got.Name) != 255 || len(got.Detail) > 512 {
		t.Fatalf("lengths are %d and %d, want 255 and at most 512", len(got.Name), len(got.Detail))
	}
	if want := "GET /?]0;owned?????yyy"; !strings.HasPrefix(got.Detail, want) {
		t.Fatalf("detail is %q, want prefix %q", got.Detail, want)
	}
}

func TestFollowSendsKeptThenNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := newLog(t, flowlog.Config{})
		l.Record(event("a", "kept"))
		l.Record(event("b", "of another sandbox"))
		events := l.Follow(ctx, flowlog.Filter{Sandbox: "a"})
		l.Record(event("a", "new"))
		l.Record(event("b", "of another sandbox"))
		for _, want := range []string{"kept", "new"} {
			if got := (<-events).Name; got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
		}
		cancel()
		if e, open := <-events; open {
			t.Fatalf("got %+v after the end", e)
		}
	})
}

func TestASlowFollowerLosesAndIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		reg := prometheus.NewRegistry()
		l := newLog(t, flowlog.Config{FollowerQueue: 2, Metrics: reg})
		events := l.Follow(ctx, flowlog.Filter{})
		for i := range 10 {
			l.Record(event("a", fmt.Sprint(i)))
			synctest.Wait()
		}
		// One is in the goroutine's hand, two are queued, seven are lost.
		for _, want := range []string{"0", "1", "2"} {
			if e := <-events; e.Name != want || e.Detail != "" {
				t.Fatalf("got %q %q, want %q", e.Name, e.Detail, want)
			}
		}
		l.Record(event("a", "after"))
		if e := <-events; e.Name != "after" || e.Detail != "(7 events lost before this one)" {
			t.Fatalf("got %q %q", e.Name, e.Detail)
		}
		l.Lost(3)
		if got := metric(t, reg, "cordon_flows_lost_total"); got != 10 {
			t.Fatalf("lost counter is %v, want 10", got)
		}
	})
}

func TestSeriesStayBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	l := newLog(t, flowlog.Config{Metrics: reg})
	for i := range 1000 {
		e := event("a", "")
		e.Reason = policy.Reason(fmt.Sprint("reason-", i))
		e.Layer = flowlog.Layer(fmt.Sprint("layer-", i))
		e.Verdict = flowlog.Verdict(fmt.Sprint("verdict-", i))
		l.Record(e)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if n := len(f.GetMetric()); n > 65 {
			t.Fatalf("%s has %d series", f.GetName(), n)
		}
	}
	if got := metric(t, reg, "cordon_flows_total"); got != 1000 {
		t.Fatalf("counted %v flows, want 1000", got)
	}
}

func metric(t *testing.T, reg *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

func TestConcurrentUse(t *testing.T) {
	l := newLog(t, flowlog.Config{PerSandbox: 50, Total: 200})
	ctx, cancel := context.WithCancel(t.Context())
	var readers, writers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			var last uint64
			for e := range l.Follow(ctx, flowlog.Filter{}) {
				if e.Seq <= last {
					t.Errorf("sequence went from %d to %d", last, e.Seq)
				}
				last = e.Seq
			}
		})
	}
	for w := range 4 {
		writers.Go(func() {
			for i := range 2000 {
				l.Record(event(fmt.Sprint(w, i%7), ""))
				if i%100 == 0 {
					l.Events(flowlog.Filter{})
					l.Forget(fmt.Sprint(w, 0))
				}
			}
		})
	}
	writers.Wait()
	cancel()
	readers.Wait()
	if got := len(l.Events(flowlog.Filter{})); got > 200 {
		t.Fatalf("%d events are kept, want at most 200", got)
	}
}

func BenchmarkRecord(b *testing.B) {
	for _, followers := range []int{0, 4} {
		b.Run(fmt.Sprintf("%d followers that never read", followers), func(b *testing.B) {
			ctx, cancel := context.WithCancel(b.Context())
			l := newLog(b, flowlog.Config{Metrics: prometheus.NewRegistry()})
			var open []<-chan flowlog.Event
			for range followers {
				open = append(open, l.Follow(ctx, flowlog.Filter{}))
			}
			e := event("isandbox000000000000a", "www.example.com")
			e.Time = time.Now()
			e.Detail = "GET /index.html"
			b.ReportAllocs()
			for b.Loop() {
				l.Record(e)
			}
			cancel()
			for _, c := range open {
				for range c {
				}
			}
		})
	}
}
