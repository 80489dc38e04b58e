package ingress

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
)

// paused makes a sandbox paused that traffic wakes.
func paused(owner string, change ...func(*Target)) func(*Target) {
	return func(t *Target) {
		t.State, t.AutoResume, t.Owner = Paused, true, owner
		for _, c := range change {
			c(t)
		}
	}
}

// woken marks a sandbox as running, as a manager does.
func (l *lab) woken(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := *l.targets[id]
	c.State = Running
	l.targets[id] = &c
}

func TestStrangersWakeNothing(t *testing.T) {
	var wakes atomic.Int32
	l := newLab(t, func(c *Config) {
		c.Wake = func(context.Context, string, Waker) error { wakes.Add(1); return errors.New("no") }
	})
	const agent = 49983
	secured := func(t *Target) { t.AccessToken = "acc" }
	l.sandbox("iprivate", paused("k", linked))
	l.sandbox("ilisted", paused("k", func(t *Target) { t.AllowIn = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} }))
	l.sandbox("iagent", paused("k", secured))
	l.sandbox("iopen", paused("k"))
	l.sandbox("iasleep", func(t *Target) { t.State = Paused })
	over := auth.URLAccess{Sandbox: "iprivate", Port: 80, Link: "u2", Expires: time.Now().Add(time.Hour)}.Sign("key")
	stale := auth.FileAccess{Path: "/a", Operation: auth.ReadFile, Expires: 1}
	for _, tt := range []struct {
		name   string
		host   string
		path   string
		header []string
		code   int
	}{
		{"without a token", "80-iprivate", "/", nil, 403},
		{"with a wrong one", "80-iprivate", "/", []string{"e2b-traffic-access-token", "no"}, 403},
		{"with a revoked link", "80-iprivate", "/?cordon_token=" + over, nil, 403},
		{"with its cookie", "80-iprivate", "/", []string{"Cookie", tokenCookie + "=" + over}, 403},
		{"from an address that is not listed", "80-ilisted", "/", nil, 403},
		{"at the agent without its token", "49983-iagent", "/envs", nil, 502},
		{"at the agent with a wrong one", "49983-iagent", "/envs", []string{"X-Access-Token", "no"}, 502},
		{"at the agent with a file's signature that is wrong", "49983-iagent", "/files?path=/a&signature=v1_x", nil, 502},
		{"at the agent with a file's signature whose time is over", "49983-iagent", "/files?path=/a&signature_expiration=1&signature=" + stale.Sign("acc"), nil, 502},
		{"at the agent's control routes", "49983-iopen", "/init", nil, 404},
		{"asking whether it runs, with the token", "49983-iagent", "/health", []string{"X-Access-Token", "acc"}, 502},
		{"asking whether it runs, where no token is needed", "49983-iopen", "/health", nil, 502},
		{"where traffic wakes nothing", "80-iasleep", "/", nil, 502},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, body := get(t, l.client(true), "https://"+tt.host+"."+domain+tt.path, tt.header...)
			if resp.StatusCode != tt.code || wakes.Load() != 0 {
				t.Errorf("got %d %s and %d wakes, want %d", resp.StatusCode, body, wakes.Load(), tt.code)
			}
		})
	}
	file := auth.FileAccess{Path: "/a", Operation: auth.ReadFile}
	for _, path := range []string{"/files?path=/a&signature=" + strings.ReplaceAll(file.Sign("acc"), "+", "%2B"), "/envs"} {
		before := wakes.Load()
		get(t, l.client(true), fmt.Sprintf("https://%d-iagent.%s%s", agent, domain, path), map[bool][]string{true: {"X-Access-Token", "acc"}}[path == "/envs"]...)
		if wakes.Load() == before && path != "/envs" { // the second is within the pause after the first's failure
			t.Errorf("%s with its credentials woke nothing", path)
		}
	}
}

func TestWhatWakesIsTheSandboxsChoice(t *testing.T) {
	var l *lab
	var woke atomic.Pointer[Waker]
	l = newLab(t, func(c *Config) {
		c.Wake = func(_ context.Context, id string, by Waker) error {
			woke.Store(&by)
			l.woken(id)
			return nil
		}
	})
	a := l.sandbox(idA)
	port := a.serve(echo)
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket"}
	local := netip.MustParseAddr("127.0.0.1")
	for _, tt := range []struct {
		name   string
		on     WakeOn
		header []string
		code   int // 200: woken
		by     Waker
	}{
		{"any: a request", OnAny, nil, 200, Waker{"GET", "/a%2Fb", local, uint16(port), false}},
		{"any: an upgrade", OnAny, upgrade, 200, Waker{"GET", "/a%2Fb", local, uint16(port), true}},
		{"requests: a request", OnRequests, nil, 200, Waker{"GET", "/a%2Fb", local, uint16(port), false}},
		{"requests: an upgrade", OnRequests, upgrade, 503, Waker{}},
		{"header: a request without it", OnHeader, nil, 503, Waker{}},
		{"header: an upgrade without it", OnHeader, upgrade, 503, Waker{}},
		{"header: a request with it", OnHeader, []string{"Cordon-Wake", "1"}, 200, Waker{"GET", "/a%2Fb", local, uint16(port), false}},
		{"header: an empty one", OnHeader, []string{"Cordon-Wake", ""}, 503, Waker{}},
		{"a choice that this server does not know", "other", nil, 503, Waker{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a.change(paused("k", func(x *Target) { x.WakeOn = tt.on }))
			woke.Store(nil)
			resp, body := get(t, l.client(false), "https://"+a.host(port)+"/a%2Fb?secret=1", tt.header...)
			if resp.StatusCode != tt.code || strings.Contains(body, "cordon-wake=") {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
			var got Waker
			if by := woke.Load(); by != nil {
				got = *by
			}
			if got != tt.by {
				t.Errorf("woken by %+v, want %+v", got, tt.by)
			}
		})
	}
	t.Run("requests: a WebSocket over HTTP/2", func(t *testing.T) {
		a.change(paused("k", func(x *Target) { x.WakeOn = OnRequests }))
		if s := dialStream(t, l.h2(t), "https://"+a.host(port)+"/", "websocket"); s.resp.StatusCode != 503 {
			t.Errorf("got %d", s.resp.StatusCode)
		}
	})
}

func TestManyRequestsWaitForOneWake(t *testing.T) {
	var l *lab
	var wakes atomic.Int32
	gate := make(chan struct{})
	l = newLab(t, func(c *Config) {
		c.Wake = func(ctx context.Context, id string, _ Waker) error {
			wakes.Add(1)
			<-gate
			l.woken(id)
			return nil
		}
	})
	a := l.sandbox(idA, paused("k"))
	port := a.serve(echo)
	c := l.client(true)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if resp, err := c.Get("https://" + a.host(port) + "/"); err != nil || resp.StatusCode != 200 {
				t.Errorf("woken: %v %v", resp, err)
			} else {
				resp.Body.Close()
			}
		})
	}
	eventually(t, "all wait", func() bool {
		l.in.wakes.mu.Lock()
		defer l.in.wakes.mu.Unlock()
		return l.in.wakes.calls[idA] != nil && l.in.wakes.calls[idA].waiting == 20
	})
	close(gate)
	wg.Wait()
	if wakes.Load() != 1 {
		t.Errorf("%d wakes", wakes.Load())
	}
}

func TestAFailedWakeSaysSoAndBacksOff(t *testing.T) {
	var wakes atomic.Int32
	var fail atomic.Pointer[error]
	l := newLab(t, func(c *Config) {
		c.Wake = func(context.Context, string, Waker) error { wakes.Add(1); return *fail.Load() }
	})
	for _, tt := range []struct {
		name  string
		err   error
		code  int
		body  string
		again int // wakes after a second request
	}{
		{"a fault", errors.New("secret detail"), 503, `"message":"The sandbox is paused and could not be resumed"`, 1},
		{"a limit", errs.New(errs.Exhausted, "this server runs its limit of 3 sandboxes"), 429, "this server runs its limit of 3 sandboxes", 1},
		{"a sandbox that is gone", errs.New(errs.NotFound, "no"), 502, "The sandbox was not found", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fail.Store(&tt.err)
			wakes.Store(0)
			id := "i" + strings.ReplaceAll(tt.name, " ", "")
			l.sandbox(id, paused("k"))
			for i := range 2 {
				resp, body := get(t, l.client(true), "https://80-"+id+"."+domain+"/")
				if i == 0 && (resp.StatusCode != tt.code || !strings.Contains(body, tt.body) || strings.Contains(body, "secret")) {
					t.Errorf("got %d %s", resp.StatusCode, body)
				}
				if tt.code != 502 && resp.Header.Get("Retry-After") == "" {
					t.Error("no Retry-After")
				}
			}
			if got := int(wakes.Load()); got != tt.again {
				t.Errorf("%d wakes, want %d", got, tt.again)
			}
		})
	}
	w := newWakes(1)
	var pauses []time.Duration
	for range 8 {
		w.settle(&wakeCall{id: "x", err: errors.New("no")})
		pauses = append(pauses, w.pause("x").Round(time.Second))
	}
	if got, want := fmt.Sprint(pauses), "[1s 2s 4s 8s 16s 32s 1m0s 1m0s]"; got != want {
		t.Errorf("pauses are %s, want %s", got, want)
	}
	if w.settle(&wakeCall{id: "x"}); len(w.failed) != 0 {
		t.Error("a success is not forgotten for")
	}
}

// Sixteen sandboxes of one owner whose wakes hang, and forty more that queue, hold
// neither another owner's nor more than their share of the places.
func TestHostileSandboxesDoNotStarveOthersWakes(t *testing.T) {
	var l *lab
	gate := make(chan struct{})
	var hanging, most atomic.Int32
	l = newLab(t, func(c *Config) {
		c.Limits.Wakes = 16
		c.Wake = func(ctx context.Context, id string, _ Waker) error {
			if strings.HasPrefix(id, "ihostile") {
				if n := hanging.Add(1); n > most.Load() {
					most.Store(n)
				}
				defer hanging.Add(-1)
				select {
				case <-gate:
				case <-ctx.Done():
				}
				return errors.New("no")
			}
			l.woken(id)
			return nil
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 56 {
		id := fmt.Sprintf("ihostile%d", i)
		l.sandbox(id, paused("mallory"))
		wg.Go(func() {
			req, _ := http.NewRequestWithContext(ctx, "GET", "https://80-"+id+"."+domain+"/", nil)
			if resp, err := l.client(true).Do(req); err == nil {
				resp.Body.Close()
			}
		})
	}
	eventually(t, "the hostile ones wait", func() bool {
		l.in.wakes.mu.Lock()
		defer l.in.wakes.mu.Unlock()
		return len(l.in.wakes.queue) == 52
	})
	for i := range 20 {
		b := l.sandbox(fmt.Sprintf("ihonest%d", i), paused("alice"))
		port := b.serve(echo)
		if resp, body := get(t, l.client(true), "https://"+b.host(port)+"/"); resp.StatusCode != 200 {
			t.Fatalf("an honest sandbox: %d %s", resp.StatusCode, body)
		}
	}
	if n := most.Load(); n != 4 {
		t.Errorf("%d of 16 wakes were one owner's", n)
	}
	cancel() // who waits gives up: the queue forgets them
	wg.Wait()
	eventually(t, "the queue is empty", func() bool {
		l.in.wakes.mu.Lock()
		defer l.in.wakes.mu.Unlock()
		return len(l.in.wakes.queue) == 0
	})
	close(gate)
	eventually(t, "nothing is left", func() bool {
		l.in.wakes.mu.Lock()
		defer l.in.wakes.mu.Unlock()
		return len(l.in.wakes.calls)+len(l.in.wakes.owners)+l.in.wakes.running == 0
	})
}

func TestTheQueueOfWakesIsBounded(t *testing.T) {
	gate := make(chan struct{})
	l := newLab(t, func(c *Config) {
		c.Limits.Wakes = 1
		c.Wake = func(context.Context, string, Waker) error { <-gate; return errors.New("no") }
	})
	defer close(gate)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var busy atomic.Int32
	for i := range 8 {
		id := fmt.Sprintf("isame%d", i)
		l.sandbox(id, paused("k"))
		wg.Go(func() {
			req, _ := http.NewRequestWithContext(ctx, "GET", "https://80-"+id+"."+domain+"/", nil)
			if resp, err := l.client(true).Do(req); err == nil {
				resp.Body.Close()
				if resp.StatusCode == 429 {
					busy.Add(1)
				}
			}
		})
	}
	eventually(t, "those without a place are told", func() bool { return busy.Load() == 3 }) // one runs, four wait
}
