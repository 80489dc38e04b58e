package api_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// FuzzCreateBody sends arbitrary bodies through the whole handler. Whatever
// arrives, the answer is JSON and no fault of ours, and a request that gets
// through carries exactly the network rules that were written.
func FuzzCreateBody(f *testing.F) {
	for _, seed := range []string{
		`{"templateID":"base","timeout":300,"secure":true,"allow_internet_access":true,"autoPause":false}`,
		`{"templateID":"base","network":{"allowOut":["1.1.1.1","*.example.com"],"denyOut":["0.0.0.0/0"]}}`,
		`{"network":{"allowPublicTraffic":false,"maskRequestHost":"localhost:${PORT}"}}`,
		`{"network":{"denyOut":["10.0.0.0/8"]},"network":{"denyout":[]}}`,
		`{"Network":{"denyOut":null,"dns":"strict","mode":"observe"}}`,
		`{"metadata":{"a":"b"},"envVars":{"A":"\u0000"},"autoResume":{"enabled":true}}`,
		`{"timeout":1e3}`, `{"timeout":-9223372036854775808}`, `[]`, `null`, `{"network":{"rules":[0]}}`, "\xff",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		b := newBench(t)
		req := httptest.NewRequest("POST", "/v2/sandboxes", strings.NewReader(string(body)))
		req.Header.Set("X-API-KEY", b.user)
		rec := httptest.NewRecorder()
		b.handler.ServeHTTP(rec, req)
		var answer map[string]any
		if err := json.Unmarshal(rec.Body.Bytes(), &answer); err != nil {
			t.Fatalf("status %d, body %q: %v", rec.Code, rec.Body, err)
		}
		switch rec.Code {
		case http.StatusCreated:
			checkFaithful(t, body, b.sandboxes.Created[0])
		case http.StatusBadRequest, http.StatusNotFound, http.StatusNotImplemented, http.StatusRequestEntityTooLarge:
			if b.sandboxes.Len() != 0 || answer["message"] == "" {
				t.Fatalf("refused with %s, and %d sandboxes", rec.Body, b.sandboxes.Len())
			}
		default:
			t.Fatalf("status %d: %s", rec.Code, rec.Body)
		}
	})
}

// checkFaithful compares the request with the body, read another way. Bodies
// that name a field twice or in other capitals say nothing certain.
func checkFaithful(t *testing.T, body []byte, got sandbox.CreateRequest) {
	if got.Timeout < 0 || got.Timeout > 24*time.Hour || !got.Secure {
		t.Fatalf("got %+v", got)
	}
	text := strings.ToLower(string(body))
	for _, field := range []string{"network", "allowout", "denyout", "allow_internet_access"} {
		if strings.Count(text, field) > 1 || strings.Contains(text, `\u`) {
			return
		}
	}
	var raw map[string]any
	if err := json.NewDecoder(strings.NewReader(string(body))).Decode(&raw); err != nil {
		t.Fatalf("accepted what is not JSON: %v", err)
	}
	network, ok := raw["network"].(map[string]any)
	if !ok {
		return
	}
	for field, rules := range map[string][]string{"allowOut": got.Egress.AllowOut, "denyOut": got.Egress.DenyOut} {
		var want []string
		for _, item := range asList(network[field]) {
			entry, _ := item.(string) // null in a list of strings is ""
			want = append(want, entry)
		}
		if len(want) != len(rules) || len(want) > 0 && !reflect.DeepEqual(want, rules) {
			t.Fatalf("%s is %q, the body says %q", field, rules, want)
		}
	}
}

func asList(v any) []any {
	list, _ := v.([]any)
	return list
}
