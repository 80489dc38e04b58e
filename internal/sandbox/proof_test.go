package sandbox

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// zone is the public DNS as far as TXT records go.
type zone struct {
	mu  sync.Mutex
	txt map[string][]string
	err error
}

func (z *zone) LookupTXT(_ context.Context, name string) ([]string, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.err != nil {
		return nil, z.err
	}
	if found, ok := z.txt[strings.TrimSuffix(name, ".")]; ok {
		return found, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

func (z *zone) set(name string, texts ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.txt[name] = texts
}

func TestADomainIsBoundByWhoProvesControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{txt: map[string][]string{}}
		proof := &DomainProof{Secret: []byte(strings.Repeat("s", 32)), LookupTXT: z.LookupTXT, Without: []string{"*.lab.example"}}
		m := newManager(t, newWorld(), func(c *Config) { c.Proof = proof })
		runManager(t, m)
		a, b := mustCreate(t, m, "alice"), mustCreate(t, m, "bob")
		bind := func(owner string, id ID, name string) error {
			_, err := m.Bind(t.Context(), owner, id, Domain{name, 3000})
			return err
		}
		refused := func(err error, want ...string) {
			t.Helper()
			if !errs.Is(err, errs.Conflict) {
				t.Fatalf("got %v", err)
			}
			for _, w := range want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q says nothing of %q", err, w)
				}
			}
		}
		const name = "app.example.com"
		record, text := proof.Record("alice", name)
		if record != "_cordon-challenge.app.example.com" || !strings.HasPrefix(text, "cordon-verify=") {
			t.Fatalf("the record is %s %s", record, text)
		}
		refused(bind("alice", a.ID, "App.Example.com."), record, text, "now there is none")
		leads(t, m, name, "", 0)
		_, bobs := proof.Record("bob", name)
		_, others := proof.Record("alice", "other.example.com")
		z.set(record, "v=spf1", bobs, others, text+"x")
		refused(bind("alice", a.ID, name), text, "4 other texts")
		z.err = &net.DNSError{Err: "server misbehaving", IsTemporary: true}
		refused(bind("alice", a.ID, name), text, "the look-up failed")
		z.err = nil
		z.set("_cordon-challenge.example.com", text)
		refused(bind("alice", a.ID, name), "4 other texts") // the parent's proves nothing for it

		z.set(record, "v=spf1", text)
		refused(bind("bob", b.ID, name), bobs)
		if err := bind("alice", a.ID, name); err != nil {
			t.Fatal(err)
		}
		leads(t, m, name, a.ID, 3000)
		z.set(record)
		if _, err := m.Bind(t.Context(), "alice", a.ID, Domain{name, 4000}); err != nil {
			t.Errorf("another port of the same sandbox: %v", err)
		}
		refused(m.Proven(t.Context(), name), text) // no certificate any more
		z.set(record, text)
		if err := m.Proven(t.Context(), name); err != nil {
			t.Error(err)
		}
		if err := m.Proven(t.Context(), "never.example.com"); !errs.Is(err, errs.NotFound) {
			t.Errorf("a name that is not bound: %v", err)
		}

		// Names that the operator asks no record for stay their key's for a while.
		if err := bind("alice", a.ID, "x.lab.example"); err != nil {
			t.Fatal(err)
		}
		refused(bind("alice", a.ID, "lab.example"))
		if err := m.Unbind(t.Context(), "alice", a.ID, "x.lab.example"); err != nil {
			t.Fatal(err)
		}
		refused(bind("bob", b.ID, "x.lab.example"), "_cordon-challenge.x.lab.example")
		if err := bind("alice", mustCreate(t, m, "alice").ID, "x.lab.example"); err != nil {
			t.Errorf("its own key: %v", err)
		}
		if err := m.Kill(t.Context(), "alice", a.ID); err != nil {
			t.Fatal(err)
		}
		z.set(record, bobs)
		if err := bind("bob", b.ID, name); err != nil {
			t.Errorf("with a proof at once: %v", err)
		}
		if err := bind("bob", b.ID, "y.lab.example"); err != nil {
			t.Error(err)
		}
		if err := m.Unbind(t.Context(), "bob", b.ID, "y.lab.example"); err != nil {
			t.Fatal(err)
		}
		c := mustCreate(t, m, "carol")
		refused(bind("carol", c.ID, "y.lab.example"))
		time.Sleep(releaseGrace + time.Second)
		d, err := m.Create(t.Context(), CreateRequest{Owner: "carol"})
		if err != nil {
			t.Fatal(err)
		}
		if err := bind("carol", d.ID, "y.lab.example"); err != nil {
			t.Errorf("after the grace: %v", err)
		}
	})
}

func TestProofsAreNamesApart(t *testing.T) {
	p := &DomainProof{Secret: []byte(strings.Repeat("s", 32)), Without: []string{"A.example", "*.lab.example"}}
	var texts []string
	for _, of := range [][2]string{{"a", "b.example"}, {"a", "c.example"}, {"ab", ".example"}, {"", "ab.example"}} {
		_, text := p.Record(of[0], of[1])
		texts = append(texts, text)
	}
	slices.Sort(texts)
	if len(slices.Compact(texts)) != 4 {
		t.Errorf("two proofs are one: %v", texts)
	}
	for name, want := range map[string]bool{"a.example": true, "x.a.example": false, "x.lab.example": true, "y.x.lab.example": true, "lab.example": false, "evillab.example": false} {
		if got := p.free(name); got != want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

func TestPrivateByDefault(t *testing.T) {
	m := newManager(t, newWorld(), func(c *Config) { c.DefaultPrivate = true })
	runManager(t, m)
	yes := true
	for public, req := range map[bool]CreateRequest{false: {Owner: "k"}, true: {Owner: "k", AllowPublicTraffic: &yes}} {
		rec, err := m.Create(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Public() != public || (rec.TrafficToken == "") != public {
			t.Errorf("asked for %v: public %v, token %q", req.AllowPublicTraffic, rec.Public(), rec.TrafficToken)
		}
	}
}

func TestAResetMakesNothingPublic(t *testing.T) {
	m := newManager(t, newWorld())
	runManager(t, m)
	rec, err := m.Create(t.Context(), private())
	if err != nil {
		t.Fatal(err)
	}
	yes, no := true, false
	if _, err := m.Reset(t.Context(), "k1", rec.ID, ResetRequest{AllowPublicTraffic: &yes}); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "private") {
		t.Errorf("got %v", err)
	}
	if now, err := m.Reset(t.Context(), "k1", rec.ID, ResetRequest{AllowPublicTraffic: &no}); err != nil || now.Public() {
		t.Errorf("got %v, %v", now.Public(), err)
	}
}

// freely is a manager where every key binds names below lab.example without a record.
func freely(t *testing.T) *Manager {
	t.Helper()
	z := &zone{txt: map[string][]string{}}
	proof := &DomainProof{Secret: []byte(strings.Repeat("s", 32)), LookupTXT: z.LookupTXT, Without: []string{"*.lab.example"}}
	m := newManager(t, newWorld(), func(c *Config) { c.Proof = proof })
	runManager(t, m)
	return m
}

// A key keeps its sandbox busy, so that its bind waits until another releases the name.
func TestABindThatWaitsDoesNotOutrunTheGrace(t *testing.T) {
	m := freely(t)
	a, b := mustCreate(t, m, "alice"), mustCreate(t, m, "bob")
	const name = "x.lab.example"
	if _, err := m.Bind(t.Context(), "alice", a.ID, Domain{name, 3000}); err != nil {
		t.Fatal(err)
	}
	busy, err := m.table.hold("bob", b.ID)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := m.Bind(t.Context(), "bob", b.ID, Domain{name, 3000})
		got <- err
	}()
	time.Sleep(50 * time.Millisecond) // it waits; where it has not begun, it is refused anyway
	if err := m.Unbind(t.Context(), "alice", a.ID, name); err != nil {
		t.Fatal(err)
	}
	busy.op.Unlock()
	if err := <-got; !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "_cordon-challenge."+name) {
		t.Errorf("got %v", err)
	}
	leads(t, m, name, "", 0)
}

func TestAKeyThatReleasesManyNamesTakesNoOthersGrace(t *testing.T) {
	m := freely(t)
	a, b := mustCreate(t, m, "alice"), mustCreate(t, m, "bob")
	m.domains.mu.Lock()
	for i := range 2 * maxReleased {
		m.domains.keepReleased("mallory", fmt.Sprintf("n%d.lab.example", i))
	}
	m.domains.mu.Unlock()
	const name = "x.lab.example"
	if _, err := m.Bind(t.Context(), "alice", a.ID, Domain{name, 3000}); err != nil {
		t.Fatal(err)
	}
	if err := m.Unbind(t.Context(), "alice", a.ID, name); err != nil {
		t.Fatal(err)
	}
	m.domains.mu.Lock()
	for i := range 100 {
		m.domains.keepReleased("mallory", fmt.Sprintf("m%d.lab.example", i))
	}
	if n := len(m.domains.released); n > maxReleased {
		t.Errorf("%d names are remembered", n)
	}
	m.domains.mu.Unlock()
	if _, err := m.Bind(t.Context(), "bob", b.ID, Domain{name, 3000}); !errs.Is(err, errs.Conflict) {
		t.Errorf("got %v", err)
	}
}
