package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
)

// TestAnswersAfterTheClientHasGoneAreNoAttempts: a service that goes on sending to a
// client of the host's that is gone has not tried to reach the host.
func TestAnswersAfterTheClientHasGoneAreNoAttempts(t *testing.T) {
	w := start(t)
	l := w.lease()
	w.apply(l, policy.Input{})
	var service net.Listener
	enter(t, l.NetNS, func() (err error) {
		service, err = net.Listen("tcp", ":8000")
		return err
	})
	defer service.Close()
	go func() {
		for {
			c, err := service.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for b := make([]byte, 64<<10); ; {
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}()
		}
	}()
	for _, a := range []netip.Addr{l.Addr4.Addr(), l.Addr6.Addr()} {
		for i := range 20 {
			c, err := hostDial(netip.AddrPortFrom(a, 8000))
			if err != nil {
				t.Fatal(err)
			}
			for got := 0; got < 1<<20; {
				k, err := c.Read(make([]byte, 64<<10))
				if err != nil {
					t.Fatal(err)
				}
				got += k
			}
			if err := c.(*net.TCPConn).SetLinger(0); err != nil { // leave with a reset
				t.Fatal(err)
			}
			if i%2 == 0 { // what is on its way meets a tracker that knows the flow no more
				if err := w.forgetFlows([]*slotState{w.byID[l.Sandbox]}); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
		}
	}
	// An attempt is still one.
	if _, err := dial(l, "tcp", netip.AddrPortFrom(l.Gate4, 9)); err == nil {
		t.Error("the sandbox reaches the host")
	}
	w.flows.wait(t, "the attempt", func(e flowEvent) bool { return e.Dst.Port() == 9 && e.Reason == policy.ReasonFloor })
	w.flows.mu.Lock()
	defer w.flows.mu.Unlock()
	for _, e := range w.flows.events {
		if e.Verdict == "deny" && e.Dst.Port() != 9 {
			t.Fatalf("a denial that is no attempt: %+v", e)
		}
	}
}

// TestOverrunsAreCounted makes the kernel drop events.
func TestOverrunsAreCounted(t *testing.T) {
	privileged(t)
	was := eventBuffer
	eventBuffer = 4096
	t.Cleanup(func() { eventBuffer = was })
	var lost atomic.Uint64
	w := start(t, func(c *Config) { c.Lost = func(n uint64) { lost.Add(n) } })
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{})
	for i := 0; lost.Load() == 0 && i < 20; i++ {
		for range 200 {
			if c, err := dial(l, "udp", at("198.51.100.10:7777")); err == nil {
				_, _ = c.Write([]byte("x"))
				c.Close()
			}
		}
	}
	if lost.Load() == 0 {
		t.Error("events of 4000 flows in a buffer of 4 KiB, and nothing was lost")
	}
}

// TestAGoodStartWarnsOfNothing: the host is prepared in the order that a machine needs
// where the tracker is a module.
func TestAGoodStartWarnsOfNothing(t *testing.T) {
	var log bytes.Buffer
	w := start(t, func(c *Config) { c.Log = logTo(&log) })
	w.halt()
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			t.Error(line)
		}
	}
	for _, key := range []string{trackerBytes, trackerTimes} {
		if got, _ := sysctl.Read(key); got != "1" {
			t.Errorf("%s is %q", key, got)
		}
	}
	if found := CheckTracker(); len(found) > 0 {
		t.Error(found)
	}
	if err := sysctl.Write(trackerBytes, "0"); err != nil {
		t.Fatal(err)
	}
	if found := fmt.Sprint(CheckTracker()); !strings.Contains(found, "nf_conntrack_acct is 0") {
		t.Errorf("the check says %s", found)
	}
	w.boot(nil)
	if got, _ := sysctl.Read(trackerBytes); got != "1" {
		t.Errorf("after another start %s is %q", trackerBytes, got)
	}
}

// TestAForgottenConnectionEnds: the tracker may forget a connection, when it is flushed
// or when a stack keeps one that is over for longer than we do. What the sandbox sends
// on it then would leave by another port; it is refused instead.
func TestAForgottenConnectionEnds(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	w.apply(l, policy.Input{})
	tap := w.tap()
	for _, dst := range []netip.AddrPort{at("198.51.100.10:7777"), at("[2001:db8:2::10]:7777")} {
		c := open(t, l, dst)
		if err := echoes(c); err != nil {
			t.Fatal(err)
		}
		to := func(p packet) bool { return p.dst == dst }
		if err := w.forgetFlows([]*slotState{w.byID[l.Sandbox]}); err != nil {
			t.Fatal(err)
		}
		before := tap.count(to)
		if err := echoes(c); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: on a forgotten connection: %v, want a reset", dst, err)
		}
		if before == 0 || tap.count(to) != before {
			t.Errorf("%s: %d packets left before, %d in all", dst, before, tap.count(to))
		}
	}
}
