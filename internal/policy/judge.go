package policy

import (
	"net/netip"
	"strconv"
)

// Wire is what the first bytes of a TCP connection are.
type Wire uint8

// The kinds of first bytes. In all but WireOther a name may be shown.
const (
	WireOther Wire = iota
	WireTLS
	WireHTTP
)

// Route says where an allowed connection is connected to.
type Route uint8

// The routes.
const (
	RouteDirect Route = iota // the address the sandbox asked for: no name was needed
	RouteName                // the proxy's own resolution of the name
	RoutePinned              // the address the sandbox asked for, which was pinned to a name
	RouteSelf                // this service's ingress
)

// Judgement is a verdict on a TCP connection that the proxy sees, with what follows.
type Judgement struct {
	Verdict
	Route Route
	Name  string // that decided; empty: the address did
}

// Judge decides a connection to dst that shows name, or shows none. A rule without a
// port is about TLS on 443 and HTTP on 80; one with a port is about every protocol on
// it, so a name of pins, which the sandbox had resolved to dst for a rule with this
// port, lets a connection without a name pass. It is what the proxy and explain ask.
func (c *Compiled) Judge(dst netip.AddrPort, name string, wire Wire, pins []string) Judgement {
	if name != "" && (fits(dst.Port(), wire) || c.listsPort(name, dst.Port())) {
		j := Judgement{Verdict: c.Decide(Flow{Proto: TCP, Dst: dst, Name: name}), Name: name}
		if !j.Allow {
			return j
		}
		if c.IsSelf(name) {
			j.Route = RouteSelf
		} else if bare := c.Decide(Flow{Proto: TCP, Dst: dst}); !j.Observed && (!bare.Allow || bare.Observed) {
			j.Route = RouteName
		}
		return j
	}
	bare := Judgement{Verdict: c.Decide(Flow{Proto: TCP, Dst: dst})}
	if bare.Allow && !bare.Observed {
		return bare
	}
	for _, pin := range pins {
		if !c.listsPort(pin, dst.Port()) {
			continue
		}
		if v := c.Decide(Flow{Proto: TCP, Dst: dst, Name: pin}); v.Allow && !v.Observed {
			return Judgement{Verdict: v, Route: RoutePinned, Name: pin}
		}
	}
	return bare
}

// fits reports whether the port is one on which a rule without a port is about wire.
func fits(port uint16, wire Wire) bool {
	switch port {
	case 443:
		return wire == WireTLS
	case 80:
		return wire == WireHTTP
	}
	return wire != WireOther
}

// NamesPort reports whether some rule names a host with this port, so that connections
// to it are looked at whatever their protocol.
func (c *Compiled) NamesPort(port uint16) bool {
	return c.allow.pinPorts[port] != nil || c.opAllow.pinPorts[port] != nil || c.floorOpen.pinPorts[port] != nil
}

// listsPort reports whether a rule lists name with this port.
func (c *Compiled) listsPort(name string, port uint16) bool {
	for _, s := range [...]*ruleSet{&c.floorOpen, &c.opAllow, &c.allow} {
		if set := s.pinPorts[port]; set != nil && set.match(name) != 0 {
			return true
		}
	}
	return false
}

// PortRule returns the rule that lets a protocol without a name pass on port, where
// names are listed without a port: the one name there is, or NAME for many.
func (c *Compiled) PortRule(port uint16) (entry string, ok bool) {
	if !proxyPort(port) || c.allow.names == nil {
		return "", false
	}
	name := "NAME"
	if len(c.allow.names.rules) == 1 {
		for n, r := range c.allow.names.rules {
			if r.exact != 0 {
				name = n
			}
		}
	}
	return name + ":" + strconv.Itoa(int(port)), true
}
