package ingress_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/client"
)

// row is one answer of the server's own, as programs and people get it.
type row struct {
	name   string
	url    string
	host   string // the Host header, where it is not the URL's
	header http.Header
	status int
	want   map[string]any // the JSON; status is its code
	title  string         // of the page
}

// answers asks for every answer of the table, in JSON and as a page.
func (s *live) answers(t *testing.T) {
	public := s.guest(t, client.CreateOptions{})
	public.serve(s, "0.0.0.0:3000")
	for _, rows := range [][]row{s.addresses(public), s.absent(t), s.private(t), s.links(t), s.closed(public)} {
		for _, r := range rows {
			t.Run(r.name, func(t *testing.T) { s.bothForms(t, r) })
		}
	}
	t.Run("too many connections", func(t *testing.T) { s.tooMany(t, public) })
	t.Run("a closed port is answered within 100 ms", func(t *testing.T) { s.closedQuickly(t, public) })
}

// gone is the answer for what is no running sandbox.
func gone(name, id, url string) row {
	return row{
		name: name, url: url, status: http.StatusBadGateway, title: "Sandbox not found",
		want: map[string]any{"sandboxId": id, "message": "The sandbox was not found"},
	}
}

// absent are sandboxes that cannot answer any more, or never could.
func (s *live) absent(t *testing.T) []row {
	killed := s.guest(t, client.CreateOptions{})
	killed.kill()
	paused := s.guest(t, client.CreateOptions{})
	if err := paused.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	expired := s.guest(t, client.CreateOptions{Timeout: time.Second})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := expired.Info(t.Context()); errors.Is(err, client.ErrNotFound) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a sandbox of one second still runs")
		}
	}
	unknown := strings.Repeat("z", len(killed.ID))
	return []row{
		gone("an unknown sandbox", unknown, strings.Replace(killed.url(3000), killed.ID, unknown, 1)),
		gone("a killed sandbox", killed.ID, killed.url(3000)),
		gone("the agent of a killed sandbox, whom SDKs ask whether it runs", killed.ID, killed.url(49983)+"health"),
		gone("an expired sandbox", expired.ID, expired.url(3000)),
		gone("the agent of an expired sandbox", expired.ID, expired.url(49983)+"health"),
		gone("a paused sandbox that nothing may wake", paused.ID, paused.url(3000)),
	}
}

func (s *live) closed(g *guest) []row {
	return []row{{
		name: "a port that is not open", url: g.url(3001), status: http.StatusBadGateway, title: "Nothing answers on port 3001",
		want: map[string]any{"sandboxId": g.ID, "message": "The sandbox is running but port is not open", "port": 3001.},
	}}
}

// private are sandboxes that not everybody may speak to.
func (s *live) private(t *testing.T) []row {
	off := false
	secret := s.guest(t, client.CreateOptions{Network: client.Network{AllowPublicTraffic: &off}})
	secret.serve(s, "0.0.0.0:3000")
	listed := s.guest(t, client.CreateOptions{Network: client.Network{AllowIn: []string{"192.0.2.0/24"}}})
	token := func(value string) http.Header { return http.Header{"E2b-Traffic-Access-Token": {value}} }
	refused := func(name, id, url, message string) row {
		return row{name: name, url: url, status: http.StatusForbidden, title: "This sandbox is private", want: map[string]any{"sandboxId": id, "message": message}}
	}
	const secured = "Sandbox is secured with traffic access token. "
	missing := refused("a private sandbox without a token", secret.ID, secret.url(3000), secured+"Token header 'e2b-traffic-access-token' is missing")
	wrong := refused("a private sandbox with a wrong token", secret.ID, secret.url(3000), secured+"Provided token in header 'e2b-traffic-access-token' is invalid")
	wrong.header = token("wrong")
	query := refused("a private sandbox with a wrong token in the query", secret.ID, secret.url(3000)+"?cordon_token=wrong", secured+"Provided token in query parameter 'cordon_token' is invalid")
	source := refused("an address that is not in allowIn", listed.ID, listed.url(3000), "The sandbox accepts requests from listed addresses only, and yours is not in network.allowIn")
	source.title = "Your address is not allowed"
	t.Run("a private sandbox with its token", func(t *testing.T) {
		req := s.request(t, secret.url(3000), "", token(secret.TrafficToken))
		if code, body := send(t, s.web(t, true), req); code != http.StatusOK || body != secret.ID+" at 0.0.0.0:3000" {
			t.Errorf("%d %s", code, body)
		}
	})
	return []row{missing, wrong, query, source}
}

// links are signed URLs that open nothing any more.
func (s *live) links(t *testing.T) []row {
	off := false
	g := s.guest(t, client.CreateOptions{Network: client.Network{AllowPublicTraffic: &off}})
	g.serve(s, "0.0.0.0:3000")
	sign := func(ttl time.Duration) client.SignedURL {
		u, err := s.SignURL(t.Context(), g.ID, 3000, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	expired, revoked := sign(time.Second), sign(time.Hour)
	if code, body := fetch(t, s.web(t, true), revoked.URL); code != http.StatusOK {
		t.Fatalf("a signed URL: %d %s", code, body)
	}
	if err := s.RevokeURL(t.Context(), g.ID, revoked.ID); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(expired.Expires) + 10*time.Millisecond) // the server's clock is ours
	return []row{
		{
			name: "a link that has expired", url: expired.URL, status: http.StatusForbidden, title: "This link has expired",
			want: map[string]any{"sandboxId": g.ID, "message": "The link to this sandbox has expired"},
		},
		{
			name: "a link that was revoked", url: revoked.URL, status: http.StatusForbidden, title: "This link was revoked",
			want: map[string]any{"sandboxId": g.ID, "message": "The link to this sandbox was revoked"},
		},
	}
}

// addresses are hosts that cannot be a sandbox's.
func (s *live) addresses(g *guest) []row {
	domain := "." + g.Domain
	var rows []row
	for _, a := range []struct{ name, host, message string }{
		{"port 0", "0-" + g.ID + domain, `Port "0" in the host is not valid: use a number from 1 to 65535 without leading zeros.`},
		{"a port that is too large", "65536-" + g.ID + domain, `Port "65536" in the host is not valid: use a number from 1 to 65535 without leading zeros.`},
		{"a port that is no number", "http-" + g.ID + domain, `Port "http" in the host is not valid: use a number from 1 to 65535 without leading zeros.`},
		{"an ID that cannot be one", "3000-" + domain, `Host "3000-` + domain + `" is not a valid host name.`},
		{"an ID of nothing", "3000--x" + domain, `Sandbox ID "" in the host is not valid: it consists of the letters a-z and digits.`},
		{"a label without a port", g.ID + domain, `Host label "` + g.ID + `" is not of the form <port>-<sandboxID>.`},
		{"a foreign host", "3000-" + g.ID + ".example.com", `Host "3000-` + g.ID + `.example.com" is not served here. Sandboxes are at <port>-<sandboxID>` + domain + `.`},
	} {
		rows = append(rows, row{
			name: a.name, url: g.url(3000), host: a.host, status: http.StatusBadRequest, title: "This address is not valid",
			want: map[string]any{"message": a.message},
		})
	}
	return rows
}

func (s *live) request(t *testing.T, url, host string, header http.Header) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if req.Header = header.Clone(); header == nil {
		req.Header = http.Header{}
	}
	req.Host = host
	return req
}

// bothForms asks as a program over either protocol and as a browser that navigates.
func (s *live) bothForms(t *testing.T, r row) {
	t.Helper()
	r.want["code"] = float64(r.status)
	for _, http2 := range []bool{false, true} {
		res, err := s.web(t, http2).Do(s.request(t, r.url, r.host, r.header))
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		err = json.NewDecoder(res.Body).Decode(&got)
		res.Body.Close()
		if err != nil || res.StatusCode != r.status || res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("a program got %d %s: %v", res.StatusCode, res.Header.Get("Content-Type"), err)
		}
		if d := cmp.Diff(r.want, got); d != "" {
			t.Errorf("a program got (-want +got):\n%s", d)
		}
	}
	s.page(t, r)
}

// page asks as a browser does when a person follows a link.
func (s *live) page(t *testing.T, r row) {
	t.Helper()
	req := s.request(t, r.url, r.host, r.header)
	req.Header.Set("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")
	req.Header.Set("Sec-Fetch-Mode", "navigate")
	c := s.web(t, true)
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if got := res.Header.Get("Content-Type"); got != "text/html; charset=utf-8" {
		t.Errorf("a browser got %s", got)
	}
	if got := res.Header.Get("Content-Security-Policy"); !strings.HasPrefix(got, "default-src 'none';") {
		t.Errorf("the page may load: %q", got)
	}
	status, body := send(t, c, req)
	if status != r.status {
		t.Errorf("a browser got %d", status)
	}
	facts := []string{"<!doctype html>", `<html lang="en">`, "<h1>" + r.title + "</h1>", fmt.Sprintf("Error %d", r.status)}
	for name, fact := range r.want {
		switch name {
		case "code":
		case "message":
			facts = append(facts, "<dd>"+html.EscapeString(fact.(string))+"</dd>")
		default:
			facts = append(facts, fmt.Sprintf("<dd>%v</dd>", fact))
		}
	}
	facts = slices.DeleteFunc(facts, func(fact string) bool { return strings.Contains(body, fact) })
	if len(facts) > 0 {
		t.Errorf("the page has no %q:\n%s", facts, body)
	}
}

// tooMany fills a sandbox with requests. The limit is the whole sandbox's: requests
// over either protocol count.
func (s *live) tooMany(t *testing.T, g *guest) {
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	c := s.web(t, false)
	for range connLimit {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.url(3000)+"hold", nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Fatalf("below the limit: %d", res.StatusCode)
		}
	}
	s.bothForms(t, row{
		url: g.url(3000), status: http.StatusTooManyRequests, title: "Too many connections",
		want: map[string]any{"sandboxId": g.ID, "message": "The sandbox has too many open connections", "limit": float64(connLimit)},
	})
	leave()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		code, _ := fetch(t, c, g.url(3000))
		if code == http.StatusOK {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after the others have left: %d", code)
		}
	}
}

// closedQuickly takes the quickest of several answers: the machine may be busy.
func (s *live) closedQuickly(t *testing.T, g *guest) {
	s.bothProtocols(t, func(t *testing.T, c *http.Client) {
		best := time.Hour
		for range 10 {
			began := time.Now()
			if code, body := fetch(t, c, g.url(3001)); code != http.StatusBadGateway {
				t.Fatalf("%d %s", code, body)
			}
			best = min(best, time.Since(began))
		}
		t.Logf("the quickest of ten took %s", best)
		if best > 100*time.Millisecond {
			t.Errorf("the quickest of ten took %s", best)
		}
	})
}
