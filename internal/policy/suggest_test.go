package policy

import (
	stdcmp "cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func tcpSeen(addr, name string) Seen {
	return Seen{Proto: TCP, Dst: netip.MustParseAddrPort(addr), Name: name}
}

func udpSeen(addr string) Seen { return Seen{Proto: UDP, Dst: netip.MustParseAddrPort(addr)} }

func asked(name string, addrs ...string) Seen {
	s := Seen{Proto: UDP, Dst: netip.AddrPortFrom(DefaultNameserver, 53), Name: name}
	for _, a := range addrs {
		s.Answers = append(s.Answers, netip.MustParseAddr(a))
	}
	return s
}

func TestSuggest(t *testing.T) {
	tests := []struct {
		name string
		seen []Seen
		wide Widening
		want []string
	}{
		{"nothing was seen", nil, Exactly, nil},
		{"a name that was shown", []Seen{asked("a.test", "198.51.100.1"), tcpSeen("198.51.100.1:443", "a.test"), tcpSeen("198.51.100.1:80", "A.test.")}, Exactly, []string{"a.test"}},
		{"a name asked for and not used", []Seen{asked("a.test", "198.51.100.1")}, Exactly, nil},
		{"an address that nobody asked for", []Seen{tcpSeen("198.51.100.1:4000", ""), udpSeen("198.51.100.1:4000")}, Exactly, []string{"198.51.100.1:4000"}},
		{"TCP on another port to an address that was asked for", []Seen{asked("db.test", "198.51.100.1"), tcpSeen("198.51.100.1:5432", "")}, Exactly, []string{"db.test:5432"}},
		{"UDP to an address that was asked for", []Seen{asked("ntp.test", "198.51.100.1"), udpSeen("198.51.100.1:123")}, Exactly, []string{"ntp.test:123", "198.51.100.1:123"}},
		{"QUIC beside TLS", []Seen{asked("q.test", "198.51.100.1"), udpSeen("198.51.100.1:443"), tcpSeen("198.51.100.1:443", "q.test")}, Exactly, []string{"q.test", "198.51.100.1:443"}},
		{"a connection to 443 that shows no name", []Seen{tcpSeen("198.51.100.1:443", "")}, Exactly, []string{"198.51.100.1:443"}},
		{"a ping covers the ports of its address", []Seen{{Proto: ICMP, Dst: netip.MustParseAddrPort("198.51.100.1:0")}, tcpSeen("198.51.100.1:4000", "")}, Exactly, []string{"198.51.100.1"}},
		{"a ping by name", []Seen{asked("a.test", "198.51.100.1"), {Proto: ICMP, Dst: netip.MustParseAddrPort("198.51.100.1:0")}}, Exactly, []string{"a.test:443", "198.51.100.1"}},
		{"IPv6", []Seen{tcpSeen("[2001:db8::1]:4000", "")}, Exactly, []string{"[2001:db8::1]:4000"}},
		{"the floor", []Seen{tcpSeen("10.0.0.1:80", ""), tcpSeen("169.254.169.254:80", "metadata.test"), tcpSeen("[64:ff9b::a00:1]:80", "")}, Exactly, nil},
		{"a name that is none", []Seen{tcpSeen("198.51.100.1:80", "198.51.100.1")}, Exactly, []string{"198.51.100.1:80"}},
		{"siblings stay apart", []Seen{tcpSeen("198.51.100.1:443", "a.example.com"), tcpSeen("198.51.100.2:443", "b.example.com")}, Exactly, []string{"a.example.com", "b.example.com"}},
		{"siblings become a wildcard when asked", []Seen{tcpSeen("198.51.100.1:443", "a.example.com"), tcpSeen("198.51.100.2:443", "b.example.com"), tcpSeen("198.51.100.3:443", "example.com")}, Wildcards, []string{"*.example.com", "example.com"}},
		{"an only child does not", []Seen{tcpSeen("198.51.100.1:443", "a.example.com")}, Wildcards, []string{"a.example.com"}},
		{"a public suffix is no parent", []Seen{tcpSeen("198.51.100.1:443", "a.co.uk"), tcpSeen("198.51.100.2:443", "b.co.uk")}, Wildcards, []string{"a.co.uk", "b.co.uk"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Suggest(tt.seen, tt.wide)
			if diff := cmp.Diff(Input{AllowOut: tt.want, DenyOut: []string{"0.0.0.0/0"}}, got); diff != "" {
				t.Error(diff)
			}
			if _, err := Compile(got, nil, 1); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSuggestionsAllowWhatWasSeen makes up traffic and judges it by what was
// suggested: all of it above the floor passes, each name resolves, and no entry can
// be left out.
func TestSuggestionsAllowWhatWasSeen(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	names := []string{"", "", "a.example.com", "b.example.com", "example.org", "c.test"}
	ports := []uint16{80, 443, 4000, 123}
	for range 500 {
		var seen []Seen
		for range r.IntN(8) {
			a := netip.AddrFrom4([4]byte{byte(r.IntN(256)), 51, 100, byte(r.IntN(3))})
			f := Seen{Proto: []Proto{TCP, UDP}[r.IntN(2)], Dst: netip.AddrPortFrom(a, ports[r.IntN(len(ports))])}
			name := names[r.IntN(len(names))]
			if name != "" {
				seen = append(seen, Seen{Proto: UDP, Dst: netip.AddrPortFrom(DefaultNameserver, 53), Name: name, Answers: []netip.Addr{a}})
			}
			if f.Proto == TCP && proxyPort(f.Dst.Port()) {
				f.Name = name
			}
			seen = append(seen, f)
		}
		in := Suggest(seen, Widening(r.IntN(2)))
		if missing := unserved(t, in, seen); missing != nil {
			t.Fatalf("%v\nis not allowed by %v\nsuggested for %v", missing, in, seen)
		}
		if in.AllowOut == nil || r.IntN(2) == 0 {
			continue
		}
		i := r.IntN(len(in.AllowOut))
		less := in
		less.AllowOut = append(append([]string{}, in.AllowOut[:i]...), in.AllowOut[i+1:]...)
		if unserved(t, less, seen) == nil {
			t.Fatalf("%q can be left out of %v, suggested for %v", in.AllowOut[i], in, seen)
		}
	}
}

// unserved returns a flow that the rules refuse although no floor does.
func unserved(t *testing.T, in Input, seen []Seen) *Seen {
	t.Helper()
	c, err := Compile(in, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	by := map[netip.Addr]string{}
	for _, s := range seen {
		for _, a := range s.Answers {
			by[a] = s.Name
		}
	}
	for i, s := range seen {
		if len(s.Answers) > 0 || floored(s.Dst.Addr()) {
			continue
		}
		f := Flow{Proto: s.Proto, Dst: s.Dst, Name: s.Name}
		if f.Name == "" && s.Proto == TCP && !proxyPort(s.Dst.Port()) {
			f.Name = by[s.Dst.Addr()] // by its pin
		}
		dns := c.Decide(Flow{Proto: UDP, Dst: netip.AddrPortFrom(DefaultNameserver, 53)}).Allow
		asked := f.Name != "" || by[s.Dst.Addr()] != ""
		if !c.Decide(f).Allow || asked && (!dns || !c.DecideQuery(stdcmp.Or(f.Name, by[s.Dst.Addr()])).Allow) {
			return &seen[i]
		}
	}
	return nil
}

// TestSuggestPresets: names that a preset lists become the preset, the smallest
// that has the most of them; what was used on a port it does not open stays.
func TestSuggestPresets(t *testing.T) {
	at := func(name string, port uint16) Seen {
		return Seen{Proto: TCP, Dst: netip.AddrPortFrom(netip.MustParseAddr("151.101.0.223"), port), Name: name}
	}
	got := Suggest([]Seen{at("pypi.org", 443), at("files.pythonhosted.org", 443), at("registry.npmjs.org", 443), at("deb.debian.org", 80),
		at("repo.maven.apache.org", 80), at("example.com", 443), at("cas-server.xethub.hf.co", 443)}, WithPresets)
	want := []string{"preset:python", "preset:npm", "preset:debian", "preset:huggingface", "example.com", "repo.maven.apache.org"}
	if diff := cmp.Diff(want, got.AllowOut); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	mustCompile(t, got, nil)
	if got := Suggest([]Seen{at("pypi.org", 443)}, Exactly); !slices.Equal(got.AllowOut, []string{"pypi.org"}) {
		t.Errorf("without asking for presets: %v", got.AllowOut)
	}
}
