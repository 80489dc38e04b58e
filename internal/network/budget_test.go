package network

import (
	"errors"
	"io"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// sends writes so many bytes to an echo and waits until all came back.
func sends(l sandbox.Lease, to netip.AddrPort, n int) error {
	c, err := dial(l, "tcp", to)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	go func() { _, _ = c.Write(make([]byte, n)) }()
	_, err = io.CopyN(io.Discard, c, int64(n))
	return err
}

func TestABudgetOfBytesOutlivesUpdatesAndServers(t *testing.T) {
	const budget = 500_000
	w := start(t, func(c *Config) { c.MaxBytesOut = budget })
	w.serve(7777)
	to, to6 := at("198.51.100.10:7777"), at("[2001:db8:2::10]:7777")
	l, other := w.lease(), w.lease()
	w.apply(l, policy.Input{})
	w.apply(other, policy.Input{})
	if err := sends(l, to, 200_000); err != nil {
		t.Fatal("within the budget:", err)
	}
	p := w.apply(l, policy.Input{DenyOut: []string{"198.51.102.0/24"}})
	live := open(t, l, to)
	w.halt()
	w.Close()
	w.boot(map[sandbox.ID]sandbox.Held{l.Sandbox: {Lease: l, Policy: p}})
	if err := sends(l, to6, 200_000); err != nil {
		t.Fatal("within the budget, after an update and a restart:", err)
	}
	if err := sends(l, to, 200_000); err == nil {
		t.Fatal("600,000 bytes passed a budget of 500,000")
	}
	if err := echoes(live); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a flow that was open: %v, want a reset", err)
	}
	if _, err := dial(l, "tcp", to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a new flow: %v, want a refusal", err)
	}
	if err := refusalUDP(l, to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a datagram: %v, want a refusal", err)
	}
	w.flows.wait(t, "budget", func(e flowlog.Event) bool {
		return e.Reason == ReasonBytesOut && e.Rule.ID == "limit" && e.Verdict == flowlog.Denied && e.Sandbox == string(l.Sandbox)
	})
	listenIn(t, l, ":4000")
	if c, err := hostDial(netip.AddrPortFrom(l.Addr4.Addr(), 4000)); err != nil {
		t.Errorf("who calls the sandbox: %v", err)
	} else {
		c.Close()
	}
}

func TestEachSlotHasItsOwnBudget(t *testing.T) {
	w := start(t, func(c *Config) { c.MaxBytesOut = 100_000 })
	w.serve(7777)
	to := at("198.51.100.10:7777")
	l, other := w.lease(), w.lease()
	w.apply(l, policy.Input{})
	w.apply(other, policy.Input{})
	if err := sends(l, to, 150_000); err == nil {
		t.Fatal("150,000 bytes passed a budget of 100,000")
	}
	if err := sends(other, to, 50_000); err != nil {
		t.Errorf("another: %v", err)
	}
}

func TestNewFlowsArePaced(t *testing.T) {
	w := start(t, func(c *Config) { c.MaxNewFlows = 20 })
	w.serve(7777)
	to := at("198.51.100.10:7777")
	l, other := w.lease(), w.lease()
	w.apply(l, policy.Input{})
	w.apply(other, policy.Input{})
	passed, began := 0, time.Now()
	for range 100 {
		if c, err := dial(l, "tcp", to); err == nil {
			c.Close()
			passed++
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	if most := 21 + int(20*time.Since(began).Seconds()); passed < 20 || passed > most {
		t.Errorf("%d of 100 flows in %s; want 20 to %d", passed, time.Since(began), most)
	}
	w.flows.wait(t, "too fast", func(e flowlog.Event) bool { return e.Reason == ReasonNewFlows && e.Sandbox == string(l.Sandbox) })
	if _, err := dial(other, "tcp", to); err != nil {
		t.Errorf("another: %v", err)
	}
	time.Sleep(200 * time.Millisecond)
	if _, err := dial(l, "tcp", to); err != nil {
		t.Errorf("a moment later: %v", err)
	}
}
