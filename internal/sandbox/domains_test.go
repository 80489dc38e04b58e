package sandbox

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// leads asserts where a domain leads; an empty id stands for nowhere.
func leads(t *testing.T, m *Manager, name string, id ID, port uint16) {
	t.Helper()
	gotID, gotPort, ok := m.ByDomain(name)
	if gotID != id || ok != (id != "") || ok && gotPort != port {
		t.Errorf("%s leads to port %d of %q (%v), want port %d of %q", name, gotPort, gotID, ok, port, id)
	}
}

func mustCreate(t *testing.T, m *Manager, owner string) Record {
	t.Helper()
	rec, err := m.Create(t.Context(), CreateRequest{Owner: owner})
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func TestADomainLeadsToItsSandboxForAsLongAsItLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		dir := t.TempDir()
		snapshots := func(c *Config) { c.SnapshotDir = dir }
		m := newManager(t, w, snapshots)
		runManager(t, m)
		a, b := mustCreate(t, m, "alice"), mustCreate(t, m, "bob")
		ctx := t.Context()
		if d, err := m.Bind(ctx, "alice", a.ID, Domain{"App.Example.COM.", 3000}); err != nil || d.Name != "app.example.com" {
			t.Fatalf("bind: %+v, %v", d, err)
		}
		leads(t, m, "app.example.com", a.ID, 3000)
		if _, err := m.Bind(ctx, "alice", a.ID, Domain{"app.example.com", 8080}); err != nil {
			t.Errorf("bind again with another port: %v", err)
		}
		leads(t, m, "app.example.com", a.ID, 8080)
		if _, err := m.Bind(ctx, "bob", b.ID, Domain{"app.example.com", 1}); !errs.Is(err, errs.Conflict) {
			t.Errorf("bind another's name: %v", err)
		}
		if _, err := m.Bind(ctx, "bob", a.ID, Domain{"bob.example.com", 1}); !errs.Is(err, errs.NotFound) {
			t.Errorf("bind to another's sandbox: %v", err)
		}
		if err := m.Unbind(ctx, "bob", b.ID, "app.example.com"); !errs.Is(err, errs.NotFound) {
			t.Errorf("release another's name: %v", err)
		}
		if err := m.Pause(ctx, "", a.ID); err != nil {
			t.Fatal(err)
		}
		leads(t, m, "app.example.com", a.ID, 8080)

		next := newManager(t, w, snapshots) // the next server
		if err := next.Reconcile(ctx); err != nil {
			t.Fatal(err)
		}
		runManager(t, next)
		leads(t, next, "app.example.com", a.ID, 8080)
		if _, _, err := next.Connect(ctx, "", a.ID, 0); err != nil {
			t.Fatal(err)
		}
		leads(t, next, "app.example.com", a.ID, 8080)
		if err := next.Kill(ctx, "", a.ID); err != nil {
			t.Fatal(err)
		}
		leads(t, next, "app.example.com", "", 0)
		if _, err := next.Bind(ctx, "bob", b.ID, Domain{"app.example.com", 1}); err != nil {
			t.Errorf("bind a name that is free again: %v", err)
		}
		if err := next.Unbind(ctx, "bob", b.ID, "APP.example.com"); err != nil {
			t.Errorf("release: %v", err)
		}
		leads(t, next, "app.example.com", "", 0)
		if err := next.Kill(ctx, "", b.ID); err != nil {
			t.Error(err)
		}
	})
}

func TestBadDomainsChangeNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w, func(c *Config) { c.Operator = &policy.Operator{SelfDomains: []string{"sbx.test", "second.test"}} })
		runManager(t, m)
		rec := mustCreate(t, m, "")
		for _, d := range []Domain{
			{"", 80}, {"localhost", 80}, {"a.localhost", 80}, {"app", 80}, {"10.0.0.1", 80}, {"*.example.com", 80}, {"https://example.com", 80},
			{"example.com:80", 80}, {"exa mple.com", 80}, {"sbx.test", 80}, {"x.sbx.test", 80}, {"api.second.test", 80}, {"3000-" + string(rec.ID) + ".SBX.test", 80},
			{"app.example.com", 0}, {"app.example.com", AgentPort},
		} {
			if got, err := m.Bind(t.Context(), "", rec.ID, d); !errs.Is(err, errs.Invalid) {
				t.Errorf("bind %+v: %+v, %v", d, got, err)
			}
		}
		w.failAt("put", true)
		if _, err := m.Bind(t.Context(), "", rec.ID, Domain{"app.example.com", 80}); err == nil {
			t.Error("bound although the store cannot write")
		}
		leads(t, m, "app.example.com", "", 0)
		w.failAt("put", false)
		for i := range MaxDomains {
			if _, err := m.Bind(t.Context(), "", rec.ID, Domain{fmt.Sprintf("a%d.example.com", i), 80}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := m.Bind(t.Context(), "", rec.ID, Domain{"more.example.com", 80}); !errs.Is(err, errs.Exhausted) {
			t.Errorf("one more than the limit: %v", err)
		}
		if got, _ := m.Get(t.Context(), "", rec.ID); len(got.Domains) != MaxDomains {
			t.Errorf("%d domains in the record, want %d", len(got.Domains), MaxDomains)
		}
		if err := m.Kill(t.Context(), "", rec.ID); err != nil {
			t.Error(err)
		}
	})
}

func TestOneOfManyGetsADomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, newWorld())
		runManager(t, m)
		var wg sync.WaitGroup
		won := make(chan ID, 8)
		for range cap(won) {
			rec := mustCreate(t, m, "")
			wg.Go(func() {
				if _, err := m.Bind(t.Context(), "", rec.ID, Domain{"app.example.com", 80}); err == nil {
					won <- rec.ID
				} else if !errs.Is(err, errs.Conflict) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d sandboxes got the domain, want 1", len(won))
		}
		leads(t, m, "app.example.com", <-won, 80)
	})
}
