package ingress

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

func TestACookieIsNotForPagesOfOtherSandboxes(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.Custom = func(host string) (string, uint16, bool) {
			id, ok := map[string]string{"a.example": idA, "b.example": idB}[host]
			return id, 80, ok
		}
	})
	a, b := l.sandbox(idA, linked), l.sandbox(idB)
	port := a.serve(echo)
	cookie := tokenCookie + "=" + link(a.t, port, time.Now().Add(time.Minute))
	own, other := "https://"+a.host(port), "https://"+b.host(3000)
	for _, tt := range []struct {
		name   string
		method string
		header []string
		want   int
	}{
		{"a program", "GET", nil, 200},
		{"the sandbox's own page", "POST", []string{"Origin", own, "Sec-Fetch-Site", "same-origin"}, 200},
		{"its own page, which says nobody where it comes from", "POST", []string{"Origin", "null", "Sec-Fetch-Site", "same-origin"}, 200},
		{"a bookmark", "GET", []string{"Sec-Fetch-Site", "none", "Sec-Fetch-Mode", "navigate"}, 200},
		{"a page of another port of the sandbox", "POST", []string{"Origin", "https://" + a.host(8080), "Sec-Fetch-Site", "same-site"}, 200},
		{"an image in such a page", "GET", []string{"Referer", "https://" + a.host(8080) + "/x?y", "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "no-cors"}, 200},
		{"a page at the sandbox's own domain", "POST", []string{"Origin", "https://a.example", "Sec-Fetch-Site", "cross-site"}, 200},
		{"a request of a page of another site around a frame", "POST", []string{"Origin", "https://app.example", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors"}, 200},
		{"a page on the developer's machine", "POST", []string{"Origin", "http://localhost:5173", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors"}, 200},
		{"a form of the sandbox's own domain", "POST", []string{"Origin", "https://a.example", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"}, 200},
		{"a form, in a browser that says no more", "POST", []string{"Origin", own}, 200},
		{"a link in a page of another site", "GET", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 200},
		{"a form in a page of another site", "POST", []string{"Origin", "https://app.example", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 403},
		{"one that leads to a frame", "POST", []string{"Origin", "https://app.example", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, 403},
		{"one that hides its origin", "POST", []string{"Origin", "null", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"}, 403},
		{"one without an origin", "POST", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"}, 403},
		{"one whose mode is not said", "POST", []string{"Origin", "https://app.example", "Sec-Fetch-Site", "cross-site"}, 403},
		{"one in a browser that says no more", "POST", []string{"Origin", "https://app.example"}, 403},
		{"a frame in a page of another site", "GET", []string{"Referer", "https://app.example/", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, 200},
		{"a link in a page of another sandbox", "GET", []string{"Referer", other + "/", "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 200},
		{"a page of another sandbox", "POST", []string{"Origin", other, "Sec-Fetch-Site", "same-site"}, 403},
		{"one, in a browser that says no more", "GET", []string{"Origin", other}, 403},
		{"one at another sandbox's domain", "POST", []string{"Origin", "https://b.example", "Sec-Fetch-Site", "cross-site"}, 403},
		{"one that hides in a sandboxed frame", "POST", []string{"Origin", "null", "Sec-Fetch-Site", "cross-site"}, 403},
		{"one in capitals with a port", "POST", []string{"Origin", "HTTPS://3000-" + idB + ".CORDON.Localhost.:8443", "Sec-Fetch-Site", "same-site"}, 403},
		{"an image in a page of another sandbox", "GET", []string{"Referer", other + "/", "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "no-cors"}, 403},
		{"an image in a page that sends no Referer", "GET", []string{"Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "no-cors"}, 403},
		{"a frame in one", "GET", []string{"Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, 403},
		{"a form in one", "POST", []string{"Origin", other, "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 403},
		{"no origin at all", "POST", []string{"Origin", ""}, 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequest(tt.method, own+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			if resp, body := do(t, l.client(true), req, append(tt.header, "Cookie", cookie)...); resp.StatusCode != tt.want {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, tt.want)
			}
		})
	}
}

func TestASandboxDoesNotClearTheCookiesOfTheSite(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Clear-Site-Data"] = r.Header["Want"]
		if r.URL.Path == "/early" {
			w.Header().Set("Set-Cookie", "a=b; Domain="+domain)
			w.WriteHeader(103)
		}
	}))
	for _, tt := range []struct{ sent, want string }{
		{`"cookies"`, ""},
		{`"cache", "cookies","storage"`, `"cache", "storage"`},
		{`"*"`, `"cache", "storage", "executionContexts"`},
		{` "COOKIES" , * `, `"cache", "storage", "executionContexts"`},
		{`cookies`, ""},
		{`"storage"`, `"storage"`},
	} {
		l.both(t, func(t *testing.T, c *http.Client) {
			if resp, _ := get(t, c, "https://"+a.host(port)+"/", "Want", tt.sent); resp.Header.Get("Clear-Site-Data") != tt.want {
				t.Errorf("%s: got %q, want %q", tt.sent, resp.Header["Clear-Site-Data"], tt.want)
			}
		})
	}
	t.Run("nor by an early answer", func(t *testing.T) {
		got := l.plain(t, "GET /early HTTP/1.1\r\nHost: "+a.host(port)+"\r\nWant: \"cookies\"\r\nConnection: close\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 103") || strings.Contains(got, "Clear-Site-Data") || strings.Contains(got, "Domain=") {
			t.Errorf("got %s", got)
		}
	})
}

// A page may open a WebSocket to anywhere: only the server can say no.
func TestAWebSocketIsNotOpenedByPagesOfOtherSandboxes(t *testing.T) {
	l := newLab(t)
	a, b := l.sandbox(idA, linked), l.sandbox(idB)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true}) // as a careless service does
		if err == nil {
			ws.CloseNow()
		}
	}))
	cookie := tokenCookie + "=" + link(a.t, port, time.Now().Add(time.Minute))
	for origin, want := range map[string]int{"https://" + a.host(port): 101, fmt.Sprintf("https://%s", b.host(3000)): 403} {
		ws, resp, err := websocket.Dial(t.Context(), "wss://"+a.host(port)+"/", &websocket.DialOptions{
			HTTPClient: l.client(false), HTTPHeader: http.Header{"Cookie": {cookie}, "Origin": {origin}},
		})
		if err == nil {
			ws.CloseNow()
		}
		if resp == nil || resp.StatusCode != want {
			t.Errorf("%s: got %v, %v, want %d", origin, resp, err, want)
		}
	}
}
