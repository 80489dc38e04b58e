package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/api"
	"github.com/cordonhq/cordon/internal/api/apitest"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bench is an API over fakes, with two keys.
type bench struct {
	t         testing.TB
	handler   http.Handler
	sandboxes *apitest.Sandboxes
	keys      *apitest.Keys
	flows     *flowlog.Log
	log       *bytes.Buffer
	admin     string // secrets
	user      string
	adminID   string
	userID    string
}

func newBench(t testing.TB, change ...func(*api.Config)) *bench {
	t.Helper()
	b := &bench{t: t, sandboxes: apitest.NewSandboxes(), keys: &apitest.Keys{}, log: &bytes.Buffer{}}
	var err error
	if b.flows, err = flowlog.New(flowlog.Config{}); err != nil {
		t.Fatal(err)
	}
	var admin, user auth.Key
	admin, b.admin = auth.NewKey("admin", true, time.Now())
	user, b.user = auth.NewKey("user", false, time.Now())
	for _, k := range []auth.Key{admin, user} {
		if err := b.keys.PutKey(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	b.adminID, b.userID = admin.ID, user.ID
	cfg := api.Config{
		Sandboxes: b.sandboxes, Snapshots: b.sandboxes, Keys: b.keys, Flows: b.flows,
		Domain: "sbx.test:8443", Version: "1.2.3", Log: slog.New(slog.NewTextHandler(b.log, nil)),
	}
	for _, c := range change {
		c(&cfg)
	}
	b.handler = api.New(cfg)
	return b
}

// reply is an answer with its JSON decoded.
type reply struct {
	*httptest.ResponseRecorder
	body map[string]any
	list []any
}

// do sends a request with the user's key; body "" is none.
func (b *bench) do(method, path, body string, change ...func(*http.Request)) reply {
	b.t.Helper()
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	if body == "" {
		req = httptest.NewRequest(method, path, nil)
	}
	req.Header.Set("X-API-KEY", b.user)
	for _, c := range change {
		c(req)
	}
	rec := httptest.NewRecorder()
	b.handler.ServeHTTP(rec, req)
	r := reply{ResponseRecorder: rec}
	text := rec.Body.Bytes()
	if len(text) == 0 {
		if rec.Code != http.StatusNoContent {
			b.t.Fatalf("%s %s: status %d with an empty body", method, path, rec.Code)
		}
		return r
	}
	if got := rec.Header().Get("Content-Type"); got != "application/json" {
		b.t.Fatalf("%s %s: content type %q", method, path, got)
	}
	var err error
	if text[0] == '[' {
		err = json.Unmarshal(text, &r.list)
	} else {
		err = json.Unmarshal(text, &r.body)
	}
	if err != nil {
		b.t.Fatalf("%s %s: %v in %s", method, path, err, text)
	}
	if rec.Code >= 400 && r.body["code"] != float64(rec.Code) {
		b.t.Fatalf("%s %s: status %d but code %v", method, path, rec.Code, r.body["code"])
	}
	return r
}

func (b *bench) asAdmin(r *http.Request) { r.Header.Set("X-API-KEY", b.admin) }

// create makes a sandbox of the user's and returns its ID.
func (b *bench) create(body string) string {
	b.t.Helper()
	r := b.do("POST", "/sandboxes", body)
	if r.Code != http.StatusCreated {
		b.t.Fatalf("create: %d %v", r.Code, r.body)
	}
	return r.body["sandboxID"].(string)
}

func (b *bench) want(r reply, status int, message string) {
	b.t.Helper()
	if r.Code != status {
		b.t.Fatalf("status %d %s, want %d", r.Code, r.Body, status)
	}
	if got, _ := r.body["message"].(string); !strings.Contains(got, message) {
		b.t.Fatalf("message %q, want %q in it", got, message)
	}
}

func TestCreateAnswersWhatTheSDKsNeed(t *testing.T) {
	tests := []struct {
		name, path, body string
		tokens           []string // fields present
	}{
		{"as novita does", "/sandboxes", `{"templateID":"code-interpreter-v1","timeout":300,"secure":true,"allow_internet_access":true,"autoPause":false}`, []string{"envdAccessToken"}},
		{"as e2b does", "/v2/sandboxes", `{"templateID":"base"}`, []string{"envdAccessToken"}},
		{"not secured, first version", "/sandboxes", `{"templateID":"base","secure":false}`, nil},
		{"not secured, second version", "/v2/sandboxes", `{"templateID":"base","secure":false}`, []string{"envdAccessToken"}},
		{"without public traffic", "/sandboxes", `{"templateID":"base","secure":false,"network":{"allowPublicTraffic":false}}`, []string{"trafficAccessToken"}},
		{"with public traffic", "/v2/sandboxes", `{"templateID":"base","network":{"allowPublicTraffic":true}}`, []string{"envdAccessToken"}},
		{"with nulls", "/sandboxes", `{"templateID":"base","secure":null,"allow_internet_access":null,"network":null,"mcp":null,"timeout":null,"metadata":null}`, []string{"envdAccessToken"}},
		{"with empty lists", "/v2/sandboxes", `{"templateID":"base","volumeMounts":[],"mcp":{},"iam":{},"network":{"rules":{},"egressProxy":null,"httpsPorts":[]}}`, []string{"envdAccessToken"}},
		{"with fields nobody knows", "/v2/sandboxes", `{"templateID":"base","nodeID":"n1","futureField":{"x":1}}`, []string{"envdAccessToken"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			r := b.do("POST", tt.path, tt.body)
			b.want(r, http.StatusCreated, "")
			for field, want := range map[string]any{
				"templateID": "tmpl1", "envdVersion": "0.6.13", "domain": "sbx.test:8443", "clientID": "cordon",
			} {
				if r.body[field] != want {
					t.Errorf("%s is %v, want %v", field, r.body[field], want)
				}
			}
			if id, _ := r.body["sandboxID"].(string); !sandbox.ID(id).Valid() {
				t.Errorf("sandboxID is %v", r.body["sandboxID"])
			}
			for _, field := range []string{"envdAccessToken", "trafficAccessToken"} {
				_, got := r.body[field]
				if want := strings.Contains(fmt.Sprint(tt.tokens), field); got != want {
					t.Errorf("%s is present: %v, want %v", field, got, want)
				}
			}
			if strings.Contains(r.Body.String(), "control-secret") {
				t.Error("the control token was shown")
			}
		})
	}
}

func TestCreatePassesOnWhatWasAsked(t *testing.T) {
	yes, no := true, false
	b := newBench(t)
	b.create(`{"templateID":"base","timeout":60,"metadata":{"a":"1"},"envVars":{"K":"v=w"},"autoPause":true,"autoResume":{"enabled":true,"on":"requests"},
		"allow_internet_access":false,
		"network":{"allowOut":["1.1.1.1","*.example.com"],"denyOut":["0.0.0.0/0"],"allowPublicTraffic":false,
			"maskRequestHost":"localhost:${PORT}","maskOrigin":true,"httpsPorts":[8443],"dns":"open","onDeny":"explain","mode":"observe","allow_internet_access":true}}`)
	got := b.sandboxes.Created[0]
	want := sandbox.CreateRequest{
		Owner: b.userID, Template: "base", Timeout: time.Minute,
		Metadata: map[string]string{"a": "1"}, EnvVars: map[string]string{"K": "v=w"},
		AllowPublicTraffic: &no, MaskRequestHost: "localhost:${PORT}", MaskOrigin: true, HTTPSPorts: []uint16{8443},
		OnTimeout: sandbox.PauseOnTimeout, AutoResume: true, AutoResumeOn: sandbox.PlainRequests, Secure: true,
	}
	want.Egress.AllowOut = []string{"1.1.1.1", "*.example.com"}
	want.Egress.DenyOut = []string{"0.0.0.0/0"}
	want.Egress.AllowInternetAccess = &no // the stricter of the two given
	want.Egress.DNS, want.Egress.OnDeny, want.Egress.Mode = "open", "explain", "observe"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	b.create(`{"templateID":"base","allow_internet_access":true}`)
	if got := b.sandboxes.Created[1].Egress.AllowInternetAccess; got == nil || *got != yes {
		t.Fatal("allow_internet_access: true was lost")
	}
}

func TestCreateRefuses(t *testing.T) {
	tests := []struct {
		name, body string
		status     int
		message    string
	}{
		{"nothing", ``, 400, "the body is empty"},
		{"half an object", `{"templateID":"ba`, 400, "ends in the middle"},
		{"something else", `hello`, 400, "not valid JSON at byte 1"},
		{"a list", `[]`, 400, "the body must be an object, got array"},
		{"a template that is no string", `{"templateID":7}`, 400, "field templateID must be a string, got number"},
		{"an unknown template", `{"templateID":"nowhere"}`, 404, `template "nowhere" doesn't exist`},
		{"a timeout that is a string", `{"templateID":"base","timeout":"300"}`, 400, "field timeout must be a whole number, got string"},
		{"half a second", `{"templateID":"base","timeout":0.5}`, 400, "field timeout must be a whole number"},
		{"no time at all", `{"templateID":"base","timeout":0}`, 400, "timeout is 0 seconds, it must be at least 1"},
		{"negative time", `{"templateID":"base","timeout":-5}`, 400, "timeout is -5 seconds"},
		{"over a day", `{"templateID":"base","timeout":86401}`, 400, "timeout is 86401 seconds"},
		{"a time that overflows nanoseconds", `{"templateID":"base","timeout":9223372036854775807}`, 400, "at most 86400"},
		{"metadata that is no string", `{"metadata":{"a":1}}`, 400, "field metadata"},
		{"allowOut that is a string", `{"network":{"allowOut":"1.1.1.1"}}`, 400, "field network.allowOut must be a list, got string"},
		{"denyOut with a number", `{"network":{"denyOut":["1.1.1.1",7]}}`, 400, "field network.denyOut must be a string, got number"},
		{"network that is a list", `{"network":[]}`, 400, "must be an object, got array"},
		{"a misspelled rule", `{"network":{"deny_out":["0.0.0.0/0"]}}`, 400, "network.deny_out is unknown"},
		{"a domain in denyOut", `{"network":{"denyOut":["example.com"]}}`, 400, "invalid denied CIDR example.com"},
		{"a domain without deny-all", `{"network":{"allowOut":["example.com"]}}`, 400,
			"When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic."},
		{"an unknown DNS mode", `{"network":{"dns":"maybe"}}`, 400, `network.dns is "maybe"`},
		{"what resumes it", `{"autoResume":{"enabled":true,"on":"sunrise"}}`, 400, `autoResume.on is "sunrise": use any, requests or header`},
		{"what resumes it, in metadata", `{"metadata":{"cordon.autoResumeOn":"sunrise"}}`, 400, `metadata.cordon.autoResumeOn is "sunrise"`},
		{"a mask with another scheme", `{"network":{"maskRequestHost":"https://localhost"}}`, 400, "mask request host is not valid: https://localhost"},
		{"an invalid mask", `{"network":{"maskRequestHost":"a b"}}`, 400, "mask request host is not valid: a b"},
		{"rules", `{"network":{"rules":{"a.com":[{}]}}}`, 501, "network.rules is not supported"},
		{"an egress proxy", `{"network":{"egressProxy":{"address":"x:1"}}}`, 501, "network.egressProxy is not supported"},
		{"an HTTPS port that is none", `{"network":{"httpsPorts":[0]}}`, 400, "network.httpsPorts: 0 is not a port"},
		{"the agent's port for HTTPS", `{"network":{"httpsPorts":[49983]}}`, 400, "49983 is the agent's port"},
		{"nameservers, even none", `{"network":{"dnsServers":[]}}`, 501, "network.dnsServers is not supported"},
		{"an MCP server", `{"mcp":{"x":{}}}`, 501, "mcp is not supported"},
		{"a volume", `{"volumeMounts":[{"name":"v","path":"/v"}]}`, 501, "volumeMounts is not supported"},
		{"a secret", `{"secrets":{"A":"b"}}`, 501, "secrets is not supported"},
		{"an identity", `{"iam":{"tokens":{"t":{}}}}`, 501, "iam is not supported"},
		{"a pause without memory", `{"autoPause":true,"autoPauseMemory":false}`, 501, "autoPauseMemory: false is not supported"},
		{"an environment name with =", `{"envVars":{"A=B":"c"}}`, 400, `envVars has "A=B"`},
		{"an environment value with NUL", `{"envVars":{"A":"\u0000"}}`, 400, `envVars has "A"`},
		{"over 4 MiB", `{"templateID":"` + strings.Repeat("x", 4<<20) + `"}`, 413, "over 4194304 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.want(b.do("POST", "/v2/sandboxes", tt.body), tt.status, tt.message)
			if n := b.sandboxes.Len(); n != 0 {
				t.Fatalf("%d sandboxes were created", n)
			}
		})
	}
}

func TestTenThousandRulesFit(t *testing.T) {
	b := newBench(t)
	var deny []string
	for i := range 10_000 {
		deny = append(deny, fmt.Sprintf("2001:db8:%x:%x::/64", i, i))
	}
	body, err := json.Marshal(map[string]any{"templateID": "base", "network": map[string]any{"denyOut": deny}})
	if err != nil {
		t.Fatal(err)
	}
	b.want(b.do("POST", "/v2/sandboxes", string(body)), 201, "")
	if got := len(b.sandboxes.Created[0].Egress.DenyOut); got != 10_000 {
		t.Fatalf("%d rules arrived", got)
	}
	b.want(b.do("POST", "/sandboxes/quota/pause", strings.Repeat(" ", 1<<20)+"{}"), 413, "over 1048576 bytes")
}

func TestWhoMayAsk(t *testing.T) {
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Del("X-API-KEY")
			r.Header.Set(name, value)
		}
	}
	b := newBench(t)
	tests := []struct {
		name    string
		change  func(*http.Request)
		status  int
		message string
	}{
		{"a key in X-API-KEY", header("X-API-KEY", b.user), 200, ""},
		{"a key as a bearer", header("Authorization", "Bearer "+b.user), 200, ""},
		{"a key as a bearer, lower case", header("Authorization", "bearer "+b.user), 200, ""},
		{"nothing", header("X-Other", "x"), 401, "no API key"},
		{"an unknown key", header("X-API-KEY", "e2b_0000000000000000000000000000000000000000"), 401, "not valid"},
		{"the ID of a key", header("X-API-KEY", b.adminID), 401, "not valid"},
		{"another scheme", header("Authorization", "Basic "+b.user), 401, "no API key"},
		{"an empty bearer", header("Authorization", "Bearer "), 401, "no API key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := b.do("GET", "/v2/sandboxes", "", tt.change)
			b.want(r, tt.status, tt.message)
			if tt.status == 401 && r.Header().Get("WWW-Authenticate") == "" {
				t.Error("no WWW-Authenticate")
			}
		})
	}
	t.Run("unknown callers learn nothing about paths", func(t *testing.T) {
		b.want(b.do("GET", "/no/such/path", "", header("X-Other", "x")), 401, "")
	})
	t.Run("health needs no key", func(t *testing.T) {
		r := b.do("GET", "/health", "", header("X-Other", "x"))
		b.want(r, 200, "")
		if r.body["status"] != "ok" || r.body["version"] != "1.2.3" {
			t.Errorf("health is %v", r.body)
		}
	})
	t.Run("a revoked key", func(t *testing.T) {
		b.want(b.do("DELETE", "/keys/"+b.userID, "", b.asAdmin), 204, "")
		b.want(b.do("GET", "/v2/sandboxes", ""), 401, "not valid")
	})
}

// TestAKeyWithoutAnIDOwnsNothing: an owner that is empty stands for all of them, so a
// damaged record of a key must not become one.
func TestAKeyWithoutAnIDOwnsNothing(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	key, secret := auth.NewKey("damaged", false, time.Now())
	key.ID = ""
	if err := b.keys.PutKey(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	damaged := func(r *http.Request) { r.Header.Set("X-API-KEY", secret) }
	r := b.do("GET", "/v2/sandboxes", "", damaged)
	b.want(r, 200, "")
	if len(r.list) != 0 {
		t.Errorf("it sees %v", r.list)
	}
	b.want(b.do("GET", "/sandboxes/"+id, "", damaged), 404, "")
	b.want(b.do("DELETE", "/sandboxes/"+id, "", damaged), 404, "")
	b.want(b.do("GET", "/sandboxes/"+id, ""), 200, "")
}

func TestHealthSaysWhyNot(t *testing.T) {
	b := newBench(t, func(c *api.Config) {
		c.Ready = func() error { return errs.New(errs.Unavailable, "the server is draining") }
	})
	b.want(b.do("GET", "/health", ""), 503, "draining")
}

func TestEveryErrorKindHasItsStatus(t *testing.T) {
	tests := []struct {
		err        error
		status     int
		message    string
		retryAfter string
	}{
		{errs.New(errs.Invalid, "x"), 400, "x", ""},
		{errs.New(errs.Unauthorized, "x"), 401, "x", ""},
		{errs.New(errs.Forbidden, "x"), 403, "x", ""},
		{errs.New(errs.NotFound, "x"), 404, "x", ""},
		{errs.New(errs.Conflict, "x"), 409, "x", ""},
		{errs.New(errs.Exhausted, "x"), 429, "x", "1"},
		{errs.New(errs.Unavailable, "x"), 503, "x", "1"},
		{errs.New(errs.Unimplemented, "x"), 501, "x", ""},
		{fmt.Errorf("step: %w", errs.Wrap(errs.Conflict, errors.New("cause"), "shown")), 409, "shown", ""},
	}
	for _, tt := range tests {
		t.Run(tt.err.Error(), func(t *testing.T) {
			b := newBench(t)
			b.sandboxes.Broken = tt.err
			r := b.do("GET", "/sandboxes/"+string(sandboxid.New()), "")
			b.want(r, tt.status, "")
			if r.body["message"] != tt.message || r.Header().Get("Retry-After") != tt.retryAfter {
				t.Fatalf("got %v, Retry-After %q", r.body, r.Header().Get("Retry-After"))
			}
		})
	}
}

func TestFaultsOfOursShowAnIDOnly(t *testing.T) {
	for name, broken := range map[string]error{
		"unclassified":            errors.New("secret cause"),
		"classified as internal":  errs.Wrap(errs.Internal, errors.New("secret cause"), "secret step"),
		"a canceled step of ours": fmt.Errorf("secret cause: %w", errors.New("context canceled")),
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.sandboxes.Broken = broken
			r := b.do("POST", "/sandboxes", `{}`)
			b.want(r, 500, "internal error, id ")
			if strings.Contains(r.Body.String(), "secret") {
				t.Fatalf("shown: %s", r.Body)
			}
			id := strings.TrimPrefix(r.body["message"].(string), "internal error, id ")
			if log := b.log.String(); len(id) != 12 || !strings.Contains(log, "id="+id) || !strings.Contains(log, "secret cause") {
				t.Fatalf("id %q, log %s", id, log)
			}
		})
	}
}

func TestAPanicIsAFaultOfOurs(t *testing.T) {
	b := newBench(t, func(c *api.Config) { c.Sandboxes = nil })
	b.want(b.do("GET", "/v2/sandboxes", ""), 500, "internal error, id ")
	if !strings.Contains(b.log.String(), "nil pointer") {
		t.Fatalf("log: %s", b.log)
	}
}

func TestSandboxCalls(t *testing.T) {
	b := newBench(t)
	id := b.create(`{"templateID":"base"}`)
	absent := string(sandboxid.New())
	gone := fmt.Sprintf(`Sandbox %q doesn't exist or you don't have access to it`, absent)
	tests := []struct {
		name, method, path, body string
		status                   int
		message                  string
	}{
		{"get", "GET", "/sandboxes/ID", "", 200, ""},
		{"get by an old client", "GET", "/sandboxes/ID-cordon", "", 200, ""},
		{"get of none", "GET", "/sandboxes/" + absent, "", 404, gone},
		{"get of what cannot be", "GET", "/sandboxes/UPPER", "", 404, `Sandbox "UPPER" doesn't exist`},
		{"set the timeout", "POST", "/sandboxes/ID/timeout", `{"timeout":600}`, 204, ""},
		{"set no timeout", "POST", "/sandboxes/ID/timeout", `{}`, 400, "timeout is 0 seconds"},
		{"set the timeout without a body", "POST", "/sandboxes/ID/timeout", ``, 400, "the body is empty"},
		{"set the timeout of none", "POST", "/sandboxes/" + absent + "/timeout", `{"timeout":600}`, 404, gone},
		{"refresh", "POST", "/sandboxes/ID/refreshes", `{"duration":60}`, 204, ""},
		{"refresh without a body", "POST", "/sandboxes/ID/refreshes", ``, 204, ""},
		{"connect to a running one", "POST", "/sandboxes/ID/connect", `{"timeout":300}`, 200, ""},
		{"connect, second version", "POST", "/v2/sandboxes/ID/connect", `{}`, 200, ""},
		{"connect without a body", "POST", "/v2/sandboxes/ID/connect", ``, 200, ""},
		{"connect with timeout 0", "POST", "/sandboxes/ID/connect", `{"timeout":0}`, 200, ""},
		{"connect, saying what it is", "POST", "/sandboxes/ID/connect", `{"secure":true,"allowPublicTraffic":true}`, 200, ""},
		{"connect without security", "POST", "/sandboxes/ID/connect", `{"secure":false}`, 501, "secure is set when"},
		{"connect to make it private", "POST", "/sandboxes/ID/connect", `{"allowPublicTraffic":false}`, 501, "allowPublicTraffic is set when"},
		{"connect to make it private, nested", "POST", "/sandboxes/ID/connect", `{"network":{"allowPublicTraffic":false}}`, 501, "allowPublicTraffic is set when"},
		{"connect with new rules", "POST", "/sandboxes/ID/connect", `{"network":{"denyOut":["0.0.0.0/0"]}}`, 501, "egress rules are not changed"},
		{"connect without memory", "POST", "/v2/sandboxes/ID/connect", `{"memory":false}`, 501, "memory: false"},
		{"connect to none", "POST", "/v2/sandboxes/" + absent + "/connect", `{}`, 404, gone},
		{"resume a running one", "POST", "/sandboxes/ID/resume", `{"autoPause":false,"timeout":300}`, 409, "already running"},
		{"pause without memory", "POST", "/sandboxes/ID/pause", `{"memory":false}`, 501, "memory: false"},
		{"pause", "POST", "/sandboxes/ID/pause", ``, 204, ""},
		{"pause again", "POST", "/sandboxes/ID/pause", `{}`, 409, "already paused"},
		{"refresh a paused one", "POST", "/sandboxes/ID/refreshes", `{"duration":60}`, 409, "is paused"},
		{"connect to a paused one", "POST", "/sandboxes/ID/connect", `{"timeout":300}`, 201, ""},
		{"pause with memory", "POST", "/sandboxes/ID/pause", `{"memory":true}`, 204, ""},
		{"resume", "POST", "/sandboxes/ID/resume", `{"autoPause":false,"timeout":300}`, 201, ""},
		{"pause once more", "POST", "/sandboxes/ID/pause", ``, 204, ""},
		{"connect, second version, to a paused one", "POST", "/v2/sandboxes/ID/connect", ``, 201, ""},
		{"pause none", "POST", "/sandboxes/" + absent + "/pause", ``, 404, gone},
		{"update the network", "PUT", "/sandboxes/ID/network", `{"allowOut":["example.com"],"denyOut":["0.0.0.0/0"]}`, 204, ""},
		{"clear the network", "PUT", "/sandboxes/ID/network", `{}`, 204, ""},
		{"update with a bad rule", "PUT", "/sandboxes/ID/network", `{"denyOut":["x"]}`, 400, "invalid denied CIDR x"},
		{"update with an unknown rule", "PUT", "/sandboxes/ID/network", `{"denyIn":["x"]}`, 400, "network.denyIn is unknown"},
		{"update what is fixed", "PUT", "/sandboxes/ID/network", `{"allowPublicTraffic":false}`, 400, "cannot be changed"},
		{"update the mask's choice", "PUT", "/sandboxes/ID/network", `{"maskOrigin":true}`, 400, "cannot be changed"},
		{"update the mask", "PUT", "/sandboxes/ID/network", `{"maskRequestHost":"x"}`, 400, "cannot be changed"},
		{"update the network of none", "PUT", "/sandboxes/" + absent + "/network", `{}`, 404, gone},
		{"metrics of none", "GET", "/sandboxes/" + absent + "/metrics", "", 404, gone},
		{"events of none", "GET", "/sandboxes/" + absent + "/network/events", "", 404, gone},
		{"bind a domain", "PUT", "/sandboxes/ID/domains/app.example.com", `{"port":3000}`, 200, ""},
		{"bind it to another port", "PUT", "/sandboxes/ID/domains/app.example.com", `{"port":8080}`, 200, ""},
		{"bind a domain to no port", "PUT", "/sandboxes/ID/domains/b.example.com", `{}`, 400, "port is 0"},
		{"bind a domain to a port above all", "PUT", "/sandboxes/ID/domains/b.example.com", `{"port":65536}`, 400, "port is 65536"},
		{"bind a domain without a body", "PUT", "/sandboxes/ID/domains/b.example.com", ``, 400, "the body is empty"},
		{"list the domains", "GET", "/sandboxes/ID/domains", "", 200, ""},
		{"bind a domain to none", "PUT", "/sandboxes/" + absent + "/domains/b.example.com", `{"port":1}`, 404, gone},
		{"release a domain", "DELETE", "/sandboxes/ID/domains/app.example.com", "", 204, ""},
		{"release it again", "DELETE", "/sandboxes/ID/domains/app.example.com", "", 404, "not bound"},
		{"kill", "DELETE", "/sandboxes/ID-cordon", "", 204, ""},
		{"kill again", "DELETE", "/sandboxes/ID", "", 404, "doesn't exist"},
	}
	for _, tt := range tests { // in order: each builds on those before
		path := strings.ReplaceAll(tt.path, "ID", id)
		t.Run(tt.name, func(t *testing.T) {
			b := *b
			b.t = t
			b.want(b.do(tt.method, path, tt.body), tt.status, tt.message)
		})
	}
}

func TestConnectNeverShortensAndTimeoutDoes(t *testing.T) {
	b := newBench(t)
	id := b.create(`{"timeout":3600}`)
	left := func() time.Duration {
		end, err := time.Parse(time.RFC3339Nano, b.do("GET", "/sandboxes/"+id, "").body["endAt"].(string))
		if err != nil {
			t.Fatal(err)
		}
		return time.Until(end)
	}
	b.do("POST", "/v2/sandboxes/"+id+"/connect", `{"timeout":60}`)
	if got := left(); got < 59*time.Minute {
		t.Fatalf("connect left %s", got)
	}
	b.do("POST", "/sandboxes/"+id+"/timeout", `{"timeout":60}`)
	if got := left(); got > time.Minute {
		t.Fatalf("timeout left %s", got)
	}
}

func TestDetail(t *testing.T) {
	b := newBench(t)
	id := b.create(`{"templateID":"base","timeout":60,"metadata":{"a":"b"},"autoPause":true,"allow_internet_access":false,
		"network":{"allowOut":["1.1.1.1"],"allowPublicTraffic":false,"maskRequestHost":"http://localhost"}}`)
	got := b.do("GET", "/sandboxes/"+id, "").body
	started, err1 := time.Parse(time.RFC3339Nano, got["startedAt"].(string))
	ends, err2 := time.Parse(time.RFC3339Nano, got["endAt"].(string))
	if err := errors.Join(err1, err2); err != nil || ends.Sub(started) > time.Minute {
		t.Fatalf("%v: %s to %s", err, started, ends)
	}
	delete(got, "startedAt")
	delete(got, "endAt")
	want := map[string]any{
		"sandboxID": id, "templateID": "tmpl1", "alias": "base", "clientID": "cordon", "state": "running",
		"cpuCount": 2.0, "memoryMB": 512.0, "diskSizeMB": 1024.0, "envdVersion": "0.6.13",
		"envdAccessToken": "access-" + id, "domain": "sbx.test:8443", "metadata": map[string]any{"a": "b"},
		"allowInternetAccess": false,
		"network":             map[string]any{"allowOut": []any{"1.1.1.1"}, "allowPublicTraffic": false, "maskRequestHost": "localhost", "maskOrigin": true, "generation": 1.0},
		"lifecycle":           map[string]any{"onTimeout": "pause", "autoResume": false},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	plain := b.do("GET", "/sandboxes/"+b.create(`{}`), "").body
	for _, absent := range []string{"network", "allowInternetAccess", "metadata"} {
		if v, ok := plain[absent]; ok {
			t.Errorf("%s is %v though nothing was asked", absent, v)
		}
	}
}

func TestOwnersDoNotSeeEachOther(t *testing.T) {
	b := newBench(t)
	mine := b.create(`{}`)
	theirs := b.do("POST", "/sandboxes", `{}`, b.asAdmin).body["sandboxID"].(string)
	b.want(b.do("GET", "/sandboxes/"+theirs, ""), 404, "you don't have access")
	b.want(b.do("DELETE", "/sandboxes/"+theirs, ""), 404, "you don't have access")
	b.want(b.do("PUT", "/sandboxes/"+theirs+"/network", "{}"), 404, "you don't have access")
	b.want(b.do("POST", "/network/explain", `{"sandboxID":"`+theirs+`","destination":"1.1.1.1"}`), 404, "you don't have access")
	b.want(b.do("GET", "/sandboxes/"+theirs+"/network/events", ""), 404, "you don't have access")
	b.want(b.do("GET", "/sandboxes/"+theirs+"/domains", ""), 404, "you don't have access")
	b.want(b.do("PUT", "/sandboxes/"+theirs+"/domains/a.example.com", `{"port":80}`), 404, "you don't have access")
	b.want(b.do("DELETE", "/sandboxes/"+theirs+"/domains/a.example.com", ""), 404, "you don't have access")
	b.want(b.do("PUT", "/sandboxes/"+mine+"/domains/a.example.com", `{"port":80}`), 200, "")
	b.want(b.do("PUT", "/sandboxes/"+theirs+"/domains/a.example.com", `{"port":80}`, b.asAdmin), 409, "bound to another sandbox")
	b.want(b.do("GET", "/sandboxes/"+mine, "", b.asAdmin), 200, "")
	if got := len(b.do("GET", "/v2/sandboxes", "").list); got != 1 {
		t.Errorf("the user sees %d sandboxes, want 1", got)
	}
	if got := len(b.do("GET", "/v2/sandboxes", "", b.asAdmin).list); got != 2 {
		t.Errorf("the admin sees %d sandboxes, want 2", got)
	}
}

func TestList(t *testing.T) {
	b := newBench(t)
	var ids []string
	for i := range 5 {
		ids = append(ids, b.create(fmt.Sprintf(`{"templateID":"t%d","metadata":{"n":"%d","a b":"c&d=%%"}}`, i%2, i)))
	}
	b.do("POST", "/sandboxes/"+ids[4]+"/pause", "")
	// encode is what the SDKs do: keys and values, then the query string, then
	// the parameter.
	encode := func(k, v string) string {
		esc := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
		return url.QueryEscape(url.Values{esc(k): {esc(v)}}.Encode())
	}
	tests := []struct {
		name, path string
		want       []int
	}{
		{"all, newest first", "/v2/sandboxes", []int{4, 3, 2, 1, 0}},
		{"oldest first", "/v2/sandboxes?order=asc", []int{0, 1, 2, 3, 4}},
		{"newest first, said so", "/v2/sandboxes?order=desc", []int{4, 3, 2, 1, 0}},
		{"running ones", "/v2/sandboxes?state=running", []int{3, 2, 1, 0}},
		{"paused ones", "/v2/sandboxes?state=paused", []int{4}},
		{"both", "/v2/sandboxes?state=running,paused", []int{4, 3, 2, 1, 0}},
		{"both, the comma escaped", "/v2/sandboxes?state=running%2Cpaused", []int{4, 3, 2, 1, 0}},
		{"of a template", "/v2/sandboxes?template=t1", []int{3, 1}},
		{"of metadata", "/v2/sandboxes?metadata=" + encode("n", "2"), []int{2}},
		{"of metadata with every special", "/v2/sandboxes?metadata=" + encode("a b", "c&d=%"), []int{4, 3, 2, 1, 0}},
		{"as seen on the wire", "/v2/sandboxes?metadata=a%252520b%3Dc%252526d%25253D%252525", []int{4, 3, 2, 1, 0}},
		{"of metadata none has", "/v2/sandboxes?metadata=" + encode("n", "7"), []int{}},
		{"started after all", "/v2/sandboxes?startedAfter=2999-01-01T00:00:00.000Z", []int{}},
		{"started after long ago", "/v2/sandboxes?startedAfter=2000-01-01T00:00:00.000Z", []int{4, 3, 2, 1, 0}},
		{"the first version: running ones", "/sandboxes", []int{3, 2, 1, 0}},
		{"the first version with metadata", "/sandboxes?metadata=" + encode("n", "2"), []int{2}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := b.do("GET", tt.path, "")
			if r.list == nil {
				t.Fatalf("got %d %s", r.Code, r.Body)
			}
			got := []string{}
			for _, item := range r.list {
				got = append(got, item.(map[string]any)["sandboxID"].(string))
			}
			want := []string{}
			for _, i := range tt.want {
				want = append(want, ids[i])
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatal(diff)
			}
			if _, there := r.Header()["X-Next-Token"]; there {
				t.Error("the only page has a next token")
			}
		})
	}
}

func TestPages(t *testing.T) {
	b := newBench(t)
	for range 5 {
		b.create(`{}`)
	}
	seen, next := 0, ""
	for page := 0; ; page++ {
		r := b.do("GET", "/v2/sandboxes?limit=2&nextToken="+next, "")
		seen += len(r.list)
		next = r.Header().Get("x-next-token")
		if next == "" {
			if page != 2 {
				t.Fatalf("%d pages, want 3", page+1)
			}
			break
		}
	}
	if seen != 5 {
		t.Fatalf("saw %d sandboxes, want 5", seen)
	}
}

func TestParametersOfTheWrongForm(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	tests := []struct{ path, message string }{
		{"/v2/sandboxes?limit=x", `parameter limit is not valid: "x" is not a number`},
		{"/v2/sandboxes?limit=-1", "parameter limit is -1"},
		{"/v2/sandboxes?state=dead", `parameter state has "dead"`},
		{"/v2/sandboxes?order=up", `parameter order is "up"`},
		{"/v2/sandboxes?startedAfter=yesterday", "parameter startedAfter is not valid"},
		{"/v2/sandboxes?metadata=%25zz", "parameter metadata is not valid"},
		{"/v2/sandboxes?metadata=novalue", "parameter metadata is not valid"},
		{"/v2/sandboxes?nextToken=%27", "nextToken"},
		{"/sandboxes/events?offset=-1", "parameter offset is -1"},
		{"/sandboxes/events?startTime=now", "parameter startTime is not valid"},
		{"/sandboxes/" + id + "/network/events?verdict=maybe", `parameter verdict is "maybe"`},
		{"/sandboxes/" + id + "/network/events?since=-1", "parameter since is -1"},
		{"/sandboxes/" + id + "/network/events?follow=perhaps", "parameter follow is not valid"},
	}
	for _, tt := range tests {
		t.Run(tt.path, func(t *testing.T) {
			b := *b
			b.t = t
			b.want(b.do("GET", tt.path, ""), 400, tt.message)
		})
	}
}

func TestLiteralPathsAreNotSandboxes(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	quota := b.do("GET", "/sandboxes/quota", "")
	b.want(quota, 200, "")
	if got := quota.body["limit"].(map[string]any)["maxLengthHours"]; got != 24.0 {
		t.Errorf("maxLengthHours is %v", got)
	}
	if got := quota.body["usage"].(map[string]any)["concurrentInstances"]; got != 1.0 {
		t.Errorf("concurrentInstances is %v", got)
	}
	b.do("POST", "/sandboxes/"+id+"/pause", "")
	b.do("DELETE", "/sandboxes/"+id, "")
	events := b.do("GET", "/sandboxes/events?limit=2&orderAsc=true&sandboxID="+id, "")
	b.want(events, 200, "")
	var names []any
	for _, item := range events.body["items"].([]any) {
		names = append(names, item.(map[string]any)["eventName"])
	}
	if diff := cmp.Diff([]any{"create", "pause"}, names); diff != "" || events.body["hasMore"] != true || events.body["total"] != 3.0 {
		t.Fatalf("%v %s", events.body, diff)
	}
	only := b.do("GET", "/sandboxes/events?events=kill,resume", "")
	if got := len(only.body["items"].([]any)); got != 1 {
		t.Fatalf("%d kill events, want 1", got)
	}
}

func TestMetrics(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	all := b.do("GET", "/sandboxes/"+id+"/metrics", "").list
	want := map[string]any{
		"timestamp": "1970-01-01T00:16:40Z", "timestampUnix": 1000.0, "cpuCount": 2.0, "cpuUsedPct": 12.5,
		"memUsed": 1.0, "memTotal": 2.0, "memCache": 3.0, "diskUsed": 4.0, "diskTotal": 5.0,
	}
	if diff := cmp.Diff(want, all[0]); diff != "" || len(all) != 2 {
		t.Fatal(len(all), diff)
	}
	if got := len(b.do("GET", "/sandboxes/"+id+"/metrics?start=1500&end=2000", "").list); got != 1 {
		t.Fatalf("%d samples in the range, want 1", got)
	}
}

func TestWhatIsNotSupportedSaysSo(t *testing.T) {
	b := newBench(t)
	for _, tt := range []struct{ method, path, what string }{
		{"POST", "/volumes", "volumes"}, {"GET", "/volumes/v1", "volumes"}, {"PUT", "/volumecontent/v/file", "volumes"},
		{"GET", "/secrets", "secrets"}, {"PUT", "/secrets/s", "secrets"},
		{"POST", "/v3/templates", "template builds"}, {"POST", "/templates", "template builds"},
		{"GET", "/templates/t/files/abc", "template builds"}, {"POST", "/v2/templates/t/builds/b", "template builds"},
		{"POST", "/templates/tags", "tags"}, {"PATCH", "/templates/t", "template"},
		{"POST", "/sandboxes/i/hotplug-memory", "memory"}, {"DELETE", "/sandboxes/i/volume-mounts?path=/x", "volumes"},
		{"GET", "/templates", "templates"},
	} {
		b.want(b.do(tt.method, tt.path, "{}"), 501, tt.what)
	}
	b.want(b.do("GET", "/no/such/path", ""), 404, "there is no GET /no/such/path")
	b.want(b.do("PATCH", "/sandboxes", "{}"), 404, "there is no PATCH /sandboxes")

	plain := newBench(t, func(c *api.Config) { c.Snapshots = nil })
	id := plain.create(`{}`)
	for _, path := range []string{"/sandboxes/" + id + "/snapshots", "/sandboxes/" + id + "/fork", "/sandboxes/" + id + "/clone", "/sandboxes/" + id + "/reset"} {
		plain.want(plain.do("POST", path, ""), 501, "does not support snapshots")
	}
	plain.want(plain.do("DELETE", "/templates/snap", ""), 501, "does not support snapshots")
}

func TestSnapshots(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	unnamed := b.do("POST", "/sandboxes/"+id+"/snapshots", "{}")
	b.want(unnamed, 201, "")
	if names, ok := unnamed.body["names"].([]any); !ok || len(names) != 0 {
		t.Fatalf("names is %v, want an empty list", unnamed.body["names"])
	}
	b.want(b.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"mine"}`), 201, "")
	first := b.do("GET", "/snapshots?limit=1&sandboxID="+id, "")
	if len(first.list) != 1 || first.Header().Get("X-Next-Token") != "1" {
		t.Fatalf("first page is %v, next %q", first.list, first.Header().Get("X-Next-Token"))
	}
	snap := unnamed.body["snapshotID"].(string)
	b.want(b.do("DELETE", "/templates/"+url.PathEscape(snap), ""), 204, "")
	b.want(b.do("DELETE", "/templates/"+strings.ReplaceAll(snap, ":", "%3A"), ""), 404, "doesn't exist")
}

func TestForkTellsOfEachCopy(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	r := b.do("POST", "/sandboxes/"+id+"/fork", `{"count":3,"timeout":60}`)
	b.want(r, 201, "")
	if len(r.list) != 3 {
		t.Fatalf("got %d copies", len(r.list))
	}
	for i, item := range r.list {
		entry := item.(map[string]any)
		_, ok := entry["sandbox"]
		_, failed := entry["error"]
		if ok == failed || failed != (i == 2) {
			t.Errorf("copy %d is %v", i, entry)
		}
	}
	if e := r.list[2].(map[string]any)["error"].(map[string]any); e["code"] != 500.0 || strings.Contains(fmt.Sprint(e), "fire") {
		t.Errorf("the error shown is %v", e)
	}
	b.want(b.do("POST", "/sandboxes/"+id+"/fork", ""), 201, "")
	b.want(b.do("POST", "/sandboxes/"+id+"/fork", `{"count":0}`), 400, "count is 0")
	b.want(b.do("POST", "/sandboxes/"+id+"/fork", `{"count":101}`), 400, "count is 101")
}

func TestCloneLeavesOutTheClientID(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	r := b.do("POST", "/sandboxes/"+id+"/clone", `{"count":3,"strict":false}`)
	b.want(r, 201, "")
	copies := r.body["sandboxes"].([]any)
	if len(copies) != 2 {
		t.Fatalf("got %d copies, want the two that run", len(copies))
	}
	for _, c := range copies {
		if _, glued := c.(map[string]any)["clientID"]; glued {
			t.Errorf("copy %v has a clientID", c)
		}
	}
}

func TestReset(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	path := "/sandboxes/" + id + "/reset"
	b.want(b.do("POST", path, `{"resume":true}`), 200, "")
	if got := b.do("POST", path, `{"resume":true,"allowPublicTraffic":false}`).body["trafficAccessToken"]; got != "traffic-after-reset" {
		t.Fatalf("traffic token is %v", got)
	}
	b.want(b.do("POST", path, `{"secure":false}`), 501, "secure is set when")
	b.do("POST", "/sandboxes/"+id+"/pause", "")
	b.want(b.do("POST", path, `{"resume":false}`), 409, "is paused")
}

func TestTemplates(t *testing.T) {
	b := newBench(t, func(c *api.Config) {
		c.Templates = func(context.Context) ([]sandbox.Template, error) {
			return []sandbox.Template{
				{ID: "t1", Names: []string{"base"}, Ready: true, Created: time.Unix(0, 0), Resources: sandbox.Resources{CPUs: 1}},
				{ID: "t2", Names: []string{"host"}},
			}, nil
		}
	})
	list := b.do("GET", "/templates", "").list
	if len(list) != 2 || list[0].(map[string]any)["buildStatus"] != "ready" || list[1].(map[string]any)["buildStatus"] != "building" {
		t.Fatalf("got %v", list)
	}
	// The Python models fail on an absent field, also one that may be null.
	for _, field := range []string{"aliases", "buildCount", "buildID", "buildStatus", "cpuCount", "createdAt", "createdBy", "diskSizeMB",
		"envdVersion", "lastSpawnedAt", "memoryMB", "names", "public", "spawnCount", "templateID", "updatedAt"} {
		if _, ok := list[0].(map[string]any)[field]; !ok {
			t.Errorf("field %s is absent", field)
		}
	}
	second := b.do("GET", "/v2/templates?page=2&limit=1&template_type=x", "").body
	if got := second["templates"].([]any); len(got) != 1 || second["totalPages"] != 2.0 || second["total"] != 2.0 {
		t.Fatalf("second page is %v", second)
	}
	if got := b.do("GET", "/v2/templates?page=9223372036854775807&limit=1", "").body["templates"].([]any); len(got) != 0 {
		t.Fatalf("page beyond the last is %v", got)
	}
	if got := b.do("GET", "/templates/aliases/base", "").body["templateID"]; got != "t1" {
		t.Fatalf("alias base is %v", got)
	}
	b.want(b.do("GET", "/templates/aliases/nothing", ""), 404, "doesn't exist")
}

func TestKeys(t *testing.T) {
	b := newBench(t)
	for _, r := range []reply{b.do("GET", "/keys", ""), b.do("POST", "/keys", `{"name":"x"}`), b.do("DELETE", "/keys/x", "")} {
		b.want(r, 403, "may not manage keys")
	}
	made := b.do("POST", "/keys", `{"name":"ci"}`, b.asAdmin)
	b.want(made, 201, "")
	secret := made.body["key"].(string)
	if !auth.ValidKeyForm(secret) {
		t.Fatalf("key is %q", secret)
	}
	b.want(b.do("GET", "/v2/sandboxes", "", func(r *http.Request) { r.Header.Set("X-API-KEY", secret) }), 200, "")
	list := b.do("GET", "/keys", "", b.asAdmin)
	if len(list.list) != 3 || strings.Contains(list.Body.String(), secret) || strings.Contains(list.Body.String(), "hash") {
		t.Fatalf("list is %s", list.Body)
	}
	b.want(b.do("DELETE", "/keys/"+made.body["id"].(string), "", b.asAdmin), 204, "")
	b.want(b.do("GET", "/v2/sandboxes", "", func(r *http.Request) { r.Header.Set("X-API-KEY", secret) }), 401, "")
	b.want(b.do("DELETE", "/keys/"+b.adminID, "", b.asAdmin), 409, "last admin key")
	b.want(b.do("DELETE", "/keys/none", "", b.asAdmin), 404, "doesn't exist")
	b.want(b.do("POST", "/keys", `{"name":""}`, b.asAdmin), 400, "name has 0 characters")
	b.want(b.do("POST", "/keys", `{"name":"`+strings.Repeat("n", 101)+`"}`, b.asAdmin), 400, "name has 101 characters")
}

func TestLimitReached(t *testing.T) {
	b := newBench(t)
	b.sandboxes.Limit = 1
	b.create(`{}`)
	r := b.do("POST", "/v2/sandboxes", `{}`)
	b.want(r, 429, "limit of 1 sandboxes")
	if r.Header().Get("Retry-After") != "1" {
		t.Fatal("no whole number of seconds in Retry-After")
	}
}

func TestPresetsAreListed(t *testing.T) {
	b := newBench(t)
	r := b.do("GET", "/network/presets", "")
	var got []control.Preset
	if err := json.Unmarshal(r.Body.Bytes(), &got); r.Code != 200 || err != nil {
		t.Fatalf("status %d, %v: %s", r.Code, err, r.Body)
	}
	for _, p := range got {
		if p.Name == "python" {
			if p.Version == "" || len(p.Hosts) == 0 || p.Hosts[0].Host != "pypi.org" || len(p.Hosts[0].Ports) != 1 || p.Hosts[0].Ports[0] != 443 {
				t.Fatalf("python is listed as %+v", p)
			}
			return
		}
	}
	t.Fatalf("python is not listed: %s", r.Body)
}

func TestExplain(t *testing.T) {
	b := newBench(t)
	id := b.create(`{"network":{"allowOut":["example.com","*.example.org","9.9.9.9"],"denyOut":["0.0.0.0/0"]}}`)
	tests := []struct {
		name, body           string
		verdict, rule, dnsIs string
	}{
		{"a listed name", `{"sandboxID":"ID","destination":"Example.com."}`, "allow", "allow[0]", "allow"},
		{"a listed name, port 80", `{"sandboxID":"ID","destination":"a.example.org:80"}`, "allow", "allow[1]", "allow"},
		{"another name", `{"sandboxID":"ID","destination":"example.net"}`, "deny", "deny[0]", "deny"},
		{"a listed name on another port", `{"sandboxID":"ID","destination":"example.com:22"}`, "deny", "deny[0]", "allow"},
		{"a listed address", `{"sandboxID":"ID","destination":"9.9.9.9:22"}`, "allow", "allow[2]", ""},
		{"an address, by UDP", `{"sandboxID":"ID","destination":"9.9.9.10","protocol":"udp"}`, "deny", "deny[0]", ""},
		{"a listed name, by UDP", `{"sandboxID":"ID","destination":"example.com:443","protocol":"udp"}`, "deny", "deny[0]", "allow"},
		{"an IPv6 address", `{"sandboxID":"ID","destination":"[2001:db8::1]:443"}`, "deny", "deny[0]", ""},
		{"an IPv6 address by ICMP", `{"sandboxID":"ID","destination":"2001:db8::1","protocol":"icmp"}`, "deny", "deny[0]", ""},
		{"the metadata service", `{"sandboxID":"ID","destination":"169.254.169.254:80"}`, "deny", "floor", ""},
		{"a name at a private address", `{"sandboxID":"ID","destination":"example.com","address":"10.0.0.1"}`, "deny", "floor", "allow"},
		{"rules not yet in force", `{"network":{"denyOut":["9.9.9.9"]},"destination":"9.9.9.9"}`, "deny", "deny[0]", ""},
		{"no rules", `{"destination":"example.net"}`, "allow", "default", "allow"},
		{"observed", `{"network":{"denyOut":["0.0.0.0/0"],"mode":"observe"},"destination":"9.9.9.9"}`, "observe", "deny[0]", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := b.do("POST", "/network/explain", strings.ReplaceAll(tt.body, `:"ID"`, `:"`+id+`"`))
			if r.Code != 200 || r.body["verdict"] != tt.verdict {
				t.Fatalf("got %d %v, want %s", r.Code, r.body, tt.verdict)
			}
			if got := r.body["rule"].(map[string]any)["id"].(string); !strings.HasPrefix(got, tt.rule) {
				t.Errorf("rule is %s, want %s", got, tt.rule)
			}
			if got := r.body["reason"]; (got == "name-tcp-only") != strings.HasPrefix(tt.name, "a listed name, by UDP") {
				t.Errorf("the reason is %v", got)
			}
			dns, _ := r.body["dns"].(map[string]any)
			if got, _ := dns["verdict"].(string); got != tt.dnsIs {
				t.Errorf("dns is %v, want %q", dns, tt.dnsIs)
			}
		})
	}
	for _, tt := range []struct{ body, message string }{
		{`{}`, "neither a domain nor an IP address"},
		{`{"destination":"http://x.com/"}`, "destination"},
		{`{"destination":"x.com:0"}`, "no valid port"},
		{`{"destination":"x.com:65536"}`, "no valid port"},
		{`{"destination":"x.com","protocol":"sctp"}`, `protocol is "sctp"`},
		{`{"destination":"x.com","address":"here"}`, `address "here"`},
		{`{"destination":"x.com","network":{"denyOut":["x"]}}`, "invalid denied CIDR x"},
		{`{"destination":"x.com","network":{"denyOut":["1.1.1.1"]},"sandboxID":"` + id + `"}`, "not both"},
		{`{"destination":"pypi.org","network":{"denyOut":["0.0.0.0/0"],"allowOut":["preset:pyhton"]}}`, `network.allowOut[0]: there is no preset "pyhton": use python, `},
	} {
		b.want(b.do("POST", "/network/explain", tt.body), 400, tt.message)
	}
}

func flow(sandbox, name string, verdict flowlog.Verdict) flowlog.Event {
	return flowlog.Event{
		Sandbox: sandbox, Name: name, Verdict: verdict, Layer: flowlog.LayerProxy, Proto: "tls", Generation: 1,
		Dst: netip.MustParseAddrPort("192.0.2.7:443"), Duration: 1500 * time.Microsecond,
	}
}

func TestNetworkEvents(t *testing.T) {
	b := newBench(t)
	id, other := b.create(`{}`), b.create(`{}`)
	b.flows.Record(flow(id, "a.com", flowlog.Allowed))
	b.flows.Record(flow(other, "x.com", flowlog.Denied))
	b.flows.Record(flow(id, "b.com", flowlog.Denied))
	path := "/sandboxes/" + id + "/network/events"
	all := b.do("GET", path, "").list
	if len(all) != 2 {
		t.Fatalf("%d events, want 2", len(all))
	}
	first := all[0].(map[string]any)
	for field, want := range map[string]any{
		"sandboxID": id, "name": "a.com", "verdict": "allow", "layer": "proxy", "protocol": "tls",
		"destination": "192.0.2.7:443", "durationMs": 1.5,
	} {
		if first[field] != want {
			t.Errorf("%s is %v, want %v", field, first[field], want)
		}
	}
	if _, ok := first["upstream"]; ok {
		t.Error("an upstream nobody dialled is shown")
	}
	if got := len(b.do("GET", path+"?verdict=deny", "").list); got != 1 {
		t.Errorf("%d denied events, want 1", got)
	}
	if got := len(b.do("GET", path+"?limit=1", "").list); got != 1 {
		t.Errorf("%d events under limit=1", got)
	}
	since := fmt.Sprintf("%s?since=%.0f", path, first["seq"])
	if got := len(b.do("GET", since, "").list); got != 1 {
		t.Errorf("%d events since the first, want 1", got)
	}
}

func TestFollowingNetworkEvents(t *testing.T) {
	b := newBench(t)
	id := b.create(`{}`)
	b.flows.Record(flow(id, "kept.com", flowlog.Allowed))
	b.flows.Record(flow(id, "also.com", flowlog.Denied))
	server := httptest.NewServer(b.handler)
	defer server.Close()
	after := b.flows.Events(flowlog.Filter{})[0].Seq

	req, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+"/sandboxes/"+id+"/network/events?follow=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-KEY", b.user)
	req.Header.Set("Last-Event-ID", fmt.Sprint(after))
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := resp.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Fatalf("content type %q", got)
	}
	for _, want := range []string{"also.com", "new.com"} {
		if want == "new.com" {
			b.flows.Record(flow(id, want, flowlog.Denied))
		}
		if got := nextEvent(t, resp.Body); got["name"] != want {
			t.Fatalf("got %v, want %s", got, want)
		}
	}
}

// nextEvent reads byte by byte, so that an event held back in a buffer of the
// server's would be noticed.
func nextEvent(t *testing.T, r io.Reader) map[string]any {
	t.Helper()
	var line []byte
	for one := make([]byte, 1); ; {
		if _, err := io.ReadFull(r, one); err != nil {
			t.Fatal(err)
		}
		if one[0] != '\n' {
			line = append(line, one[0])
			continue
		}
		if data, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
			var e map[string]any
			if err := json.Unmarshal(data, &e); err != nil {
				t.Fatal(err)
			}
			return e
		}
		line = line[:0]
	}
}

func TestSignedURLs(t *testing.T) {
	b := newBench(t)
	id := b.create(`{"network":{"allowPublicTraffic":false}}`)
	made := b.do("POST", "/sandboxes/"+id+"/urls", `{"port":3000,"ttl":60}`)
	if made.Code != 201 {
		t.Fatalf("got %d %s", made.Code, made.Body)
	}
	token, _ := made.body["token"].(string)
	read, ok := auth.ParseURLToken(token)
	if !ok || !read.Genuine("key", id, 3000) || read.Link != made.body["id"] || read.Expires.Format(time.RFC3339) != made.body["expires"] {
		t.Errorf("token %q of %v", token, made.body)
	}
	if want := "https://3000-" + id + ".sbx.test:8443/?cordon_token=" + token; made.body["url"] != want {
		t.Errorf("got %v, want %s", made.body["url"], want)
	}
	b.do("POST", "/sandboxes/"+id+"/urls", `{"port":8080}`)
	list := b.do("GET", "/sandboxes/"+id+"/urls", "")
	if list.Code != 200 || len(list.list) != 2 || strings.Contains(list.Body.String(), "token") {
		t.Errorf("list: %d %s", list.Code, list.Body)
	}
	for _, tt := range []struct {
		name, method, path, body string
		code                     int
		message                  string
	}{
		{"port 0", "POST", "", `{"port":0}`, 400, "port is 0: use 1 to 65535"},
		{"a port beyond all", "POST", "", `{"port":65536}`, 400, "port is 65536: use 1 to 65535"},
		{"no port", "POST", "", `{}`, 400, "port is 0: use 1 to 65535"},
		{"no time", "POST", "", `{"port":80,"ttl":0}`, 400, "ttl is 0 seconds, it must be at least 1"},
		{"a port in words", "POST", "", `{"port":"80"}`, 400, "field port must be a whole number, got string"},
		{"another's sandbox", "POST", "x", `{"port":80}`, 404, ""},
		{"revoke what is not there", "DELETE", "/nothing", "", 404, ""},
		{"revoke one", "DELETE", "/" + made.body["id"].(string), "", 204, ""},
		{"revoke it again", "DELETE", "/" + made.body["id"].(string), "", 404, ""},
		{"revoke all", "DELETE", "", "", 204, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sandbox := id
			if tt.path == "x" {
				sandbox, tt.path = "izzzzzzzzzzzzzzzzzzzz", ""
			}
			got := b.do(tt.method, "/sandboxes/"+sandbox+"/urls"+tt.path, tt.body)
			if got.Code != tt.code || tt.message != "" && got.body["message"] != tt.message {
				t.Errorf("got %d %s", got.Code, got.Body)
			}
		})
	}
	if list := b.do("GET", "/sandboxes/"+id+"/urls", ""); len(list.list) != 0 {
		t.Errorf("after revoking all: %s", list.Body)
	}
}

func TestAllowInAndIdleTimeout(t *testing.T) {
	b := newBench(t)
	for body, message := range map[string]string{
		`{"network":{"allowIn":["10.0.0.0/8","lan"]}}`:           `network.allowIn[1] is "lan", it must be an IP address or a CIDR such as 10.0.0.0/8 or 2001:db8::/32`,
		`{"idleTimeout":0}`:                                      "idleTimeout is 0 seconds, it must be at least 1",
		`{"metadata":{"a":"` + strings.Repeat("x", 9000) + `"}}`: `metadata["a"] is 9000 bytes with a key of 1: a key may have 256, a value 8192`,
	} {
		if got := b.do("POST", "/v2/sandboxes", body); got.Code != 400 || got.body["message"] != message {
			t.Errorf("got %d %s", got.Code, got.Body)
		}
	}
	id := b.create(`{"idleTimeout":90,"network":{"allowIn":["10.1.2.3/8"]}}`)
	shown := func() (any, any) {
		got := b.do("GET", "/sandboxes/"+id, "")
		network, _ := got.body["network"].(map[string]any)
		return network["allowIn"], got.body["lifecycle"].(map[string]any)["idleTimeout"]
	}
	for _, step := range []struct{ put, want string }{
		{"", "[10.0.0.0/8]"},
		{`{"denyOut":["0.0.0.0/0"]}`, "[10.0.0.0/8]"}, // as an SDK that does not know it writes
		{`{"allowIn":[]}`, "[]"},
		{`{"allowIn":null}`, "[]"},
		{`{"allowIn":["0.0.0.0/0","::/0"]}`, "[0.0.0.0/0 ::/0]"},
		{`{"allowIn":["x"]}`, "[0.0.0.0/0 ::/0]"},
	} {
		if step.put != "" {
			b.do("PUT", "/sandboxes/"+id+"/network", step.put)
		}
		if list, idle := shown(); fmt.Sprint(list) != step.want || idle != 90.0 {
			t.Errorf("after %q: %v and %v, want %s", step.put, list, idle, step.want)
		}
	}
	if got := b.do("POST", "/v2/sandboxes/"+id+"/connect", `{"network":{"allowIn":["::/0"]}}`); got.Code != 501 {
		t.Errorf("connect: %d %s", got.Code, got.Body)
	}
}

func TestKeysHaveLimits(t *testing.T) {
	b := newBench(t)
	admin := func(r *http.Request) { r.Header.Set("X-API-KEY", b.admin) }
	made := b.do("POST", "/keys", `{"name":"small","maxSandboxes":3,"maxPaused":2}`, admin)
	if made.Code != 201 || made.body["maxSandboxes"] != 3.0 || made.body["maxPaused"] != 2.0 {
		t.Errorf("got %d %s", made.Code, made.Body)
	}
	if got := b.do("POST", "/keys", `{"name":"bad","maxSandboxes":-1}`, admin); got.Code != 400 || got.body["message"] != "maxSandboxes is -1, it must be 1 to 1000000, or 0 for the server's default" {
		t.Errorf("got %d %s", got.Code, got.Body)
	}
}
