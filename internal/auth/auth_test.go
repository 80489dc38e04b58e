package auth_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/internal/auth"
)

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func TestNewKeyIsWhatTheStrictestSDKAccepts(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		key, secret := auth.NewKey("ci", true, noon)
		if !auth.ValidKeyForm(secret) {
			t.Fatalf("secret %q has not the form", secret)
		}
		if seen[secret] || seen[key.ID] {
			t.Fatalf("secret or ID came twice: %q %q", secret, key.ID)
		}
		seen[secret], seen[key.ID] = true, true
	}
}

func TestAStoredKeyDoesNotTellItsSecret(t *testing.T) {
	key, secret := auth.NewKey("ci", false, noon)
	text, err := json.Marshal(key)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), secret[8:]) {
		t.Fatalf("%s contains the secret", text)
	}
	var back auth.Key
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(key, back); diff != "" {
		t.Fatal(diff)
	}
	if back.Hash != auth.HashOf(secret) {
		t.Fatal("the hash read back is not the secret's")
	}
}

func TestShortSecretsKeepMostOfThemselvesOutOfTheHint(t *testing.T) {
	for _, secret := range []string{"", "abc", "sk_local"} {
		if hint := auth.KeyFor(secret, "", false, noon).Hint; len(hint)*4 > len(secret) {
			t.Errorf("hint of %q is %q", secret, hint)
		}
	}
}

func TestHashRefusesMalformedText(t *testing.T) {
	for _, text := range []string{"", "00", strings.Repeat("0", 63), strings.Repeat("0", 66), strings.Repeat("x", 64)} {
		var h auth.Hash
		if err := h.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}

func TestFind(t *testing.T) {
	a, secretA := auth.NewKey("a", false, noon)
	b, secretB := auth.NewKey("b", true, noon)
	unset := auth.KeyFor("", "empty", true, noon)
	keys := []auth.Key{a, b, unset}
	tests := []struct {
		name, secret string
		want         string
		ok           bool
	}{
		{"the first key", secretA, a.ID, true},
		{"the second key", secretB, b.ID, true},
		{"a secret in capitals", strings.ToUpper(secretA), "", false},
		{"a secret with more behind it", secretA + "0", "", false},
		{"the stored hash itself", a.Hash.String(), "", false},
		{"no secret, though a stored one is empty", "", "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := auth.Find(keys, tt.secret)
			if got.ID != tt.want || ok != tt.ok {
				t.Fatalf("got %q %v, want %q %v", got.ID, ok, tt.want, tt.ok)
			}
		})
	}
}

func TestEqual(t *testing.T) {
	tests := []struct {
		name      string
		got, want string
		equal     bool
	}{
		{"the same", "token", "token", true},
		{"another", "tokem", "token", false},
		{"a prefix", "toke", "token", false},
		{"nothing sent", "", "token", false},
		{"nothing set and nothing sent", "", "", false},
	}
	for _, tt := range tests {
		if got := auth.Equal(tt.got, tt.want); got != tt.equal {
			t.Errorf("%s: Equal(%q, %q) = %v", tt.name, tt.got, tt.want, got)
		}
	}
}

// The vector was computed by the SDKs' own code.
func TestFileSignatureVector(t *testing.T) {
	got := auth.FileAccess{Path: "hello.txt", Operation: auth.ReadFile, User: "user"}.Sign("0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0")
	if want := "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E"; got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
}

func TestFileSignatures(t *testing.T) {
	const token = "0123456789abcdef0123456789abcdef"
	signed := auth.FileAccess{Path: "/a", Operation: auth.ReadFile, User: "user", Expires: noon.Unix()}
	signature := signed.Sign(token)
	tests := []struct {
		name   string
		access auth.FileAccess
		token  string
		at     time.Time
		want   bool
	}{
		{"as signed", signed, token, noon, true},
		{"one second late", signed, token, noon.Add(time.Second), false},
		{"another path", auth.FileAccess{Path: "/b", Operation: auth.ReadFile, User: "user", Expires: noon.Unix()}, token, noon, false},
		{"writing", auth.FileAccess{Path: "/a", Operation: auth.WriteFile, User: "user", Expires: noon.Unix()}, token, noon, false},
		{"another user", auth.FileAccess{Path: "/a", Operation: auth.ReadFile, User: "root", Expires: noon.Unix()}, token, noon, false},
		{"a later expiry", auth.FileAccess{Path: "/a", Operation: auth.ReadFile, User: "user", Expires: noon.Unix() + 1}, token, noon, false},
		{"the expiry left out", auth.FileAccess{Path: "/a", Operation: auth.ReadFile, User: "user"}, token, noon, false},
		{"another token", signed, "f123456789abcdef0123456789abcdef", noon, false},
		{"no token", signed, "", noon, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.access.Verify(tt.token, signature, tt.at); got != tt.want {
				t.Fatalf("got %v, want %v", got, tt.want)
			}
		})
	}
	if open := (auth.FileAccess{Path: "/a", Operation: auth.ReadFile}); open.Verify("", open.Sign(""), noon) {
		t.Fatal("a signature was accepted where there is no token")
	}
}

func TestURLTokens(t *testing.T) {
	access := auth.URLAccess{Sandbox: "iabc", Port: 3000, Link: "u1", Expires: noon}
	token := access.Sign("key")
	parts := strings.Split(token, ".")
	with := func(at int, value string) string {
		changed := append([]string(nil), parts...)
		changed[at] = value
		return strings.Join(changed, ".")
	}
	tests := []struct {
		name    string
		key     string
		token   string
		sandbox string
		port    uint16
		want    bool
	}{
		{"as signed", "key", token, "iabc", 3000, true},
		{"another port", "key", token, "iabc", 3001, false},
		{"a port that shares digits with the expiry", "key", token, "iabc", 300, false},
		{"another sandbox", "key", token, "iabd", 3000, false},
		{"another key", "kez", token, "iabc", 3000, false},
		{"no key", "", token, "iabc", 3000, false},
		{"a later expiry", "key", with(1, "1767358801"), "iabc", 3000, false},
		{"another link", "key", with(2, "u2"), "iabc", 3000, false},
		{"no link", "key", with(2, ""), "iabc", 3000, false},
		{"a link with a dot in it", "key", with(2, "u.1"), "iabc", 3000, false},
		{"the MAC cut", "key", token[:len(token)-2], "iabc", 3000, false},
		{"the MAC with a line break, which decoders skip", "key", token + "\n", "iabc", 3000, false},
		{"the MAC with padding", "key", token + "=", "iabc", 3000, false},
		{"no MAC", "key", with(3, ""), "iabc", 3000, false},
		{"an expiry with a zero before it", "key", with(1, "0"+parts[1]), "iabc", 3000, false},
		{"an expiry with a sign", "key", with(1, "+"+parts[1]), "iabc", 3000, false},
		{"an expiry before 1970", "key", auth.URLAccess{Sandbox: "iabc", Port: 3000, Expires: time.Unix(-1, 0)}.Sign("key"), "iabc", 3000, false},
		{"an expiry beyond all calendars", "key", with(1, "999999999999999999"), "iabc", 3000, false},
		{"another version", "key", with(0, "c2"), "iabc", 3000, false},
		{"nothing", "key", "", "iabc", 3000, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			read, ok := auth.ParseURLToken(tt.token)
			if got := ok && read.Genuine(tt.key, tt.sandbox, tt.port); got != tt.want {
				t.Fatalf("got %v, want %v", got, tt.want)
			}
			if tt.want && (read.Link != "u1" || !read.Expires.Equal(noon)) {
				t.Fatalf("read %+v", read)
			}
		})
	}
}

// A token has one spelling: whatever is read is what would have been written.
func FuzzURLToken(f *testing.F) {
	f.Add(auth.URLAccess{Sandbox: "iabc", Port: 3000, Link: "u1", Expires: noon}.Sign("key"))
	f.Add(auth.URLAccess{Sandbox: "iabc", Port: 3000, Expires: noon}.Sign("key"))
	f.Add("c1.1.x.AAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("c1...")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		read, ok := auth.ParseURLToken(s)
		if !ok {
			return
		}
		if len(s) > 128 {
			t.Fatalf("%d octets were accepted", len(s))
		}
		again := auth.URLAccess{Sandbox: "iabc", Port: 3000, Link: read.Link, Expires: read.Expires}.Sign("key")
		if genuine := read.Genuine("key", "iabc", 3000); genuine != (again == s) {
			t.Fatalf("%q is genuine: %v, and would be written %q", s, genuine, again)
		}
	})
}
