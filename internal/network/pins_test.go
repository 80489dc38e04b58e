package network

import (
	"net/netip"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// TestPinsComeNoFasterThanAKeyMayHaveThem: a rule may name thousands of ports and an
// answer thousands of addresses; the kernel is busy with each pair.
func TestPinsComeNoFasterThanAKeyMayHaveThem(t *testing.T) {
	w := start(t)
	in := policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"db.example.com:5432"}}
	var ports []uint16
	for p := range uint16(6000) {
		ports = append(ports, 10_000+p)
	}
	greedy, same, other := w.owned(t, "a"), w.owned(t, "a"), w.owned(t, "b")
	for _, l := range []sandbox.Lease{greedy, same, other} {
		w.apply(l, in)
	}
	began := time.Now()
	var err error
	for i := range byte(4) { // pins that are there cost nothing
		addr := netip.AddrFrom4([4]byte{198, 51, 100, 1 + i})
		if err = w.Pin(greedy.Sandbox, "db.example.com", addr, ports, time.Minute); err != nil {
			break
		}
	}
	w.mu.Lock()
	s := w.byID[greedy.Sandbox]
	w.mu.Unlock()
	if most := pinBurst + int(pinRate*time.Since(began).Seconds()) + 1; !errs.Is(err, errs.Exhausted) || len(s.pins.live) > most {
		t.Errorf("%d pins in %s, then %v; want %d at most, then a refusal", len(s.pins.live), time.Since(began), err, most)
	}
	for range 2 {
		if err := w.Pin(other.Sandbox, "db.example.com", public4, ports[:500], time.Minute); err != nil {
			t.Errorf("another key: %v", err)
		}
	}
	// What a resumed sandbox had pinned is not asked for anew.
	var saved []sandbox.Pin
	for i := range maxSavedPins {
		saved = append(saved, sandbox.Pin{Name: "db.example.com", Dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(101 + i/250), byte(i%250 + 1)}), 5432)})
	}
	if err := w.Repin(same, saved); err != nil {
		t.Errorf("saved pins: %v", err)
	}
	if n := len(w.Pins(same.Sandbox)); n != maxSavedPins {
		t.Errorf("%d saved pins are back, want %d", n, maxSavedPins)
	}
}
