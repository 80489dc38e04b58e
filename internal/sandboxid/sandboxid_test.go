package sandboxid

import (
	"regexp"
	"testing"
)

func TestIDsHaveTheirForm(t *testing.T) {
	seen := map[ID]bool{}
	for range 1000 {
		id := New()
		if !id.Valid() || seen[id] {
			t.Fatalf("%q is not valid, or was there before", id)
		}
		seen[id] = true
	}
	for _, bad := range []ID{"", "i", "i2345678901234567890", "s12345678901234567890", "i1234567890123456789A", "i12345678901234567890\n", "i123456789012345678901"} {
		if bad.Valid() {
			t.Errorf("%q is valid", bad)
		}
	}
}

func TestNamesUseTheWholeAlphabet(t *testing.T) {
	seen := map[rune]bool{}
	for range 1000 {
		name := Name('c')
		if !regexp.MustCompile(`^c[0-9a-z]{20}$`).MatchString(name) {
			t.Fatalf("name %q", name)
		}
		for _, r := range name[1:] {
			seen[r] = true
		}
	}
	if len(seen) != 36 {
		t.Errorf("%d letters and digits are used, want 36", len(seen))
	}
}

func TestTokensDoNotRepeat(t *testing.T) {
	a, b := NewToken(), NewToken()
	if a == b || !regexp.MustCompile(`^[0-9a-z]{26,}$`).MatchString(a) {
		t.Errorf("tokens %q and %q", a, b)
	}
}
