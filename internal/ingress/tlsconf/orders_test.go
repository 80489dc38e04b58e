package tlsconf

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
)

func TestOneOwnerLeavesOrdersToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrders()
		count := func(owner string) (n int) {
			for range 100 {
				if o.place(owner) {
					n++
				}
			}
			return n
		}
		if a, b, c := count("a"), count("b"), count("c"); a != 5 || b != 5 || c != 0 {
			t.Errorf("at once: %d, %d and %d, want 5, 5 and 0", a, b, c)
		}
		time.Sleep(time.Hour)
		if got := count("a"); got != 5 {
			t.Errorf("later: %d, want 5", got)
		}
		if got := count("c"); got != 5 {
			t.Errorf("later, another: %d, want 5", got)
		}
		time.Sleep(time.Hour)
		if o.forget(func(string) bool { return true }); len(o.byOwner) != 0 {
			t.Errorf("kept of owners: %v", o.byOwner)
		}
	})
}

func TestAnOrderThatFoundNoPlaceIsTriedAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		a := &ACME{cfg: ACMEConfig{Owner: func(string) string { return "a" }}, log: slog.New(slog.DiscardHandler), orders: newOrders(), ctx: ctx}
		a.storage = &certmagic.FileStorage{Path: t.TempDir()}
		a.cache = certmagic.NewCache(certmagic.CacheOptions{GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return a.custom, nil }})
		defer a.cache.Stop()
		a.custom = certmagic.New(a.cache, certmagic.Config{Storage: a.storage})
		for a.orders.place("a") {
		}
		for range 5 {
			ord, err := a.order("app.example")
			if err != nil {
				t.Fatal(err)
			}
			<-ord.done
			if !errors.Is(ord.err, errTooMany) || ord.backoff != 0 || time.Until(ord.next) > noPlaceWait {
				t.Fatalf("got %v, again in %s", ord.err, time.Until(ord.next))
			}
			time.Sleep(noPlaceWait)
		}
		a.orders.wait()
	})
}
