package ingress

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"
)

// What a service says of itself by a name that means the user's own machine is of
// use to a client only as the URL that the client used.
func TestAServiceThatNamesItselfLeadsToItsPublicURL(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.Custom = func(host string) (string, uint16, bool) { return idA, 4000, host == "app.example" }
	})
	a := l.sandbox(idA)
	answer := func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"Location", "Content-Location", "Refresh"} {
			if v := r.Header.Get("Want-" + name); v != "" {
				w.Header().Set(name, v)
			}
		}
		w.WriteHeader(http.StatusFound)
	}
	port := a.serve(http.HandlerFunc(answer))
	own := "https://" + a.host(port)
	here := fmt.Sprint("localhost:", port)
	for _, tt := range []struct{ name, mask, field, sent, want string }{
		{"the name it is bound to", "", "Location", "http://" + here + "/a?b#c", own + "/a?b#c"},
		{"with the scheme it was told of", "", "Location", "https://" + here + "/a", own + "/a"},
		{"its address", "", "Location", fmt.Sprintf("http://127.0.0.1:%d/", port), own + "/"},
		{"no path", "", "Location", "http://" + here, own},
		{"a query at once", "", "Location", "http://" + here + "?x", own + "?x"},
		{"in capitals", "", "Location", strings.ToUpper("http://" + here + "/A"), own + "/A"},
		{"without a scheme", "", "Location", "//" + here + "/a", own + "/a"},
		{"where the answer is", "", "Content-Location", "http://" + here + "/a", own + "/a"},
		{"later", "", "Refresh", "5; url=http://" + here + "/a", "5; url=" + own + "/a"},
		{"later, in quotes", "", "Refresh", `0.5;URL = "http://` + here + `/a"`, `0.5;URL = "` + own + `/a"`},
		{"later, without a name", "", "Refresh", "0, http://" + here + "/a", "0, " + own + "/a"},
		{"the mask", "app.test:${PORT}", "Location", fmt.Sprintf("http://app.test:%d/a", port), own + "/a"},
		{"a mask without a port", "app.test", "Location", "http://app.test/a", own + "/a"},
		{"such a mask with the port of its scheme", "app.test", "Location", "https://app.test:443/a", own + "/a"},
		{"such a mask with the port", "app.test", "Location", fmt.Sprintf("http://app.test:%d/a", port), own + "/a"},
		{"a mask with another port", "app.test:8080", "Location", "http://app.test:8080/a", own + "/a"},
		{"the loopback behind a mask", "app.test", "Location", "http://" + here + "/a", own + "/a"},

		{"a path", "", "Location", "/a", "/a"},
		{"another port of the machine", "", "Location", "http://localhost:1/a", "http://localhost:1/a"},
		{"the machine's own web server", "", "Location", "http://localhost/a", "http://localhost/a"},
		{"a mask that is not this sandbox's", "", "Location", "http://app.test/a", "http://app.test/a"},
		{"a neighbour of the mask", "app.test", "Location", "http://x.app.test/a", "http://x.app.test/a"},
		{"another port of the mask", "app.test", "Location", "http://app.test:1/a", "http://app.test:1/a"},
		{"user information", "", "Location", "http://" + here + "@evil.example/", "http://" + here + "@evil.example/"},
		{"a backslash", "", "Location", "http://" + here + `\@evil.example/`, "http://" + here + `\@evil.example/`},
		{"a longer name", "", "Location", "http://" + here + ".evil.example/", "http://" + here + ".evil.example/"},
		{"a longer port", "", "Location", "http://" + here + "0/", "http://" + here + "0/"},
		{"another scheme", "", "Location", "ws://" + here + "/", "ws://" + here + "/"},
		{"a place elsewhere that names it", "", "Location", "https://idp.example/?back=http://" + here + "/", "https://idp.example/?back=http://" + here + "/"},
		{"a refresh of itself", "", "Refresh", "5", "5"},
		{"a refresh that is none", "", "Refresh", "http://" + here + "/", "http://" + here + "/"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a.change(func(x *Target) { x.MaskHost = tt.mask })
			l.both(t, func(t *testing.T, c *http.Client) {
				req, err := http.NewRequest("GET", own+"/", nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Want-"+tt.field, tt.sent)
				resp, err := c.Transport.RoundTrip(req) // a client would read it
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.Header.Get(tt.field) != tt.want {
					t.Errorf("%s: %s\ngot %s, want %s", tt.field, tt.sent, resp.Header.Get(tt.field), tt.want)
				}
			})
		})
	}
	t.Run("a domain of its own", func(t *testing.T) {
		a.serve(http.HandlerFunc(answer), 4000)
		got := l.plain(t, "GET / HTTP/1.1\r\nHost: app.example\r\nWant-Location: http://localhost:4000/a\r\nConnection: close\r\n\r\n")
		if !strings.Contains(got, "Location: http://app.example/a\r\n") {
			t.Errorf("got %s", got)
		}
	})
}

// Services that compare Origin with Host see both masked, if the sandbox chose so.
func TestTheMaskCountsForTheURLsOwnOrigin(t *testing.T) {
	l := newLab(t)
	a, b := l.sandbox(idA), l.sandbox(idB)
	port := a.serve(echo)
	own, other := "https://"+a.host(port), "https://"+b.host(port)
	masked := fmt.Sprint("http://localhost:", port)
	for _, tt := range []struct {
		name   string
		choice bool
		header []string
		want   []string
		absent string
	}{
		{"its own", true, []string{"Origin", own, "Referer", own + "/a?b"},
			[]string{"origin=" + masked + "\n", "referer=" + masked + "/a?b\n"}, "x-forwarded-host"},
		{"its own, with the port of https", true, []string{"Origin", own + ":443"}, []string{"origin=" + masked + "\n"}, "x-forwarded-host"},
		{"another sandbox's", true, []string{"Origin", other, "Referer", other + "/a"}, []string{"origin=" + other + "\n", "referer=" + other + "/a\n"}, masked},
		{"another port's", true, []string{"Origin", "https://" + a.host(1)}, []string{"origin=https://" + a.host(1) + "\n"}, masked},
		{"http, which anyone on the way can write", true, []string{"Origin", "http://" + a.host(port)}, []string{"origin=http://" + a.host(port) + "\n"}, masked},
		{"null", true, []string{"Origin", "null"}, []string{"origin=null\n"}, masked},
		{"its own with more behind it", true, []string{"Origin", own + "/"}, []string{"origin=" + own + "/\n"}, masked},
		{"a longer host", true, []string{"Origin", own + ".evil.example"}, []string{"origin=" + own + ".evil.example\n"}, masked},
		{"two", true, []string{"Origin", own, "Origin", other}, []string{"origin=" + own + "\n", "origin=" + other + "\n"}, masked},
		{"none", true, nil, []string{"host=localhost"}, "origin="},
		{"not chosen", false, []string{"Origin", own}, []string{"origin=" + own + "\n", "x-forwarded-host=" + a.host(port) + "\n"}, masked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a.change(func(x *Target) { x.MaskHost, x.MaskOrigin = "localhost:${PORT}", tt.choice })
			l.both(t, func(t *testing.T, c *http.Client) {
				_, body := get(t, c, own+"/", tt.header...)
				for _, want := range tt.want {
					if !strings.Contains(body, want) {
						t.Errorf("no %q in\n%s", want, body)
					}
				}
				if strings.Contains(body, tt.absent) {
					t.Errorf("%q in\n%s", tt.absent, body)
				}
			})
		})
	}
}

// A service's own check decides: it gets to see what it compares.
func TestAWebSocketOpensThroughTheMask(t *testing.T) {
	l := newLab(t)
	a, b := l.sandbox(idA, func(x *Target) { x.MaskHost, x.MaskOrigin = "localhost:${PORT}", true }), l.sandbox(idB)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ws, err := websocket.Accept(w, r, nil); err == nil { // compares Origin with Host
			ws.CloseNow()
		}
	}))
	for origin, want := range map[string]int{"https://" + a.host(port): 101, "https://" + b.host(port): 403, "https://evil.example": 403} {
		ws, resp, err := websocket.Dial(t.Context(), "wss://"+a.host(port)+"/", &websocket.DialOptions{
			HTTPClient: l.client(false), HTTPHeader: http.Header{"Origin": {origin}},
		})
		if err == nil {
			ws.CloseNow()
		}
		if resp == nil || resp.StatusCode != want {
			t.Errorf("%s: got %v, %v, want %d", origin, resp, err, want)
		}
	}
}

func FuzzCutURL(f *testing.F) {
	f.Add("http://localhost:3000/a")
	f.Add("//[::1]:80?x")
	f.Fuzz(func(t *testing.T, s string) {
		scheme, authority, rest, ok := cutURL(s)
		if !ok {
			return
		}
		if scheme != "" {
			scheme += ":"
		}
		if got := scheme + "//" + authority + rest; !strings.EqualFold(got, s) {
			t.Errorf("%q came back as %q", s, got)
		}
		if rest != "" && !strings.ContainsAny(rest[:1], "/?#") || strings.ContainsAny(authority, "@\\/") {
			t.Errorf("%q: authority %q, rest %q", s, authority, rest)
		}
	})
}

func FuzzRefreshTarget(f *testing.F) {
	f.Add("5; url=http://localhost:3000/a")
	f.Fuzz(func(t *testing.T, s string) {
		if i := refreshTarget(s); i < 0 || i > len(s) {
			t.Errorf("%q: %d", s, i)
		}
	})
}
