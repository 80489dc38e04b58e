package ingress

import (
	"context"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
)

// A preflight carries no credentials by its standard: it is answered without any, and
// the request behind it is not.
func TestAPreflightNeedsNoToken(t *testing.T) {
	var woken atomic.Int32
	l := newLab(t, func(c *Config) {
		c.Wake = func(context.Context, string, Waker) error { woken.Add(1); return nil }
	})
	a := l.sandbox(idA, linked, func(x *Target) { x.AutoResume = true })
	var reached atomic.Int32
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		io.WriteString(w, r.Method)
	}))
	own := "https://" + a.host(port) + "/"
	ask := func(t *testing.T, c *http.Client, method, url string, header ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequest(method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		return do(t, c, req, header...)
	}
	const app = "https://app.example"
	preflight := []string{"Origin", app, "Access-Control-Request-Method", "PUT", "Access-Control-Request-Headers", "content-type,e2b-traffic-access-token"}
	for _, state := range []State{Running, Paused} {
		a.change(func(x *Target) { x.State = state })
		l.both(t, func(t *testing.T, c *http.Client) {
			resp, _ := ask(t, c, "OPTIONS", own, preflight...)
			h := resp.Header
			if resp.StatusCode != 204 || h.Get("Access-Control-Allow-Origin") != "*" || h.Get("Access-Control-Allow-Methods") != "PUT" ||
				!strings.Contains(h.Get("Access-Control-Allow-Headers"), "e2b-traffic-access-token") || h.Get("Access-Control-Allow-Credentials") != "" {
				t.Errorf("got %d %v", resp.StatusCode, h)
			}
			if resp, _ := ask(t, c, "OPTIONS", own+"?cordon_token=wrong", preflight...); resp.StatusCode != 204 {
				t.Errorf("with a token that is wrong: got %d", resp.StatusCode)
			}
			if resp, _ := ask(t, c, "OPTIONS", "https://"+a.host(1)+"/", preflight...); resp.StatusCode != 204 {
				t.Errorf("a port where nothing listens is told apart: got %d", resp.StatusCode)
			}
			page := "https://" + a.host(8080)
			resp, _ = ask(t, c, "OPTIONS", own, "Origin", page, "Access-Control-Request-Method", "PUT")
			if h := resp.Header; resp.StatusCode != 204 || h.Get("Access-Control-Allow-Origin") != page || h.Get("Access-Control-Allow-Credentials") != "true" {
				t.Errorf("a page of its own: got %d %v", resp.StatusCode, h)
			}
			for name, header := range map[string][]string{
				"without an origin": {"Access-Control-Request-Method", "PUT"}, "without a method": {"Origin", app},
				"with a method that is none": {"Origin", app, "Access-Control-Request-Method", "P T"},
				"with two methods":           {"Origin", app, "Access-Control-Request-Method", "PUT", "Access-Control-Request-Method", "PUT"},
			} {
				if resp, _ := ask(t, c, "OPTIONS", own, header...); resp.StatusCode != 403 {
					t.Errorf("%s: got %d", name, resp.StatusCode)
				}
			}
			req, _ := http.NewRequest("OPTIONS", own, strings.NewReader("x"))
			if resp, _ := do(t, c, req, preflight...); resp.StatusCode != 403 {
				t.Errorf("with a body: got %d", resp.StatusCode)
			}
			if resp, _ := ask(t, c, "PUT", own, "Origin", app); resp.StatusCode != 403 || resp.Header.Get("Access-Control-Allow-Origin") != "*" {
				t.Errorf("the request behind it: got %d", resp.StatusCode)
			}
		})
	}
	if woken.Load() != 0 || reached.Load() != 0 {
		t.Errorf("woken %d times, the service was reached %d times", woken.Load(), reached.Load())
	}
	t.Run("a paused one stays paused even with a token in the URL", func(t *testing.T) {
		if resp, _ := ask(t, l.client(false), "OPTIONS", own+"?cordon_token=tok", preflight...); resp.StatusCode != 204 || woken.Load() != 0 {
			t.Errorf("got %d, woken %d times", resp.StatusCode, woken.Load())
		}
	})
	t.Run("the agent of a paused one", func(t *testing.T) {
		a.change(func(x *Target) { x.AgentPort, x.AccessToken = uint16(port), "acc" })
		if resp, _ := ask(t, l.client(false), "OPTIONS", own+"files", preflight...); resp.StatusCode != 204 || woken.Load() != 0 {
			t.Errorf("got %d, woken %d times", resp.StatusCode, woken.Load())
		}
		if resp, _ := ask(t, l.client(false), "OPTIONS", own+"init", preflight...); resp.StatusCode != 404 {
			t.Errorf("a control route: got %d", resp.StatusCode)
		}
		a.change(func(x *Target) { x.AgentPort = 0 })
	})
	t.Run("a token in the URL leads to the service, whose word counts", func(t *testing.T) {
		a.change(func(x *Target) { x.State = Running })
		if resp, body := ask(t, l.client(false), "OPTIONS", own+"?cordon_token=tok", preflight...); resp.StatusCode != 200 || body != "OPTIONS" {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	})
	t.Run("who is in no list is not answered", func(t *testing.T) {
		a.change(func(x *Target) { x.AllowIn = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} })
		if resp, _ := ask(t, l.client(false), "OPTIONS", own, preflight...); resp.StatusCode != 403 {
			t.Errorf("got %d", resp.StatusCode)
		}
	})
}
