package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func flow(t testing.TB, s string) Flow {
	t.Helper()
	f := Flow{Proto: TCP}
	parts := strings.Fields(s)
	switch parts[0] {
	case "tcp":
	case "udp":
		f.Proto = UDP
	case "icmp":
		f.Proto = ICMP
	case "icmp6":
		f.Proto = ICMPv6
	case "sctp":
		f.Proto = 132
	default:
		t.Fatalf("flow %q: unknown protocol", s)
	}
	if f.Proto == ICMP || f.Proto == ICMPv6 {
		f.Dst = netip.AddrPortFrom(netip.MustParseAddr(parts[1]), 0)
	} else {
		f.Dst = netip.MustParseAddrPort(parts[1])
	}
	if len(parts) > 2 {
		f.Name = parts[2]
	}
	return f
}

// say is a verdict in one line: "allow allow-name allow[0]".
func say(v Verdict) string {
	word := "deny"
	if v.Allow {
		word = "allow"
	}
	if v.Observed {
		word = "observe"
	}
	return word + " " + string(v.Reason) + " " + v.Rule.ID
}

func TestDecideFollowsTheTable(t *testing.T) {
	all := []string{"0.0.0.0/0"}
	type checks map[string]string
	tests := []struct {
		name string
		in   Input
		want checks
	}{
		{"nothing: everything but the floor", Input{}, checks{
			"tcp 1.1.1.1:443":                "allow default default",
			"udp 1.1.1.1:53":                 "allow default default",
			"icmp 1.1.1.1":                   "allow default default",
			"tcp [2606:4700::1111]:443":      "allow default default",
			"icmp6 2606:4700::1111":          "allow default default",
			"sctp 1.1.1.1:443":               "deny protocol protocol",
			"tcp 10.0.0.1:443":               "deny floor floor",
			"tcp 1.1.1.1:443 whatever.com":   "allow default default",
			"tcp 169.254.169.254:80 meta.io": "deny floor floor",
		}},
		{"internet access off", Input{AllowInternetAccess: new(false)}, checks{
			"tcp 1.1.1.1:443":           "deny deny-address deny[internet]",
			"udp 8.8.8.8:53":            "deny deny-address deny[internet]",
			"tcp [2606:4700::1111]:443": "deny deny-address deny[internet]",
			"icmp6 2606:4700::1111":     "deny deny-address deny[internet]",
		}},
		{"internet access on changes nothing", Input{AllowInternetAccess: new(true), DenyOut: []string{"1.1.1.1"}}, checks{
			"tcp 1.1.1.1:443": "deny deny-address deny[0]",
			"tcp 1.1.1.2:443": "allow default default",
		}},
		{"allow wins over internet access off", Input{AllowInternetAccess: new(false), AllowOut: []string{"1.1.1.1", "a.com"}}, checks{
			"tcp 1.1.1.1:443":         "allow allow-address allow[0]",
			"tcp 9.9.9.9:443 a.com":   "allow allow-name allow[1]",
			"tcp 9.9.9.9:443":         "deny no-name deny[internet]",
			"tcp 9.9.9.9:443 b.com":   "deny name-denied deny[internet]",
			"tcp 9.9.9.9:22 a.com":    "deny deny-address deny[internet]",
			"udp 9.9.9.9:443 a.com":   "deny name-tcp-only deny[internet]",
			"udp 9.9.9.9:443 b.com":   "deny deny-address deny[internet]",
			"udp 9.9.9.9:123 a.com":   "deny deny-address deny[internet]",
			"udp 8.8.8.8:53":          "allow allow-dns dns",
			"tcp 8.8.8.8:53":          "allow allow-dns dns",
			"tcp 8.8.8.8:853":         "deny deny-address deny[internet]",
			"udp 1.1.1.1:53":          "allow allow-address allow[0]",
			"udp 8.8.4.4:53":          "deny deny-address deny[internet]",
			"tcp 8.8.8.8:443 a.com.x": "deny name-denied deny[internet]",
		}},
		{"deny-all means IPv6 too", Input{DenyOut: all}, checks{
			"tcp 1.1.1.1:443":           "deny deny-address deny[0]",
			"tcp [2606:4700::1111]:443": "deny deny-address deny[0]",
		}},
		{"the mapped spelling of deny-all is deny-all", Input{DenyOut: []string{"::ffff:0.0.0.0/96"}, AllowOut: []string{"a.com"}}, checks{
			"tcp [2606:4700::1111]:443": "deny no-name deny[0]",
		}},
		{"IPv6 deny-all leaves IPv4 alone", Input{DenyOut: []string{"::/0"}}, checks{
			"tcp 1.1.1.1:443":           "allow default default",
			"tcp [2606:4700::1111]:443": "deny deny-address deny[0]",
		}},
		{"allow beats deny though deny is more specific", Input{AllowOut: []string{"1.0.0.0/8"}, DenyOut: []string{"1.1.1.1/32"}}, checks{
			"tcp 1.1.1.1:443": "allow allow-address allow[0]",
		}},
		{"the longest rule is named, the first of equals", Input{DenyOut: []string{"1.0.0.0/8", "1.1.0.9/16", "1.1.0.0/16"}}, checks{
			"tcp 1.1.1.1:443": "deny deny-address deny[1]",
			"tcp 1.2.1.1:443": "deny deny-address deny[0]",
		}},
		{"names", Input{DenyOut: all, AllowOut: []string{"example.com", "*.example.org", "*.deep.example.org", "bücher.example"}}, checks{
			"tcp 9.9.9.9:443 example.com":           "allow allow-name allow[0]",
			"tcp 9.9.9.9:80 example.com":            "allow allow-name allow[0]",
			"tcp 9.9.9.9:8080 example.com":          "deny deny-address deny[0]",
			"tcp 9.9.9.9:443 www.example.com":       "deny name-denied deny[0]",
			"tcp 9.9.9.9:443 notexample.com":        "deny name-denied deny[0]",
			"tcp 9.9.9.9:443 example.com.evil.org":  "deny name-denied deny[0]",
			"tcp 9.9.9.9:443 example.org":           "deny name-denied deny[0]",
			"tcp 9.9.9.9:443 notexample.org":        "deny name-denied deny[0]",
			"tcp 9.9.9.9:443 a.example.org":         "allow allow-name allow[1]",
			"tcp 9.9.9.9:443 a.b.c.example.org":     "allow allow-name allow[1]",
			"tcp 9.9.9.9:443 x.deep.example.org":    "allow allow-name allow[2]",
			"tcp 9.9.9.9:443 deep.example.org":      "allow allow-name allow[1]",
			"tcp 9.9.9.9:443 xn--bcher-kva.example": "allow allow-name allow[3]",
			"tcp [2606:4700::1111]:443 example.com": "allow allow-name allow[0]",
			"tcp 10.1.2.3:443 example.com":          "deny floor floor",
		}},
		{"a star is any name, but some name", Input{DenyOut: all, AllowOut: []string{"*"}}, checks{
			"tcp 9.9.9.9:443 example.com": "allow allow-name allow[0]",
			"tcp 9.9.9.9:443":             "deny no-name deny[0]",
			"tcp 9.9.9.9:25 example.com":  "deny deny-address deny[0]",
		}},
		{"ports limit a rule", Input{DenyOut: all, AllowOut: []string{"a.com:5432", "1.2.3.0/24:22", "1.2.3.4", "b.com:443", "[2001:db8::1]:22"}}, checks{
			"tcp 9.9.9.9:5432 a.com":   "allow allow-name allow[0]",
			"tcp 9.9.9.9:5432":         "deny no-name deny[0]",
			"tcp 9.9.9.9:443 a.com":    "deny name-denied deny[0]",
			"tcp 1.2.3.9:22":           "allow allow-address allow[1]",
			"udp 1.2.3.9:22":           "allow allow-address allow[1]",
			"tcp 1.2.3.9:23":           "deny deny-address deny[0]",
			"icmp 1.2.3.9":             "deny deny-address deny[0]",
			"tcp 1.2.3.4:23":           "allow allow-address allow[2]",
			"icmp 1.2.3.4":             "allow allow-address allow[2]",
			"tcp 9.9.9.9:443 b.com":    "allow allow-name allow[3]",
			"tcp 9.9.9.9:80 b.com":     "deny deny-address deny[0]",
			"tcp [2001:db8::1]:22":     "allow allow-address allow[4]",
			"tcp [2001:db8::1]:23":     "deny deny-address deny[0]",
			"udp 8.8.8.8:53":           "allow allow-dns dns",
			"tcp 9.9.9.9:443 c.b.com":  "deny name-denied deny[0]",
			"tcp 9.9.9.9:5432 c.a.com": "deny name-denied deny[0]",
		}},
		{"a denied port", Input{DenyOut: []string{"0.0.0.0/0:25"}}, checks{
			"tcp 1.1.1.1:25":           "deny deny-address deny[0]",
			"tcp [2606:4700::1111]:25": "deny deny-address deny[0]",
			"tcp 1.1.1.1:26":           "allow default default",
			"icmp 1.1.1.1":             "allow default default",
		}},
		{"a floor entry in the allow list has no effect", Input{DenyOut: all, AllowOut: []string{"10.0.0.0/8", "169.254.169.254", "127.0.0.1", "::1"}}, checks{
			"tcp 10.1.1.1:80":        "deny floor floor",
			"tcp 169.254.169.254:80": "deny floor floor",
			"tcp 127.0.0.1:80":       "deny floor floor",
			"tcp [::1]:80":           "deny floor floor",
		}},
		{"mapped and translated forms are the IPv4 address", Input{DenyOut: []string{"1.2.3.4", "::ffff:5.6.7.0/120"}}, checks{
			"tcp [::ffff:1.2.3.4]:80":      "deny deny-address deny[0]",
			"tcp [64:ff9b::1.2.3.4]:80":    "deny deny-address deny[0]",
			"tcp [2002:102:304::1]:80":     "deny deny-address deny[0]",
			"tcp 5.6.7.8:80":               "deny deny-address deny[1]",
			"tcp [::ffff:9.9.9.9]:80":      "allow default default",
			"tcp [64:ff9b::9.9.9.9]:80":    "allow default default",
			"tcp [::ffff:10.0.0.1]:80":     "deny floor floor",
			"tcp [::10.0.0.1]:80":          "deny floor floor",
			"tcp [64:ff9b::10.0.0.1]:80":   "deny floor floor",
			"tcp [64:ff9b:1::a00:1]:80":    "deny floor floor",
			"tcp [2002:a00:1::1]:80":       "deny floor floor",
			"tcp [2002:a9fe:a9fe::]:80":    "deny floor floor",
			"tcp [2001:0:a00:1::1]:80":     "deny floor floor",
			"tcp [2001:0:101:101::f5]:80":  "deny floor floor",
			"tcp [::ffff:0:10.0.0.1]:80":   "deny floor floor",
			"tcp [fe80::1%eth0]:80":        "deny floor floor",
			"tcp [2606:4700::1%eth0]:4433": "allow default default",
		}},
		{"observe lets all above the floor pass", Input{Mode: ModeObserve, DenyOut: all, AllowOut: []string{"a.com"}}, checks{
			"tcp 9.9.9.9:443 a.com": "allow allow-name allow[0]",
			"tcp 9.9.9.9:443 b.com": "observe name-denied deny[0]",
			"udp 9.9.9.9:53":        "observe deny-address deny[0]",
			"tcp 10.0.0.1:443":      "deny floor floor",
			"sctp 9.9.9.9:1":        "deny protocol protocol",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := mustCompile(t, tt.in, nil)
			for f, want := range tt.want {
				if got := say(c.Decide(flow(t, f))); got != want {
					t.Errorf("%s: got %s, want %s", f, got, want)
				}
			}
		})
	}
}

func TestVerdictsQuoteTheRuleAsWritten(t *testing.T) {
	c := mustCompile(t, Input{AllowOut: []string{"*.BÜCHER.Example."}, DenyOut: []string{"1.2.3.4/0"}}, nil)
	for f, want := range map[string]Rule{
		"tcp 9.9.9.9:443 a.xn--bcher-kva.example": {"allow[0]", "*.BÜCHER.Example."},
		"tcp 9.9.9.9:22":         {"deny[0]", "1.2.3.4/0"},
		"tcp 10.0.0.1:22":        {"floor", "10.0.0.0/8 (private, RFC 1918)"},
		"tcp [fd00:ec2::254]:80": {"floor", "fd00:ec2::254/128 (cloud metadata, AWS)"},
		"udp 8.8.8.8:53":         {"dns", "8.8.8.8:53 (comes with a domain rule)"},
	} {
		if diff := cmp.Diff(want, c.Decide(flow(t, f)).Rule); diff != "" {
			t.Errorf("%s: %s", f, diff)
		}
	}
}

func TestOperatorStandsAboveTheSandbox(t *testing.T) {
	op := &Operator{
		FloorOpen:   []string{"10.0.0.5", "10.0.1.0/24:5432", "intra.corp", "db.corp:5432"},
		AlwaysDeny:  []string{"6.6.6.0/24", "bad.com", "*.bad.com", "7.7.7.7:25"},
		AlwaysAllow: []string{"5.5.5.5", "mirror.com", "6.6.6.6"},
		SelfDomains: []string{"cordon.localhost", "Sandboxes.Example.com."},
		HostAddrs:   []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32"), netip.MustParsePrefix("2001:db8:1::7/128")},
	}
	type checks map[string]string
	tests := []struct {
		name string
		in   Input
		want checks
	}{
		{"default allow", Input{AllowOut: []string{"6.6.6.0/24"}}, checks{
			"tcp 10.0.0.5:22":                             "allow floor-open operator.open[0]",
			"tcp [::ffff:10.0.0.5]:22":                    "allow floor-open operator.open[0]",
			"tcp 10.0.0.6:22":                             "deny floor floor",
			"tcp 10.0.1.9:5432":                           "allow floor-open operator.open[1]",
			"tcp 10.0.1.9:5433":                           "deny floor floor",
			"tcp 10.9.9.9:443 intra.corp":                 "allow floor-open operator.open[2]",
			"tcp 10.9.9.9:22 intra.corp":                  "deny floor floor",
			"tcp 10.9.9.9:5432 db.corp":                   "allow floor-open operator.open[3]",
			"tcp 6.6.6.9:443":                             "deny operator operator.deny[0]",
			"tcp [64:ff9b::6.6.6.9]:443":                  "deny operator operator.deny[0]",
			"tcp 6.6.6.6:443":                             "deny operator operator.deny[0]",
			"tcp 9.9.9.9:443 bad.com":                     "deny operator operator.deny[1]",
			"tcp 9.9.9.9:443 x.bad.com":                   "deny operator operator.deny[2]",
			"tcp 7.7.7.7:25":                              "deny operator operator.deny[3]",
			"tcp 203.0.113.7:443":                         "deny floor floor",
			"tcp [2001:db8:1::7]:443":                     "deny floor floor",
			"tcp [64:ff9b::cb00:7107]:443":                "deny floor floor",
			"tcp 192.0.0.8:443":                           "deny floor floor",
			"tcp 192.0.0.8:22 cordon.local":               "deny floor floor",
			"tcp 192.0.0.8:443 3000-x.cordon.localhost":   "allow default default",
			"tcp 192.0.0.8:443 cordon.localhost":          "allow default default",
			"tcp 192.0.0.8:443 notcordon.localhost":       "deny floor floor",
			"tcp 192.0.0.8:22 3000-x.cordon.localhost":    "deny floor floor",
			"tcp 192.0.0.9:443 3000-x.cordon.localhost":   "deny floor floor",
			"tcp 192.0.0.8:80 9-y.sandboxes.example.com":  "allow default default",
			"tcp [64:ff9b::c000:8]:80 a.cordon.localhost": "deny floor floor",
		}},
		{"deny all", Input{DenyOut: []string{"0.0.0.0/0"}}, checks{
			"tcp 5.5.5.5:22":                            "allow operator operator.allow[0]",
			"tcp 9.9.9.9:443 mirror.com":                "allow operator operator.allow[1]",
			"tcp 9.9.9.9:443":                           "deny no-name deny[0]",
			"udp 8.8.8.8:53":                            "allow allow-dns dns",
			"tcp 10.0.0.5:22":                           "allow floor-open operator.open[0]",
			"tcp 192.0.0.8:443 3000-x.cordon.localhost": "deny name-denied deny[0]",
		}},
		{"deny all but one of our names", Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"3000-x.cordon.localhost"}}, checks{
			"tcp 192.0.0.8:443 3000-x.cordon.localhost": "allow allow-name allow[0]",
			"tcp 192.0.0.8:443 3001-x.cordon.localhost": "deny name-denied deny[0]",
		}},
		{"observe spares nothing that the operator denies", Input{Mode: ModeObserve}, checks{
			"tcp 6.6.6.9:443": "deny operator operator.deny[0]",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := mustCompile(t, tt.in, op)
			for f, want := range tt.want {
				if got := say(c.Decide(flow(t, f))); got != want {
					t.Errorf("%s: got %s, want %s", f, got, want)
				}
			}
		})
	}
}

func TestDecideAddrRefusesOnlyFloorAndOperator(t *testing.T) {
	op := &Operator{
		FloorOpen: []string{"intra.corp"}, AlwaysDeny: []string{"6.6.6.0/24"}, SelfDomains: []string{"cordon.localhost"},
	}
	c := mustCompile(t, Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"a.com", "*.cordon.localhost"}}, op)
	for _, tt := range []struct{ name, dst, want string }{
		{"a.com", "9.9.9.9:443", "allow allow-name allow[0]"},
		{"a.com", "[2606:4700::1]:443", "allow allow-name allow[0]"},
		{"a.com", "127.0.0.1:443", "deny floor floor"},
		{"a.com", "[::ffff:127.0.0.1]:443", "deny floor floor"},
		{"a.com", "[64:ff9b::a9fe:a9fe]:80", "deny floor floor"},
		{"a.com", "192.0.0.8:443", "deny floor floor"},
		{"a.com", "6.6.6.6:443", "deny operator operator.deny[0]"},
		{"x.cordon.localhost", "192.0.0.8:443", "allow allow-name allow[1]"},
		{"x.cordon.localhost", "192.0.0.8:22", "deny floor floor"},
		{"intra.corp", "10.0.0.1:443", "allow floor-open operator.open[0]"},
		{"intra.corp", "10.0.0.1:22", "deny floor floor"},
	} {
		if got := say(c.DecideAddr(tt.name, netip.MustParseAddrPort(tt.dst))); got != tt.want {
			t.Errorf("%s at %s: got %s, want %s", tt.name, tt.dst, got, tt.want)
		}
	}
	if got := say(c.DecideAddr("a.com", netip.AddrPort{})); got != "deny floor floor" {
		t.Errorf("no address: got %s", got)
	}
}

func TestDNSModeFollowsTheRules(t *testing.T) {
	all := []string{"0.0.0.0/0"}
	tests := []struct {
		name string
		in   Input
		op   *Operator
		want DNSMode
	}{
		{"nothing", Input{}, nil, DNSOpen},
		{"deny all, nothing allowed", Input{DenyOut: all}, nil, DNSOpen},
		{"the nameserver came with a domain", Input{DenyOut: all, AllowOut: []string{"a.com"}}, nil, DNSStrict},
		{"internet access off and a domain", Input{AllowInternetAccess: new(false), AllowOut: []string{"a.com"}}, nil, DNSStrict},
		{"a domain, and the nameserver by address", Input{DenyOut: all, AllowOut: []string{"a.com", "8.8.8.8"}}, nil, DNSOpen},
		{"a domain, and the nameserver by CIDR", Input{DenyOut: all, AllowOut: []string{"8.0.0.0/8", "a.com"}}, nil, DNSOpen},
		{"a domain, and the nameserver by CIDR and port", Input{DenyOut: all, AllowOut: []string{"8.8.8.8:53", "a.com"}}, nil, DNSOpen},
		{"a domain, and the nameserver for another port", Input{DenyOut: all, AllowOut: []string{"8.8.8.8:443", "a.com"}}, nil, DNSStrict},
		{"a domain, and the second nameserver by address", Input{DenyOut: all, AllowOut: []string{"1.1.1.1", "a.com"}}, nil, DNSStrict},
		{"only addresses", Input{DenyOut: all, AllowOut: []string{"8.8.8.8"}}, nil, DNSOpen},
		{"the nameserver denied, no domain", Input{DenyOut: []string{"8.8.8.8"}}, nil, DNSOpen},
		{"forced open", Input{DNS: DNSOpen, DenyOut: all, AllowOut: []string{"a.com"}}, nil, DNSOpen},
		{"forced strict", Input{DNS: DNSStrict}, nil, DNSStrict},
		{"the operator's domain under deny-all", Input{DenyOut: all}, &Operator{AlwaysAllow: []string{"mirror.com"}}, DNSStrict},
		{"the operator's domain under default allow", Input{}, &Operator{AlwaysAllow: []string{"mirror.com"}}, DNSOpen},
		{"the operator allows the nameserver", Input{DenyOut: all, AllowOut: []string{"a.com"}}, &Operator{AlwaysAllow: []string{"8.8.8.8"}}, DNSOpen},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := mustCompile(t, tt.in, tt.op).DNS(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestDecideQuery(t *testing.T) {
	op := &Operator{FloorOpen: []string{"db.corp:5432"}, AlwaysDeny: []string{"*.bad.com", "half.com:22"}, AlwaysAllow: []string{"mirror.com"}}
	strict := mustCompile(t, Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"a.com", "*.b.com", "c.com:5432"}}, op)
	open := mustCompile(t, Input{}, op)
	watched := mustCompile(t, Input{Mode: ModeObserve, DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"a.com"}}, nil)
	for _, tt := range []struct {
		c          *Compiled
		name, want string
	}{
		{strict, "a.com", "allow allow-name allow[0]"},
		{strict, "x.a.com", "deny name-denied dns"},
		{strict, "x.y.b.com", "allow allow-name allow[1]"},
		{strict, "_sip._tcp.b.com", "allow allow-name allow[1]"},
		{strict, "b.com", "deny name-denied dns"},
		{strict, "c.com", "allow allow-name allow[2]"},
		{strict, "mirror.com", "allow operator operator.allow[0]"},
		{strict, "db.corp", "allow floor-open operator.open[0]"},
		{strict, "x.bad.com", "deny operator operator.deny[0]"},
		{strict, "", "deny name-denied dns"},
		{open, "anything.example", "allow default default"},
		{open, "half.com", "allow default default"},
		{open, "x.bad.com", "deny operator operator.deny[0]"},
		{watched, "b.com", "observe name-denied dns"},
	} {
		if got := say(tt.c.DecideQuery(tt.name)); got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestWildcardOfNamesOnlyWildcards(t *testing.T) {
	c := mustCompile(t, Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"*.a.com", "www.a.com", "*.b.com:8443"}}, nil)
	for name, want := range map[string]string{"x.a.com": "*.a.com", "www.a.com": "", "a.com": "", "x.b.com": "*.b.com:8443", "c.com": ""} {
		r, ok := c.WildcardOf(name)
		if got := r.Text; got != want || ok != (want != "") {
			t.Errorf("%s: got %q %v, want %q", name, got, ok, want)
		}
	}
}

func TestAnswersInTheFloorAreRemoved(t *testing.T) {
	op := &Operator{FloorOpen: []string{"10.0.0.5:5432", "10.2.0.0/16", "intra.corp"}, SelfDomains: []string{"cordon.localhost"}}
	c := mustCompile(t, Input{}, op)
	for _, tt := range []struct {
		name, addr string
		want       bool
	}{
		{"a.com", "9.9.9.9", true},
		{"a.com", "10.0.0.1", false},
		{"a.com", "::ffff:10.0.0.1", false},
		{"a.com", "64:ff9b::a00:1", false},
		{"a.com", "10.0.0.5", true},
		{"a.com", "10.2.3.4", true},
		{"a.com", "192.0.0.8", false},
		{"x.cordon.localhost", "192.0.0.8", true},
		{"x.cordon.localhost", "127.0.0.1", false},
		{"intra.corp", "10.7.7.7", true},
	} {
		if got := c.AnswerAllowed(tt.name, netip.MustParseAddr(tt.addr)); got != tt.want {
			t.Errorf("%s %s: got %v", tt.name, tt.addr, got)
		}
	}
	if c.AnswerAllowed("a.com", netip.Addr{}) {
		t.Error("no address is an answer")
	}
}

func TestPinPorts(t *testing.T) {
	op := &Operator{FloorOpen: []string{"db.corp:5432"}, AlwaysDeny: []string{"x.a.com:7000"}}
	c := mustCompile(t, Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"a.com:6000", "a.com:443", "a.com:5000", "a.com", "*.a.com:7000", "a.com:5000"}}, op)
	for name, want := range map[string][]PinPort{
		"a.com":   {{443, Rule{"allow[1]", "a.com:443"}}, {5000, Rule{"allow[2]", "a.com:5000"}}, {6000, Rule{"allow[0]", "a.com:6000"}}},
		"y.a.com": {{7000, Rule{"allow[4]", "*.a.com:7000"}}},
		"x.a.com": nil,
		"db.corp": {{5432, Rule{"operator.open[0]", "db.corp:5432"}}},
		"b.com":   nil,
	} {
		if diff := cmp.Diff(want, c.PinPorts(name)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestIsSelf(t *testing.T) {
	c := mustCompile(t, Input{}, &Operator{SelfDomains: []string{"cordon.localhost"}})
	for name, want := range map[string]bool{
		"cordon.localhost": true, "3000-x.cordon.localhost": true, "a.b.cordon.localhost": true,
		"notcordon.localhost": false, "cordon.localhost.evil.com": false, "localhost": false, "": false,
	} {
		if got := c.IsSelf(name); got != want {
			t.Errorf("%q: got %v", name, got)
		}
	}
}
