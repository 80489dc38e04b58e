package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cordonhq/cordon/internal/errs"
)

const needsDenyAll = "When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic."

func mustCompile(t testing.TB, in Input, op *Operator) *Compiled {
	t.Helper()
	c, err := Compile(in, op, 7)
	if err != nil {
		t.Fatalf("compile %+v: %v", in, err)
	}
	return c
}

func many(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%d.%d.%d.0/24", 1+i/65536, i/256%256, i%256)
	}
	return out
}

func TestCompileRefusesWhatCannotBe(t *testing.T) {
	all := []string{"0.0.0.0/0"}
	tests := []struct {
		name string
		in   Input
		want string
	}{
		{"a domain in the deny list", Input{DenyOut: []string{"example.com"}}, "invalid denied CIDR example.com"},
		{"a wildcard in the deny list", Input{DenyOut: []string{"*.example.com"}}, "invalid denied CIDR *.example.com"},
		{"a star in the deny list", Input{DenyOut: []string{"*"}}, "invalid denied CIDR *"},
		{"a broken CIDR in the deny list", Input{DenyOut: []string{"10.0.0.0/33"}}, "invalid denied CIDR 10.0.0.0/33"},
		{"an empty denied entry", Input{DenyOut: []string{""}}, "invalid denied CIDR "},
		{"the second entry is named", Input{DenyOut: []string{"1.2.3.4", "1.2.3"}}, "invalid denied CIDR 1.2.3"},
		{"a domain without deny-all", Input{AllowOut: []string{"example.com"}}, needsDenyAll},
		{"a domain with only part of the net denied", Input{AllowOut: []string{"example.com"}, DenyOut: []string{"0.0.0.0/1", "128.0.0.0/1"}}, needsDenyAll},
		{"a domain with only IPv6 denied", Input{AllowOut: []string{"example.com"}, DenyOut: []string{"::/0"}}, needsDenyAll},
		{"a domain with one port denied", Input{AllowOut: []string{"example.com"}, DenyOut: []string{"0.0.0.0/0:443"}}, needsDenyAll},
		{"a domain with internet access explicitly on", Input{AllowOut: []string{"example.com"}, AllowInternetAccess: new(true)}, needsDenyAll},
		{"a star without deny-all", Input{AllowOut: []string{"*"}}, needsDenyAll},
		{"a domain with port without deny-all", Input{AllowOut: []string{"example.com:5432"}}, needsDenyAll},
		{"10,001 allowed entries", Input{AllowOut: many(10_001)}, "network.allowOut has 10001 entries, the most is 10000: merge CIDRs or use wildcards"},
		{"10,001 denied entries", Input{DenyOut: many(10_001)}, "network.denyOut has 10001 entries, the most is 10000: merge CIDRs or use wildcards"},
		{"an unknown DNS mode", Input{DNS: "closed"}, `network.dns is "closed": use "open", "strict" or leave it out`},
		{"an unknown way to deny", Input{OnDeny: "drop"}, `network.onDeny is "drop": use "explain", "reset" or leave it out`},
		{"an unknown mode", Input{Mode: "off"}, `network.mode is "off": use "enforce", "observe" or leave it out`},
	}
	for _, bad := range []string{
		"", " ", "example.com ", " example.com", "exa mple.com", "https://example.com", "http://1.2.3.4/", "example.com/path",
		"*foo.com", "a.*.com", "**.x", "*.", "*.*", "*.*.com", "foo*", "*.foo*", ".example.com", "example..com", "..", ".",
		"-a.com", "user@example.com", "example.com:0", "example.com:65536",
		"example.com:", "example.com:080", "example.com:+80", "example.com:80:80", ":80", "1.2.3.4:99999", "[1.2.3.4]:80", "[example.com]:80",
		"[2001:db8::1]", "[2001:db8::1:443", "2001:db8::g", "fe80::1%eth0", "0x7f.1", "127.1", "2130706433", "0177.0.0.1", "0x7f000001",
		"1.2.3.4.5", "a.0x1", "a.0x", "1.2.3.4/", "1.2.3.4/-1", "1.2.3.4/08", "2001:db8::/129", "exam\x00ple.com", "exam\nple.com", "example.com\\", "a\u200db.com\u2028",
		"xn--\u00fc.com", strings.Repeat("a", 64) + ".com", strings.Repeat("a.", 127) + "aa", "%65xample.com", "ex,ample.com", "\uff0e", "a\uff0e\uff0eb",
	} {
		tests = append(tests, struct {
			name string
			in   Input
			want string
		}{fmt.Sprintf("allowed entry %q", bad), Input{AllowOut: []string{bad}, DenyOut: all}, "invalid allowed address " + bad})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Compile(tt.in, nil, 1)
			if err == nil {
				t.Fatal("compiled")
			}
			if !errs.Is(err, errs.Invalid) {
				t.Errorf("kind %v, want invalid", errs.KindOf(err))
			}
			if got := err.Error(); got != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

func TestParseEntryNormalises(t *testing.T) {
	pfx := netip.MustParsePrefix
	tests := []struct {
		in   string
		want entry
	}{
		{"1.2.3.4", entry{prefix: pfx("1.2.3.4/32")}},
		{"1.2.3.4/8", entry{prefix: pfx("1.0.0.0/8")}},
		{"255.255.255.255", entry{prefix: pfx("255.255.255.255/32")}},
		{"2001:db8::1", entry{prefix: pfx("2001:db8::1/128")}},
		{"2001:DB8::1/32", entry{prefix: pfx("2001:db8::/32")}},
		{"::ffff:1.2.3.4", entry{prefix: pfx("1.2.3.4/32")}},
		{"::ffff:1.2.3.4/120", entry{prefix: pfx("1.2.3.0/24")}},
		{"1.2.3.4:80", entry{prefix: pfx("1.2.3.4/32"), port: 80}},
		{"1.2.3.4/24:80", entry{prefix: pfx("1.2.3.0/24"), port: 80}},
		{"[2001:db8::1]:443", entry{prefix: pfx("2001:db8::1/128"), port: 443}},
		{"[2001:db8::/32]:443", entry{prefix: pfx("2001:db8::/32"), port: 443}},
		{"2001:db8::/32:443", entry{prefix: pfx("2001:db8::/32"), port: 443}},
		{"2001:db8::1:443", entry{prefix: pfx("2001:db8::1:443/128")}},
		{"example.com", entry{name: "example.com"}},
		{"EXAMPLE.com.", entry{name: "example.com"}},
		{"localhost", entry{name: "localhost"}},
		{"example.com:5432", entry{name: "example.com", port: 5432}},
		{"*.Example.com", entry{name: "example.com", wildcard: true}},
		{"*.example.com:8443", entry{name: "example.com", wildcard: true, port: 8443}},
		{"*", entry{wildcard: true}},
		{"*:8443", entry{wildcard: true, port: 8443}},
		{"bücher.example", entry{name: "xn--bcher-kva.example"}},
		{"*.BÜCHER.example", entry{name: "xn--bcher-kva.example", wildcard: true}},
		{"straße.example", entry{name: "xn--strae-oqa.example"}},
		{"example。com", entry{name: "example.com"}},
		{"exаmple.com", entry{name: "xn--exmple-4nf.com"}}, // Cyrillic а: another name, not ours
		{"r3---sn-x.example.com", entry{name: "r3---sn-x.example.com"}},
		{"3com.com", entry{name: "3com.com"}},
		{"1.2.3.4.example", entry{name: "1.2.3.4.example"}},
		{strings.Repeat("a", 63) + ".com", entry{name: strings.Repeat("a", 63) + ".com"}},
		{strings.Repeat("a.", 126) + "a", entry{name: strings.Repeat("a.", 126) + "a"}},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, err := parseEntry(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestCanonicalNameRefusesWhatIsNoDomainName(t *testing.T) {
	for _, name := range []string{
		"", ".", "..", "example.com..", ".example.com", "a..b", "exam ple.com", "exam\x00ple.com", "example.com\r", "a\\b.com", "a/b.com",
		"user@a.com", "a.com:80", "[a.com]", "[::1]", "::1", "1.2.3.4", "1.2.3.4.", "127.1", "0x7f.1", "0X7F.0x1", "2130706433", "017700000001",
		"*.a.com", "*", "-a.com", "a.-.com", "exаmple.com", "example\uff0ecom", "ü.com", strings.Repeat("a", 64), strings.Repeat("a.", 127) + "aa", "a\x7f.com", "a%2eb.com",
	} {
		if got, ok := CanonicalName(name); ok {
			t.Errorf("CanonicalName(%q) = %q, want refused", name, got)
		}
	}
	for in, want := range map[string]string{
		"example.com": "example.com", "EXAMPLE.Com": "example.com", "example.com.": "example.com", "a": "a", "xn--bcher-kva.example": "xn--bcher-kva.example",
		"1.2.3.4a": "1.2.3.4a", "0xg": "0xg", "9.example": "9.example",
	} {
		if got, ok := CanonicalName(in); !ok || got != want {
			t.Errorf("CanonicalName(%q) = %q, %v, want %q", in, got, ok, want)
		}
	}
}

func TestCompileKeepsItsOwnCopyOfTheInput(t *testing.T) {
	in := Input{AllowOut: []string{"1.2.3.4"}, DenyOut: []string{"0.0.0.0/0"}, AllowInternetAccess: new(false)}
	want := clone(in)
	c := mustCompile(t, in, nil)
	in.AllowOut[0], *in.AllowInternetAccess = "5.6.7.8", true
	if diff := cmp.Diff(want, c.Input()); diff != "" {
		t.Error(diff)
	}
	if got := c.Generation(); got != 7 {
		t.Errorf("generation %d, want 7", got)
	}
	if c.OnDeny() != OnDenyExplain || c.Mode() != ModeEnforce {
		t.Errorf("defaults %q %q, want explain and enforce", c.OnDeny(), c.Mode())
	}
}

func TestCompileRefusesABadOperator(t *testing.T) {
	tests := []struct {
		name string
		op   Operator
		want string
	}{
		{"a broken hole", Operator{FloorOpen: []string{"10.0.0.1", "10.0.0.0/99"}}, `operator floorOpen[1] is "10.0.0.0/99": neither an IP address, a CIDR nor a domain name`},
		{"a wildcard exception", Operator{FloorOpen: []string{"*.internal"}}, `operator floorOpen[0] is "*.internal": an exception to the always blocked ranges needs an exact name`},
		{"a broken deny", Operator{AlwaysDeny: []string{"a b"}}, `operator alwaysDeny[0] is "a b": neither an IP address, a CIDR nor a domain name`},
		{"a bad port", Operator{AlwaysAllow: []string{"a.com:x"}}, `operator alwaysAllow[0] is "a.com:x": the port must be a decimal number from 1 to 65535`},
		{"a self domain that is an address", Operator{SelfDomains: []string{"127.0.0.1"}}, `operator selfDomains[0] is "127.0.0.1": not a domain name`},
		{"a zero host address", Operator{HostAddrs: make([]netip.Prefix, 1)}, `operator hostAddrs[0] is not a valid prefix`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Compile(Input{}, &tt.op, 1)
			if err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// hostNames are names as hosts have them and clients send them.
var hostNames = map[string]string{
	"data_set.s3.a.test": "data_set.s3.a.test", "_x.a.test": "_x.a.test", "a_.test": "a_.test", "_": "_", "Ends-.With.a-.Test.": "ends-.with.a-.test",
	"xn--bcher-kva.test": "xn--bcher-kva.test", "a--b.test": "a--b.test",
}

func TestOneGrammarOfHostNames(t *testing.T) {
	for in, want := range hostNames {
		for _, f := range []func(string) (string, bool){CanonicalName, CanonicalHost} {
			if got, ok := f(in); !ok || got != want {
				t.Errorf("%q is %q, %v, want %q", in, got, ok, want)
			}
		}
		c, err := Compile(Input{AllowOut: []string{in, "*." + in, in + ":5432"}, DenyOut: []string{"0.0.0.0/0"}}, nil, 1)
		if err != nil {
			t.Errorf("rule %q: %v", in, err)
			continue
		}
		if v := c.DecideQuery(want); !v.Allow {
			t.Errorf("a query for %q: %+v", want, v)
		}
		seen := []Seen{{Proto: TCP, Dst: netip.MustParseAddrPort("198.51.100.1:443"), Name: in}}
		if got := Suggest(seen, Exactly); len(got.AllowOut) != 1 || got.AllowOut[0] != want {
			t.Errorf("suggested for %q: %q", in, got.AllowOut)
		}
	}
	for _, name := range []string{"data_set.a.test", "a-.test", "a.-.test", "ü.test", "a"} {
		if got, ok := PublicName(name); ok && name != "a" || got != name && name == "a" {
			t.Errorf("a public name: %q is %q, %v", name, got, ok)
		}
	}
}

func TestCanonicalHostOfOtherScripts(t *testing.T) {
	const label = "xn--bcher-kva.test"
	for _, in := range []string{"bücher.test", "B\u00dcCHER.test.", "b\xfccher.test", "B\xdcCHER.TEST"} {
		if got, ok := CanonicalHost(in); !ok || got != label {
			t.Errorf("%q is %q, %v, want %q", in, got, ok, label)
		}
	}
	if got, ok := CanonicalHost("data_set.b\xfccher.test"); !ok || got != "data_set."+label {
		t.Errorf("with an underscore: %q, %v", got, ok)
	}
	for _, in := range []string{ // read as something else by a reader that maps less, or more
		"ａllowed.test", "allowed．test", "allowed。test", "allowed｡test", "allow\u200bed.test", "allow\u00aded.test", "\u017fomething.test", "¼.test", "℀.test",
		"bu\u0308cher.test", "b\xfccher\x00.test", "b\xfccher .test", "b\xfccher..test", "-b\xfccher.test", strings.Repeat("\xfc", 70) + ".test", strings.Repeat("ü.", 2000), "\xfc", "١٢٣.٤", "a\xa0b.test", "\x80.test",
	} {
		if got, ok := CanonicalHost(in); ok && in != "\xfc" {
			t.Errorf("%q is %q, want refused", in, got)
		}
	}
}
