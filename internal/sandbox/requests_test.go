package sandbox_test

import (
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

func TestValidMaskHost(t *testing.T) {
	tests := []struct {
		name string
		mask string
		ok   bool
	}{
		{"empty means no mask", "", true},
		{"a host", "localhost", true},
		{"a host and the real port", "localhost:${PORT}", true},
		{"the port inside the name", "${PORT}.example.com", true},
		{"a fixed port", "app.example.com:8080", true},
		{"an IPv4 address", "127.0.0.1:${PORT}", true},
		{"an IPv6 address", "[::1]:${PORT}", true},
		{"an IPv6 address without a port", "[::1]", true},
		{"a space", "local host", false},
		{"a URL", "http://localhost", false},
		{"a path", "localhost/x", false},
		{"a line break", "localhost\r\nX: y", false},
		{"not ASCII", "bücher.example", false},
		{"user information", "me@localhost", false},
		{"an empty port", "localhost:", false},
		{"port zero", "localhost:0", false},
		{"a port over 65535", "localhost:65536", false},
		{"a name for a port", "localhost:http", false},
		{"another variable", "localhost:${HOST}", false},
		{"an empty label", "a..b", false},
		{"an IPv6 address without brackets", "::1", false},
		{"brackets around a name", "[localhost]:80", false},
		{"a zone", "[fe80::1%eth0]:80", false},
		{"a label over 63 octets", strings.Repeat("a", 64), false},
		{"over 253 octets", strings.Repeat("a.", 130) + "a", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := sandbox.ValidMaskHost(tt.mask)
			if tt.ok && err != nil {
				t.Fatalf("ValidMaskHost(%q) = %v, want nil", tt.mask, err)
			}
			if tt.ok {
				return
			}
			if !errs.Is(err, errs.Invalid) {
				t.Fatalf("ValidMaskHost(%q) = %v, want an Invalid error", tt.mask, err)
			}
			if got, want := err.Error(), "mask request host is not valid: "+tt.mask; got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
		})
	}
}
