package agent

import (
	"bytes"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/agent/wire"
)

func FuzzResolveStaysAbsolute(f *testing.F) {
	for _, p := range []string{"", "~", "~/a", "~a", "/", "/a/../..", "a/./b", "..", "\x00", "~\\x"} {
		f.Add(p, "/w")
	}
	u := user{Home: "/home/user"}
	f.Fuzz(func(t *testing.T, p, workdir string) {
		got, err := resolve(p, u, workdir)
		if err != nil {
			return
		}
		if !path.IsAbs(got) || got != path.Clean(got) || strings.ContainsRune(got, 0) {
			t.Errorf("resolve(%q, %q) = %q", p, workdir, got)
		}
		if p != "" && p[0] != '/' && !strings.Contains(p, "..") && got != u.Home && !strings.HasPrefix(got, u.Home+"/") {
			t.Errorf("resolve(%q) = %q left the home", p, got)
		}
	})
}

func FuzzSignatureAdmitsOnlyItsOwn(f *testing.F) {
	f.Add("hello.txt", "user", "", "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E")
	f.Add("a:b", "c", "99999999999", "v1_")
	f.Add("", "", "-1", "")
	c := &claim{Claim: wire.Claim{AccessToken: testToken}}
	now := time.Unix(1_700_000_000, 0)
	f.Fuzz(func(t *testing.T, p, name, expires, signature string) {
		q := url.Values{"path": {p}, "username": {name}, "signature": {signature}, "signature_expiration": {expires}}
		err := c.checkSignature(q, opRead, now)
		if err == nil && signature != sign(p, opRead, name, testToken, expires) {
			t.Fatalf("%q admitted", signature)
		}
		q.Set("signature", sign(p, opWrite, name, testToken, expires))
		if c.checkSignature(q, opRead, now) == nil {
			t.Fatal("a signature for writing read")
		}
	})
}

func FuzzFileNameOfAPart(f *testing.F) {
	for _, s := range []string{
		`form-data; name="file"; filename="/tmp/echo_host.py"`, `form-data; name="file"; filename*=UTF-8''%e2%82%ac`,
		`form-data; name=file; filename=`, `;`, "", `form-data; filename="a\"b"`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if name, err := fileName(s); err == nil && name == "" {
			t.Errorf("%q gave an empty name", s)
		}
	})
}

func FuzzAccounts(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/bash\ntester:x:1000:1000::/home/t:/bin/sh\n", "g:x:5:tester\n")
	f.Add("tester:x:-1:99999999999::..:\n", "g:x::tester,,\n:::\n")
	f.Add(strings.Repeat("x", 70_000)+"\ntester:x:1:1::/:\n", "")
	f.Fuzz(func(t *testing.T, passwd, group string) {
		dir := t.TempDir()
		for name, text := range map[string]string{"passwd": passwd, "group": group} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s := &users{etc: dir}
		u, err := s.lookup("tester")
		if err == nil && (u.Name != "tester" || !path.IsAbs(u.Home) || len(u.Groups) == 0 || u.Groups[0] != u.GID) {
			t.Errorf("%+v", u)
		}
		if _, err := s.names(); err != nil {
			t.Error(err)
		}
	})
}

func FuzzHostsBlockIsWrittenOnce(f *testing.F) {
	f.Add("127.0.0.1 localhost\n")
	f.Add(blockBegin + "\nx\n" + blockEnd + "\nmine\n")
	f.Add(blockEnd + "\n" + blockBegin)
	own := []netip.Addr{netip.MustParseAddr("192.0.2.2")}
	f.Fuzz(func(t *testing.T, old string) {
		once := hostsFile([]byte(old), "name", own)
		if n := strings.Count(string(once), "192.0.2.2\tname\n"); n < 1 {
			t.Errorf("the name is missing from %q", once)
		}
		if strings.Count(old, blockBegin) > 1 || strings.Contains(old, blockEnd) && !strings.Contains(old, blockBegin) {
			return // somebody played with our markers: anything stable will do
		}
		if twice := hostsFile(once, "name", own); string(twice) != string(once) {
			t.Errorf("%q then %q", once, twice)
		}
	})
}

func FuzzAcceptEncoding(f *testing.F) {
	for _, s := range []string{"", "gzip", "gzip;q=0, identity;q=0", "*;q=0", "x-gzip ; q=0.5", ";;,,q="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		gz, plain := acceptable(s)
		if !strings.Contains(strings.ToLower(s), "q=") && !plain {
			t.Errorf("%q: identity refused without a weight", s)
		}
		if gz && !strings.Contains(strings.ToLower(s), "gzip") && !strings.Contains(s, "*") {
			t.Errorf("%q: gzip was not offered", s)
		}
	})
}

// FuzzFrames sends bodies as they come to a stream and to a call: whatever they
// are, the agent answers, and with an error of the protocol.
func FuzzFrames(f *testing.F) {
	frame := func(flags byte, body string) []byte {
		return append([]byte{flags, byte(len(body) >> 24), byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	}
	f.Add("Start", "application/connect+json", frame(0, `{"process":{"cmd":"/nonexistent"}}`))
	f.Add("Start", "application/connect+json", []byte{0, 0xff, 0xff, 0xff, 0xff, '{'})
	f.Add("Start", "application/connect+json", frame(1, "\x1f\x8b not gzip"))
	f.Add("StreamInput", "application/connect+json", append(frame(0, `{"data":{"input":{"stdin":"AA=="}}}`), frame(2, "{}")...))
	f.Add("Connect", "application/connect+json", frame(0x80, `{"process":{"pid":4294967296}}`))
	f.Add("SendSignal", "application/json", []byte(`{"process":{"pid":1},"signal":"SIGNAL_SIGKILL"}`))
	f.Add("List", "application/json", []byte(strings.Repeat("[", 20_000)))
	a, err := New(Config{ControlHash: [32]byte{1}, Etc: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	a.claim.Store(&claim{Claim: wire.Claim{DefaultUser: "nobody-here"}}) // so that nothing is ever started
	f.Fuzz(func(t *testing.T, method, kind string, body []byte) {
		if strings.ContainsAny(method, " ?#%/\x7f") || strings.ContainsFunc(method, func(r rune) bool { return r < ' ' || r > '~' }) {
			return // another route
		}
		r := httptest.NewRequest("POST", "/process.Process/"+method, bytes.NewReader(body))
		r.Header.Set("Content-Type", kind)
		r.Header.Set("Connect-Protocol-Version", "1")
		r.Header.Set("Connect-Timeout-Ms", "1000")
		w := httptest.NewRecorder()
		a.handler.ServeHTTP(w, r)
		if w.Code >= 500 && w.Code != 501 {
			t.Errorf("%s %s %q: %d %s", method, kind, body, w.Code, w.Body)
		}
		if len(a.procs.list()) > 0 {
			t.Error("a process was started")
		}
	})
}

// FuzzForm uploads forms as they come into a directory: nothing is written outside
// of it, and nothing half.
func FuzzForm(f *testing.F) {
	part := func(disposition, body string) string {
		return "--b\r\nContent-Disposition: " + disposition + "\r\n\r\n" + body + "\r\n"
	}
	f.Add(part(`form-data; name="file"; filename="a/b.txt"`, "one") + part(`form-data; name="file"; filename="c"`, "two") + "--b--\r\n")
	f.Add(part(`form-data; name="file"; filename="../../up"`, "one") + "--b--")
	f.Add(part(`form-data; name="file"; filename="cut"`, "one"))
	f.Add("--b\r\n" + strings.Repeat("X: y\r\n", 2000) + "\r\n\r\n--b--")
	f.Add(part(`form-data; name="other"; filename="x"`, "") + part(`form-data; name="file"`, "") + "--b--")
	f.Fuzz(func(t *testing.T, body string) {
		home := t.TempDir()
		up := upload{user: user{Name: "me", UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), Home: home}, filling: new(turns)}
		if strings.Contains(body, "..") || strings.Contains(body, `="/`) || strings.Contains(body, "=/") || strings.Contains(body, "*") || strings.Contains(body, `\`) {
			return // absolute paths are the caller's right; not on the machine of the test
		}
		done, err := up.form("multipart/form-data; boundary=b", bodyReader{strings.NewReader(body)})
		if err != nil {
			return
		}
		for _, w := range done {
			if !strings.HasPrefix(w.Path, home+"/") {
				t.Errorf("wrote %s", w.Path)
			}
		}
	})
}
