package api_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

// FuzzExplainBody sends arbitrary network rules and destinations through the whole
// of what judges a flow: the API's JSON, the rules' grammar, the compiler, the
// decision. Whatever is said, the floor stays closed.
func FuzzExplainBody(f *testing.F) {
	for _, seed := range []string{
		`{"network":{"allowOut":["*.example.com"],"denyOut":["0.0.0.0/0"]},"destination":"www.example.com:443"}`,
		`{"network":{"allowOut":["db.example.com:5432","10.0.0.0/8"],"denyOut":["0.0.0.0/0","::/0"]},"destination":"10.0.0.1:5432"}`,
		`{"network":{"denyOut":["198.51.100.0/24"],"mode":"observe"},"destination":"[::ffff:127.0.0.1]:80","protocol":"udp"}`,
		`{"network":{"allowOut":["64:ff9b::/96"],"dns":"strict"},"destination":"64:ff9b::7f00:1"}`,
		`{"network":{"allow_internet_access":false},"destination":"169.254.169.254","protocol":"icmp"}`,
		`{"sandboxID":"i0","destination":"x"}`, `{"destination":"a","address":"127.0.0.1"}`, `null`, `[]`, "\xff",
	} {
		f.Add([]byte(seed))
	}
	b := newBench(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		req := httptest.NewRequest("POST", "/network/explain", strings.NewReader(string(body)))
		req.Header.Set("X-API-KEY", b.user)
		rec := httptest.NewRecorder()
		b.handler.ServeHTTP(rec, req)
		var got struct {
			Verdict, Reason, Message string
			Rule                     struct{ ID string }
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil {
			t.Fatalf("status %d, body %q: %v", rec.Code, rec.Body, err)
		}
		switch rec.Code {
		case http.StatusOK:
		case http.StatusBadRequest, http.StatusNotFound:
			if got.Message == "" {
				t.Fatalf("refused without a word: %s", rec.Body)
			}
			return
		default:
			t.Fatalf("status %d: %s", rec.Code, rec.Body)
		}
		if got.Rule.ID == "" || got.Reason == "" {
			t.Fatalf("a verdict without rule or reason: %s", rec.Body)
		}
		if a, ok := destination(body); ok && got.Verdict != "deny" && (a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified()) {
			t.Fatalf("%s is in the floor: %s", a, rec.Body)
		}
	})
}

// destination reads the address in a body, another way, if it says one.
func destination(body []byte) (netip.Addr, bool) {
	var raw struct {
		Destination string `json:"destination"`
	}
	if json.Unmarshal(body, &raw) != nil || strings.Count(strings.ToLower(string(body)), "destination") != 1 {
		return netip.Addr{}, false
	}
	if at, err := netip.ParseAddrPort(raw.Destination); err == nil {
		return at.Addr().Unmap(), true
	}
	a, err := netip.ParseAddr(raw.Destination)
	return a.Unmap(), err == nil
}
