package sandbox

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/internal/errs"
)

// private is a request for a sandbox whose ports want a token.
func private() CreateRequest {
	no := false
	return CreateRequest{Owner: "k1", AllowPublicTraffic: &no}
}

func TestSourcesAreReadOrRefusedByName(t *testing.T) {
	for _, tt := range []struct {
		name string
		list []string
		want string // of fmt.Sprint, or of the error
	}{
		{"nothing is everybody", nil, "[]"},
		{"addresses and CIDRs", []string{"10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "::1"}, "[10.0.0.0/8 192.0.2.1/32 2001:db8::/32 ::1/128]"},
		{"bits beyond the mask are cut", []string{"10.1.2.3/8"}, "[10.0.0.0/8]"},
		{"IPv4 in IPv6's form is IPv4", []string{"::ffff:10.0.0.0/104", "::ffff:192.0.2.1"}, "[10.0.0.0/8 192.0.2.1/32]"},
		{"a name", []string{"10.0.0.0/8", "example.com"}, `network.allowIn[1] is "example.com"`},
		{"a port", []string{"10.0.0.1:80"}, `network.allowIn[0] is "10.0.0.1:80"`},
		{"a zone", []string{"fe80::1%eth0"}, `network.allowIn[0] is "fe80::1%eth0"`},
		{"a mapped CIDR that is more than IPv4", []string{"::ffff:0:0/90"}, `network.allowIn[0] is "::ffff:0:0/90"`},
		{"leading zeros", []string{"010.0.0.1"}, `network.allowIn[0] is "010.0.0.1"`},
		{"an empty entry", []string{""}, `network.allowIn[0] is ""`},
		{"too many", make([]string, 1001), "network.allowIn has 1001 entries, it may have 1000"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSources("network.allowIn", tt.list)
			if err != nil {
				if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tt.want) {
					t.Fatalf("got error %v, want %q", err, tt.want)
				}
				return
			}
			if fmt.Sprint(got) != tt.want {
				t.Errorf("got %v, want %s", got, tt.want)
			}
		})
	}
	if empty, err := ParseSources("x", []string{}); empty == nil || err != nil {
		t.Error("an empty list, which is nobody, became everybody")
	}
}

func TestLinksAreDurableAndRevoked(t *testing.T) {
	w := newWorld()
	var changed atomic.Int32
	m := newManager(t, w)
	m.Subscribe(func(_ ID, c Change) {
		if c == AccessChanged {
			changed.Add(1)
		}
	})
	runManager(t, m)
	ctx := t.Context()
	rec, err := m.Create(ctx, private())
	if err != nil {
		t.Fatal(err)
	}
	signed, a, err := m.CreateLink(ctx, "k1", rec.ID, LinkRequest{3000, time.Hour})
	if err != nil || signed.LinkKey == "" || time.Until(a.Expires) < time.Hour-time.Second || !a.Expires.Equal(a.Expires.Truncate(time.Second)) {
		t.Fatalf("got %+v, %v", a, err)
	}
	again, b, err := m.CreateLink(ctx, "k1", rec.ID, LinkRequest{3000, time.Hour})
	if err != nil || again.LinkKey != signed.LinkKey || a.ID == b.ID {
		t.Fatalf("got %+v, %v", b, err)
	}
	has := func(want ...bool) {
		t.Helper()
		ep, _ := m.Endpoint(rec.ID)
		if got := []bool{ep.Record.HasLink(a.ID), ep.Record.HasLink(b.ID)}; !cmp.Equal(got, want) {
			t.Errorf("links in force: %v, want %v", got, want)
		}
	}
	has(true, true)
	if err := m.Pause(ctx, "k1", rec.ID); err != nil {
		t.Fatal(err)
	}
	has(true, true)
	if _, _, err := m.Connect(ctx, "k1", rec.ID, 0); err != nil {
		t.Fatal(err)
	}
	stored, err := m.cfg.Store.Sandboxes(ctx) // what a restarted server reads
	if err != nil || len(stored) != 1 || !stored[0].HasLink(a.ID) || stored[0].LinkKey != signed.LinkKey {
		t.Fatalf("stored %+v, %v", stored, err)
	}
	if err := m.RevokeLinks(ctx, "k1", rec.ID, a.ID); err != nil || changed.Load() != 1 {
		t.Fatal(err, changed.Load())
	}
	has(false, true)
	if err := m.RevokeLinks(ctx, "k1", rec.ID, a.ID); !errs.Is(err, errs.NotFound) {
		t.Errorf("a second time: %v", err)
	}
	if err := m.RevokeLinks(ctx, "k2", rec.ID, ""); !errs.Is(err, errs.NotFound) {
		t.Errorf("another's key: %v", err)
	}
	if err := m.RevokeLinks(ctx, "k1", rec.ID, ""); err != nil {
		t.Fatal(err)
	}
	has(false, false)
	for name, err := range map[string]error{
		"port 0":           second(m.CreateLink(ctx, "k1", rec.ID, LinkRequest{0, time.Hour})),
		"the agent's port": second(m.CreateLink(ctx, "k1", rec.ID, LinkRequest{AgentPort, time.Hour})),
		"no time":          second(m.CreateLink(ctx, "k1", rec.ID, LinkRequest{80, 0})),
		"too long a time":  second(m.CreateLink(ctx, "k1", rec.ID, LinkRequest{80, MaxLinkLife + time.Second})),
	} {
		if !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range MaxLinks {
		if _, _, err := m.CreateLink(ctx, "k1", rec.ID, LinkRequest{80, time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	if err := second(m.CreateLink(ctx, "k1", rec.ID, LinkRequest{80, time.Hour})); !errs.Is(err, errs.Exhausted) {
		t.Errorf("over the limit: %v", err)
	}
	public, err := m.Create(ctx, CreateRequest{Owner: "k1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := second(m.CreateLink(ctx, "k1", public.ID, LinkRequest{80, time.Hour})); !errs.Is(err, errs.Conflict) {
		t.Errorf("of a public sandbox: %v", err)
	}
}

func second(_ Record, _ Link, err error) error { return err }

func TestTheListOfSourcesChangesOnlyWhenGiven(t *testing.T) {
	m := newManager(t, newWorld())
	runManager(t, m)
	lan := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	rec, err := m.Create(t.Context(), CreateRequest{Owner: "k1", AllowIn: lan})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		give, want []netip.Prefix
	}{{nil, lan}, {[]netip.Prefix{}, []netip.Prefix{}}, {nil, []netip.Prefix{}}, {lan, lan}} {
		if err := m.SetNetwork(t.Context(), "k1", rec.ID, NetworkUpdate{AllowIn: step.give}); err != nil {
			t.Fatal(err)
		}
		ep, _ := m.Endpoint(rec.ID)
		if got := ep.Record.AllowIn; got == nil || fmt.Sprint(got) != fmt.Sprint(step.want) {
			t.Errorf("after %v: %v, want %v", step.give, got, step.want)
		}
	}
}

func TestTrafficMovesTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var busy atomic.Bool
		m := newManager(t, newWorld(), func(c *Config) { c.InUse = func(ID) bool { return busy.Load() } })
		runManager(t, m)
		idle, err := m.Create(t.Context(), CreateRequest{IdleTimeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		plain, err := m.Create(t.Context(), CreateRequest{Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		alive := func(id ID) bool { _, ok := m.Endpoint(id); return ok }
		end := func() time.Time { ep, _ := m.Endpoint(idle.ID); return ep.Record.Expires }
		before := end()
		if m.Touch(t.Context(), idle.ID); !end().Equal(before) {
			t.Error("a request at once was written")
		}
		for range 4 {
			time.Sleep(45 * time.Second)
			m.Touch(t.Context(), idle.ID)
			m.Touch(t.Context(), plain.ID)
		}
		synctest.Wait()
		if !alive(idle.ID) || alive(plain.ID) {
			t.Errorf("after three minutes with traffic: idle timeout %v, plain timeout %v", alive(idle.ID), alive(plain.ID))
		}
		busy.Store(true) // a WebSocket is open
		time.Sleep(5 * time.Minute)
		if !alive(idle.ID) {
			t.Error("it ended with a connection open")
		}
		busy.Store(false)
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if alive(idle.ID) {
			t.Error("it goes on without traffic")
		}
	})
}

// A sandbox that a request resumes lives as long as it was made for, and its history
// says which request it was.
func TestTrafficResumesForTheSandboxsOwnTime(t *testing.T) {
	m := newManager(t, newWorld())
	runManager(t, m)
	for _, tt := range []struct {
		name       string
		idle, want time.Duration
	}{{"its timeout", 0, 12 * time.Second}, {"its idle time", time.Minute, time.Minute}} {
		t.Run(tt.name, func(t *testing.T) {
			rec, err := m.Create(t.Context(), CreateRequest{Owner: "k1", Timeout: 12 * time.Second, IdleTimeout: tt.idle, OnTimeout: PauseOnTimeout, AutoResume: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Pause(t.Context(), "k1", rec.ID); err != nil {
				t.Fatal(err)
			}
			by := Waker{Method: "GET", Path: "/a", Source: netip.MustParseAddr("192.0.2.1"), Port: 3000}
			if err := m.Wake(t.Context(), rec.ID, by); err != nil {
				t.Fatal(err)
			}
			now, err := m.Get(t.Context(), "k1", rec.ID)
			if err != nil {
				t.Fatal(err)
			}
			if got := now.Expires.Sub(now.Started); got != tt.want {
				t.Errorf("it lives for %v, want %v", got, tt.want)
			}
			events, _, err := m.Events(t.Context(), EventsRequest{Owner: "k1", Sandbox: rec.ID, Names: []string{"resume"}, Limit: 10})
			if err != nil || len(events) != 1 || events[0].By == nil || *events[0].By != by {
				t.Errorf("got %+v, %v", events, err)
			}
		})
	}
}

func TestAKeysLimitsAreItsOwn(t *testing.T) {
	m := newManager(t, newWorld(), func(c *Config) {
		c.MaxSandboxes, c.MaxPaused = 20, 20
		c.Allowance = func(owner string) Allowance {
			return map[string]Allowance{"small": {Sandboxes: 3, Paused: 1}}[owner]
		}
	})
	runManager(t, m)
	ctx := t.Context()
	var made, refused atomic.Int32
	var wg sync.WaitGroup
	ids := make(chan ID, 20)
	for range 12 { // all at once: the limit holds, and is reached
		wg.Go(func() {
			rec, err := m.Create(ctx, CreateRequest{Owner: "small"})
			switch {
			case err == nil:
				made.Add(1)
				ids <- rec.ID
			case errs.Is(err, errs.Exhausted) && strings.Contains(err.Error(), "limit of 3 sandboxes"):
				refused.Add(1)
			default:
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 3 || refused.Load() != 9 {
		t.Fatalf("%d made, %d refused", made.Load(), refused.Load())
	}
	if _, err := m.Create(ctx, CreateRequest{Owner: "other"}); err != nil {
		t.Errorf("another key: %v", err)
	}
	a, b := <-ids, <-ids
	if err := m.Pause(ctx, "small", a); err != nil {
		t.Fatal(err)
	}
	if err := m.Pause(ctx, "small", b); !errs.Is(err, errs.Exhausted) || !strings.Contains(err.Error(), "limit of 1 paused sandboxes") {
		t.Errorf("a second pause: %v", err)
	}
	if _, err := m.Create(ctx, CreateRequest{Owner: "small"}); err != nil { // the paused one made room
		t.Fatal(err)
	}
	if _, _, err := m.Connect(ctx, "", a, 0); !errs.Is(err, errs.Exhausted) { // also for an admin: it would be the key's
		t.Errorf("a resume over the limit: %v", err)
	}
	q, err := m.Quota(ctx, "small")
	if err != nil || q.MaxSandboxes != 3 || q.MaxPaused != 1 || q.Sandboxes != 3 || q.Paused != 1 {
		t.Errorf("quota %+v, %v", q, err)
	}
	q, err = m.Quota(ctx, "")
	if err != nil || q.MaxSandboxes != 20 || q.Sandboxes != 4 || q.Paused != 1 {
		t.Errorf("the server's quota %+v, %v", q, err)
	}
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	if r := m.table.reserved; len(r[Running])+len(r[Paused]) != 0 {
		t.Errorf("room is still reserved: %v", r)
	}
}

func TestASandboxIsNotLostForWantOfRoomToPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, newWorld(), func(c *Config) { c.MaxPaused = 1 })
		runManager(t, m)
		var ids []ID
		for range 2 {
			rec, err := m.Create(t.Context(), CreateRequest{Timeout: time.Second, OnTimeout: PauseOnTimeout})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, rec.ID)
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		states := map[State]int{}
		for _, id := range ids {
			if ep, ok := m.Endpoint(id); ok {
				states[ep.Record.State]++
			}
		}
		if states[Paused] != 1 || states[Running] != 1 {
			t.Errorf("got %v, want one paused and one waiting for room", states)
		}
	})
}

func TestLabelsAreBounded(t *testing.T) {
	many := map[string]string{}
	for i := range 1001 {
		many[fmt.Sprint("v", i)] = ""
	}
	for _, tt := range []struct {
		name          string
		metadata, env map[string]string
		want          string
	}{
		{"a metadata value", map[string]string{"note": strings.Repeat("x", 9000)}, nil, `metadata["note"] is 9000 bytes`},
		{"a metadata key", map[string]string{strings.Repeat("k", 300): ""}, nil, "with a key of 300"},
		{"pairs", many, nil, "metadata has 1001 pairs"},
		{"variables", nil, many, "envVars has 1001 variables"},
		{"the environment's size", nil, map[string]string{"A": strings.Repeat("x", 300<<10)}, "envVars is 307201 bytes"},
	} {
		m := newManager(t, newWorld())
		_, err := m.Create(t.Context(), CreateRequest{Metadata: tt.metadata, EnvVars: tt.env})
		if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}
