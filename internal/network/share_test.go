package network

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
)

// ended are the TCP states of connections that a slot's limit does not count.
var ended = map[uint8]uint32{7: nft.RememberWait, 8: nft.RememberClosed} // TIME_WAIT, CLOSE

func TestWhatHasEndedLeavesTheTrackerSoon(t *testing.T) {
	w := start(t)
	w.serve(7777)
	proxy(t, 15001)
	l := w.lease()
	w.apply(l, policy.Input{AllowOut: []string{"example.com", "198.51.100.10", "2001:db8:2::10"}, DenyOut: []string{"0.0.0.0/0"}})
	for _, to := range []netip.AddrPort{at("198.51.100.10:7777"), at("[2001:db8:2::10]:7777"), at("198.51.101.1:80")} {
		c, err := dial(l, "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		seen := false
		for end := time.Now().Add(2 * time.Second); !seen && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			flows, err := w.ct.Flows(conntrack.Mark{}) // whatever their mark
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range flows {
				if conntrack.Dst(f).Addr() != to.Addr() || f.ProtoInfo.TCP == nil {
					continue
				}
				if most, over := ended[f.ProtoInfo.TCP.State]; over {
					seen = true
					if f.Timeout > most {
						t.Errorf("%s stays for %d s; want %d", to, f.Timeout, most)
					}
				}
			}
		}
		if !seen {
			t.Errorf("the connection to %s does not end", to)
		}
	}
}

func TestATooSmallTrackerLimitsEachSandbox(t *testing.T) {
	var said strings.Builder
	w := start(t, func(c *Config) {
		c.MaxFlows, c.Sandboxes = 1<<31, 1000
		c.Log = logTo(&said)
	})
	have, err := sysctl.Number(trackerMax)
	if err != nil {
		t.Fatal(err)
	}
	if got := uint64(w.Network.cfg.MaxFlows); got > have/2 {
		t.Errorf("one sandbox may have %d flows of %d", got, have)
	}
	if !strings.Contains(said.String(), "net.netfilter.nf_conntrack_max") {
		t.Errorf("the log names no setting: %s", said.String())
	}
}

// as runs fn with a user's sockets.
func as(user int, fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := unix.Setfsuid(user)
		if err == nil {
			err = errors.Join(fn(), unix.Setfsuid(0))
		}
		done <- err
	}()
	return <-done
}

func TestOnlyRootReachesSandboxesFromTheHost(t *testing.T) {
	w := start(t)
	l := w.lease()
	listener := listenIn(t, l, ":8080")
	defer listener.Close()
	for _, addr := range []netip.Addr{l.Addr4.Addr(), l.Addr6.Addr()} {
		to := netip.AddrPortFrom(addr, 8080)
		call := func() error {
			c, err := hostDial(to)
			if err == nil {
				c.Close()
			}
			return err
		}
		if err := as(0, call); err != nil {
			t.Errorf("root to %s: %v", to, err)
		}
		if err := as(65534, call); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("another user to %s: %v; want refused", to, err)
		}
	}
	if err := w.Release(context.Background(), l); err != nil {
		t.Error(err)
	}
}
