// Package shares shows that what one API key does costs another next to nothing: a
// hostile key takes all it can of each resource that keys share, and another key goes on.
package shares

import (
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// measuring is for how long the quiet key is measured under each load: SHARES_MEASURE,
// such as 20s. Its tail may then be at most twice the quiet one. By default only errors and hangs fail: the
// machine may be busy with other tests.
var measuring time.Duration

// rounds are those of a run that does not measure.
const rounds = 3

// patience is what anything of the quiet key's may take on a busy machine.
const patience = 20 * time.Second

// TestOneKeyDoesNotHurtAnother takes the rows of the table in docs/operations.md in turn.
func TestOneKeyDoesNotHurtAnother(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	if long := os.Getenv("SHARES_MEASURE"); long != "" {
		var err error
		measuring, err = time.ParseDuration(long)
		must(t, err)
	}
	s := stand.New(t, stand.Options{Spares: spares, LogLevel: "warn"})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	quiet, hostile := s.NewUser(t, "quiet"), s.NewUser(t, "hostile")
	v := newVictim(t, quiet)
	// The quiet values are taken between the loads, a quarter of the time each: what the
	// machine does by itself is in both.
	alone, under := measured{}, map[string]measured{}
	for _, l := range loads {
		t.Run(l.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			v.probe(t, alone, measuring/4)
			h := &attacker{t: t, c: hostile}
			defer h.leave()
			if l.prepare != nil {
				l.prepare(ctx, h)
			}
			stop := h.run(ctx, l)
			defer stop()
			time.Sleep(time.Second) // until it is in full swing
			under[l.name] = measured{}
			v.probe(t, under[l.name], measuring)
			stop()
			begun, denied := h.did()
			if begun <= l.parallel && denied == begun {
				t.Error("the hostile key did nothing: the test shows nothing")
			}
			t.Logf("the hostile key began %d, of which %d were refused", begun, denied)
		})
	}
	t.Logf("\n%s", table(alone, under))
	for load, got := range under {
		for what, took := range got {
			if p, b := at(took, 0.99), at(alone[what], 0.99); measuring > 0 && p > 2*b {
				t.Errorf("%s: %s: p99 %v, alone %v", load, what, p, b)
			}
		}
	}
}

// things are what is measured, in the order of the table.
var things = []string{"create", "rules", "url", "dns", "first byte"}

// table shows of each load and thing the median and the tail in milliseconds, how often
// that was measured, and the tail relative to the quiet one.
func table(alone measured, under map[string]measured) string {
	var b strings.Builder
	row := func(name string, m measured) {
		fmt.Fprintf(&b, "%-12s", name)
		for _, what := range things {
			p50, p99 := at(m[what], 0.5), at(m[what], 0.99)
			ratio := float64(p99) / float64(max(1, at(alone[what], 0.99)))
			fmt.Fprintf(&b, " | %-10s %6.1f %7.1f x%-5.1f n%-4d", what, p50.Seconds()*1e3, p99.Seconds()*1e3, ratio, len(m[what]))
		}
		b.WriteString("\n")
	}
	row("alone", alone)
	for _, l := range loads {
		if m := under[l.name]; m != nil {
			row(l.name, m)
		}
	}
	return b.String()
}

// victim is the quiet key: a sandbox with a service and rules by name.
type victim struct {
	c   *client.Client
	box *client.Sandbox
}

func newVictim(t *testing.T, c *client.Client) *victim {
	t.Helper()
	box, err := c.Create(t.Context(), client.CreateOptions{Timeout: time.Hour, Network: byName("example.com")})
	must(t, err)
	_, err = box.Commands.Start(t.Context(), "python3 -m http.server 3000", client.RunOptions{})
	must(t, err)
	run(t.Context(), t, box, "for i in $(seq 200); do (: </dev/tcp/127.0.0.1/3000) 2>/dev/null && exit; sleep 0.05; done; exit 1")
	return &victim{c, box}
}

func byName(names ...string) client.Network {
	return client.Network{DenyOut: []string{client.AllTraffic}, AllowOut: names}
}

// measured is how long each thing took, by its name.
type measured map[string][]time.Duration

// try does one thing and notes how long it took.
func (m measured) try(t *testing.T, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	began := time.Now()
	if err := f(ctx); err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	m.note(t, what, time.Since(began))
}

func (m measured) note(t *testing.T, what string, d time.Duration) {
	t.Helper()
	m[what] = append(m[what], d)
	if d > patience {
		t.Errorf("%s took %v", what, d)
	}
}

// spares are how many the server keeps. A user who creates a sandbox now and then finds
// one; a user who creates them faster than the server refills waits for a cold start, which
// is another measurement. So the probe leaves the server refillTime between two creates.
const (
	spares     = 2
	refillTime = 400 * time.Millisecond
)

// probe does once a round what a user does, until the time is over.
func (v *victim) probe(t *testing.T, took measured, long time.Duration) {
	t.Helper()
	var created time.Time
	for began, i := time.Now(), 0; i < rounds || time.Since(began) < long; i++ {
		if time.Since(created) > refillTime {
			var made *client.Sandbox
			took.try(t, "create", func(ctx context.Context) (err error) {
				made, err = v.c.Create(ctx, client.CreateOptions{})
				return err
			})
			created = time.Now()
			if made != nil {
				must(t, made.Kill(t.Context()))
			}
		}
		took.try(t, "rules", func(ctx context.Context) error {
			return v.box.SetNetwork(ctx, byName("example.com", fmt.Sprintf("n%d.example.com", i)))
		})
		for range 2 {
			took.try(t, "url", v.fetch)
		}
		v.reach(t, took)
	}
}

// fetch asks the victim's service by its URL.
func (v *victim) fetch(ctx context.Context) error {
	req, err := v.box.NewRequest(ctx, http.MethodGet, 3000, "/", nil)
	if err != nil {
		return err
	}
	res, err := v.box.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", res.StatusCode)
	}
	return err
}

// reach measures inside, as the sandbox sees it: how long until a name is found, and
// until the first byte comes through the proxy.
func (v *victim) reach(t *testing.T, took measured) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	res, err := v.box.Commands.Run(ctx, "curl -sS -o /dev/null -w '%{time_namelookup} %{time_starttransfer}' https://example.com", client.RunOptions{})
	if err != nil || res.ExitCode != 0 {
		t.Errorf("first byte through the proxy: %v, %+v", err, res)
		return
	}
	for i, f := range strings.Fields(res.Stdout) {
		seconds, err := strconv.ParseFloat(f, 64)
		must(t, err)
		took.note(t, []string{"dns", "first byte"}[i], time.Duration(seconds*float64(time.Second)))
	}
}

// at is what a part of the measurements needed at most.
func at(took []time.Duration, part float64) time.Duration {
	if len(took) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(took))
	return sorted[max(0, int(math.Ceil(part*float64(len(sorted))))-1)]
}

// attacker is the hostile key.
type attacker struct {
	t     *testing.T
	c     *client.Client
	boxes []*client.Sandbox // of prepare

	mu            sync.Mutex // guards the rest
	begun, denied int
}

// begins notes that the attacker does one thing more, and fails that it was refused.
func (h *attacker) begins() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.begun++
}

func (h *attacker) fails() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.denied++
}

// did is how much the attacker did and how much of it was refused.
func (h *attacker) did() (begun, denied int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.begun, h.denied
}

// need makes sandboxes to attack from.
func (h *attacker) need(ctx context.Context, n int) {
	for range n {
		box, err := h.c.Create(ctx, client.CreateOptions{Timeout: time.Hour, Network: byName("example.com")})
		must(h.t, err)
		h.boxes = append(h.boxes, box)
	}
}

// run repeats a load, many at a time, until stop is called. A refusal is what it may get.
func (h *attacker) run(ctx context.Context, l load) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range l.parallel {
		wg.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				h.begins()
				if err := l.do(ctx, h, n); err != nil && ctx.Err() == nil {
					h.fails()
					select {
					case <-ctx.Done():
					case <-time.After(10 * time.Millisecond):
					}
				}
			}
		})
	}
	return sync.OnceFunc(func() { cancel(); wg.Wait() })
}

// leave removes all that the hostile key has.
func (h *attacker) leave() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// The key may have used up its requests: the load was such.
	patient := func(ask func() error) {
		err := ask()
		for wait := 0; err != nil && wait < 10 && ctx.Err() == nil; wait++ {
			time.Sleep(time.Second)
			err = ask()
		}
		if err != nil {
			h.t.Error(err)
		}
	}
	var list []client.Info
	patient(func() (err error) {
		list, err = h.c.List(ctx, client.ListOptions{})
		return err
	})
	for _, info := range list {
		if box, err := h.c.Connect(ctx, info.ID, time.Minute); err == nil {
			_ = box.Kill(ctx)
		}
	}
	var snaps []client.Snapshot
	patient(func() (err error) {
		snaps, err = h.c.Snapshots(ctx, "")
		return err
	})
	for _, snap := range snaps {
		_ = h.c.DeleteSnapshot(ctx, snap.ID)
	}
}

func run(ctx context.Context, t *testing.T, s *client.Sandbox, command string) {
	t.Helper()
	res, err := s.Commands.Run(ctx, command, client.RunOptions{})
	must(t, err)
	if res.ExitCode != 0 {
		t.Fatalf("%s: %s\n%s", command, res.Status, res.Stderr)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
