package sandbox

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// slowHost takes a second to start or restore, and ten to checkpoint.
type slowHost struct {
	fakeRuntime
	checkpoints *atomic.Int64
}

func (r slowHost) Start(ctx context.Context, id ID) error {
	time.Sleep(time.Second)
	return r.fakeRuntime.Start(ctx, id)
}

func (r slowHost) Restore(ctx context.Context, s RuntimeSpec, dir string) error {
	time.Sleep(time.Second)
	return r.fakeRuntime.Restore(ctx, s, dir)
}

func (r slowHost) Checkpoint(ctx context.Context, id ID, dir string) error {
	// No two end at once: the bubble's clock stands still while one waits for a mutex.
	time.Sleep(10*time.Second + time.Duration(r.checkpoints.Add(1))*10*time.Millisecond)
	return r.fakeRuntime.Checkpoint(ctx, id, dir)
}

// slowRules takes a second for each set of rules.
type slowRules struct{ fakeNetwork }

func (n slowRules) Apply(ctx context.Context, l Lease, p *policy.Compiled) error {
	if p.Generation() > 1 {
		time.Sleep(time.Second)
	}
	return n.fakeNetwork.Apply(ctx, l, p)
}

// TestWhatOneKeyStartsDoesNotHoldUpAnother has one key begin a hundred of each kind of
// work at once, and another one create a sandbox and change its rules.
func TestWhatOneKeyStartsDoesNotHoldUpAnother(t *testing.T) {
	for name, hostile := range map[string]func(m *Manager, id ID){
		"creates":   func(m *Manager, _ ID) { _, _ = m.Create(context.Background(), CreateRequest{Owner: "hostile"}) },
		"forks":     func(m *Manager, id ID) { _, _ = m.Fork(context.Background(), "hostile", id, ForkRequest{Count: 1}) },
		"snapshots": func(m *Manager, id ID) { _, _ = m.CreateSnapshot(context.Background(), "hostile", id, "") },
		"rules":     func(m *Manager, id ID) { _ = m.SetNetwork(context.Background(), "hostile", id, NetworkUpdate{}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				m := newManager(t, w, func(c *Config) {
					c.Runtime, c.Network = slowHost{fakeRuntime{w}, new(atomic.Int64)}, slowRules{fakeNetwork{w}}
				})
				runManager(t, m)
				mine, err := m.Create(t.Context(), CreateRequest{Owner: "other", Timeout: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				var theirs []ID
				for range 100 { // one each: calls about one sandbox wait for each other
					rec, err := m.Create(t.Context(), CreateRequest{Owner: "hostile", Timeout: time.Hour})
					if err != nil {
						t.Fatal(err)
					}
					theirs = append(theirs, rec.ID)
				}
				var wg sync.WaitGroup
				for i := range 100 {
					wg.Go(func() { hostile(m, theirs[i]) })
				}
				synctest.Wait()
				began := time.Now()
				if _, err := m.Create(t.Context(), CreateRequest{Owner: "other", Timeout: time.Hour}); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 2*time.Second {
					t.Errorf("a create took %v, alone it takes 1 s", took)
				}
				began = time.Now()
				if err := m.SetNetwork(t.Context(), "other", mine.ID, NetworkUpdate{}); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 2*time.Second {
					t.Errorf("a change of rules took %v, alone it takes 1 s", took)
				}
				wg.Wait()
			})
		})
	}
}

// TestTheLastSpareIsForTheKeyThatTookNone has one key create in a loop while another
// creates now and then.
func TestTheLastSpareIsForTheKeyThatTookNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w, func(c *Config) {
			c.Runtime = slowHost{fakeRuntime{w}, new(atomic.Int64)}
			c.Spares = map[string]int{"base": 2}
		})
		runManager(t, m)
		took := func(owner string) time.Duration {
			began := time.Now()
			rec, err := m.Create(t.Context(), CreateRequest{Owner: owner})
			if err != nil {
				t.Error(err)
				return 0
			}
			took := time.Since(began)
			if err := m.Kill(t.Context(), owner, rec.ID); err != nil {
				t.Error(err)
			}
			return took
		}
		time.Sleep(10 * time.Second) // the spares are ready
		if took("greedy")+took("greedy") > 100*time.Millisecond {
			t.Error("a key alone did not get both spares")
		}
		time.Sleep(10 * time.Second)
		took("quiet")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			for ctx.Err() == nil {
				took("greedy")
				time.Sleep(time.Millisecond)
			}
		})
		for range 5 {
			time.Sleep(10 * time.Second)
			if d := took("quiet"); d > 100*time.Millisecond {
				t.Errorf("a create took %v while a spare should have waited", d)
			}
		}
		cancel()
		wg.Wait()
	})
}

// TestAKeyThatCreatesAllTheTimeLeavesSparesToOthers has one key create sixteen at a time
// while another creates one every three seconds: a spare takes one second to start.
func TestAKeyThatCreatesAllTheTimeLeavesSparesToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w, func(c *Config) {
			c.Runtime = slowHost{fakeRuntime{w}, new(atomic.Int64)}
			c.Spares = map[string]int{"base": 2}
		})
		runManager(t, m)
		create := func(owner string) {
			rec, err := m.Create(t.Context(), CreateRequest{Owner: owner})
			if err != nil {
				t.Error(err)
				return
			}
			if err := m.Kill(t.Context(), owner, rec.ID); err != nil {
				t.Error(err)
			}
		}
		create("quiet")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for ctx.Err() == nil {
					create("greedy")
					time.Sleep(time.Millisecond)
				}
			})
		}
		for range 20 {
			time.Sleep(3 * time.Second)
			began := time.Now()
			create("quiet")
			if took := time.Since(began); took > 100*time.Millisecond {
				t.Errorf("a create took %v while a spare should have waited", took)
			}
		}
		cancel()
		wg.Wait()
	})
}
