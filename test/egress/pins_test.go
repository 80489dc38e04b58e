package egress_test

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

// TestPinsOutliveLookUps is what a pool of database connections does: it resolves
// the name once and connects again and again. Pins go along with the sandbox, are
// asked for again by the server, and end when the name no longer has the address.
func TestPinsOutliveLookUps(t *testing.T) {
	s := newStand(t, "")
	rules := client.Network{DenyOut: all, AllowOut: []string{"short.test:4000", "flip.test:4000"}}
	g := s.guest(t, rules)
	const addr, moving = "198.51.100.13", "198.51.100.10" // of short.test, and of flip.test once
	pinned := func(rule string) verdict { return verdict{"allow", rule, "pinned"} }
	stays := passes(tcp(addr), pinned("allow[0]"))
	g.run(passes(tcp("short.test"), pinned("allow[0]")), stays, passes(tcp("flip.test"), pinned("allow[1]")))

	stranger := s.guest(t, rules)
	stranger.run(refuses(tcp(addr), verdict{"deny", "deny[0]", "no-name"})) // it never asked

	ctx := t.Context()
	snap, err := g.Snapshot(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	copies, err := g.Fork(ctx, 1, 5*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	made, err := s.Create(ctx, client.CreateOptions{Template: snap.ID, Network: rules})
	if err != nil {
		t.Fatal(err)
	}
	narrow, err := s.Create(ctx, client.CreateOptions{Template: snap.ID, Network: client.Network{DenyOut: all, AllowOut: []string{"flip.test:4000"}}})
	if err != nil {
		t.Fatal(err)
	}
	as := func(what string, sb *client.Sandbox) *guest {
		t.Helper()
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := sb.Kill(ctx); err != nil && !errors.Is(err, client.ErrNotFound) {
				t.Errorf("kill %s: %v", what, err)
			}
		})
		other := &guest{Sandbox: sb, live: s, t: t, http: s.http(30 * time.Second)}
		other.locate()
		return other
	}
	forked := as("the copy", copies[0])
	forked.run(stays)
	as("the one made of the snapshot", made).run(stays)
	as("the one under other rules", narrow).run(refuses(tcp(addr), verdict{"deny", "deny[0]", "no-name"}))

	if err := g.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	resume := func() {
		t.Helper()
		if _, err := s.Connect(ctx, g.ID, 5*time.Minute); err != nil {
			t.Fatal(err)
		}
		g.locate()
	}
	resume()
	g.run(stays)

	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		if err := forked.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		s.Stop(t, sig)
		if err := s.Start(context.WithoutCancel(ctx)); err != nil {
			t.Fatal(err)
		}
		g.run(stays)
		if _, err := s.Connect(ctx, forked.ID, 5*time.Minute); err != nil { // paused, and the server is another one
			t.Fatal(err)
		}
		forked.locate()
		forked.run(stays)
	}

	// The server asks again for a name that was confirmed long ago.
	time.Sleep(pinLife + 2*time.Second)
	mark := s.lab.Recorder().Mark()
	g.run(stays)
	if !s.lab.Recorder().Since(mark).AskedFor("short.test") {
		t.Error("nobody asked whether the name still has the address")
	}
	// flip.test is elsewhere by now: ended at the first attempt, and refused from then on.
	expired := verdict{"deny", "deny[0]", "pin-expired"}
	g.run(check{tcp(moving), "reset", expired, ""}, refuses(tcp(moving), expired), stays)
	stranger.run(refuses(tcp(addr), verdict{"deny", "deny[0]", "no-name"}))
}
