package policy

import (
	"net/netip"
	"strings"
	"testing"
)

func FuzzCompile(f *testing.F) {
	for _, s := range []string{"1.2.3.4", "1.2.3.0/24:80", "[2001:db8::1]:443", "*.example.com", "bücher.example:5432", "*", "::ffff:1.2.3.4/100", "https://x", "a..b", "preset:npm", "preset:npm@2026-12", "preset:x"} {
		f.Add(s, "0.0.0.0/0", "1.2.3.4", "www.example.com")
	}
	f.Fuzz(func(t *testing.T, allow, deny, addr, name string) {
		c, err := Compile(Input{AllowOut: []string{allow}, DenyOut: []string{deny}}, nil, 1)
		if err != nil {
			return
		}
		entries, err := expand(allow)
		if err != nil {
			t.Fatalf("compiled %q, parse says %v", allow, err)
		}
		for _, e := range entries {
			if e.isAddr() == (e.name != "" || e.wildcard) || e.isAddr() && e.prefix != e.prefix.Masked() {
				t.Fatalf("%q parsed to %+v", allow, e)
			}
			if got, ok := CanonicalName(e.name); e.name != "" && (!ok || got != e.name) {
				t.Fatalf("%q stored as %q, which is not canonical", allow, e.name)
			}
		}
		name, _ = CanonicalName(name)
		a, _ := netip.ParseAddr(addr)
		for _, port := range somePorts {
			v := c.Decide(Flow{Proto: TCP, Dst: netip.AddrPortFrom(a, port), Name: name})
			if v.Rule.ID == "" || v.Reason == "" {
				t.Fatalf("verdict without rule or reason: %+v", v)
			}
			if _, floor := c.inFloor(plain(a)); floor && v.Allow {
				t.Fatalf("%q opened the floor: %+v", allow, v)
			}
		}
		c.DecideQuery(name)
		c.PinPorts(name)
		c.WildcardOf(name)
		c.Kernel()
	})
}

func FuzzCanonicalName(f *testing.F) {
	for _, s := range []string{"example.com", "EXAMPLE.com.", "0x7f.1", "a..b", "xn--bcher-kva.example", "1.2.3.4", "a.0X", strings.Repeat("a.", 127)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, ok := CanonicalName(s)
		if !ok {
			if got != "" {
				t.Fatalf("%q refused but %q returned", s, got)
			}
			return
		}
		if again, ok := CanonicalName(got); !ok || again != got {
			t.Fatalf("%q became %q, which becomes %q", s, got, again)
		}
		if len(got) > maxName || strings.ContainsAny(got, "ABCDEFGHIJKLMNOPQRSTUVWXYZ \x00/\\:@[]*_%") || strings.Contains(got, "..") {
			t.Fatalf("%q became %q", s, got)
		}
		if _, err := netip.ParseAddr(got); err == nil {
			t.Fatalf("%q is an address", got)
		}
		if e, err := parseEntry(got); err != nil || e.name != got {
			t.Fatalf("%q is a name, but as a rule it is %+v, %v", got, e, err)
		}
	})
}
