package server

import (
	"net/netip"
	"testing"
)

func TestEverySandboxHasALoopbackAddressOfItsOwn(t *testing.T) {
	tests := []struct {
		name, subnet, src, want string
	}{
		{"the first sandbox", "10.223.0.0/16", "127.223.0.2", "10.223.0.2"},
		{"the last sandbox", "10.223.0.0/16", "127.223.255.254", "10.223.255.254"},
		{"the largest network", "10.0.0.0/8", "127.0.0.2", "10.0.0.2"},
		{"this machine's own clients", "10.0.0.0/8", "127.0.0.1", ""},
		{"the host's side of a slot", "10.223.0.0/16", "127.223.0.1", ""},
		{"another network's address", "10.223.0.0/16", "127.224.0.2", ""},
		{"a sandbox's address itself", "10.223.0.0/16", "10.223.0.2", ""},
		{"IPv6", "10.223.0.0/16", "::1", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := sandboxBehind(netip.MustParseAddr(tt.src), netip.MustParsePrefix(tt.subnet))
			if ok != (tt.want != "") || ok && got.String() != tt.want {
				t.Fatalf("got %s %v, want %q", got, ok, tt.want)
			}
			if ok && loopbackOf(got).String() != tt.src {
				t.Errorf("and back: %s", loopbackOf(got))
			}
		})
	}
}
