package tlsconf

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
)

// TestOwnersShareTheOrders has owners who always want more, and one who comes later.
func TestOwnersShareTheOrders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		o := newOrders()
		var mu sync.Mutex
		got := map[string]int{}
		greedy := func(owner string) {
			for range 20 {
				o.wg.Go(func() {
					for ctx.Err() == nil {
						if o.place(ctx, owner) == nil {
							mu.Lock()
							got[owner]++
							mu.Unlock()
							continue
						}
						time.Sleep(time.Second)
					}
				})
			}
			synctest.Wait()
		}
		greedy("a")
		if got["a"] != 5 {
			t.Errorf("alone, at once: %d, want 5", got["a"])
		}
		greedy("b")
		if got["b"] == 0 || got["a"]+got["b"] == orderPlaces {
			t.Errorf("two that want everything have %v: none is left for a third", got)
		}
		if err := o.place(ctx, "c"); err != nil {
			t.Errorf("a third, at once: %v", err)
		}
		mu.Lock()
		got = map[string]int{}
		mu.Unlock()
		for owner := range 4 { // more than there are places for at once
			greedy("d" + strconv.Itoa(owner))
		}
		const hours = 3
		time.Sleep(hours * time.Hour)
		mu.Lock()
		all, least := 0, orderPlaces*hours*6
		for _, n := range got {
			all, least = all+n, min(least, n)
		}
		if len(got) != 6 || least < orderPlaces*hours*6/6/3 || all > orderPlaces*(hours*6+1) {
			t.Errorf("in %d hours %v, in all %d; want each a fair part of %d", hours, got, all, orderPlaces*hours*6)
		}
		mu.Unlock()
		cancel()
		o.wait()
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
		for a.orders.places.Pool().Held("a") < orderPlaces/2 {
			if err := a.orders.place(ctx, "a"); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			ord, err := a.order("app.example")
			if err != nil {
				t.Fatal(err)
			}
			<-ord.done
			synctest.Wait() // done is closed before the rest is noted
			if !errors.Is(ord.err, errTooMany) || ord.backoff != 0 || time.Until(ord.next) > noPlaceWait {
				t.Fatalf("got %v, again in %s", ord.err, time.Until(ord.next))
			}
			time.Sleep(noPlaceWait)
		}
		a.orders.wait()
	})
}
