package network

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// countedOutside counts datagrams by the sandbox that says in them who it is.
type countedOutside struct {
	mu   sync.Mutex
	from map[string]int
}

func (w *world) count(t *testing.T, at ...netip.AddrPort) *countedOutside {
	t.Helper()
	c := &countedOutside{from: map[string]int{}}
	for _, a := range at {
		u, err := w.listenOutside(a)
		if err != nil {
			t.Fatal(err)
		}
		_ = u.SetReadBuffer(4 << 20)
		t.Cleanup(func() { u.Close() })
		go func() {
			b := make([]byte, 64)
			for {
				k, _, err := u.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				c.mu.Lock()
				c.from[string(b[:k])]++
				c.mu.Unlock()
			}
		}()
	}
	return c
}

// opened waits until nothing more comes, and returns how many flows of the names came out.
func (c *countedOutside) opened(names ...string) (total int) {
	for last := -1; ; time.Sleep(100 * time.Millisecond) {
		total = 0
		c.mu.Lock()
		for _, n := range names {
			total += c.from[n]
		}
		c.mu.Unlock()
		if total == last {
			return total
		}
		last = total
	}
}

// open opens UDP flows from a sandbox, which say who.
func (w *world) open(t *testing.T, l sandbox.Lease, who string, to netip.AddrPort, n int) {
	t.Helper()
	enter(t, l.NetNS, func() error {
		for range n {
			c, err := net.Dial("udp", to.String())
			if err != nil {
				return err
			}
			_, _ = c.Write([]byte(who)) // a refusal is told to the next write
			c.Close()
		}
		return nil
	})
}

// owned acquires a slot for a key.
func (w *world) owned(t *testing.T, key string) sandbox.Lease {
	t.Helper()
	l := w.lease()
	if err := w.Own(l, key); err != nil {
		t.Fatal(err)
	}
	w.apply(l, policy.Input{})
	return l
}

// about allows for what the kernel does not count: it forgets a flow that it looks at
// before another processor has put it into the tracker's table.
func about(got, want int) bool { return want-16 <= got && got <= want+16 }

// TestAKeyHasItsShareOfThePortsToOneDestination: whatever a key opens to a destination,
// another key finds ports there.
func TestAKeyHasItsShareOfThePortsToOneDestination(t *testing.T) {
	w := start(t, func(c *Config) { c.SourcePorts = PortRange{52000, 53023} })
	for family, addr := range map[string]netip.Addr{"IPv4": public4, "IPv6": public6} {
		t.Run(family, func(t *testing.T) {
			to, other := netip.AddrPortFrom(addr, 7000), netip.AddrPortFrom(addr, 7001)
			c := w.count(t, to, other)
			one, two, neighbour := w.owned(t, family+"a"), w.owned(t, family+"a"), w.owned(t, family+"b")
			w.open(t, one, "one", to, 400)
			w.open(t, two, "two", to, 400)
			const share = 512 // half of the range
			if got := c.opened("one", "two"); !about(got, share) {
				t.Errorf("the key has %d flows to one destination, want %d", got, share)
			}
			w.open(t, neighbour, "neighbour", to, 400)
			if got := c.opened("neighbour"); got != 400 {
				t.Errorf("another key has %d of 400 flows to it", got)
			}
			w.open(t, one, "elsewhere", other, 300)
			if got := c.opened("elsewhere"); got != 300 {
				t.Errorf("to another destination the key has %d of 300 flows", got)
			}
			e := w.flows.wait(t, "the refusal", func(e flowEvent) bool {
				return e.Reason == ReasonTooMany && e.Dst == to && e.Rule.ID == "limit.source_ports.key"
			})
			if e.Rule.Text != "connections to one destination of one API key: 512" {
				t.Errorf("the rule is %q", e.Rule.Text)
			}
		})
	}
}

// TestAKeyHasItsShareOfTheTracker: many sandboxes of one key leave room for another
// key's, and all of them for the machine.
func TestAKeyHasItsShareOfTheTracker(t *testing.T) {
	// Of 4096 entries 3072 are the sandboxes', a key's share is 1536, half of it for
	// flows that live.
	w := start(t, func(c *Config) { c.entries, c.MaxFlows, c.MaxNewFlows = 4096, 300, 100_000 })
	a := netip.AddrPortFrom(public4, 7000)
	c := w.count(t, a)
	for range 4 {
		w.open(t, w.owned(t, "a"), "a", a, 300)
	}
	if got := c.opened("a"); !about(got, 768) {
		t.Errorf("the key has %d flows, want 768", got)
	}
	for range 4 {
		w.open(t, w.owned(t, "b"), "b", a, 300)
	}
	if got := c.opened("b"); !about(got, 768) {
		t.Errorf("another key has %d flows, want 768", got)
	}
	w.open(t, w.owned(t, "c"), "c", a, 300)
	if got := c.opened("c"); !about(got, 0) {
		t.Errorf("all keys together have %d more than what is the sandboxes'", got)
	}
	for _, id := range []string{"limit.conntrack.key", "limit.conntrack.server"} {
		w.flows.wait(t, id, func(e flowEvent) bool { return e.Reason == ReasonTooMany && e.Rule.ID == id })
	}
}
