package interpreter

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

func TestWhatChangesSomethingMustSayThatItIsJSON(t *testing.T) {
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte("{}")) }))
	defer agent.Close()
	dir, err := os.MkdirTemp("", "cordon-i-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	i, err := New(Config{Dir: dir + "/d", Home: t.TempDir(), Agent: agent.URL, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	for _, r := range []struct{ method, path, body string }{
		{"POST", "/execute", `{"code":"1"}`}, {"POST", "/contexts", `{"language":"none"}`}, {"DELETE", "/contexts/x", ""}, {"POST", "/contexts/x/restart", ""},
	} {
		for kind, refused := range map[string]bool{
			"": true, "text/plain": true, "text/plain;application/json": true, "application/x-www-form-urlencoded": true, "multipart/form-data; boundary=b": true, "application/jsonp": true, "application/json, text/plain": true,
			"application/json": false, "Application/JSON; charset=utf-8": false,
		} {
			if r.path == "/execute" && !refused {
				continue // there is no kernel
			}
			req := httptest.NewRequest(r.method, r.path, strings.NewReader(r.body))
			if req.Header.Del("Content-Type"); kind != "" {
				req.Header.Set("Content-Type", kind)
			}
			w := httptest.NewRecorder()
			i.routes().ServeHTTP(w, req)
			if got := w.Code == http.StatusUnsupportedMediaType; got != refused {
				t.Errorf("%s %s as %q: %d %s", r.method, r.path, kind, w.Code, w.Body)
			}
		}
	}
	for _, path := range []string{"/health", "/contexts"} {
		w := httptest.NewRecorder()
		if i.routes().ServeHTTP(w, httptest.NewRequest("GET", path, nil)); w.Code/100 != 2 {
			t.Errorf("GET %s: %d", path, w.Code)
		}
	}
	// A page's browser asks first, and gets no leave.
	w := httptest.NewRecorder()
	req := httptest.NewRequest("OPTIONS", "/execute", nil)
	req.Header.Set("Origin", "https://elsewhere.test")
	if i.routes().ServeHTTP(w, req); w.Code/100 == 2 || w.Header().Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("OPTIONS: %d %v", w.Code, w.Header())
	}
}
