package ingress

import (
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
)

func TestDomains(t *testing.T) {
	for _, bad := range [][]string{nil, {""}, {"a b"}, {"a:80"}, {"a..b"}, {"-a"}, {"*.a"}, {"a_b"}} {
		if _, err := parseDomains(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	d, err := parseDomains([]string{"a.example", "B.a.example.", "a.example"})
	if err != nil || len(d) != 2 || d[0] != "b.a.example" {
		t.Errorf("%v %v", d, err)
	}
	if p, err := d.parse("80-x.b.a.example"); err != nil || p.kind != sandboxHost || p.id != "x" {
		t.Errorf("%+v %v", p, err)
	}
}

func TestHosts(t *testing.T) {
	d := domains{domain}
	for _, tt := range []struct {
		host string
		want string
	}{
		{"3000-" + idA + "." + domain, "sandbox 3000 " + idA},
		{"3000-" + idA + "." + domain + ":1", "sandbox 3000 " + idA},
		{"1-0.CORDON.LOCALHOST.", "sandbox 1 0"},
		{"65535-A-b-c.cordon.localhost", "sandbox 65535 a"},
		{domain, "api"}, {"api." + domain + ".:443", "api"},
		{"localhost", "shared"}, {"LOCALHOST.:80", "shared"}, {"127.0.0.1", "shared"}, {"127.0.0.1:80", "shared"}, {"[::1]:80", "shared"}, {"sandbox." + domain, "shared"},
		{"example.com", "foreign"}, {"xcordon.localhost", "foreign"}, {"127.1", "foreign"}, {"0x7f000001", "foreign"},
		{"", "bad"}, {".", "bad"}, {":80", "bad"}, {"a:b", "bad"}, {"localhost:", "bad"}, {"localhost:080", "bad"}, {"localhost:99999", "bad"}, {"a:1:2", "bad"},
		{"::1", "bad"}, {"[::1", "bad"}, {"[::1]x", "bad"}, {"[fe80::1%25eth0]", "bad"}, {"[127.0.0.1]", "bad"}, {"127.0.0.1.:80", "foreign"},
		{"user@3000-" + idA + "." + domain, "bad"}, {"3000-" + idA + "." + domain + "/x", "bad"}, {"3000-" + idA + "." + domain + "#", "bad"},
		{"3000-" + idA + "." + domain + "..", "bad"}, {"3000-" + idA + "..cordon.localhost", "bad"}, {"3000-\u0130." + domain, "bad"}, {"3000-i\u212a." + domain, "bad"},
		{"3000-i\x00." + domain, "bad"}, {"3000-" + idA + ".cordon\uff0elocalhost", "bad"}, {" 3000-x." + domain, "bad"},
		{"3000." + domain, "bad"}, {"3000-." + domain, "bad"}, {"3000--x." + domain, "bad"}, {"-x." + domain, "bad"}, {"03-x." + domain, "bad"}, {"0-x." + domain, "bad"},
		{"65536-x." + domain, "bad"}, {"99999999999-x." + domain, "bad"}, {"+1-x." + domain, "bad"}, {"a-x." + domain, "bad"}, {"1-x_y." + domain, "bad"},
		{"a.1-x." + domain, "bad"}, {"*." + domain, "bad"}, {strings.Repeat("a.", 130) + domain, "bad"},
	} {
		p, err := d.parse(tt.host)
		got := map[hostKind]string{foreignHost: "foreign", apiHost: "api", sharedHost: "shared", sandboxHost: "sandbox " + strconv.Itoa(int(p.port)) + " " + p.id}[p.kind]
		if err != nil {
			got = "bad"
		}
		if got != tt.want {
			t.Errorf("%q: got %s, want %s (%v)", tt.host, got, tt.want, err)
		}
	}
}

func TestTwoNamesForOneRequest(t *testing.T) {
	api := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {})
	in, err := New(Config{Domains: []string{domain}, API: api, Lookup: func(string) (*Target, bool) { return nil, false }})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for name, tt := range map[string]struct {
		header []string
		code   int
	}{"a host field beside :authority": {[]string{"evil.example"}, 400}, "the same name twice": {[]string{"api." + domain}, 200}, "two host fields": {[]string{"api." + domain, "api." + domain}, 400}} {
		r := httptest.NewRequest("GET", "https://api."+domain+"/", nil)
		r.Header["Host"] = tt.header
		w := httptest.NewRecorder()
		if in.Handler(TLS).ServeHTTP(w, r); w.Code != tt.code {
			t.Errorf("%s: got %d, want %d", name, w.Code, tt.code)
		}
	}
}

func TestRunNeedsCertificatesForTLS(t *testing.T) {
	in, err := New(Config{Domains: []string{domain}, API: http.NotFoundHandler(), Lookup: func(string) (*Target, bool) { return nil, false }})
	if err != nil {
		t.Fatal(err)
	}
	ln := listen(t, "127.0.0.1:0")
	if err := in.Run(t.Context(), Listener{ln, TLS}); err == nil || !strings.Contains(err.Error(), "Config.TLS") {
		t.Errorf("got %v", err)
	}
	if _, err := ln.Accept(); err == nil {
		t.Error("the listener is still open")
	}
}

// FuzzHost checks that whatever a Host header says, a sandbox is only named by
// exactly its name, and that the answer does not depend on case, port or dot.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"3000-" + idA + "." + domain, "sandbox." + domain + ":80", "[::1]:80", "1-a-b.cordon.localhost.", "x@y", "127.0.0.1"} {
		f.Add(s)
	}
	d := domains{domain}
	f.Fuzz(func(t *testing.T, host string) {
		p, err := d.parse(host)
		if err != nil {
			if err.Error() == "" || strings.ContainsAny(err.Error(), "\r\n\x00") {
				t.Errorf("%q: %q", host, err)
			}
			return
		}
		if p.kind != sandboxHost {
			if p.id != "" || p.port != 0 {
				t.Errorf("%q: %+v", host, p)
			}
			return
		}
		if !validID(p.id) || p.port == 0 {
			t.Errorf("%q: %+v", host, p)
		}
		name := strconv.Itoa(int(p.port)) + "-" + p.id
		low := strings.ToLower(host)
		if !strings.HasPrefix(low, name+".") && !strings.HasPrefix(low, name+"-") || !strings.Contains(low, "."+domain) {
			t.Errorf("%q is taken for %s", host, name)
		}
		again, err := d.parse(strings.ToUpper(name) + "." + domain + ".:1")
		if err != nil || again.id != p.id || again.port != p.port {
			t.Errorf("%q: %+v, then %+v %v", host, p, again, err)
		}
	})
}

// FuzzTarget checks that taking the token out of a URL leaves all else alone and
// no token in, and that control routes stay hidden with any query.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{"/?cordon_token=x", "/a;b?%63ordon_token=1&b=%zz&&", "/init?x", "/%69nit", "/x/..%2f/init;y", "//?cordon_token"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		rest, found, _ := stripParam(target)
		if !found && rest != target {
			t.Errorf("%q became %q", target, rest)
		}
		if again, still, _ := stripParam(rest); still || again != rest {
			t.Errorf("%q still has a token: %q", target, rest)
		}
		if len(rest) > len(target) {
			t.Errorf("%q grew to %q", target, rest)
		}
		if controlRoute(target) != controlRoute(rest) {
			t.Errorf("%q and %q differ", target, rest)
		}
		// What Go's own router would take for a control route must be one for us.
		if !strings.HasPrefix(target, "/") || strings.ContainsAny(target, " #\x7f") || strings.ContainsFunc(target, func(r rune) bool { return r < ' ' }) {
			return
		}
		mux := http.NewServeMux()
		hit := false
		mux.HandleFunc("/init", func(http.ResponseWriter, *http.Request) { hit = true })
		mux.HandleFunc("/cordon/", func(http.ResponseWriter, *http.Request) { hit = true })
		r, err := http.NewRequest("POST", target, nil)
		if err != nil || r.URL.Host != "" {
			return
		}
		mux.ServeHTTP(httptest.NewRecorder(), r)
		if hit && !controlRoute(target) {
			t.Errorf("%q reaches a control route", target)
		}
	})
}
