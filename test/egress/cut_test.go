package egress_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// flow opens a stream in the sandbox.
func (g *guest) flow(o opening) {
	g.t.Helper()
	if out := ask[outcome](g, "/open", o); out.Class != "ok" {
		g.t.Fatalf("open %s: %s", o.ID, out)
	}
	g.moves(o.ID)
}

func (g *guest) look(id string) state {
	g.t.Helper()
	return ask[state](g, "/look", id)
}

// moves demands that a stream brings bytes.
func (g *guest) moves(id string) {
	g.t.Helper()
	first := g.look(id)
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if now := g.look(id); now.Bytes > first.Bytes {
			return
		}
	}
	g.t.Fatalf("the flow %s brings nothing more: %+v", id, g.look(id))
}

// spring answers each datagram with ten, like a download over UDP.
func spring(t *testing.T, s *live, addr string) {
	t.Helper()
	c, err := s.lab.Internet().ListenPacket(t.Context(), "udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf, answer := make([]byte, 2000), make([]byte, 1200)
		for {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			for range 10 {
				_, _ = c.WriteTo(answer, from)
			}
		}
	})
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
}

const endless = "/bytes/68719476736"

// cutFlows are the kinds of flows that an update judges anew, each as one that the
// update denies and one that it leaves.
func cutFlows() (denied, kept []opening) {
	denied = []opening{
		{ID: "kernel, denied", Kind: "tcp", Addr: attacker + ":8080", Name: attacker, Path: endless},
		{ID: "UDP, denied", Kind: "udp", Addr: attacker + ":4001"},
		{ID: "TLS, denied", Kind: "https", Addr: "shared-a.test:443", Name: "shared-a.test", Path: endless},
		{ID: "HTTP, denied", Kind: "http", Addr: "shared-a.test:80", Name: "shared-a.test", Path: endless},
		{ID: "IPv6, denied", Kind: "tcp", Addr: "[" + addrB6 + "]:8080", Name: "b", Path: endless},
	}
	kept = []opening{
		{ID: "kernel, allowed", Kind: "tcp", Addr: addrB + ":8080", Name: addrB, Path: endless},
		{ID: "UDP, allowed", Kind: "udp", Addr: addrB + ":4001"},
		{ID: "TLS, allowed", Kind: "https", Addr: nameA + ":443", Name: nameA, Path: endless},
		{ID: "HTTP, allowed", Kind: "http", Addr: nameA + ":80", Name: nameA, Path: endless},
		{ID: "IPv6, allowed", Kind: "tcp", Addr: "[" + addrA6 + "]:8080", Name: "a", Path: endless},
	}
	return denied, kept
}

// testCut tightens and loosens the rules under live downloads.
func testCut(t *testing.T, s *live) {
	spring(t, s, attacker+":4001")
	spring(t, s, addrB+":4001")
	before := []string{attacker, addrB, "shared-a.test", nameA, addrA6, addrB6}
	after := []string{addrB, nameA, addrA6}
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: before})
	denied, kept := cutFlows()
	for _, o := range append(denied, kept...) {
		g.flow(o)
	}
	since := g.lastSeq()

	began := time.Now()
	took := g.rules(client.Network{DenyOut: all, AllowOut: after})
	mark := s.lab.Recorder().Mark()
	for _, o := range denied {
		st := g.cut(o.ID, began)
		late := st.Told.Sub(began) // not when we came to ask, nor when a slow reader came to it
		t.Logf("%-16s %s after %s, read %s later (the call took %s)", o.ID, st.Class, late.Round(time.Millisecond), st.Ended.Sub(st.Told).Round(time.Millisecond), took.Round(time.Millisecond))
		if st.Class != "reset" && st.Class != "refused" {
			t.Errorf("%s ended by %q, want a reset", o.ID, st.Class)
		}
	}
	for _, o := range kept {
		g.moves(o.ID)
	}
	// The host itself may say that a connection is over; nothing of the sandbox's.
	for _, host := range []string{attacker, "198.51.100.30", addrB6} {
		a, _ := parseAddr(host)
		seen := s.lab.Recorder().Since(mark).To(a).Where(func(p lab.Packet) bool { return len(p.Payload) > 0 })
		if err := seen.None(); err != nil {
			t.Errorf("bytes for %s left after the update: %v", host, err)
		}
	}
	for _, o := range denied[2:4] {
		g.logged(since, check{try: try{Kind: o.Kind, Addr: o.Addr}, verdict: verdict{"deny", "deny[0]", "revoked"}})
	}

	t.Run("loosening cuts nothing", func(t *testing.T) {
		g := g.in(t)
		g.rules(client.Network{DenyOut: all, AllowOut: append(slices.Clone(after), attacker, "*.wild.test", "198.51.100.0/24")})
		g.rules(client.Network{})
		for _, o := range kept {
			g.moves(o.ID)
			if st := g.look(o.ID); !st.Ended.IsZero() {
				t.Errorf("%s ended: %+v", o.ID, st)
			}
		}
	})
}

// ended waits for the end of a stream.
func (g *guest) ended(id string, by time.Time) state {
	g.t.Helper()
	for {
		if st := g.look(id); !st.Ended.IsZero() {
			return st
		}
		if time.Now().After(by) {
			g.t.Errorf("the flow %s goes on: %+v", id, g.look(id))
			return state{}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cut demands that a stream is over a second after the update began.
func (g *guest) cut(id string, began time.Time) state {
	g.t.Helper()
	st := g.ended(id, began.Add(10*time.Second))
	if late := st.Told.Sub(began); late > time.Second {
		g.t.Errorf("%s was cut after %s, want a second at most", id, late)
	}
	return st
}

// testLatency measures how soon an update is felt by new flows.
func testLatency(t *testing.T, s *live) {
	g := s.guest(t, client.Network{})
	for _, size := range []int{1, 1000, 10_000} {
		deny := make([]string, 0, size)
		for i := range size - 1 {
			deny = append(deny, fmt.Sprintf("20.%d.%d.%d/31", i/4096, i/16%256, i%16*16)) // none adjoins another
		}
		deny = append(deny, addrA)
		var calls, felt []time.Duration
		for range max(2, min(10, 2000/size)) {
			g.rules(client.Network{})
			series := make(chan []seen, 1)
			go func() {
				out, err := askErr[[]seen](g, "/watch", watching{Try: tcp(addrA), Every: time.Millisecond, For: 5 * time.Second, Until: "refused"})
				if err != nil {
					t.Error(err)
				}
				series <- out
			}()
			time.Sleep(100 * time.Millisecond)
			began := time.Now()
			calls = append(calls, g.rules(client.Network{DenyOut: deny}))
			returned := time.Now()
			if o := g.try(tcp(addrA)); o.Class != "refused" {
				t.Errorf("a connection begun when the call had returned: %s", o)
			}
			out := <-series
			if len(out) < 2 || out[0].Class != "ok" || out[len(out)-1].Class != "refused" {
				t.Fatalf("the sandbox saw %v, want a change from ok to refused", out)
			}
			felt = append(felt, out[len(out)-1].At.Sub(began))
			for _, o := range out {
				if o.Class == "ok" && o.At.After(returned.Add(20*time.Millisecond)) { // the clocks are two
					t.Errorf("a connection begun %s after the call returned was let through", o.At.Sub(returned))
				}
			}
		}
		t.Logf("%6d entries: the call takes %s, a new flow is refused after %s", size, rounded(calls), rounded(felt))
	}
}

func rounded(ds []time.Duration) time.Duration {
	slices.Sort(ds)
	return ds[len(ds)/2].Round(10 * time.Microsecond)
}

// testQuiet changes the rules after everything is over: nobody is told anything.
func testQuiet(t *testing.T, s *live) {
	g := s.guest(t, client.Network{})
	g.run(passes(tcp(addrA), open), passes(web(addrA, nameA), open), passes(udp(addrA), open))
	since := g.lastSeq()
	var calls []time.Duration
	for range 10 {
		calls = append(calls, g.rules(client.Network{DenyOut: all}), g.rules(client.Network{}))
	}
	t.Logf("without traffic an update takes %s, at most %s", rounded(calls), slices.Max(calls))
	time.Sleep(100 * time.Millisecond)
	for _, e := range g.events(client.EventOptions{Since: since, Verdict: client.Denied}) {
		t.Errorf("nothing was tried, but the flow log says %s", line(&e))
	}
}

// testHellos sends ClientHellos of odd shapes to an allowed and a denied name.
func testHellos(t *testing.T, s *live) {
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: []string{nameA}})
	wrong := verdict{"deny", "deny[0]", "name-denied"}
	for _, shape := range []string{"", "huge", "bytes", "records"} {
		t.Run("shape "+shape, func(t *testing.T) {
			g := g.in(t)
			good, bad := web(nameA, ""), web(addrB, nameB)
			good.Shape, bad.Shape = shape, shape
			checks := []check{{good, "ok", allowed, addrA + ":443"}, {bad, "alert", wrong, ""}}
			mark := s.lab.Recorder().Mark()
			g.run(checks...)
			g.silent(mark, checks)
		})
	}
}

// testFollow compares the stream of events with the list.
func testFollow(t *testing.T, s *live) {
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: []string{nameA, addrB}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	since := g.lastSeq()
	type result struct {
		events []client.Event
		err    error
	}
	done := make(chan result, 1)
	last := tcp("198.51.100.99")
	go func() {
		var r result
		for e, err := range g.Follow(ctx, client.EventOptions{Since: since}) {
			if err != nil {
				r.err = err
				break
			}
			r.events = append(r.events, e)
			if last.about(&e) {
				break
			}
		}
		done <- r
	}()
	g.run(passes(tcp(addrB), allow1), check{web(nameA, ""), "ok", allowed, ""}, check{ask8(nameB), "NODATA", verdict{"deny", "dns", "name-denied"}, ""}, refuses(last, denied))
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	listed := g.events(client.EventOptions{Since: since})
	listed = listed[:min(len(listed), len(r.events))]
	if list(r.events) != list(listed) {
		t.Errorf("the stream says\n%sthe list says\n%s", list(r.events), list(listed))
	}
	for verdict, want := range map[string]int{"allow": 3, "deny": 2} { // and the questions for nameA
		n := 0
		for _, e := range r.events {
			if string(e.Verdict) == verdict {
				n++
			}
		}
		if n < want {
			t.Errorf("%d events say %s, want %d or more:\n%s", n, verdict, want, list(r.events))
		}
	}
}

// testModes tries the modes that tell more than they must.
func testModes(t *testing.T, s *live) {
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: []string{nameA}, Mode: "observe"})
	t.Run("observe lets everything above the floor pass and says what it would have denied", func(t *testing.T) {
		g := g.in(t)
		byAddr, byName := verdict{"observe", "deny[0]", "deny-address"}, verdict{"observe", "deny[0]", "name-denied"}
		g.run(
			check{web(nameA, ""), "ok", allowed, ""}, passes(tcp(addrB), byAddr), passes(udp(addrB), byAddr),
			passes(web(nameB, ""), byName), passes(get(nameB, ""), byName), check{ask8(nameB), "NOERROR", verdict{"observe", "dns", "name-denied"}, addrB},
			passes(tcp("["+addrB6+"]"), byAddr), refuses(tcp("10.0.0.5"), floor), refuses(get("169.254.169.254", ""), floor),
		)
	})
	t.Run("enforcing what was observed cuts what is refused", func(t *testing.T) {
		g := g.in(t)
		g.flow(opening{ID: "observed", Kind: "https", Addr: nameB + ":443", Name: nameB, Path: endless})
		began := time.Now()
		g.rules(client.Network{DenyOut: all, AllowOut: []string{nameA}})
		g.cut("observed", began)
	})
	t.Run("explain answers HTTP with the reason, in words", func(t *testing.T) {
		g := g.in(t)
		g.rules(client.Network{DenyOut: all, AllowOut: []string{nameA}, OnDeny: "reset"})
		g.run(check{get(addrB, nameB), "reset", verdict{"deny", "deny[0]", "name-denied"}, ""})
		g.rules(client.Network{DenyOut: all, AllowOut: []string{nameA}})
		wrong := verdict{"deny", "deny[0]", "name-denied"}
		mark := s.lab.Recorder().Mark()
		checks := []check{{get(addrB, nameB), "403", wrong, ""}, {web(addrB, nameB), "alert", wrong, ""}, {get(nameA, ""), "ok", allowed, ""}}
		g.run(checks...)
		g.silent(mark, checks)
		o := g.try(get(addrB, nameB))
		if o.Deny != "deny[0] 0.0.0.0/0" {
			t.Errorf("X-Cordon-Deny is %q, want the rule", o.Deny)
		}
		for _, word := range []string{nameB, "deny[0] 0.0.0.0/0", g.ID, "name-denied"} {
			if !contains(o.Detail, word) {
				t.Errorf("the body does not say %q: %s", word, o.Detail)
			}
		}
	})
}

// testSuggest watches a sandbox, asks for the rules it needs, and enforces them.
func testSuggest(t *testing.T, s *live) {
	g := s.guest(t, client.Network{DenyOut: all, Mode: "observe"})
	work := []try{web(nameA, ""), get(nameB, ""), tcp("shared-a.test"), udp(attacker), tcp("[2001:db8:80::c633:6463]"), web("x.wild.test", ""), web("y.wild.test", "")}
	for _, y := range work {
		if o := g.try(y); o.Class != "ok" {
			t.Fatalf("%s in observe mode: %s", y, o)
		}
	}
	time.Sleep(50 * time.Millisecond) // the log is a few milliseconds behind
	suggest := func(args ...string) string {
		out, err := s.Command(t.Context(), append([]string{"network", "suggest", g.ID}, args...)...).Output()
		if err != nil {
			t.Fatalf("suggest: %v", err)
		}
		return string(out)
	}
	var rules client.Network
	if err := json.Unmarshal([]byte(suggest("--form", "json")), &rules); err != nil {
		t.Fatal(err)
	}
	want := client.Network{
		AllowOut: []string{nameA, nameB, "shared-a.test:4000", "x.wild.test", "y.wild.test", attacker + ":4000", "[2001:db8:80::c633:6463]:4000"}, DenyOut: all,
	}
	if diff := cmp.Diff(want, rules); diff != "" {
		t.Error(diff)
	}
	if wide := suggest("--wildcards"); !contains(wide, `allowOut: ["*.wild.test", "allowed.test", `) || !contains(wide, `"deny_out": ["0.0.0.0/0"]`) {
		t.Errorf("with wildcards, as code:\n%s", wide)
	}
	g.rules(rules)
	for _, y := range work {
		if o := g.try(y); o.Class != "ok" {
			t.Errorf("%s under what was suggested: %s", y, o)
		}
	}
	wrong := verdict{"deny", "deny[0]", "name-denied"}
	g.run(check{web(attacker, "attacker.test"), "alert", wrong, ""}, refuses(udp(addrB), denied), check{ask8("shared-b.test"), "NODATA", verdict{"deny", "dns", "name-denied"}, ""})
}

// pins are rules about a name and a port, whose addresses the resolver pins.
type pins struct {
	g     *guest
	since time.Time
}

// startPins tries them; finish looks again when they have to be confirmed.
func startPins(t *testing.T, s *live) *pins {
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: []string{"short.test:4000", "short.test:8080", "*.wild.test:4000", "shared-a.test:443"}})
	p := &pins{g: g}
	const addr = "198.51.100.13" // of short.test and of zero.test
	pinned := func(rule string) verdict { return verdict{"allow", rule, "pinned"} }
	noName := verdict{"deny", "dns", "name-denied"}
	unnamed := verdict{"deny", "deny[0]", "no-name"} // on a port where a name could have helped
	mark := s.lab.Recorder().Mark()
	g.run(refuses(tcp(addr), unnamed)) // nobody has asked for it yet
	if err := s.lab.Recorder().Since(mark).To(mustAddr(addr)).None(); err != nil {
		t.Error(err)
	}
	g.run(
		passes(tcp("short.test"), pinned("allow[0]")),
		passes(tcp(addr), pinned("allow[0]")), // resolved a moment ago
		refuses(try{Kind: "tcp", Addr: addr + ":7"}, denied),
		refuses(udp(addr), verdict{"deny", "deny[0]", "name-tcp-only"}), // its rule is about TCP
		check{web(addr, "short.test"), "alert", verdict{"deny", "deny[0]", "name-denied"}, ""},
		check{web("shared-a.test", ""), "ok", verdict{"allow", "allow[3]", "allow-name"}, ""},
		check{web("198.51.100.30", "shared-b.test"), "alert", verdict{"deny", "deny[0]", "name-denied"}, ""},
		refuses(tcp("198.51.100.30"), unnamed),
		check{ask8("zero.test"), "NODATA", noName, ""},
		check{ask8(nameB), "NODATA", noName, ""},
		refuses(tcp(addrB), unnamed),
		passes(tcp("x.wild.test"), pinned("allow[2]")),
		refuses(tcp("198.51.100.41"), unnamed), // the apex
	)
	g.flow(opening{ID: "pinned", Kind: "tcp", Addr: "short.test:8080", Name: "short.test", Path: "/slow?n=100000&every=50ms"})
	p.since = time.Now()
	return p
}

// pinLife is the shortest time until a pin is confirmed, whatever the TTL of the answer.
const pinLife = 30 * time.Second

func (p *pins) finish(t *testing.T) {
	g := p.g.in(t)
	time.Sleep(time.Until(p.since.Add(pinLife + 2*time.Second)))
	unnamed := verdict{"deny", "deny[0]", "no-name"}
	g.run(passes(tcp("198.51.100.13"), verdict{"allow", "allow[0]", "pinned"})) // the server asked again
	g.moves("pinned")                                                           // a flow that lives is not cut
	g.run(passes(tcp("short.test"), verdict{"allow", "allow[0]", "pinned"}))
	g.rules(client.Network{DenyOut: all, AllowOut: []string{"*.wild.test:4000"}})
	g.cut("pinned", time.Now())
	g.run(refuses(tcp("198.51.100.13"), unnamed))
}
