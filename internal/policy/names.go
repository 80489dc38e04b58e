package policy

import (
	"strings"
	"sync"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// RFC 1035 section 2.3.4, without the root's length octet.
const (
	maxName  = 253
	maxLabel = 63
)

// CanonicalName lower-cases name, drops one trailing dot, and checks the grammar of
// host names: labels of letters, digits, hyphens and underscores, 63 octets each and
// 253 in all (RFC 1035). That is wider than RFC 1123, because real hosts are: object
// stores have underscores in names, content networks labels that end in a hyphen. An
// IP literal in any spelling is not a name. The second result is false when name is
// not a host name. It is the one grammar of rules, server names, Host, DNS and tools.
func CanonicalName(name string) (string, bool) {
	name = strings.TrimSuffix(name, ".")
	if len(name) == 0 || len(name) > maxName {
		return "", false
	}
	upper, start := false, 0
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if !isLabel(name[start:i]) {
				return "", false
			}
			if i == len(name) && numeric(name[start:]) {
				return "", false
			}
			start = i + 1
			continue
		}
		upper = upper || 'A' <= name[i] && name[i] <= 'Z'
	}
	if upper {
		name = strings.ToLower(name)
	}
	return name, true
}

// isLabel reports whether s is letters, digits, underscores and hyphens, without a
// hyphen first, which programs would take for an option.
func isLabel(s string) bool {
	if len(s) == 0 || len(s) > maxLabel || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || isDigit(c) || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

// PublicName is CanonicalName for a name that is to get a certificate: RFC 1123
// section 2.1, without underscores and hyphens at the end of a label.
func PublicName(name string) (string, bool) {
	name, ok := CanonicalName(name)
	if !ok || strings.Contains(name, "_") || strings.Contains(name+".", "-.") {
		return "", false
	}
	return name, true
}

// idn maps names in other scripts than ASCII as browsers do (RFC 5891, UTS 46).
// CanonicalName checks what comes of it.
var idn = sync.OnceValue(func() *idna.Profile {
	return idna.New(idna.MapForLookup(), idna.BidiRule(), idna.Transitional(false), idna.StrictDomainName(false))
})

// maxUnicode bounds a name before it is mapped: no name of 253 octets is longer in
// UTF-8.
const maxUnicode = 4 * maxName

// CanonicalHost is CanonicalName for a name as programs write it, in UTF-8 or in
// Latin-1: it brings the name to its A-labels. What is not exactly those labels in
// lower case is refused, such as full-width letters and dots: who maps less, or more,
// reads another name.
func CanonicalHost(name string) (string, bool) {
	if isASCII(name) {
		return CanonicalName(name)
	}
	name = strings.TrimSuffix(name, ".")
	if len(name) > maxUnicode {
		return "", false
	}
	if !utf8.ValidString(name) {
		runes := make([]rune, len(name))
		for i := range len(name) {
			runes[i] = rune(name[i])
		}
		name = string(runes)
	}
	labels, err := idn().ToASCII(name)
	if err != nil {
		return "", false
	}
	if back, err := idn().ToUnicode(labels); err != nil || back != strings.ToLower(name) {
		return "", false
	}
	return CanonicalName(labels)
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// numeric reports whether a last label makes programs read the whole name as an
// IPv4 address: decimal or octal digits, or 0x and hex digits (WHATWG URL,
// "ends in a number"). 0x7f.1 and 2130706433 are 127.0.0.1 to many of them.
func numeric(label string) bool {
	digits := isDigit
	if len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x' {
		label, digits = label[2:], isHex
	}
	for i := range len(label) {
		if !digits(label[i]) {
			return false
		}
	}
	return true
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isHex(c byte) bool { return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'f' }

// nameSet matches names: one map, one lookup for the name itself and one for
// each parent that a wildcard could stand before.
type nameSet struct {
	rules    map[string]nameRule
	any      ruleRef // the rule "*"
	longest  int     // octets of the longest wildcard parent: longer ones are not looked up
	wildcard bool    // some rule is a wildcard with a parent
}

// nameRule is what is said about one name.
type nameRule struct {
	exact ruleRef // the name itself
	below ruleRef // every name below it
}

func (s *nameSet) add(e entry, r ruleRef) {
	if e.name == "" {
		s.any = s.any.or(r)
		return
	}
	if s.rules == nil {
		s.rules = map[string]nameRule{}
	}
	n := s.rules[e.name]
	if e.wildcard {
		n.below = n.below.or(r)
		s.wildcard, s.longest = true, max(s.longest, len(e.name))
	} else {
		n.exact = n.exact.or(r)
	}
	s.rules[e.name] = n
}

// exact returns the rule that lists name itself.
func (s *nameSet) exact(name string) ruleRef {
	if s == nil {
		return 0
	}
	return s.rules[name].exact
}

// below returns the wildcard rule with the longest parent of name.
func (s *nameSet) below(name string) ruleRef {
	if s == nil || name == "" {
		return 0
	}
	if s.wildcard {
		for i := 1; i < len(name); i++ {
			if name[i] != '.' || len(name)-i-1 > s.longest {
				continue
			}
			if r := s.rules[name[i+1:]].below; r != 0 {
				return r
			}
		}
	}
	return s.any
}

func (s *nameSet) match(name string) ruleRef {
	if s == nil || name == "" {
		return 0
	}
	if r := s.exact(name); r != 0 {
		return r
	}
	return s.below(name)
}
