package egress_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

// times are how long new connections took.
type times struct {
	Took   []time.Duration
	Failed map[string]int
}

// at returns the time that a share of the connections needed at most.
func (ts times) at(share float64) time.Duration {
	if len(ts.Took) == 0 {
		return 0
	}
	return ts.Took[min(len(ts.Took)-1, int(share*float64(len(ts.Took))))]
}

func (ts times) String() string {
	return fmt.Sprintf("p50 %s, p99 %s, most %s of %d, failed %v",
		ts.at(0.5).Round(100*time.Microsecond), ts.at(0.99).Round(100*time.Microsecond), ts.at(1).Round(100*time.Microsecond), len(ts.Took), ts.Failed)
}

// and joins two measurements.
func (ts times) and(other times) times {
	both := times{Took: slices.Concat(ts.Took, other.Took), Failed: ts.Failed}
	slices.Sort(both.Took)
	return both
}

// measure times new connections, one after the other.
func (g *guest) measure(m measuring) times {
	g.t.Helper()
	ts := ask[times](g, "/rate", m)
	slices.Sort(ts.Took)
	if len(ts.Failed) > 0 {
		g.t.Errorf("%s: %v", m.Try, ts.Failed)
	}
	return ts
}

// slack is what a busy machine may add to a tail; the goal is a tenth of it or less.
const slack = 250 * time.Millisecond

// settled repeats a measurement that a busy machine may have spoilt.
func settled(measure func() bool) bool {
	for range 3 {
		if measure() {
			return true
		}
	}
	return false
}

// testFlood holds a thousand connections that show no name, in one sandbox, and
// watches new connections of another.
func testFlood(t *testing.T, s *live) {
	rules := client.Network{DenyOut: all, AllowOut: []string{nameA}}
	victim, noisy := s.guest(t, rules), s.guest(t, rules)
	new := measuring{Try: web(addrA, nameA), N: 200, Gap: 2 * time.Millisecond}
	victim.measure(measuring{Try: new.Try, N: 20}) // warms everything up
	if !settled(func() bool {
		before := victim.measure(new)
		done := make(chan flooded, 1)
		go func() {
			out, err := askErr[flooded](noisy, "/flood", flooding{
				Addr: netip.MustParseAddrPort(addrB + ":443"), Silent: 500, Begun: 500, For: 7 * time.Second,
			})
			if err != nil {
				t.Error(err)
			}
			done <- out
		}()
		time.Sleep(2 * time.Second) // all are there; after five seconds each is ended and made anew
		loud := victim.measure(new)
		out := <-done
		quiet := before.and(victim.measure(new)) // on both sides, so that a drift of the machine shows
		t.Logf("undisturbed, before and after: %s", quiet)
		t.Logf("beside a thousand connections without a name (made %d, failed %v): %s", out.Made, out.Failed, loud)
		t.Logf("p99 grew by %s, the goal is 10ms", (loud.at(0.99) - quiet.at(0.99)).Round(100*time.Microsecond))
		for _, n := range out.Failed { // beyond what the server's descriptors allow one sandbox
			out.Made += n
		}
		if out.Made < 1000 {
			t.Errorf("only %d connections were tried", out.Made)
		}
		return loud.at(0.99) <= quiet.at(0.99)+slack
	}) {
		t.Errorf("new connections wait for those of another sandbox")
	}
	noisy.saw("proxy", "deny", "sniff-timeout", "budget")
}

// testLogLoad has one sandbox cause more than 100,000 verdicts a minute while its
// log is followed, and watches connections and a download of another.
func testLogLoad(t *testing.T, s *live) {
	rules := client.Network{DenyOut: all, AllowOut: []string{nameA, addrB}}
	victim, noisy := s.guest(t, rules), s.guest(t, rules)
	new := measuring{Try: web(addrA, nameA), N: 100, Gap: 5 * time.Millisecond}
	victim.flow(opening{ID: "download", Kind: "tcp", Addr: addrB + ":8080", Name: addrB, Path: endless})
	victim.measure(measuring{Try: new.Try, N: 20})
	speed := func() (ts times, bytes float64) {
		before, began := victim.look("download"), time.Now()
		ts = victim.measure(new)
		return ts, float64(victim.look("download").Bytes-before.Bytes) / time.Since(began).Seconds()
	}
	if !settled(func() bool { return logLoad(t, noisy, speed) }) {
		t.Error("verdicts slow traffic down")
	}
}

// logLoad compares connections and a download of another sandbox with and without.
func logLoad(t *testing.T, noisy *guest, speed func() (times, float64)) bool {
	quiet, quietBytes := speed()

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	followed := make(chan int, 1)
	go func() {
		n := 0
		for _, err := range noisy.Follow(ctx, client.EventOptions{}) {
			if err != nil {
				break
			}
			n++
		}
		followed <- n
	}()
	noisy.run(passes(tcp(addrB), allow1))
	since, began := noisy.lastSeq(), time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := askErr[int](noisy, "/requests", requesting{Addr: addrA + ":80", Name: nameA, PerSecond: 3000, For: 5 * time.Second})
		done <- err
	}()
	time.Sleep(500 * time.Millisecond)
	loud, loudBytes := speed()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	n, took := noisy.lastSeq()-since, time.Since(began)
	cancel()
	perMinute := float64(n) / took.Minutes()
	t.Logf("%d verdicts in %s (%.0f a minute), %d of them followed", n, took.Round(time.Millisecond), perMinute, <-followed)
	t.Logf("undisturbed: %s, download %.1f MB/s", quiet, quietBytes/1e6)
	t.Logf("beside them: %s, download %.1f MB/s", loud, loudBytes/1e6)
	if perMinute < 50_000 { // what is not caused does not slow anything down
		t.Logf("%.0f verdicts a minute prove little", perMinute)
	}
	return loud.at(0.99) <= quiet.at(0.99)+slack && loudBytes >= quietBytes/4
}
