package egress_test

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

// TestLimits runs a server whose operator has set every limit low.
func TestLimits(t *testing.T) {
	s := newStand(t, `  limits:
    connections: 50
    new_connections: 60
    dns_queries: 5
    bytes_out: 3000000
`)
	rules := client.Network{DenyOut: all, AllowOut: []string{nameA, addrB}}
	t.Run("connections at a time", func(t *testing.T) {
		g := s.guest(t, rules)
		beside := s.guest(t, rules)
		for _, addr := range []string{addrB + ":4000", addrA + ":443"} { // the kernel's and the proxy's
			done := make(chan error, 1)
			go func() {
				_, err := askErr[flooded](g, "/flood", flooding{Addr: netip.MustParseAddrPort(addr), Silent: 100, For: 3 * time.Second})
				done <- err
			}()
			time.Sleep(2 * time.Second)
			if o := g.try(try{Kind: "https", Addr: addr, Name: nameA}); o.Class == "ok" {
				t.Errorf("%s: one more connection beside the limit: %s", addr, o)
			}
			beside.run(passes(tcp(addrB), allow1), check{web(addrA, nameA), "ok", allowed, ""})
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		g.saw("kernel", "deny", "too-many-flows", "budget-new-flows")
	})
	t.Run("questions in a second", func(t *testing.T) {
		g := s.guest(t, client.Network{})
		// 15 at once, and five a second for the four seconds that the others wait.
		out := ask[map[string]int](g, "/names", asking{Server: "8.8.8.8:53", Format: "n%d.wild.test", Names: 45})
		if n := out["NOERROR"]; n < 30 || n > 40 || out["REFUSED"] != 45-n {
			t.Errorf("45 questions at once: %v", out)
		}
		g.saw("resolver", "deny", "budget-queries")
	})
	t.Run("bytes in all, whoever passes them on", func(t *testing.T) { testBytesOut(t, s, rules) })
}

// saw demands an event of a layer with a verdict and one of the reasons.
func (g *guest) saw(layer, verdict string, reasons ...string) {
	g.t.Helper()
	var events []client.Event
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		events = g.events(client.EventOptions{Limit: 4096})
		if slices.ContainsFunc(events, func(e client.Event) bool {
			return string(e.Layer) == layer && string(e.Verdict) == verdict && slices.Contains(reasons, e.Reason)
		}) {
			return
		}
	}
	g.t.Errorf("no event of the %s says %s for one of %v:\n%s", layer, verdict, reasons, list(events[max(0, len(events)-10):]))
}

func testBytesOut(t *testing.T, s *live, rules client.Network) {
	g := s.guest(t, rules)
	// Two megabytes by the proxy, a server that is killed, half a megabyte by the
	// kernel: what was sent is remembered.
	g.sends(web(addrA, nameA), 2<<20)
	g.rules(rules) // an update begins no new budget either
	g.flow(opening{ID: "download", Kind: "https", Addr: nameA + ":443", Name: nameA, Path: endless})
	g.flow(opening{ID: "kernel", Kind: "tcp", Addr: addrB + ":8080", Name: addrB, Path: endless})
	s.Stop(t, syscall.SIGKILL)
	if err := s.Start(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	g.flow(opening{ID: "again", Kind: "https", Addr: nameA + ":443", Name: nameA, Path: endless})
	mark := s.lab.Recorder().Mark()
	o := ask[outcome](g, "/send", sending{tcp(addrB), 4 << 20})
	if o.Class == "ok" {
		t.Fatalf("four megabytes beyond the budget: %s", o)
	}
	out := 0
	for _, p := range s.lab.Recorder().Since(mark).To(mustAddr(addrB)).Packets() {
		out += len(p.Payload)
	}
	t.Logf("%.2f MB of a budget of 3.00 came out after 2.10 had, then %s", float64(out)/1e6, o)
	if out > 900_000 {
		t.Errorf("%d bytes came out", out)
	}
	limit := verdict{"deny", "limit", "budget-bytes-out"}
	g.run(refuses(tcp(addrB), limit), refuses(web(addrA, nameA), limit), refuses(ask8(nameA), limit))
	for _, id := range []string{"kernel", "again"} { // they cannot even acknowledge what comes
		if st := g.ended(id, time.Now().Add(5*time.Second)); st.Class != "reset" {
			t.Errorf("%s ended by %q", id, st.Class)
		}
	}
	if got := g.sh("echo the agent answers"); strings.TrimSpace(got) != "the agent answers" {
		t.Errorf("the agent says %q", got)
	}
	s.guest(t, rules).run(passes(tcp(addrB), allow1)) // another has its own
}

// sends sends so many bytes and demands that it works.
func (g *guest) sends(y try, n int) {
	g.t.Helper()
	if o := ask[outcome](g, "/send", sending{y, n}); o.Class != "ok" {
		g.t.Fatalf("send %d bytes to %s: %s", n, y, o)
	}
}
