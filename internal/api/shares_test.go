package api_test

import (
	"context"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/api"
	"github.com/cordonhq/cordon/internal/sandbox"
)

func byAdmin(b *bench) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("X-API-KEY", b.admin) }
}

func TestAKeyThatAsksTooOftenIsToldWhenToAskAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		refused := 0
		var last reply
		for range 1100 {
			if r := b.do("GET", "/sandboxes/quota", ""); r.Code != http.StatusOK {
				refused, last = refused+1, r
			}
		}
		if refused != 100 {
			t.Errorf("%d of 1100 requests at once were refused, want 100", refused)
		}
		if last.ResponseRecorder == nil || last.Code != http.StatusTooManyRequests || !strings.Contains(last.body["message"].(string), "API requests in a second: this API key holds its share of 500") {
			t.Fatalf("a request beyond: %+v", last.body)
		}
		wait, err := strconv.Atoi(last.Header().Get("Retry-After"))
		if err != nil || wait != 1 {
			t.Errorf("Retry-After is %q", last.Header().Get("Retry-After"))
		}
		if r := b.do("GET", "/sandboxes/quota", "", byAdmin(b)); r.Code != http.StatusOK {
			t.Errorf("another key: %d", r.Code)
		}
		time.Sleep(time.Duration(wait) * time.Second)
		if r := b.do("GET", "/sandboxes/quota", ""); r.Code != http.StatusOK {
			t.Errorf("after the wait: %d", r.Code)
		}
	})
}

// slowLists takes a second for each list.
type slowLists struct {
	api.Sandboxes
}

func (s slowLists) List(ctx context.Context, req sandbox.ListRequest) ([]sandbox.Record, string, error) {
	time.Sleep(time.Second)
	return s.Sandboxes.List(ctx, req)
}

func TestListsOfOneKeyDoNotHoldUpAnothers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, func(c *api.Config) { c.Sandboxes = slowLists{c.Sandboxes} })
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() { b.do("GET", "/sandboxes", "") })
		}
		synctest.Wait()
		began := time.Now()
		if r := b.do("GET", "/sandboxes", "", byAdmin(b)); r.Code != http.StatusOK || time.Since(began) > 2*time.Second {
			t.Errorf("behind 200 lists of another key it took %v, status %d, want at most 2 s", time.Since(began), r.Code)
		}
		wg.Wait()
	})
}

// watchedEvents counts how many look through events at once.
type watchedEvents struct {
	api.Sandboxes
	now, most *atomic.Int64
}

func (w watchedEvents) Events(ctx context.Context, req sandbox.EventsRequest) ([]sandbox.Event, int, error) {
	n := w.now.Add(1)
	defer w.now.Add(-1)
	for most := w.most.Load(); n > most && !w.most.CompareAndSwap(most, n); most = w.most.Load() {
	}
	time.Sleep(100 * time.Millisecond)
	return w.Sandboxes.Events(ctx, req)
}

func TestEveryLookThroughEventsTakesItsTurn(t *testing.T) {
	for _, path := range []string{"/sandboxes/events", "/sandboxes/%s/logs", "/v2/sandboxes/%s/logs"} {
		t.Run(path, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := watchedEvents{now: new(atomic.Int64), most: new(atomic.Int64)}
				b := newBench(t, func(c *api.Config) { w.Sandboxes, c.Sandboxes = c.Sandboxes, &w })
				at := strings.Replace(path, "%s", b.create(`{}`), 1)
				var wg sync.WaitGroup
				for range 100 {
					wg.Go(func() {
						if r := b.do("GET", at, ""); r.Code != http.StatusOK {
							t.Errorf("%d %v", r.Code, r.body)
						}
					})
				}
				wg.Wait()
				if most, want := w.most.Load(), int64(max(3, runtime.NumCPU()+1)); most == 0 || most > want {
					t.Errorf("%d ran at a time, want at most %d", most, want)
				}
			})
		})
	}
}
