package policy

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

// entry is one parsed list entry: an address range, or a name when prefix is
// not valid.
type entry struct {
	prefix   netip.Prefix // masked, IPv4 where it was IPv4-mapped
	name     string       // canonical; without "*." when wildcard; empty for "*"
	wildcard bool         // "*.name" or "*"
	port     uint16       // 0: not limited
	shown    bool         // with a port of the proxy: only where the name is shown
}

func (e entry) isAddr() bool { return e.prefix.IsValid() }

// all reports whether e is 0.0.0.0/0, which stands for every destination of
// both families in a deny list.
func (e entry) all() bool { return e.isAddr() && e.prefix.Addr().Is4() && e.prefix.Bits() == 0 }

var (
	errNotAddr = errors.New("neither an IP address, a CIDR nor a domain name")
	errPort    = errors.New("the port must be a decimal number from 1 to 65535")
)

// parseEntry reads "ip", "cidr", "name", "*.name" or "*", each with an optional
// ":port"; an IPv6 address with a port stands in brackets.
func parseEntry(s string) (entry, error) {
	if p, err := parseRange(s); err == nil {
		return entry{prefix: p}, nil
	}
	host, port, err := splitPort(s)
	if err != nil {
		return entry{}, err
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		p, err := parseRange(inner)
		if !ok || err != nil || port == 0 || !strings.Contains(inner, ":") {
			return entry{}, errNotAddr
		}
		return entry{prefix: p, port: port}, nil
	}
	if p, err := parseRange(host); err == nil {
		if strings.Contains(host, ":") && !strings.Contains(host, "/") {
			return entry{}, errNotAddr // 2001:db8::1:443 is an address, not a port
		}
		return entry{prefix: p, port: port}, nil
	}
	e, err := parseName(host)
	e.port = port
	return e, err
}

// parseRange reads an address or a CIDR, clears host bits and turns
// IPv4-mapped ranges into the IPv4 ranges they mean.
func parseRange(s string) (netip.Prefix, error) {
	var p netip.Prefix
	if strings.Contains(s, "/") {
		parsed, err := netip.ParsePrefix(s)
		if err != nil {
			return netip.Prefix{}, err
		}
		p = parsed
	} else {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, err
		}
		if a.Zone() != "" {
			return netip.Prefix{}, errNotAddr // a zone means something on one host only
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// splitPort cuts ":port" off; port is 0 when there is none.
func splitPort(s string) (host string, port uint16, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.HasSuffix(s, "]") {
		return s, 0, nil
	}
	digits := s[i+1:]
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || n == 0 || digits[0] == '0' || digits[0] == '+' {
		return "", 0, errPort
	}
	return s[:i], uint16(n), nil
}

func parseName(s string) (entry, error) {
	if s == "*" {
		return entry{wildcard: true}, nil
	}
	rest, wildcard := strings.CutPrefix(s, "*.")
	if !isASCII(rest) { // stored as A-labels, mapped as a person means it
		labels, err := idn().ToASCII(rest)
		if err != nil {
			return entry{}, err
		}
		rest = labels
	}
	name, ok := CanonicalName(rest)
	if !ok {
		return entry{}, errNotAddr
	}
	return entry{name: name, wildcard: wildcard}, nil
}
