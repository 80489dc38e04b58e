package ingress

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// domains are the names served, lower-case, longest first.
type domains []string

func parseDomains(in []string) (domains, error) {
	if len(in) == 0 {
		return nil, errors.New("ingress: Domains is empty: name at least one domain, such as cordon.localhost")
	}
	var out domains
	for _, d := range in {
		name := strings.TrimSuffix(lower(d), ".")
		if !validName(name) {
			return nil, fmt.Errorf("ingress: domain %q is not a domain name: use labels of a-z, 0-9 and '-', without a port", d)
		}
		out = append(out, name)
	}
	slices.SortFunc(out, func(a, b string) int { return len(b) - len(a) })
	return slices.Compact(out), nil
}

// validName reports whether s is a host name of LDH labels (RFC 1123, section 2.1).
func validName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !validLabel(label) {
			return false
		}
	}
	return true
}

// lower folds ASCII letters only: Unicode's folding makes an "i" of U+0130 and a
// "k" of U+212A.
func lower(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r >= 'A' && r <= 'Z' }) {
		return s
	}
	b := []byte(s)
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func validLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if letter, digit := c >= 'a' && c <= 'z', c >= '0' && c <= '9'; !letter && !digit && c != '-' {
			return false
		}
	}
	return true
}

// hostKind says what a host stands for.
type hostKind uint8

const (
	foreignHost hostKind = iota // a name that is not ours
	apiHost                     // <domain>, api.<domain>
	sharedHost                  // sandbox.<domain>, localhost, an IP address
	sandboxHost                 // <port>-<id>.<domain>
)

// place is what a Host header names.
type place struct {
	kind hostKind
	name string // without port and trailing dot, lower-case
	id   string // of sandboxHost
	port uint16 // of sandboxHost
}

// hostError is a sentence for the client.
type hostError string

func (e hostError) Error() string { return string(e) }

// shown is user input as it may appear in a sentence.
func shown(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return strconv.QuoteToASCII(s)
}

// parse reads a Host header. It is strict: whatever two readers could understand
// differently is refused.
func (d domains) parse(host string) (place, error) {
	name, literal, err := splitHost(host)
	if err != nil {
		return place{}, err
	}
	if literal {
		return place{kind: sharedHost, name: name}, nil
	}
	name = strings.TrimSuffix(lower(name), ".")
	if !validName(name) {
		return place{}, badHost(host)
	}
	if name == "localhost" {
		return place{kind: sharedHost, name: name}, nil
	}
	for _, domain := range d {
		if name == domain {
			return place{kind: apiHost, name: name}, nil
		}
		label, ok := strings.CutSuffix(name, "."+domain)
		if !ok {
			continue
		}
		switch label {
		case "api":
			return place{kind: apiHost, name: name}, nil
		case "sandbox":
			return place{kind: sharedHost, name: name}, nil
		}
		p, err := parseLabel(label)
		p.name = name
		return p, err
	}
	return place{kind: foreignHost, name: name}, nil
}

// splitHost takes the port off and recognises IP addresses.
func splitHost(host string) (name string, literal bool, err error) {
	name = host
	if rest, v6 := strings.CutPrefix(host, "["); v6 {
		addr, port, closed := strings.Cut(rest, "]")
		ip, err := netip.ParseAddr(addr)
		if !closed || err != nil || !ip.Is6() || ip.Zone() != "" || !validPortSuffix(port) {
			return "", false, badHost(host)
		}
		return addr, true, nil
	}
	if i := strings.IndexByte(host, ':'); i >= 0 {
		if !validPortSuffix(host[i:]) {
			return "", false, badHost(host)
		}
		name = host[:i]
	}
	if ip, err := netip.ParseAddr(name); err == nil && ip.Is4() {
		return name, true, nil
	}
	return name, false, nil
}

// validPortSuffix reports whether s is empty or a colon and a port number.
func validPortSuffix(s string) bool {
	if s == "" {
		return true
	}
	_, ok := parsePort(s[1:])
	return s[0] == ':' && ok
}

// parsePort reads 1 to 65535 in decimal without leading zeros.
func parsePort(s string) (uint16, bool) {
	if s == "" || len(s) > 5 || s[0] == '0' {
		return 0, false
	}
	n := 0
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int(s[i]-'0')
	}
	return uint16(n), n <= 65535
}

// validID reports whether s can be a sandbox's ID: lower-case letters and digits.
func validID(s string) bool {
	return s != "" && len(s) <= 63 && !strings.Contains(s, "-") && validLabel(s)
}

// parseLabel reads <port>-<id>, with whatever older clients put behind another "-".
func parseLabel(label string) (place, error) {
	port, rest, ok := strings.Cut(label, "-")
	if !ok {
		return place{}, hostError("Host label " + shown(label) + " is not of the form <port>-<sandboxID>.")
	}
	n, ok := parsePort(port)
	if !ok {
		return place{}, hostError("Port " + shown(port) + " in the host is not valid: use a number from 1 to 65535 without leading zeros.")
	}
	id, _, _ := strings.Cut(rest, "-")
	if !validID(id) {
		return place{}, hostError("Sandbox ID " + shown(id) + " in the host is not valid: it consists of the letters a-z and digits.")
	}
	return place{kind: sandboxHost, id: id, port: n}, nil
}

// looksLikeSandbox reports whether a foreign name was meant for a sandbox of
// another domain.
func looksLikeSandbox(name string) bool {
	label, _, _ := strings.Cut(name, ".")
	_, err := parseLabel(label)
	return err == nil
}

func badHost(host string) hostError {
	return hostError("Host " + shown(host) + " is not a valid host name.")
}
