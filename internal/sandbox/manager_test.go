package sandbox

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

func TestAFailedCreateLeavesNothing(t *testing.T) {
	for _, step := range []string{"resolve", "acquire", "create", "start", "ready", "apply", "init", "put"} {
		t.Run("when "+step+" fails", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				m := newManager(t, w)
				runManager(t, m)
				w.failAt(step, true)
				_, err := m.Create(t.Context(), CreateRequest{Template: "base"})
				if !errors.Is(err, errBroken) {
					t.Fatalf("err = %v, want the broken step's", err)
				}
				if left := w.leftovers(); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
				w.failAt(step, false)
				if _, err := m.Create(t.Context(), CreateRequest{Template: "base"}); err != nil {
					t.Errorf("the next create: %v", err)
				}
			})
		})
	}
}

func TestThePolicyIsInForceBeforeTheAgentLearnsAnything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		if _, err := m.Create(t.Context(), CreateRequest{Template: "base"}); err != nil {
			t.Fatal(err)
		}
		apply, initialise := slices.Index(w.steps, "apply"), slices.Index(w.steps, "init")
		if apply < 0 || initialise < 0 || apply > initialise {
			t.Errorf("steps %v: apply must come before init", w.steps)
		}
	})
}

func TestBadRequestsChangeNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		req  CreateRequest
		kind errs.Kind
		say  string
	}{
		"a timeout beyond the limit":       {CreateRequest{Timeout: 48 * time.Hour}, errs.Invalid, "timeout"},
		"a negative timeout":               {CreateRequest{Timeout: -time.Second}, errs.Invalid, "timeout"},
		"an unknown template":              {CreateRequest{Template: "nope"}, errs.NotFound, "nope"},
		"a domain among the denied":        {CreateRequest{Egress: policy.Input{DenyOut: []string{"a.test"}}}, errs.Invalid, "invalid denied CIDR a.test"},
		"the mask's choice without a mask": {CreateRequest{MaskOrigin: true}, errs.Invalid, "maskOrigin needs maskRequestHost"},
		"a mask that is no host":           {CreateRequest{MaskRequestHost: "a b"}, errs.Invalid, "mask request host is not valid"},
		"an allowed name without a deny":   {CreateRequest{Egress: policy.Input{AllowOut: []string{"a.test"}}}, errs.Invalid, "ALL_TRAFFIC"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			_, err := newManager(t, w).Create(t.Context(), tc.req)
			if errs.KindOf(err) != tc.kind || !strings.Contains(err.Error(), tc.say) {
				t.Errorf("err = %v (%v), want %v with %q", err, errs.KindOf(err), tc.kind, tc.say)
			}
			if slices.Contains(w.steps, "acquire") {
				t.Errorf("steps %v: something was done", w.steps)
			}
		})
	}
}

// TestAStoreThatCannotWriteKeepsNothingAlive is about a full disk: the sandbox that
// filled it must end, and its network with it.
func TestAStoreThatCannotWriteKeepsNothingAlive(t *testing.T) {
	for _, how := range []string{"kill", "expiry"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				m := newManager(t, w)
				runManager(t, m)
				rec, err := m.Create(t.Context(), CreateRequest{Timeout: 10 * time.Second})
				if err != nil {
					t.Fatal(err)
				}
				ep, _ := m.Endpoint(rec.ID)
				w.failAt("delete", true)
				if how == "kill" {
					if err := m.Kill(t.Context(), "", rec.ID); !errors.Is(err, errBroken) {
						t.Errorf("a kill whose record stays: %v", err)
					}
				} else {
					time.Sleep(11 * time.Second)
				}
				synctest.Wait()
				select {
				case <-ep.Done:
				default:
					t.Error("its connections go on")
				}
				if left := w.leftovers(); len(left) != 1 || left[0] != "record "+string(rec.ID) {
					t.Errorf("left: %q; want the record only", left)
				}
				w.failAt("delete", false)
				if how == "kill" {
					err = m.Kill(t.Context(), "", rec.ID)
				} else {
					time.Sleep(time.Second)
				}
				if left := w.leftovers(); err != nil || len(left) > 0 {
					t.Errorf("with the store back: error %v, left %q", err, left)
				}
			})
		})
	}
}

func TestKillFreesEverythingOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		rec, err := m.Create(t.Context(), CreateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		ep, ok := m.Endpoint(rec.ID)
		if !ok {
			t.Fatal("no endpoint")
		}
		var wg sync.WaitGroup
		results := make(chan error, 5)
		for range cap(results) {
			wg.Go(func() { results <- m.Kill(t.Context(), "", rec.ID) })
		}
		wg.Wait()
		close(results)
		killed := 0
		for err := range results {
			switch {
			case err == nil:
				killed++
			case !errs.Is(err, errs.NotFound):
				t.Errorf("kill: %v", err)
			}
		}
		if killed != 1 {
			t.Errorf("%d of the concurrent kills succeeded, want 1", killed)
		}
		if left := w.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		select {
		case <-ep.Done:
		default:
			t.Error("Done is still open")
		}
	})
}

func TestTimeIsOverToTheSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		rec, err := m.Create(t.Context(), CreateRequest{Timeout: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Second)
		if _, _, err := m.Connect(t.Context(), "", rec.ID, time.Second); err != nil {
			t.Fatal(err)
		}
		if got, err := m.Get(t.Context(), "", rec.ID); err != nil || !got.Expires.Equal(rec.Expires) {
			t.Errorf("connect with a shorter time moved the end from %v to %v (%v)", rec.Expires, got.Expires, err)
		}
		if err := m.SetTimeout(t.Context(), "", rec.ID, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4900 * time.Millisecond)
		synctest.Wait()
		if _, err := m.Get(t.Context(), "", rec.ID); err != nil {
			t.Fatalf("gone before its time: %v", err)
		}
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		if _, err := m.Get(t.Context(), "", rec.ID); !errs.Is(err, errs.NotFound) {
			t.Errorf("still there after its time: %v", err)
		}
		if left := w.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestAFailedUpdateKeepsTheOldRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		rec, err := m.Create(t.Context(), CreateRequest{Egress: policy.Input{DenyOut: []string{"8.8.8.8"}}})
		if err != nil {
			t.Fatal(err)
		}
		before := w.policyOf(rec.ID)
		if err := m.SetNetwork(t.Context(), "", rec.ID, NetworkUpdate{Egress: policy.Input{DenyOut: []string{"no"}}}); !errs.Is(err, errs.Invalid) {
			t.Errorf("bad rules: %v", err)
		}
		w.failAt("apply", true)
		if err := m.SetNetwork(t.Context(), "", rec.ID, NetworkUpdate{}); !errors.Is(err, errBroken) {
			t.Errorf("kernel refusal: %v", err)
		}
		got, err := m.Get(t.Context(), "", rec.ID)
		if err != nil || !slices.Equal(got.Egress.DenyOut, []string{"8.8.8.8"}) || got.Generation != 1 {
			t.Errorf("record %v, %v: the old rules must stand", got.Egress, err)
		}
		if w.stored[rec.ID].Generation != 1 || w.policyOf(rec.ID) != before {
			t.Error("stored or enforced rules changed")
		}
		w.failAt("apply", false)
		if err := m.SetNetwork(t.Context(), "", rec.ID, NetworkUpdate{}); err != nil {
			t.Errorf("the next update: %v", err)
		}
		if p, _ := m.Policy(rec.ID); p.Generation() != 2 || w.policyOf(rec.ID) != p {
			t.Errorf("generation %d in force", p.Generation())
		}
	})
}

func TestAServerAdoptsWhatAnotherLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		first := newManager(t, w)
		runManager(t, first)
		kept, err := first.Create(t.Context(), CreateRequest{Egress: policy.Input{DenyOut: []string{"0.0.0.0/0"}}})
		if err != nil {
			t.Fatal(err)
		}
		lost, err := first.Create(t.Context(), CreateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		orphan := sandboxid.New()
		w.mu.Lock()
		delete(w.running, lost.ID)
		w.running[orphan] = make(chan struct{})
		w.mu.Unlock()

		second := newManager(t, w)
		if err := second.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		runManager(t, second)
		if got, err := second.Get(t.Context(), "", kept.ID); err != nil || got.ControlToken != kept.ControlToken {
			t.Errorf("kept sandbox: %v", err)
		}
		if p := w.policyOf(kept.ID); p == nil || !p.Kernel().DenyAll {
			t.Error("the kept sandbox is not under its stored rules")
		}
		if _, err := second.Get(t.Context(), "", lost.ID); !errs.Is(err, errs.NotFound) {
			t.Errorf("lost sandbox: %v", err)
		}
		if _, ok := w.running[orphan]; ok {
			t.Error("the orphan still runs")
		}
		if err := second.Kill(t.Context(), "", kept.ID); err != nil {
			t.Error(err)
		}
		if left := w.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestACrashedSandboxIsClearedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		rec, err := m.Create(t.Context(), CreateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		fakeRuntime{w}.crash(rec.ID)
		synctest.Wait()
		if _, err := m.Get(t.Context(), "", rec.ID); !errs.Is(err, errs.NotFound) {
			t.Errorf("after the crash: %v", err)
		}
		if left := w.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestSparesAreClaimedAndRefilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w, func(c *Config) { c.Spares = map[string]int{"base": 2} })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		synctest.Wait()
		if len(w.running) != 2 {
			t.Fatalf("%d spares run, want 2", len(w.running))
		}
		for id := range w.running {
			if w.policyOf(id) != nil {
				t.Error("a spare has a policy: it must have no network")
			}
		}
		w.steps = nil
		if _, err := m.Create(t.Context(), CreateRequest{}); err != nil {
			t.Fatal(err)
		}
		if i := slices.Index(w.steps, "start"); i >= 0 && i < slices.Index(w.steps, "put") {
			t.Errorf("steps %v: a spare should have been claimed", w.steps)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		synctest.Wait()
		if len(w.running) != 3 {
			t.Errorf("%d run, want the sandbox and 2 spares", len(w.running))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(w.running) != 1 {
			t.Errorf("%d run after the server ended, want the sandbox alone", len(w.running))
		}
	})
}

func TestARefusedTemplateIsNotStarted(t *testing.T) {
	w := newWorld()
	m := newManager(t, w, func(c *Config) {
		c.Refuse = func(template string) error { return errs.New(errs.Forbidden, "no %s here", template) }
	})
	if _, err := m.Create(t.Context(), CreateRequest{}); !errs.Is(err, errs.Forbidden) || !strings.Contains(err.Error(), "no base here") {
		t.Errorf("%v, want a refusal of the default template", err)
	}
	if len(w.running) > 0 {
		t.Error("it was started")
	}
}

// TestFailedSparesAreTriedLessAndLessOften counts attempts and log lines of a template
// whose sandboxes cannot be started for a day, and then can.
func TestFailedSparesAreTriedLessAndLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.failAt("start", true)
		var log bytes.Buffer
		m := newManager(t, w, func(c *Config) {
			c.Spares = map[string]int{"base": 2}
			c.Log = slog.New(slog.NewTextHandler(&log, nil))
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		attempts := func() (n int) {
			synctest.Wait()
			for _, s := range w.since() {
				if s == "start" {
					n++
				}
			}
			return n
		}
		time.Sleep(time.Minute)
		if n := attempts(); n < 2 || n > 4 {
			t.Errorf("%d attempts in the first minute, want 3", n)
		}
		time.Sleep(24 * time.Hour)
		if n := attempts(); n < 100 || n > 160 {
			t.Errorf("%d attempts in a day, want one in ten minutes", n)
		}
		if n := strings.Count(log.String(), "spare not started"); n != 1 {
			t.Errorf("%d lines about it, want one:\n%s", n, &log)
		}
		w.failAt("start", false)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(w.running) != 2 || strings.Count(log.String(), "spares can be started again") != 1 {
			t.Errorf("%d spares run, want 2; the log:\n%s", len(w.running), &log)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestPauseKeepsRulesTokensAndTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		off := false
		rec, err := m.Create(t.Context(), CreateRequest{Secure: true, AllowPublicTraffic: &off, Egress: policy.Input{DenyOut: []string{"0.0.0.0/0"}}})
		if err != nil {
			t.Fatal(err)
		}
		w.failAt("checkpoint", true)
		if err := m.Pause(t.Context(), "", rec.ID); !errors.Is(err, errBroken) {
			t.Errorf("failing checkpoint: %v", err)
		}
		if ep, _ := m.Endpoint(rec.ID); ep.Record.State != Running || w.policyOf(rec.ID) == nil {
			t.Errorf("a failed pause must leave it running, state %s", ep.Record.State)
		}
		w.failAt("checkpoint", false)
		if err := m.Pause(t.Context(), "", rec.ID); err != nil {
			t.Fatal(err)
		}
		if err := m.Pause(t.Context(), "", rec.ID); !errs.Is(err, errs.Conflict) {
			t.Errorf("second pause: %v", err)
		}
		if len(w.running) != 0 || len(w.slots) != 0 {
			t.Error("a paused sandbox holds processes or a slot")
		}
		w.failAt("restore", true)
		if _, _, err := m.Connect(t.Context(), "", rec.ID, time.Minute); !errors.Is(err, errBroken) {
			t.Errorf("failing restore: %v", err)
		}
		if len(w.slots) != 0 {
			t.Error("a failed resume left a slot")
		}
		w.failAt("restore", false)
		w.steps = nil
		back, resumed, err := m.Connect(t.Context(), "", rec.ID, time.Minute)
		if err != nil || !resumed {
			t.Fatalf("resume: %v, resumed %v", err, resumed)
		}
		if back.AccessToken != rec.AccessToken || back.TrafficToken != rec.TrafficToken || back.ID != rec.ID {
			t.Error("tokens or ID changed")
		}
		if apply, restore := slices.Index(w.steps, "apply"), slices.Index(w.steps, "restore"); apply < 0 || apply > restore {
			t.Errorf("steps %v: the policy must be in force before memory runs again", w.steps)
		}
		if p := w.policyOf(rec.ID); p == nil || !p.Kernel().DenyAll {
			t.Error("not under its rules after the resume")
		}
	})
}

func TestAKeySeesOnlyItsOwnSandboxes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		rec, err := m.Create(t.Context(), CreateRequest{Owner: "k1"})
		if err != nil {
			t.Fatal(err)
		}
		for name, try := range map[string]func(owner string) error{
			"get":     func(o string) error { _, err := m.Get(t.Context(), o, rec.ID); return err },
			"timeout": func(o string) error { return m.SetTimeout(t.Context(), o, rec.ID, time.Hour) },
			"network": func(o string) error { return m.SetNetwork(t.Context(), o, rec.ID, NetworkUpdate{}) },
			"connect": func(o string) error { _, _, err := m.Connect(t.Context(), o, rec.ID, 0); return err },
			"pause":   func(o string) error { return m.Pause(t.Context(), o, rec.ID) },
			"resume":  func(o string) error { _, _, err := m.Connect(t.Context(), o, rec.ID, 0); return err },
			"metrics": func(o string) error { _, err := m.Metrics(t.Context(), o, rec.ID); return err },
		} {
			if err := try("k2"); !errs.Is(err, errs.NotFound) {
				t.Errorf("%s by another key: %v, want not found", name, err)
			}
		}
		if err := m.Kill(t.Context(), "k2", rec.ID); !errs.Is(err, errs.NotFound) {
			t.Errorf("kill by another key: %v, want not found", err)
		}
		if page, _, _ := m.List(t.Context(), ListRequest{Owner: "k2"}); len(page) != 0 {
			t.Errorf("another key lists %d", len(page))
		}
		if page, _, _ := m.List(t.Context(), ListRequest{Owner: ""}); len(page) != 1 {
			t.Errorf("an admin lists %d, want 1", len(page))
		}
		if err := m.Kill(t.Context(), "", rec.ID); err != nil {
			t.Errorf("kill by an admin: %v", err)
		}
	})
}

func TestALimitIsALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w, func(c *Config) { c.MaxSandboxes = 3 })
		runManager(t, m)
		var wg sync.WaitGroup
		results := make(chan error, 10)
		for range cap(results) {
			wg.Go(func() {
				_, err := m.Create(t.Context(), CreateRequest{})
				results <- err
			})
		}
		wg.Wait()
		close(results)
		made := 0
		for err := range results {
			if err == nil {
				made++
			} else if !errs.Is(err, errs.Exhausted) {
				t.Errorf("create: %v", err)
			}
		}
		if made > 3 || made == 0 || len(w.running) != made {
			t.Errorf("%d made and %d run, the limit is 3", made, len(w.running))
		}
	})
}

func TestPagesShowEverySandboxOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		for i := range 7 {
			time.Sleep(time.Duration(i%2) * time.Second) // some start in the same instant
			if _, err := m.Create(t.Context(), CreateRequest{Metadata: map[string]string{"n": string(rune('a' + i))}}); err != nil {
				t.Fatal(err)
			}
		}
		for _, ascending := range []bool{false, true} {
			seen := map[ID]bool{}
			cursor := ""
			for range 10 {
				page, next, err := m.List(t.Context(), ListRequest{Limit: 2, Cursor: cursor, Ascending: ascending})
				if err != nil {
					t.Fatal(err)
				}
				for _, rec := range page {
					if seen[rec.ID] {
						t.Errorf("%s listed twice", rec.ID)
					}
					seen[rec.ID] = true
				}
				if cursor = next; cursor == "" {
					break
				}
			}
			if len(seen) != 7 {
				t.Errorf("ascending %v: %d sandboxes seen, want 7", ascending, len(seen))
			}
		}
		page, _, err := m.List(t.Context(), ListRequest{Metadata: map[string]string{"n": "c"}})
		if err != nil || len(page) != 1 {
			t.Errorf("by metadata: %d found, %v", len(page), err)
		}
		if _, _, err := m.List(t.Context(), ListRequest{Cursor: "!"}); !errs.Is(err, errs.Invalid) {
			t.Errorf("a forged cursor: %v", err)
		}
	})
}
