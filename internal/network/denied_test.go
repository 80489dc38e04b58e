package network

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
)

func TestAddressesOfDeniedNamesAreDenied(t *testing.T) {
	w := start(t)
	w.serve(7777, 5432, 443)
	proxy(t, w.cfg.ProxyPort)
	op := &policy.Operator{AlwaysDeny: []string{"evil.example", "db.example:5432"}, DeniedAddr: w.Denied}
	l := w.lease()
	p := compiled(t, policy.Input{Mode: policy.ModeObserve, AllowOut: []string{"198.51.100.0/24"}}, op)
	if err := w.Apply(t.Context(), l, p); err != nil {
		t.Fatal(err)
	}
	live := open(t, l, at("198.51.100.10:7777"))
	if err := w.SetDenied(map[netip.AddrPort]int{at("198.51.100.10:0"): 0, at("[2001:db8:2::10]:0"): 0, at("198.51.100.11:5432"): 1}); err != nil {
		t.Fatal(err)
	}
	if err := echoes(live); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a flow from before: %v; want reset", err)
	}
	for _, to := range []string{"198.51.100.10:7777", "[2001:db8:2::10]:7777", "[64:ff9b::c633:640a]:7777", "198.51.100.11:5432"} {
		if _, err := dial(l, "tcp", at(to)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v; want refused", to, err)
		}
		if v := p.Decide(policy.Flow{Proto: policy.TCP, Dst: at(to)}); v.Allow || v.Reason != policy.ReasonOperator {
			t.Errorf("%s: the policy: %+v", to, v)
		}
		w.flows.wait(t, "a denial of "+to, func(e flowEvent) bool {
			return e.Dst == at(to) && e.Verdict == "deny" && e.Reason == policy.ReasonOperator && e.Rule.ID != ""
		})
	}
	if err := refusalUDP(l, at("198.51.100.10:443")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("UDP 443: %v; want refused", err)
	}
	for _, to := range []string{"198.51.100.11:7777", "198.51.100.12:5432"} {
		if _, err := hello(l, at(to)); err != nil {
			t.Errorf("%s: %v; want an answer", to, err)
		}
	}
	// Another name may be at the same address: there the proxy decides by what is shown.
	if who, err := hello(l, at("198.51.100.10:443")); err != nil || who != "proxy for 198.51.100.10:443" {
		t.Errorf("TCP 443: %q, %v; want the proxy", who, err)
	}
	for name, want := range map[string]bool{"": false, "evil.example": false, "good.example": true} {
		if v := p.Decide(policy.Flow{Proto: policy.TCP, Dst: at("198.51.100.10:443"), Name: name}); v.Allow != want {
			t.Errorf("%q on TCP 443: %+v", name, v)
		}
	}
	if err := w.SetDenied(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := hello(l, at("198.51.100.10:7777")); err != nil {
		t.Errorf("a name that has another address now: %v", err)
	}
	// What is denied before the table is made, or made anew, is in it.
	if err := w.SetDenied(map[netip.AddrPort]int{at("198.51.100.10:0"): 0}); err != nil {
		t.Fatal(err)
	}
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
	if _, err := dial(l, "tcp", at("198.51.100.10:7777")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("in a new table: %v; want refused", err)
	}
}

// TestADenialThatTheKernelRefusedIsTriedAgain: what is to be denied has not changed since,
// but it is not in force.
func TestADenialThatTheKernelRefusedIsTriedAgain(t *testing.T) {
	w := start(t)
	w.serve(7777)
	l := w.lease()
	op := &policy.Operator{AlwaysDeny: []string{"evil.example"}, DeniedAddr: w.Denied}
	if err := w.Apply(t.Context(), l, compiled(t, policy.Input{}, op)); err != nil {
		t.Fatal(err)
	}
	bad := &Network{machine: &machine{cfg: w.Network.cfg, kern: w.kern}, shares: w.shares, open: true}
	bad.cfg.Name = "none" // there is no such table
	for range 2 {
		if err := bad.SetDenied(map[netip.AddrPort]int{at("198.51.100.10:0"): 0}); err == nil {
			t.Error("without a table: nothing said")
		}
	}
	if _, denied := bad.Denied(at("198.51.100.10:7777")); !denied {
		t.Error("the proxy lets it pass meanwhile")
	}
	bad.cfg.Name = w.cfg.Name // it is there now
	if err := bad.SetDenied(map[netip.AddrPort]int{at("198.51.100.10:0"): 0}); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(l, "tcp", at("198.51.100.10:7777")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v; want refused", err)
	}
}
