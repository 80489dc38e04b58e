package network

import (
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// refusedTo demands that a destination is always blocked, in the kernel and for those who
// ask IsHost.
func (w *world) refusedTo(t *testing.T, l sandbox.Lease, to string) {
	t.Helper()
	dst := at(to)
	if _, err := dial(l, "tcp", dst); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%s: %v; want refused", to, err)
	}
	w.flows.wait(t, "a denial of "+to, func(e flowEvent) bool {
		return e.Dst == dst && e.Reason == policy.ReasonFloor && e.Verdict == "deny"
	})
}

func TestWhatIsNearTheMachineIsAlwaysBlocked(t *testing.T) {
	w := start(t, func(c *Config) {
		c.PublicAddresses = []netip.Prefix{netip.MustParsePrefix("198.51.100.99/32"), netip.MustParsePrefix("2001:db8:9::/64")}
	})
	w.serve(7777)
	op := &policy.Operator{IsHost: w.IsHost}
	l := w.lease()
	if err := w.Apply(t.Context(), l, compiled(t, policy.Input{AllowOut: []string{"198.51.100.0/24", "203.0.113.0/24"}}, op)); err != nil {
		t.Fatal(err)
	}
	for what, to := range map[string]string{
		"an address that others know the machine by": "198.51.100.99:7777",
		"its NAT64 form":                 "[64:ff9b::c633:6463]:7777",
		"an IPv6 network of the machine": "[2001:db8:9::5]:7777",
		"a neighbour":                    "203.0.113.254:7777",
		"an IPv6 neighbour":              "[2001:db8:1::fe]:7777",
		"the machine's own, in NAT64":    "[64:ff9b::cb00:7101]:7777",
		"the machine's own, in 6to4":     "[2002:cb00:7101::1]:7777",
	} {
		t.Run(what, func(t *testing.T) { w.refusedTo(t, l, to) })
		if v := compiled(t, policy.Input{}, op).Decide(policy.Flow{Proto: policy.TCP, Dst: at(to)}); v.Allow {
			t.Errorf("%s: the policy allows %s", what, to)
		}
	}
	t.Run("control", func(t *testing.T) {
		for _, to := range []string{"198.51.100.98:7777", "[2001:db8:2::10]:7777"} {
			if _, err := hello(l, at(to)); err != nil {
				t.Errorf("%s: %v", to, err)
			}
		}
	})
	t.Run("an exception", func(t *testing.T) {
		open := *op
		open.FloorOpen = []string{"198.51.100.99:7777", "203.0.113.254/32"}
		if err := w.Apply(t.Context(), l, compiled(t, policy.Input{DenyOut: []string{"0.0.0.0/0"}}, &open)); err != nil {
			t.Fatal(err)
		}
		for _, to := range []string{"198.51.100.99:7777", "203.0.113.254:7777"} {
			if _, err := hello(l, at(to)); err != nil {
				t.Errorf("%s: %v", to, err)
			}
		}
		if _, err := dial(l, "tcp", at("198.51.100.98:7777")); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("beside the exception: %v; want refused", err)
		}
	})
}

func TestWhatIsNearIsFollowed(t *testing.T) {
	w := start(t)
	w.serve(7777)
	op := &policy.Operator{IsHost: w.IsHost}
	l := w.lease()
	if err := w.Apply(t.Context(), l, compiled(t, policy.Input{}, op)); err != nil {
		t.Fatal(err)
	}
	private, public := "[2001:db8:64::a00:5]:7777", "[2001:db8:64::c633:640a]:7777"
	if _, err := hello(l, at(private)); err != nil {
		t.Fatal("before the prefix is known:", err)
	}
	if err := w.SetNAT64([]netip.Prefix{netip.MustParsePrefix("2001:db8:64::/96")}); err != nil {
		t.Fatal(err)
	}
	w.refusedTo(t, l, private)
	if _, err := hello(l, at(public)); err != nil {
		t.Errorf("a public address by NAT64: %v", err)
	}
	link, err := netlink.LinkByName("up0")
	if err != nil {
		t.Fatal(err)
	}
	neighbour := netip.MustParseAddr("198.51.103.7")
	if err := netlink.AddrAdd(link, slot.Address(netip.MustParsePrefix("198.51.103.1/24"))); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(3 * time.Second); !w.IsHost(neighbour); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a new network of the machine is not seen")
		}
	}
	w.refusedTo(t, l, "198.51.103.7:7777")
	// The sets survive a table that is put back.
	if err := w.kern.do(func(b *nft.Batch) { b.DelTable(w.table().Table()) }); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if there, err := w.kern.hasTable(w.table().Table().Name); err == nil && there && w.hidden.Load() {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the table is not put back")
		}
	}
	if !strings.Contains(w.list(t), "198.51.103.0/24") {
		t.Error("the new table does not know the network")
	}
}
