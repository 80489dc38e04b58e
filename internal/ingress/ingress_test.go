package ingress

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/internal/auth"
)

func TestRefusalsAreExact(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.ConnsPerSandbox = 1 })
	a := l.sandbox(idA)
	l.sandbox(idB, func(s *Target) { s.Public = false; s.TrafficToken = "tok" })
	hold, holding := make(chan struct{}), make(chan struct{})
	full := a.serve(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { close(holding); <-hold }))
	release := sync.OnceFunc(func() { close(hold) })
	defer release()
	secured := "Sandbox is secured with traffic access token. "
	for _, tt := range []struct {
		name   string
		host   string
		header []string
		code   int
		body   string
		title  string
	}{
		{"an unknown sandbox is a 502", "3000-izzzzzzzzzzzzzzzzzzzz." + domain, nil, 502,
			`{"sandboxId":"izzzzzzzzzzzzzzzzzzzz","message":"The sandbox was not found","code":502}`, "Sandbox not found"},
		{"a port nobody listens on is a 502 with the port", "1-" + idA + "." + domain, nil, 502,
			`{"sandboxId":"` + idA + `","message":"The sandbox is running but port is not open","port":1,"code":502}`, "Nothing answers on port 1"},
		{"a private sandbox without a token is a 403", "3000-" + idB + "." + domain, nil, 403,
			`{"sandboxId":"` + idB + `","message":"` + secured + `Token header 'e2b-traffic-access-token' is missing","code":403}`, "This sandbox is private"},
		{"a private sandbox with a wrong token is a 403", "3000-" + idB + "." + domain, []string{"e2b-traffic-access-token", "no"}, 403,
			`{"sandboxId":"` + idB + `","message":"` + secured + `Provided token in header 'e2b-traffic-access-token' is invalid","code":403}`, "This sandbox is private"},
		{"a bad port is a 400", "99999-" + idA + "." + domain, nil, 400,
			`{"message":"Port \"99999\" in the host is not valid: use a number from 1 to 65535 without leading zeros.","code":400}`, "This address is not valid"},
		{"too many connections are a 429 with the limit", fmt.Sprintf("%d-%s.%s", full, idA, domain), nil, 429,
			`{"sandboxId":"` + idA + `","message":"The sandbox has too many open connections","limit":1,"code":429}`, "Too many connections"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.code == 429 {
				var holder sync.WaitGroup
				c := l.client(false)
				holder.Go(func() {
					if resp, err := c.Get("https://" + tt.host + "/"); err == nil {
						resp.Body.Close()
					}
				})
				<-holding
				defer holder.Wait()
				defer release()
			}
			l.both(t, func(t *testing.T, c *http.Client) {
				resp, body := get(t, c, "https://"+tt.host+"/", tt.header...)
				took := time.Hour
				for range 3 { // a busy machine is no fault of ours
					start := time.Now()
					get(t, c, "https://"+tt.host+"/", tt.header...)
					took = min(took, time.Since(start))
				}
				if took > 100*time.Millisecond {
					t.Errorf("took %v", took)
				}
				if resp.StatusCode != tt.code || body != tt.body || resp.Header.Get("Content-Type") != "application/json" {
					t.Errorf("got %d %s %s\nwant %d %s", resp.StatusCode, resp.Header.Get("Content-Type"), body, tt.code, tt.body)
				}
				for _, browser := range [][]string{{"Accept", "text/html,*/*"}, {"Sec-Fetch-Mode", "navigate", "Accept", "*/*"}} {
					resp, body = get(t, c, "https://"+tt.host+"/", append(browser, tt.header...)...)
					if resp.StatusCode != tt.code || !strings.Contains(body, "<h1>"+tt.title+"</h1>") || !strings.Contains(resp.Header.Get("Content-Security-Policy"), "default-src 'none'") {
						t.Errorf("page: got %d %s", resp.StatusCode, body)
					}
				}
				resp, _ = get(t, c, "https://"+tt.host+"/", append([]string{"Sec-Fetch-Mode", "cors", "Accept", "text/html"}, tt.header...)...)
				if resp.Header.Get("Content-Type") != "application/json" {
					t.Error("fetch from a page got HTML")
				}
			})
		})
	}
}

func TestRoutes(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.BySignature = func(r *http.Request) (string, bool) { return idB, r.URL.Query().Get("signature") == "sig" }
	})
	a, b := l.sandbox(idA), l.sandbox(idB)
	name := func(s string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) })
	}
	pa, pb := a.serve(name("A")), b.serve(name("B"))
	agent := b.serve(name("agent B"))
	b.change(func(t *Target) { t.AgentPort = uint16(agent) })
	port := fmt.Sprint
	for _, tt := range []struct {
		name   string
		host   string
		path   string
		header []string
		tls    string // body, or "400"
		plain  string
	}{
		{"the host names the sandbox", a.host(pa), "/", nil, "A", "A"},
		{"case, trailing dot, port and legacy suffix do not matter", strings.ToUpper(fmt.Sprintf("%d-%s-client", pa, idA)) + ".CORDON.localhost.:8443", "/", nil, "A", "A"},
		{"routing headers are ignored on a sandbox's host", a.host(pa), "/", []string{"E2b-Sandbox-Id", idB, "E2b-Sandbox-Port", port(pb)}, "A", "A"},
		{"routing headers count on localhost", "localhost:3000", "/", []string{"E2b-Sandbox-Id", idB, "E2b-Sandbox-Port", port(pb)}, "B", "B"},
		{"both families of them", "localhost", "/", []string{"Novita-Sandbox-Id", idB + "-x", "Novita-Sandbox-Port", port(pb)}, "B", "B"},
		{"on IPv4", "127.0.0.1:9", "/", []string{"Novita-Sandbox-Id", idB, "Novita-Sandbox-Port", port(pb)}, "B", "B"},
		{"on IPv6", "[::1]:9", "/", []string{"Novita-Sandbox-Id", idB, "Novita-Sandbox-Port", port(pb)}, "B", "B"},
		{"on the shared host", "sandbox." + domain, "/", []string{"Novita-Sandbox-Id", idB, "Novita-Sandbox-Port", port(pb)}, "B", "B"},
		{"an API call with an SDK's stray routing headers", "localhost", "/v2/sandboxes/x/connect", []string{"Novita-Sandbox-Id", idB, "Novita-Sandbox-Port", "49983"}, "api /v2/sandboxes/x/connect", "api /v2/sandboxes/x/connect"},
		{"two sandboxes in them are refused", "localhost", "/", []string{"Novita-Sandbox-Id", idB, "Novita-Sandbox-Port", port(pb), "E2b-Sandbox-Id", idA, "E2b-Sandbox-Port", port(pa)}, "400", "400"},
		{"twice the same header is refused", "localhost", "/", []string{"E2b-Sandbox-Id", idB, "E2b-Sandbox-Id", idA, "E2b-Sandbox-Port", port(pa)}, "400", "400"},
		{"a path in the header is refused", "localhost", "/", []string{"E2b-Sandbox-Id", "../" + idB, "E2b-Sandbox-Port", port(pa)}, "400", "400"},
		{"a header without a port is refused", "localhost", "/", []string{"E2b-Sandbox-Id", idB}, "400", "400"},
		{"they are ignored on the API's host", "api." + domain, "/x", []string{"E2b-Sandbox-Id", idB, "E2b-Sandbox-Port", port(pb)}, "api /x", "api /x"},
		{"and on a foreign host", "evil.example", "/x", []string{"E2b-Sandbox-Id", idB, "E2b-Sandbox-Port", port(pb)}, "400", "api /x"},
		{"the API has its host", "api." + domain, "/health", nil, "api /health", "api /health"},
		{"and the domain itself", domain, "/health", nil, "api /health", "api /health"},
		{"and shared hosts without routing headers", "localhost", "/health", nil, "api /health", "api /health"},
		{"a sandbox of another domain is refused everywhere", fmt.Sprintf("%d-%s.evil.example", pa, idA), "/", nil, "400", "400"},
		{"a name that only ends like ours is foreign", "3000-" + idA + ".evil" + domain, "/", nil, "400", "400"},
		{"a label before the sandbox is refused", "x." + a.host(pa), "/", nil, "400", "400"},
		{"a port with a leading zero is refused", "0" + a.host(pa), "/", nil, "400", "400"},
		{"port 0 is refused", "0-" + idA + "." + domain, "/", nil, "400", "400"},
		{"a port that overflows is refused", "65616-" + idA + "." + domain, "/", nil, "400", "400"},
		{"a label that is no sandbox is refused", "www." + domain, "/", nil, "400", "400"},
		{"a signed file URL finds its sandbox", "127.0.0.1:3000", "/files?path=x&signature=sig", nil, "agent B", "agent B"},
		{"one with a wrong signature is the API's", "127.0.0.1:3000", "/files?path=x&signature=no", nil, "api /files", "api /files"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := func(c *http.Client, base, want string) {
				t.Helper()
				req, _ := http.NewRequest("GET", base+tt.path, nil)
				req.Host = tt.host
				resp, body := do(t, c, req, tt.header...)
				if got := body; want == "400" {
					var e struct{ Code int }
					if json.Unmarshal([]byte(body), &e); resp.StatusCode != 400 || e.Code != 400 {
						t.Errorf("%s: got %d %s, want 400", base, resp.StatusCode, body)
					}
				} else if got != want {
					t.Errorf("%s: got %d %q, want %q", base, resp.StatusCode, got, want)
				}
			}
			check(l.client(false), "https://localhost", tt.tls)
			check(l.client(true), "https://localhost", tt.tls)
			check(http.DefaultClient, "http://"+l.http, tt.plain)
		})
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestServiceSeesRequestAsItWas(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(t *Target) { t.Public = false; t.TrafficToken = "tok" })
	port := a.serve(echo)
	host := a.host(port) + ":8443"
	l.both(t, func(t *testing.T, c *http.Client) {
		_, body := get(t, c, "https://"+host+"/a;b/%2F%2e/x?q=a;b&r=%zz&cordon_token=tok&r=+%20", "X-Twice", "1", "X-Twice", "2",
			"X-Forwarded-For", "6.6.6.6", "X-Forwarded-Proto", "gopher", "X-Forwarded-Host", "evil", "Forwarded", "for=6.6.6.6", "X_Forwarded_For", "6.6.6.6", "X.Forwarded.For", "6.6.6.6", "e2b.Traffic_access!token", "tok",
			"X-Real-Ip", "6.6.6.6", "Cookie", "a=1; __Host-cordon-token=zzz; b=2", "E2b-Traffic-Access-Token", "tok",
			"Proxy-Authorization", "x", "Te", "trailers")
		got := map[string]bool{}
		for line := range strings.SplitSeq(strings.TrimSpace(body), "\n") {
			got[line] = true
		}
		want := map[string]bool{}
		for _, line := range []string{"GET /a;b/%2F%2e/x?q=a;b&r=%zz&r=+%20", "host=" + host, "x-twice=1", "x-twice=2", "x-forwarded-for=127.0.0.1",
			"x-forwarded-proto=https", "cookie=a=1; b=2", "te=trailers", "user-agent=Go-http-client/" + map[bool]string{true: "1.1", false: "2.0"}[c.Transport.(*http.Transport).Protocols.HTTP1()], "body=0"} {
			want[line] = true
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
	})
}

func TestMask(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(t *Target) { t.MaskHost = "localhost:${PORT}-${PORT}" })
	port := a.serve(echo)
	agent := a.serve(echo)
	a.change(func(t *Target) { t.AgentPort = uint16(agent) })
	c := l.client(true)
	_, body := get(t, c, "https://"+a.host(port)+"/")
	if want := fmt.Sprintf("host=localhost:%d-%d\n", port, port); !strings.Contains(body, want) || !strings.Contains(body, "x-forwarded-host="+a.host(port)+"\n") {
		t.Errorf("got %s, want %s", body, want)
	}
	if _, body = get(t, c, "https://"+a.host(agent)+"/"); !strings.Contains(body, "host="+a.host(agent)+"\n") || strings.Contains(body, "x-forwarded-host") {
		t.Errorf("the agent's port is masked: %s", body)
	}
	a.change(func(t *Target) { t.MaskHost = "x\r\nevil: 1" })
	if resp, body := get(t, c, "https://"+a.host(port)+"/"); resp.StatusCode != 502 {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

func TestTrustedProxy(t *testing.T) {
	l := newLab(t, func(c *Config) { c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	a := l.sandbox(idA)
	port := a.serve(echo)
	out := l.plain(t, "GET / HTTP/1.1\r\nHost: "+a.host(port)+"\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\nConnection: close\r\n\r\n")
	if !strings.Contains(out, "x-forwarded-for=192.0.2.7, 127.0.0.1\n") || !strings.Contains(out, "x-forwarded-proto=https\n") {
		t.Error(out)
	}
}

func TestSandboxesReachOnlyTheNameTheyShow(t *testing.T) {
	outside := netip.MustParseAddr("127.0.0.1")
	l := newLab(t, func(c *Config) {
		c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} // it does not cover sandboxes
		c.Inside = func(a netip.Addr) (netip.Addr, bool) { return netip.MustParseAddr("10.223.0.2"), a != outside }
	})
	a, b := l.sandbox(idA), l.sandbox(idB)
	pa, pb := a.serve(echo), b.serve(echo)
	l.both(t, func(t *testing.T, c *http.Client) {
		c.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 223, 0, 2)}}
			return d.DialContext(ctx, network, l.https)
		}
		resp, body := get(t, c, "https://"+a.host(pa)+"/", "X-Forwarded-For", "192.0.2.7")
		if resp.StatusCode != 200 || !strings.Contains(body, "x-forwarded-for=10.223.0.2\n") {
			t.Errorf("the host shown: %d %s", resp.StatusCode, body)
		}
		for _, other := range []string{b.host(pb), a.host(pb), "api." + domain, domain, "sandbox." + domain, "localhost", "127.0.0.1"} {
			req, err := http.NewRequest("GET", "https://"+a.host(pa)+"/health", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = other
			resp, body := do(t, c, req, "E2b-Sandbox-Id", idB, "E2b-Sandbox-Port", strconv.Itoa(pb))
			if resp.StatusCode != http.StatusMisdirectedRequest {
				t.Errorf("%s over a connection for %s: %d %s", other, a.host(pa), resp.StatusCode, body)
			}
		}
	})
	// Others may bring many hosts over one connection, as browsers do.
	req, err := http.NewRequest("GET", "https://"+a.host(pa)+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = b.host(pb)
	if resp, body := do(t, l.client(true), req); resp.StatusCode != 200 {
		t.Errorf("a client outside: %d %s", resp.StatusCode, body)
	}
}

func TestAgentPort(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, func(t *Target) { t.Public = false; t.TrafficToken = "tok" })
	agent := a.serve(echo)
	a.change(func(t *Target) { t.AgentPort = uint16(agent) })
	c := l.client(false)
	if resp, body := get(t, c, "https://"+a.host(agent)+"/health", "X-Access-Token", "acc"); resp.StatusCode != 200 || !strings.Contains(body, "x-access-token=acc") {
		t.Errorf("agent without traffic token: %d %s", resp.StatusCode, body)
	}
	for _, path := range []string{
		"/init", "/INIT", "/init/", "//init", "/./init", "/x/../init", "/%69nit", "/%2569nit", "/%2e%2e/init", "/x%2f..%2finit", `/x\..\init`, "/init;x", "/init?x",
		"/%20init", "/init%00", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade", "/cordon/dial", "/cordon", "/Cordon/x/y", "/%25252569nit",
	} {
		out := l.plain(t, "POST "+path+" HTTP/1.1\r\nHost: "+a.host(agent)+"\r\nConnection: close\r\n\r\n")
		if !strings.HasPrefix(out, "HTTP/1.1 404") {
			t.Errorf("%s: %s", path, out)
		}
	}
	for _, path := range []string{"/health", "/files?path=/init", "/process.Process/Start", "/initialize", "/filesystem.Filesystem/Stat"} {
		out := l.plain(t, "GET "+path+" HTTP/1.1\r\nHost: "+a.host(agent)+"\r\nConnection: close\r\n\r\n")
		if !strings.HasPrefix(out, "HTTP/1.1 200") {
			t.Errorf("%s: %s", path, out)
		}
	}
}

func TestTokens(t *testing.T) {
	l := newLab(t)
	a, b := l.sandbox(idA, secured("tokA")), l.sandbox(idB, secured("tokB"))
	pa, pb := a.serve(echo), b.serve(echo)
	pa2 := a.serve(echo)
	soon, past := time.Now().Add(time.Minute), time.Now().Add(-time.Minute)
	signed := link(a.t, pa, soon)
	c := l.client(true)
	param := func(tok string) string { return "/?cordon_token=" + tok }
	for _, tt := range []struct {
		name   string
		host   string
		path   string
		header []string
		code   int
	}{
		{"the header opens", a.host(pa), "/", []string{"e2b-traffic-access-token", "tokA"}, 200},
		{"another sandbox's does not", b.host(pb), "/", []string{"e2b-traffic-access-token", "tokA"}, 403},
		{"nor an empty one", a.host(pa), "/", []string{"e2b-traffic-access-token", ""}, 403},
		{"nor two", a.host(pa), "/", []string{"e2b-traffic-access-token", "tokA", "e2b-traffic-access-token", "tokA"}, 403},
		{"a wrong header is not made good by a parameter", a.host(pa), param("tokA"), []string{"e2b-traffic-access-token", "x"}, 403},
		{"the parameter opens for a program", a.host(pa), param("tokA"), nil, 200},
		{"a signed one too", a.host(pa), param(signed), nil, 200},
		{"not on another port", a.host(pa2), param(signed), nil, 403},
		{"not on another sandbox", b.host(pb), param(signed), nil, 403},
		{"not when it has expired", a.host(pa), param(link(a.t, pa, past)), nil, 403},
		{"not with another expiry", a.host(pa), param(strings.Replace(signed, "c1.", "c1.9", 1)), nil, 403},
		{"not cut short", a.host(pa), param(signed[:len(signed)-1]), nil, 403},
		{"it opens as a header too", a.host(pa), "/", []string{"e2b-traffic-access-token", signed}, 200},
		{"not one that was revoked", a.host(pa), param(auth.URLAccess{Sandbox: idA, Port: uint16(pa), Link: "u2", Expires: soon}.Sign(a.t.LinkKey)), nil, 403},
		{"not one without a link, signed with the links' key", a.host(pa), param(auth.URLAccess{Sandbox: idA, Port: uint16(pa), Expires: soon}.Sign(a.t.LinkKey)), nil, 403},
		{"not one with a link, signed with the traffic token", a.host(pa), param(auth.URLAccess{Sandbox: idA, Port: uint16(pa), Link: "u1", Expires: soon}.Sign("tokA")), nil, 403},
		{"a cookie opens", a.host(pa), "/", []string{"Cookie", "x=1; " + tokenCookie + "=" + signed}, 200},
		{"not on another port", a.host(pa2), "/", []string{"Cookie", tokenCookie + "=" + signed}, 403},
		{"not with the token itself", a.host(pa), "/", []string{"Cookie", tokenCookie + "=tokA"}, 403},
		{"an upgrade without a token does not pass", a.host(pa), "/", nil, 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, body := get(t, c, "https://"+tt.host+tt.path, tt.header...)
			if resp.StatusCode != tt.code {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, tt.code)
			}
			if strings.Contains(body, "tokA") && tt.code == 200 || strings.Contains(body, signed) || strings.Contains(body, "cordon") && strings.Contains(body, "token=") {
				t.Errorf("the service sees the token: %s", body)
			}
		})
	}
}

// secured is a sandbox that wants tok to be shown, with a signed URL "u1" in force.
func secured(tok string) func(*Target) {
	return func(t *Target) {
		t.Public, t.TrafficToken, t.LinkKey = false, tok, "key of "+tok
		t.Link = func(id string) bool { return id == "u1" }
	}
}

func TestTokenBecomesACookie(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, secured("tokA"))
	pa, c := a.serve(echo), l.client(true)
	t.Run("a browser gets a cookie that works, until the key changes", func(t *testing.T) {
		resp, _ := get(t, c, "https://"+a.host(pa)+"//x/?a=%2F&cordon%5Ftoken=tokA&b", "Sec-Fetch-Mode", "navigate")
		if got, want := resp.Header.Get("Location"), "https://"+a.host(pa)+"//x/?a=%2F&b"; resp.StatusCode != 302 || got != want {
			t.Fatalf("got %d to %q, want %q", resp.StatusCode, got, want)
		}
		set := resp.Header.Get("Set-Cookie")
		for _, attr := range []string{"__Host-cordon-token=c1.", "Path=/", "Secure", "HttpOnly", "SameSite=None", "Partitioned", "Max-Age=43"} {
			if !strings.Contains(set, attr) {
				t.Errorf("cookie %q lacks %s", set, attr)
			}
		}
		if strings.Contains(set, "Domain") || strings.Contains(set, "tokA") {
			t.Errorf("cookie %q", set)
		}
		cookie := resp.Cookies()[0]
		if resp, body := get(t, c, resp.Header.Get("Location"), "Cookie", cookie.Name+"="+cookie.Value); resp.StatusCode != 200 || strings.Contains(body, cookie.Value) {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
		a.change(func(t *Target) { t.TrafficToken = "new" })
		if resp, _ := get(t, c, "https://"+a.host(pa)+"/", "Cookie", cookie.Name+"="+cookie.Value); resp.StatusCode != 403 {
			t.Errorf("revoked cookie: got %d", resp.StatusCode)
		}
	})
	t.Run("a private sandbox without any token opens for nobody", func(t *testing.T) {
		a.change(func(t *Target) { t.TrafficToken, t.LinkKey = "", "" })
		for _, h := range [][]string{{"e2b-traffic-access-token", ""}, {"Cookie", tokenCookie + "="}, nil} {
			if resp, _ := get(t, c, "https://"+a.host(pa)+"/?cordon_token=", h...); resp.StatusCode != 403 {
				t.Errorf("%v: got %d", h, resp.StatusCode)
			}
		}
	})
}

func TestCookiesStayOnTheirHost(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for _, c := range []string{"a=1; Domain=.cordon.localhost; Path=/", "b=2; path=/; DOMAIN = cordon.localhost", "c=3; Secure", "d=4; Domain=" + a.host(80), tokenCookie + "=evil; Secure"} {
			w.Header().Add("Set-Cookie", c)
		}
	}))
	resp, _ := get(t, l.client(true), "https://"+a.host(port)+"/")
	want := []string{"a=1; Path=/", "b=2; path=/", "c=3; Secure", "d=4"}
	if d := cmp.Diff(want, resp.Header["Set-Cookie"]); d != "" {
		t.Error(d)
	}
}

func TestLoopbackServices(t *testing.T) {
	l := newLab(t)
	inside := listen(t, "127.0.0.1:0") // stands for the sandbox's own loopback
	var dials atomic.Int32
	a := l.sandbox(idA, func(t *Target) {
		t.AgentPort = 1 // nobody listens
		t.DialLoopback = func(ctx context.Context, port uint16) (net.Conn, error) {
			dials.Add(1)
			if port != 8000 {
				return nil, errors.New("refused")
			}
			var d net.Dialer
			return d.DialContext(ctx, "tcp", inside.Addr().String())
		}
	})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		io.WriteString(w, "inside")
	})}
	go srv.Serve(inside)
	defer srv.Close()
	c := l.client(true)
	for range 3 {
		if _, body := get(t, c, "https://"+a.host(8000)+"/"); body != "inside" {
			t.Errorf("got %s", body)
		}
	}
	if n := dials.Load(); n != 3 {
		t.Errorf("dialled %d times", n)
	}
	took := time.Hour
	for range 5 { // a busy machine is no fault of ours
		start := time.Now()
		if resp, _ := get(t, c, "https://"+a.host(8001)+"/"); resp.StatusCode != 502 {
			t.Errorf("closed port: %d", resp.StatusCode)
		}
		took = min(took, time.Since(start))
	}
	if took > 100*time.Millisecond {
		t.Errorf("closed port: after %v", took)
	}
	before := dials.Load()
	if resp, _ := get(t, c, "https://"+a.host(1)+"/"); resp.StatusCode != 502 || dials.Load() != before {
		t.Error("the agent's port was dialled through the agent")
	}
}

func TestRedirectAndHSTS(t *testing.T) {
	l := newLab(t, func(c *Config) { c.HTTPSPort, c.HSTS = 8443, time.Hour })
	a := l.sandbox(idA)
	port := a.serve(echo)
	for host, want := range map[string]string{
		a.host(port) + ":80": "https://" + a.host(port) + ":8443//x?y=%2F", "api." + domain: "https://api." + domain + ":8443//x?y=%2F",
		"evil.example": "", "[::1]": "https://[::1]:8443//x?y=%2F",
	} {
		req, _ := http.NewRequest("POST", "http://"+l.redirect+"//x?y=%2F", nil)
		req.Host = host
		resp, _ := do(t, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, req)
		code := map[bool]int{true: 308, false: 400}[want != ""]
		if resp.StatusCode != code || resp.Header.Get("Location") != want {
			t.Errorf("%s: got %d %s, want %d %s", host, resp.StatusCode, resp.Header.Get("Location"), code, want)
		}
	}
	for _, host := range []string{a.host(port), a.host(1), "api." + domain} {
		if resp, _ := get(t, l.client(true), "https://"+host+"/"); resp.Header.Get("Strict-Transport-Security") != "max-age=3600" {
			t.Errorf("%s: %q", host, resp.Header.Get("Strict-Transport-Security"))
		}
	}
}

func TestConnectionsPerSource(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.ConnsPerSource = 2 })
	request := func(c net.Conn, err error) error {
		if err != nil {
			return err // the reset was faster than connect
		}
		defer t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
		_, err = c.Read(make([]byte, 1))
		return err
	}
	one := l.dialPlain(t)
	if err := errors.Join(request(one, nil), request(net.Dial("tcp", l.http))); err != nil {
		t.Fatal(err)
	}
	if err := request(net.Dial("tcp", l.http)); err == nil {
		t.Fatal("a third connection was served")
	}
	one.Close()
	deadline := time.Now().Add(5 * time.Second)
	for request(net.Dial("tcp", l.http)) != nil {
		if time.Now().After(deadline) {
			t.Fatal("a closed connection still counts")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A connection that is taken over counts until its tunnel ends, also when that never
// begins because the client is gone by then.
func TestATunnelThatNeverBeginsDoesNotCount(t *testing.T) {
	l := newLab(t)
	asked, gone := make(chan struct{}), make(chan struct{})
	port := l.sandbox(idA).raw(func(c net.Conn, br *bufio.Reader) {
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		close(asked)
		<-gone
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n")
		io.Copy(io.Discard, br)
	})
	c := l.dialPlain(t)
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %d-%s.%s\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n", port, idA, domain)
	<-asked
	// What comes early keeps the server from noticing, for a while, that the client goes.
	time.Sleep(50 * time.Millisecond)
	io.WriteString(c, "early")
	time.Sleep(50 * time.Millisecond)
	c.SetLinger(0)
	c.Close()
	time.Sleep(50 * time.Millisecond)
	close(gone)
	eventually(t, "the connection is not counted any more", func() bool { return l.in.sources.open() == 0 })
}

func TestMetricsAreBounded(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var code int
		fmt.Sscanf(r.URL.Path, "/%d", &code)
		w.WriteHeader(code)
	}))
	c := l.client(true)
	for code := 200; code < 999; code += 13 {
		get(t, c, fmt.Sprintf("https://%s/%d", a.host(port), code))
	}
	families, err := l.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	other := 0.0
	for _, f := range families {
		if len(f.GetMetric()) > 70 {
			t.Errorf("%s has %d series", f.GetName(), len(f.GetMetric()))
		}
		for _, m := range f.GetMetric() {
			if len(m.GetLabel()) > 0 && m.GetLabel()[0].GetValue() == "other" {
				other = m.GetCounter().GetValue()
			}
		}
	}
	if other == 0 {
		t.Error("unknown codes are not counted")
	}
}
