package share

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var ten = Resource{Name: "tens", What: "things", Alpha: 1}.Of(10, 4)

func TestAKeyAloneHoldsHalfAndLeavesTheRest(t *testing.T) {
	p := NewPool(ten.Of(10, 0))
	n := takeAll(p, "a", "")
	if n != 5 || int64(n) != p.Resource().Alone() {
		t.Errorf("a key alone took %d, want 5 = Alone() = %d", n, p.Resource().Alone())
	}
	if n := takeAll(p, "b", ""); n != 3 {
		t.Errorf("a second key took %d of the 5 that are free, want 3", n)
	}
	if err := p.Take("c", "", 1); err != nil {
		t.Errorf("a third key got nothing: %v", err)
	}
}

func TestASandboxHoldsItsLimitAndTheErrorNamesIt(t *testing.T) {
	p := NewPool(ten)
	if n := takeAll(p, "a", "s1"); n != 4 {
		t.Errorf("a sandbox took %d, want 4", n)
	}
	err := p.Take("a", "s1", 1)
	var full *Full
	if !errors.As(err, &full) || full.Scope != Sandbox || full.Limit != 4 {
		t.Errorf("got %v, want the sandbox's limit of 4", err)
	}
	if want := "things: this sandbox holds its limit of 4"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	if err := p.Take("a", "s2", 1); err != nil {
		t.Errorf("another sandbox of the key: %v", err)
	}
	err = p.Take("a", "s2", 1)
	if !errors.As(err, &full) || full.Scope != Key || full.Limit != 5 {
		t.Errorf("got %v, want the key's share of 5", err)
	}
}

func TestWhatIsGivenBackIsForgotten(t *testing.T) {
	p := NewPool(ten)
	takeAll(p, "a", "s")
	for range 4 {
		p.Give("a", "s", 1)
	}
	if p.Used() != 0 || len(p.keys) != 0 || len(p.sandboxes) != 0 {
		t.Errorf("left: used %d, keys %v, sandboxes %v", p.Used(), p.keys, p.sandboxes)
	}
}

// However keys take and give, no key holds more than a key alone may, and a key that
// comes new gets something as long as one unit is left above the others' shares.
func TestSharesHoldForRandomSequences(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		p := NewPool(Resource{Name: "x", What: "x", Alpha: 1 + r.Int64N(4)}.Of(1+r.Int64N(1000), 0))
		keys := []string{"a", "b", "c", "d"}
		for range 2000 {
			k := keys[r.IntN(len(keys))]
			if r.IntN(3) > 0 {
				_ = p.Take(k, "", 1+r.Int64N(5))
			} else if held := p.Held(k); held > 0 {
				p.Give(k, "", 1+r.Int64N(held))
			}
			if p.Used() > p.r.Whole || p.Held(k) > p.r.Alone() {
				t.Fatalf("used %d of %d, %s holds %d, alone %d", p.Used(), p.r.Whole, k, p.Held(k), p.r.Alone())
			}
		}
		if p.r.Whole >= 200 && p.Take("new", "", 1) != nil {
			t.Fatalf("whole %d, used %d: a new key gets nothing", p.r.Whole, p.Used())
		}
	}
}

func TestAQueueOfOneKeyDelaysAnotherByOneOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGate(Resource{Name: "x", What: "x", Alpha: 1}.Of(2, 0), 1000, 0)
		var wg sync.WaitGroup
		enter := func(key string, done *time.Duration) {
			began := time.Now()
			wg.Go(func() {
				leave, err := g.Enter(t.Context(), key, "")
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Second)
				leave()
				if done != nil {
					*done = time.Since(began)
				}
			})
		}
		for range 100 {
			enter("greedy", nil)
		}
		synctest.Wait()
		var took time.Duration
		enter("other", &took)
		wg.Wait()
		if took > 2*time.Second {
			t.Errorf("took %s behind a queue of another key, want at most 2 s", took)
		}
		if g.pool.Used() != 0 || len(g.queues) != 0 || len(g.turn) != 0 {
			t.Errorf("left: used %d, queues %v, turn %v", g.pool.Used(), g.queues, g.turn)
		}
	})
}

func TestAGateServesKeysInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGate(Resource{Name: "x", What: "x", Alpha: 1}.Of(2, 0), 1000, 0)
		first, err := g.Enter(t.Context(), "a", "")
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		for _, k := range []string{"a", "a", "a", "b", "b", "b"} {
			wg.Go(func() {
				leave, err := g.Enter(t.Context(), k, "")
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, k)
				mu.Unlock()
				time.Sleep(time.Second)
				leave()
			})
			synctest.Wait()
		}
		time.Sleep(time.Millisecond)
		first()
		wg.Wait()
		last := slices.Index(order, "a")
		if len(order) != 6 || last > 2 {
			t.Errorf("served in the order %v", order)
		}
	})
}

func TestASandboxThatWaitsForItselfHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGate(Resource{Name: "x", What: "x", Alpha: 1}.Of(6, 1), 10, 0)
		enter := func(sandbox string) <-chan func() {
			in := make(chan func(), 1)
			go func() {
				leave, err := g.Enter(t.Context(), "a", sandbox)
				if err != nil {
					t.Error(err)
				}
				in <- leave
			}()
			synctest.Wait()
			return in
		}
		s1, s2 := enter("s1"), enter("s2")
		again := enter("s1")
		select {
		case <-again:
			t.Fatal("a sandbox holds two of one")
		default:
		}
		s3 := enter("s3") // has room, whatever waits before it
		full := enter("s4")
		(<-s2)() // the first in the queue still waits for s1
		synctest.Wait()
		for _, in := range []<-chan func(){s3, full} {
			select {
			case leave := <-in:
				leave()
			default:
				t.Fatal("kept out by another sandbox that waits for itself")
			}
		}
		(<-s1)()
		(<-again)()
		if g.pool.Used() != 0 || len(g.queues) != 0 || len(g.turn) != 0 {
			t.Errorf("left: used %d, queues %v, turn %v", g.pool.Used(), g.queues, g.turn)
		}
	})
}

func TestAGateRefusesBeyondTheQueueAndTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGate(Resource{Name: "x", What: "x", Alpha: 1}.Of(2, 0), 1, time.Second)
		leave, err := g.Enter(t.Context(), "a", "")
		if err != nil {
			t.Fatal(err)
		}
		waits := make(chan error)
		go func() { _, err := g.Enter(t.Context(), "a", ""); waits <- err }()
		synctest.Wait()
		var full *Full
		if _, err := g.Enter(t.Context(), "a", ""); !errors.As(err, &full) || full.Scope != Key {
			t.Errorf("beyond the queue: %v", err)
		}
		if err := <-waits; !errors.As(err, &full) {
			t.Errorf("after the wait: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, err := g.Enter(ctx, "a", ""); waits <- err }()
		synctest.Wait()
		cancel()
		if err := <-waits; !errors.Is(err, context.Canceled) {
			t.Errorf("after a cancel: %v", err)
		}
		leave()
		if g.pool.Used() != 0 || len(g.queues) != 0 || len(g.turn) != 0 {
			t.Errorf("left: used %d, queues %v, turn %v", g.pool.Used(), g.queues, g.turn)
		}
	})
}

func TestRatesAreOfEachKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewRates(Resource{Name: "x", What: "requests in a second", Alpha: 1}.Of(10, 0), 20)
		for i := range 20 {
			if _, err := s.Allow("a", 1); err != nil {
				t.Fatalf("request %d: %v", i, err)
			}
		}
		wait, err := s.Allow("a", 1)
		if err == nil || wait <= 0 || wait > 100*time.Millisecond {
			t.Errorf("the 21st: wait %s, %v", wait, err)
		}
		if _, err := s.Allow("b", 1); err != nil {
			t.Errorf("another key: %v", err)
		}
		time.Sleep(wait)
		if _, err := s.Allow("a", 1); err != nil {
			t.Errorf("after the wait: %v", err)
		}
		time.Sleep(3 * rememberBucket)
		_, _ = s.Allow("c", 1)
		if len(s.buckets) != 1 {
			t.Errorf("%d buckets are kept", len(s.buckets))
		}
	})
}

func TestRatesAreWaitedForInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewRates(Resource{Name: "x", What: "requests in a second", Alpha: 1}.Of(10, 0), 10)
		began := time.Now()
		var wg sync.WaitGroup
		var refused atomic.Int32
		for range 40 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				var full *Full
				if err := s.Wait(ctx, "a", 1); errors.As(err, &full) && full.Scope == Key {
					refused.Add(1)
				} else if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := refused.Load(); got != 11 || time.Since(began) != 1900*time.Millisecond {
			t.Errorf("%d of 40 were refused after %s, want those that would wait for two seconds or longer", got, time.Since(began))
		}
		if err := s.Wait(t.Context(), "b", 1); err != nil {
			t.Errorf("another key: %v", err)
		}
	})
}

func TestEveryResourceIsDefinedWhole(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range All() {
		if r.Name == "" || r.What == "" || r.Alpha < 1 || r.Answer == "" || seen[r.Name] {
			t.Errorf("%+v", r)
		}
		seen[r.Name] = true
	}
}

func takeAll(p *Pool, key, sandbox string) (n int) {
	for p.Take(key, sandbox, 1) == nil {
		n++
	}
	return n
}

func BenchmarkTakeGive(b *testing.B) {
	p := NewPool(ten)
	b.ReportAllocs()
	for b.Loop() {
		_ = p.Take("key", "sandbox", 1)
		p.Give("key", "sandbox", 1)
	}
}

func TestAMeterAddsWhatWasPromisedToWhatWasMeasured(t *testing.T) {
	m := NewMeter(Resource{Name: "x", What: "memory", Bytes: true, Alpha: 1}.Of(100, 0))
	m.Measured(40, map[string]int64{"a": 30, "b": 10})
	release, err := m.Promise("b", 20)
	if err != nil {
		t.Fatal(err)
	}
	if m.pool.Used() != 60 || m.pool.Held("b") != 30 {
		t.Errorf("used %d, b holds %d, want 60 and 30", m.pool.Used(), m.pool.Held("b"))
	}
	var full *Full
	if _, err := m.Promise("a", 10); !errors.As(err, &full) || full.Scope != Key {
		t.Errorf("a holds 30 of 60, 40 are free: %v", err)
	}
	m.Measured(55, map[string]int64{"a": 30, "b": 25}) // half of the 20 is in use now
	if m.pool.Used() != 75 || m.pool.Held("b") != 45 {
		t.Errorf("used %d, b holds %d, want 75 and 45 until the promise ends", m.pool.Used(), m.pool.Held("b"))
	}
	release()
	release()
	if m.pool.Used() != 55 || m.pool.Held("b") != 25 {
		t.Errorf("used %d, b holds %d, want 55 and 25", m.pool.Used(), m.pool.Held("b"))
	}
	m.MeasuredOne(90, "c", 5)
	if _, err := m.Promise("c", 20); !errors.As(err, &full) || full.Scope != Server {
		t.Errorf("10 are free, 20 are wanted: %v", err)
	}
	m.Measured(0, nil)
	if m.pool.Used() != 0 || m.pool.Held("a") != 0 {
		t.Errorf("left: used %d, a holds %d", m.pool.Used(), m.pool.Held("a"))
	}
}
