package ingress

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cordonhq/cordon/internal/auth"
)

// link is the token of a signed URL of the sandbox.
func link(t *Target, port int, expires time.Time) string {
	return auth.URLAccess{Sandbox: t.ID, Port: uint16(port), Link: "u1", Expires: expires}.Sign(t.LinkKey)
}

// linked makes a sandbox private, with the one link "u1".
func linked(t *Target) {
	t.Public, t.TrafficToken, t.LinkKey = false, "tok", "key"
	t.Link = func(id string) bool { return id == "u1" }
}

func TestALinkSaysWhyItDoesNotOpen(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, linked)
	port := a.serve(echo)
	now := time.Now()
	sign := func(link string, key string, expires time.Time) string {
		return auth.URLAccess{Sandbox: idA, Port: uint16(port), Link: link, Expires: expires}.Sign(key)
	}
	for _, tt := range []struct {
		name, token, message string
	}{
		{"one that expired a second ago", sign("u1", "key", now.Add(-time.Second)), "The link to this sandbox has expired"},
		{"one from before the epoch's first hour", sign("u1", "key", time.Unix(1, 0)), "The link to this sandbox has expired"},
		{"one that was revoked", sign("u2", "key", now.Add(time.Hour)), "The link to this sandbox was revoked"},
		{"one that was revoked and has expired", sign("u2", "key", now.Add(-time.Hour)), "The link to this sandbox has expired"},
		{"one that was never ours", sign("u1", "other", now.Add(-time.Hour)), "Provided token in header 'e2b-traffic-access-token' is invalid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := l.client(true)
			resp, body := get(t, c, "https://"+a.host(port)+"/", "e2b-traffic-access-token", tt.token)
			if resp.StatusCode != 403 || !strings.Contains(body, tt.message) {
				t.Errorf("header: got %d %s", resp.StatusCode, body)
			}
			if strings.Contains(tt.message, "header") {
				return // another place, another sentence
			}
			if resp, body := get(t, c, "https://"+a.host(port)+"/", "Cookie", tokenCookie+"="+tt.token); resp.StatusCode != 403 || !strings.Contains(body, tt.message) {
				t.Errorf("cookie: got %d %s", resp.StatusCode, body)
			}
			if resp, body := get(t, c, "https://"+a.host(port)+"/?cordon_token="+tt.token, "Sec-Fetch-Mode", "navigate"); resp.StatusCode != 403 || !strings.Contains(body, "<h1>This link ") || resp.Header.Get("Set-Cookie") != "" {
				t.Errorf("page: got %d %s", resp.StatusCode, body)
			}
		})
	}
}

func TestTheCookieOfALinkEndsWithIt(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, linked)
	port := a.serve(echo)
	token := link(a.t, port, time.Now().Add(90*time.Second))
	resp, _ := get(t, l.client(false), "https://"+a.host(port)+"/?cordon_token="+token, "Accept", "text/html")
	if resp.StatusCode != 302 || len(resp.Cookies()) != 1 {
		t.Fatalf("got %d with %v", resp.StatusCode, resp.Cookies())
	}
	c := resp.Cookies()[0]
	if c.Value != token || c.MaxAge < 1 || c.MaxAge > 90 || time.Until(c.Expires) > 90*time.Second {
		t.Errorf("cookie %v", c)
	}
	// Without TLS a browser would not keep the cookie, and on a shared host it would
	// be every sandbox's: the token counts for this one request.
	req, _ := http.NewRequest("GET", "http://"+l.http+"/?cordon_token="+token, nil)
	req.Host = a.host(port)
	if resp, _ := do(t, http.DefaultClient, req, "Accept", "text/html"); resp.StatusCode != 200 || resp.Header.Get("Set-Cookie") != "" {
		t.Errorf("without TLS: got %d, cookie %q", resp.StatusCode, resp.Header.Get("Set-Cookie"))
	}
	req, _ = http.NewRequest("GET", "https://localhost/?cordon_token="+token, nil)
	if resp, _ := do(t, l.client(false), req, "Accept", "text/html", "E2b-Sandbox-Id", idA, "E2b-Sandbox-Port", fmt.Sprint(port)); resp.StatusCode != 200 || resp.Header.Get("Set-Cookie") != "" {
		t.Errorf("on a shared host: got %d, cookie %q", resp.StatusCode, resp.Header.Get("Set-Cookie"))
	}
}

// A stranger's token leaves nothing in what the service gets, and takes nothing else
// of the query with it.
func TestTheRestOfTheQueryIsUntouched(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, linked)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RequestURI) }))
	token := link(a.t, port, time.Now().Add(time.Minute))
	for given, want := range map[string]string{
		"/a%2Fb?x;y=%zz&cordon_token=T&&=&z=+%20": "/a%2Fb?x;y=%zz&&=&z=+%20",
		"/?cordon_token=T":                        "/",
		"/?%63ordon_token=T&%":                    "/?%",
		"/?cordon_token=no&b&cordon_token=T":      "/?b",
		"/?a=cordon_token%3Dx&cordon_token=T":     "/?a=cordon_token%3Dx",
		"/?\xff\xfe=\x80&cordon_token=T":          "/?\xff\xfe=\x80",
	} {
		out := l.plain(t, "GET "+strings.ReplaceAll(given, "T", token)+" HTTP/1.1\r\nHost: "+a.host(port)+"\r\nConnection: close\r\n\r\n")
		if _, body, _ := strings.Cut(out, "\r\n\r\n"); body != want {
			t.Errorf("%q arrived as %q, want %q", given, body, want)
		}
	}
}

func TestOnlyListedSourcesComeIn(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("10.0.0.1/32")}
	})
	list := func(s ...string) func(*Target) {
		return func(t *Target) {
			t.AllowIn = []netip.Prefix{}
			for _, p := range s {
				t.AllowIn = append(t.AllowIn, netip.MustParsePrefix(p))
			}
		}
	}
	a := l.sandbox(idA)
	port := a.serve(echo)
	for _, tt := range []struct {
		name string
		list []string
		from string // X-Forwarded-For of the trusted proxy
		code int
	}{
		{"an address in the list", []string{"192.0.2.0/24"}, "192.0.2.7", 200},
		{"an address beside it", []string{"192.0.2.0/24"}, "192.0.3.7", 403},
		{"IPv6 in the list", []string{"2001:db8::/32"}, "2001:db8::1", 200},
		{"IPv6 beside it", []string{"2001:db8::/32"}, "2001:db9::1", 403},
		{"IPv4 in IPv6's clothes", []string{"192.0.2.0/24"}, "::ffff:192.0.2.7", 200},
		{"what the client says of itself does not count", []string{"192.0.2.0/24"}, "192.0.2.7, 198.51.100.1", 403},
		{"a chain of trusted proxies is followed", []string{"192.0.2.0/24"}, "192.0.2.7, 10.0.0.1", 200},
		{"with a port", []string{"192.0.2.0/24"}, "192.0.2.7:4711", 200},
		{"no address is in no list, not even in one of everything", []string{"0.0.0.0/0", "::/0"}, "unknown", 403},
		{"an obfuscated one neither", []string{"0.0.0.0/0"}, "_hidden", 403},
		{"the proxy itself, when it speaks for itself", []string{"127.0.0.0/8"}, "", 200},
		{"an empty list lets nobody in", nil, "192.0.2.7", 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a.change(list(tt.list...))
			header := []string{}
			if tt.from != "" {
				header = []string{"X-Forwarded-For", tt.from}
			}
			resp, body := get(t, l.client(true), "https://"+a.host(port)+"/", header...)
			if resp.StatusCode != tt.code || tt.code == 403 && !strings.Contains(body, "network.allowIn") {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, tt.code)
			}
		})
	}
	t.Run("the list comes before the token", func(t *testing.T) {
		a.change(linked)
		a.change(list("192.0.2.0/24"))
		if resp, body := get(t, l.client(false), "https://"+a.host(port)+"/", "e2b-traffic-access-token", "tok"); resp.StatusCode != 403 || !strings.Contains(body, "allowIn") {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	})
	t.Run("the agent's token opens the agent from anywhere, and none does not", func(t *testing.T) {
		agent := a.serve(echo)
		a.change(func(t *Target) { t.AgentPort, t.AccessToken = uint16(agent), "acc" })
		if resp, body := get(t, l.client(false), "https://"+a.host(agent)+"/x"); resp.StatusCode != 200 {
			t.Errorf("secured: got %d %s", resp.StatusCode, body)
		}
		a.change(func(t *Target) { t.AccessToken = "" })
		if resp, body := get(t, l.client(false), "https://"+a.host(agent)+"/x"); resp.StatusCode != 403 {
			t.Errorf("not secured: got %d %s", resp.StatusCode, body)
		}
	})
}

func TestSandboxesAreInNoList(t *testing.T) {
	inside := caller{addr: netip.MustParseAddr("10.223.0.6"), inside: true}
	for list, want := range map[string]bool{"10.0.0.0/8": false, "10.223.0.6/32": false, "0.0.0.0/0": true, "::/0": false} {
		target := &Target{AllowIn: []netip.Prefix{netip.MustParsePrefix(list)}}
		if got := target.allows(inside); got != want {
			t.Errorf("%s: got %v, want %v", list, got, want)
		}
	}
}

// Whoever would not be let in now is cut off: streams and WebSockets, over HTTP/1
// and HTTP/2, and also a client that does not read.
func TestWithdrawnAccessEndsWhatIsOpen(t *testing.T) {
	withdrawals := []struct {
		name string
		act  func(l *lab, s *sandbox)
	}{
		{"a revoked link", func(l *lab, s *sandbox) {
			s.change(func(t *Target) { t.Link = func(string) bool { return false } })
			l.in.Recheck(idA)
		}},
		{"a list that leaves the client out", func(l *lab, s *sandbox) {
			s.change(func(t *Target) { t.AllowIn = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} })
			l.in.Recheck(idA)
		}},
		{"the end of a link's time", func(*lab, *sandbox) {}},
	}
	for _, tt := range withdrawals {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			a := l.sandbox(idA, linked)
			stream := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Upgrade") != "" {
					c, err := websocket.Accept(w, r, nil)
					if err == nil {
						c.Write(r.Context(), websocket.MessageText, []byte("first"))
						c.Read(context.Background()) // until it is cut
						c.CloseNow()
					}
					return
				}
				io.WriteString(w, "first")
				http.NewResponseController(w).Flush()
				block := make([]byte, 64<<10)
				for r.URL.Path == "/flood" && r.Context().Err() == nil {
					if _, err := w.Write(block); err != nil {
						return
					}
				}
				<-r.Context().Done()
			}))
			life := time.Hour
			if strings.Contains(tt.name, "time") {
				life = 3 * time.Second
			}
			token := link(a.t, stream, time.Now().Add(life))
			ended := openAll(t, l, a.host(stream), token)
			tt.act(l, a)
			for name, done := range ended {
				select {
				case <-done:
				case <-time.After(10 * time.Second):
					t.Errorf("%s is still open", name)
				}
			}
			if in := l.in.InUse(idA); in {
				eventually(t, "the sandbox is left", func() bool { return !l.in.InUse(idA) })
			}
			resp, _ := get(t, l.client(true), "https://"+a.host(stream)+"/", "e2b-traffic-access-token", token)
			if resp.StatusCode != 403 {
				t.Errorf("afterwards: got %d", resp.StatusCode)
			}
		})
	}
}

// openAll opens one of each kind and returns, when all have got their first bytes,
// what tells that each has ended.
func openAll(t *testing.T, l *lab, host, token string) map[string]chan struct{} {
	t.Helper()
	ended := map[string]chan struct{}{}
	for _, h2 := range []bool{false, true} {
		for _, path := range []string{"/events", "/flood"} {
			name, done := fmt.Sprintf("%s h2=%v", path, h2), make(chan struct{})
			ended[name] = done
			req, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+host+path, nil)
			req.Header.Set("E2b-Traffic-Access-Token", token)
			resp, err := l.client(h2).Do(req)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			go func() {
				defer close(done)
				defer resp.Body.Close()
				if path == "/flood" { // it does not read for a while: everything is full
					time.Sleep(300 * time.Millisecond)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err == nil {
					t.Errorf("%s ended as if it were whole", name)
				}
			}()
		}
	}
	c, _, err := websocket.Dial(t.Context(), "wss://"+host+"/ws", &websocket.DialOptions{
		HTTPClient: l.client(false), HTTPHeader: http.Header{"Cookie": {tokenCookie + "=" + token}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Read(t.Context()); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	ended["websocket"] = done
	go func() {
		defer close(done)
		c.Read(context.Background())
		c.CloseNow()
	}()
	return ended
}

// FuzzTokens feeds what strangers send where tokens are expected.
func FuzzTokens(f *testing.F) {
	target := &Target{ID: idA}
	linked(target)
	good := link(target, 3000, time.Now().Add(time.Hour))
	f.Add("/?cordon_token="+good, "a=b; "+tokenCookie+"="+good+"; c", good)
	f.Add("/?a;b&cordon%5ftoken=tok&=%zz", tokenCookie+"=", "tok")
	f.Add("/?&&%", ";;=;", "")
	f.Fuzz(func(t *testing.T, uri, cookie, header string) {
		rest, found, _ := stripParam(uri)
		if again, still, _ := stripParam(rest); still || again != rest {
			t.Fatalf("%q leaves a token in %q", uri, rest)
		}
		if !found && rest != uri {
			t.Fatalf("%q without a token became %q", uri, rest)
		}
		h := http.Header{"Cookie": {cookie}}
		left, had := stripCookie(h)
		if again, still := stripCookie(http.Header{"Cookie": {left}}); still || again != left {
			t.Fatalf("%q leaves a token in %q", cookie, left)
		}
		if len(cookiesNamed(h, tokenCookie)) > 0 && !had {
			t.Fatalf("%q has a token that is not stripped", cookie)
		}
		if k, bad := target.shown(3000, header, time.Now()); bad == genuine && header != "tok" && k.link != "u1" {
			t.Fatalf("%q opens as %+v", header, k)
		}
	})
}

// FuzzForwardedFor: whatever a proxy passes on, the address is one that could have
// been written there, and never one the client put before a trusted one's word.
func FuzzForwardedFor(f *testing.F) {
	in := &Ingress{sources: &sources{trusted: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	for _, s := range []string{"", "192.0.2.1", "1.2.3.4, 10.0.0.2", "::ffff:192.0.2.1", "[2001:db8::1]:80", "fe80::1%eth0", ",", "unknown, 10.1.1.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v := &visit{in: in, r: &http.Request{Header: http.Header{"X-Forwarded-For": {s}}}, info: &connInfo{addr: netip.MustParseAddr("10.0.0.1"), trusted: true}}
		c := v.caller()
		if c.addr.Is4In6() || c.addr.Zone() != "" || c.inside {
			t.Fatalf("%q became %+v", s, c)
		}
		v.r.Header.Set("X-Forwarded-For", s+", 198.51.100.9")
		if last := v.caller(); last.addr != netip.MustParseAddr("198.51.100.9") {
			t.Fatalf("%q before it changed the last hop to %v", s, last.addr)
		}
	})
}
