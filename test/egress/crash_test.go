package egress_test

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// TestCrash takes the server away under running sandboxes, in three ways.
func TestCrash(t *testing.T) {
	s := newStand(t, "")
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: []string{nameA, addrB, addrB6}})
	g.flow(opening{ID: "kernel", Kind: "tcp", Addr: addrB + ":8080", Name: addrB, Path: endless})
	g.flow(opening{ID: "kernel6", Kind: "tcp", Addr: "[" + addrB6 + "]:8080", Name: "b", Path: endless})
	t.Run("frozen", func(t *testing.T) { testFrozen(t, s, g.in(t)) })
	t.Run("out of descriptors", func(t *testing.T) { testStarved(t, s, g.in(t)) })
	t.Run("killed", func(t *testing.T) { testKilled(t, s, g.in(t)) })
}

// temptations are what must not get out while nobody watches.
func temptations() []try {
	tries := []try{
		web(addrB6v, nameB), web("198.51.100.30", nameB), get("198.51.100.30", nameB), web(nameB, ""), ask8(nameB),
		tcp(attacker), udp(attacker), web(attacker, "attacker.test"), get(attacker, nameB), get("169.254.169.254", ""), tcp("10.0.0.5"),
	}
	for i := range tries {
		tries[i].Within = 500 * time.Millisecond
	}
	return tries
}

const addrB6v = "[2001:db8:80::c633:641e]" // shared-b.test, by IPv6

// unattended tries everything while the server is away: what is allowed by address
// passes, and nothing that is not leaves the host.
func (g *guest) unattended() {
	g.t.Helper()
	mark := g.live.lab.Recorder().Mark()
	for _, y := range temptations() {
		if o := g.try(y); o.Class == "ok" || o.Class == "NOERROR" {
			g.t.Errorf("%s: got %s while nobody judges", y, o)
		}
	}
	for _, y := range []try{tcp(addrB), udp(addrB), tcp("[" + addrB6 + "]"), web(addrB, nameB)} {
		if o := g.try(y); o.Class != "ok" {
			g.t.Errorf("%s: got %s, want ok: the kernel allows it by itself", y, o)
		}
	}
	for _, id := range []string{"kernel", "kernel6"} {
		g.moves(id)
	}
	g.nothing(mark)
}

// nothing demands that no packet of a temptation left the host since mark.
func (g *guest) nothing(mark lab.Mark) {
	g.t.Helper()
	seen := g.live.lab.Recorder().Since(mark)
	for _, host := range []string{attacker, "198.51.100.30", addrB6v, "169.254.169.254", "10.0.0.5"} {
		if err := seen.To(mustAddr(host)).None(); err != nil {
			g.t.Errorf("to %s: %v", host, err)
		}
	}
	if seen.AskedFor(nameB) {
		g.t.Errorf("a question for %s left the host", nameB)
	}
}

// attended waits until the server judges again, and demands that the sandbox never
// stopped.
func (g *guest) attended(began time.Time) {
	g.t.Helper()
	for {
		y := web(nameA, "")
		y.Within = time.Second
		o := g.try(y)
		if o.Class == "ok" {
			break
		}
		if time.Since(began) > 15*time.Second {
			g.t.Fatalf("%s after %s: %s", y, time.Since(began), o)
		}
	}
	g.t.Logf("names are served again after %s", time.Since(began).Round(time.Millisecond))
	for _, id := range []string{"kernel", "kernel6"} {
		g.moves(id)
	}
	g.run(
		passes(tcp(addrB), allow1), refuses(tcp(attacker), denied), check{ask8(nameB), "NODATA", verdict{"deny", "dns", "name-denied"}, ""},
		check{web("198.51.100.30", nameB), "alert", verdict{"deny", "deny[0]", "name-denied"}, ""},
	)
}

func testFrozen(t *testing.T, s *live, g *guest) {
	g.flow(opening{ID: "proxied", Kind: "https", Addr: nameA + ":443", Name: nameA, Path: endless})
	mark := s.lab.Recorder().Mark()
	s.signal(t, syscall.SIGSTOP)
	defer func() { _ = syscall.Kill(s.PID(), syscall.SIGCONT) }()
	g.unattended()
	s.signal(t, syscall.SIGCONT)
	g.attended(time.Now())
	g.nothing(mark) // what had piled up was judged, not let through
	g.moves("proxied")
}

func testStarved(t *testing.T, s *live, g *guest) {
	g.flow(opening{ID: "spliced", Kind: "https", Addr: nameA + ":443", Name: nameA, Path: endless})
	pid := s.PID()
	mark := s.lab.Recorder().Mark()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	var before unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	limit := func(n uint64) {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: before.Max}, nil); err != nil {
			t.Fatal(err)
		}
	}
	defer limit(before.Cur)
	// First a few are left, as it happens: a connection may be accepted whose upstream
	// cannot be dialled. Then none.
	for _, n := range []uint64{uint64(len(files)), 8} {
		limit(n)
		y := web(nameA, "")
		y.Within = time.Second
		if o := g.try(y); o.Class == "ok" && n == 8 {
			t.Errorf("without descriptors: %s", o)
		}
		g.unattended()
		g.moves("spliced")
		limit(before.Cur)
		g.attended(time.Now())
	}
	g.nothing(mark)
	if got := s.PID(); got != pid || !s.healthy(5*time.Second) {
		t.Errorf("the server %d is now %d, or not healthy", pid, got)
	}
}

func testKilled(t *testing.T, s *live, g *guest) {
	g.flow(opening{ID: "dying", Kind: "https", Addr: nameA + ":443", Name: nameA, Path: endless})
	mark := s.lab.Recorder().Mark()
	s.Stop(t, syscall.SIGKILL)
	g.ended("dying", time.Now().Add(5*time.Second))
	for _, y := range []try{web(addrA, nameA), get(addrA, nameA), ask8(nameA)} {
		if o := g.try(y); o.Class != "refused" {
			t.Errorf("%s: got %s, want refused: nobody can judge it", y, o)
		}
	}
	g.unattended()
	began := time.Now()
	if err := s.Start(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	t.Logf("the server answers again after %s", time.Since(began).Round(time.Millisecond))
	g.attended(began)
	g.nothing(mark)
	for _, id := range []string{"kernel", "kernel6"} {
		if st := g.look(id); !st.Ended.IsZero() {
			t.Errorf("%s ended: %+v", id, st)
		}
	}
}
