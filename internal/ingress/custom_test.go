package ingress

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestCustomDomains(t *testing.T) {
	leads := map[string]string{} // name → sandbox, port
	l := newLab(t, func(c *Config) {
		c.Custom = func(host string) (id string, port uint16, ok bool) {
			to, ok := leads[host]
			if ok {
				_, err := fmt.Sscan(to, &id, &port)
				ok = err == nil
			}
			return id, port, ok
		}
		c.Challenge = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/.well-known/acme-challenge/token" {
				return false
			}
			io.WriteString(w, "proof")
			return true
		}
	})
	open, private := l.sandbox(idA), l.sandbox(idB, func(t *Target) { t.Public, t.TrafficToken = false, "secret" })
	name := func(s string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s+" "+r.Host) })
	}
	leads["app.example.com"] = fmt.Sprint(idA, " ", open.serve(name("A")))
	leads["private.example.com"] = fmt.Sprint(idB, " ", private.serve(name("B")))
	leads["gone.example.com"] = "icccccccccccccccccccc 80"
	leads[domain] = fmt.Sprint(idA, " 1") // never asked for
	for _, tt := range []struct {
		name, host string
		header     []string
		status     int
		body       string
	}{
		{"a domain leads to its sandbox", "app.example.com", nil, 200, "A app.example.com"},
		{"in any case, with a port and a final dot", "APP.example.com.:8443", nil, 200, "A APP.example.com.:8443"},
		{"routing headers mean nothing on it", "app.example.com", []string{"E2b-Sandbox-Id", idB, "E2b-Sandbox-Port", "80"}, 200, "A "},
		{"a private sandbox wants its token", "private.example.com", nil, 403, ""},
		{"and gets it", "private.example.com", []string{"e2b-traffic-access-token", "secret"}, 200, "B private.example.com"},
		{"a sandbox that ended is not found", "gone.example.com", nil, 502, "not found"},
		{"names below a domain are others", "x.app.example.com", nil, 400, "not served here"},
		{"our own names are never custom", domain, nil, 200, "api /"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, h2 := range []bool{false, true} {
				req, err := http.NewRequest("GET", "https://localhost/", nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Host = tt.host
				resp, body := do(t, l.client(h2), req, tt.header...)
				if resp.StatusCode != tt.status || !strings.Contains(body, tt.body) {
					t.Errorf("got %d %q, want %d %q", resp.StatusCode, body, tt.status, tt.body)
				}
			}
		})
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequest("GET", "http://"+l.redirect+"/x?y", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "app.example.com"
	if resp, _ := do(t, c, req); resp.Header.Get("Location") != "https://app.example.com/x?y" {
		t.Errorf("without TLS: %d %s", resp.StatusCode, resp.Header.Get("Location"))
	}
	if resp, body := get(t, c, "http://"+l.redirect+"/.well-known/acme-challenge/token"); body != "proof" {
		t.Errorf("the authority's request: %d %q", resp.StatusCode, body)
	}
}
