package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/publicsuffix"
)

// Seen is something a sandbox reached, or asked for.
type Seen struct {
	Proto Proto
	Dst   netip.AddrPort
	Name  string // shown by the client, or asked for; empty: none
	// Answers are the addresses that a question for Name was answered with; a Seen
	// with Answers is a question and no flow.
	Answers []netip.Addr
}

// Widening says how far a suggestion may go beyond what was seen.
type Widening uint8

// The choices, which may be combined. With Wildcards, names with a common parent of
// a registrable domain become one wildcard; with WithPresets, names that a preset
// lists become the preset.
const (
	Exactly   Widening = 0
	Wildcards Widening = 1 << iota
	WithPresets
)

// Suggest returns the smallest policy that allows what was seen and nothing else:
// names where a name was shown or had been asked for, addresses otherwise, each with
// its port unless it is a name on 80 or 443. What is always blocked is left out,
// and so is what no rule can be about.
//
// UDP and ICMP can be allowed by address only. Where the address had been asked for
// by a name, the name is listed with the port as well, unless another entry covers
// it: a name that is not listed is not resolved.
func Suggest(seen []Seen, w Widening) Input {
	s := suggestion{asked: map[netip.Addr]string{}, names: map[string]bool{}, ports: map[string]map[uint16]bool{}, addrs: map[string]bool{}, resolve: map[string]uint16{}}
	for _, v := range seen {
		if name, ok := CanonicalName(v.Name); ok {
			for _, a := range v.Answers {
				s.asked[plain(a)] = name // the last name wins, as it does for who connects next
			}
		}
	}
	for _, v := range seen {
		if len(v.Answers) == 0 {
			s.flow(v)
		}
	}
	names := slices.Collect(maps.Keys(s.names))
	var chosen []Preset
	if w&WithPresets != 0 {
		names, chosen = s.inPresets(names)
	}
	if w&Wildcards != 0 {
		names = widened(names)
	}
	for _, name := range slices.Sorted(maps.Keys(s.resolve)) {
		listed := slices.ContainsFunc(chosen, func(p Preset) bool { return p.lists(name, nil) })
		if !listed && !slices.ContainsFunc(names, func(entry string) bool { return lists(entry, name) }) {
			names = append(names, withPort(name, s.resolve[name]))
		}
	}
	addrs := slices.Collect(maps.Keys(s.addrs))
	addrs = slices.DeleteFunc(addrs, func(a string) bool { return s.covered(a) })
	slices.Sort(names)
	slices.Sort(addrs)
	for _, p := range slices.Backward(chosen) {
		names = slices.Insert(names, 0, presetPrefix+p.Name)
	}
	return Input{AllowOut: append(names, addrs...), DenyOut: []string{"0.0.0.0/0"}}
}

// suggestion collects entries.
type suggestion struct {
	asked        map[netip.Addr]string // the name that an address was asked for by
	names, addrs map[string]bool
	ports        map[string]map[uint16]bool // the proxy's ports that a name was used on
	resolve      map[string]uint16          // names that need no more than to be resolved, with a port they were used with
}

// inPresets chooses presets that list names on the ports they were used on, the
// one with the most names first and of those the smallest, and returns the names that are left.
func (s *suggestion) inPresets(names []string) (left []string, chosen []Preset) {
	for {
		var best Preset
		var rest []string
		for _, p := range newestPresets() {
			without := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return s.names[n] && p.lists(n, s.ports[n]) })
			gain, most := len(names)-len(without), len(names)-len(rest)
			if gain > 0 && (best.Name == "" || gain > most || gain == most && len(p.Hosts) < len(best.Hosts)) {
				best, rest = p, without
			}
		}
		if best.Name == "" {
			return names, chosen
		}
		names, chosen = rest, append(chosen, best)
	}
}

// lists reports whether a preset lists a name on all of some ports.
func (p Preset) lists(name string, ports map[uint16]bool) bool {
	return slices.ContainsFunc(p.Hosts, func(h PresetHost) bool {
		for port := range ports {
			if !slices.Contains(h.Ports, port) {
				return false
			}
		}
		return lists(h.Host, name)
	})
}

// lists reports whether an entry makes a name resolve.
func lists(entry, name string) bool {
	host, _, _ := strings.Cut(entry, ":")
	parent, wild := strings.CutPrefix(host, "*")
	return host == name || wild && strings.HasSuffix(name, parent)
}

func (s *suggestion) flow(v Seen) {
	dst := netip.AddrPortFrom(plain(v.Dst.Addr()), v.Dst.Port())
	if !dst.Addr().IsValid() || dst.Port() == 53 || floored(dst.Addr()) {
		return // questions are allowed with the names
	}
	name, shown := CanonicalName(v.Name)
	if !shown {
		name = s.asked[dst.Addr()]
	}
	switch {
	case v.Proto == ICMP || v.Proto == ICMPv6:
		s.addrs[dst.Addr().String()] = true
	case v.Proto == TCP && shown && proxyPort(dst.Port()):
		s.names[name] = true
		if s.ports[name] == nil {
			s.ports[name] = map[uint16]bool{}
		}
		s.ports[name][dst.Port()] = true
		return
	case v.Proto == TCP && name != "" && !proxyPort(dst.Port()):
		s.names[withPort(name, dst.Port())] = true
		return
	case v.Proto == TCP || v.Proto == UDP:
		s.addrs[dst.String()] = true
	}
	if name != "" {
		s.resolve[name] = cmp.Or(dst.Port(), 443)
	}
}

func withPort(name string, port uint16) string { return name + ":" + strconv.Itoa(int(port)) }

// covered reports whether an "address:port" is allowed by the address alone.
func (s *suggestion) covered(entry string) bool {
	ap, err := netip.ParseAddrPort(entry)
	return err == nil && s.addrs[ap.Addr().String()]
}

// floored reports whether no sandbox may reach an address, whatever its rules.
func floored(a netip.Addr) bool {
	if _, floor := floorTable().Lookup(a); floor {
		return true
	}
	v4, ok := embedded(a)
	return ok && floored(v4)
}

// widened replaces names with a common parent by a wildcard, where the parent is a
// registrable domain or below one: "*.co.uk" has no single owner.
func widened(names []string) []string {
	children := map[string][]string{}
	for _, n := range names {
		host, _, _ := strings.Cut(n, ":")
		_, parent, ok := strings.Cut(host, ".")
		if _, err := publicsuffix.EffectiveTLDPlusOne(parent); ok && err == nil {
			key := parent + n[len(host):] // names with different ports stay apart
			children[key] = append(children[key], n)
		}
	}
	gone := map[string]bool{}
	var out []string
	for parent, list := range children {
		if len(list) > 1 {
			out = append(out, "*."+parent)
			for _, n := range list {
				gone[n] = true
			}
		}
	}
	for _, n := range names {
		if !gone[n] {
			out = append(out, n)
		}
	}
	return out
}
