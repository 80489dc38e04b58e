package server

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// dialSelf connects a sandbox that asked for one of our own public URLs to the
// ingress, where the request passes every check a stranger's does. The connection
// comes from an address of the loopback network that is the sandbox's alone, so
// that the ingress knows whose it is: otherwise all sandboxes would share the
// limits of this machine's own clients, and services would take them for local.
func (s *server) dialSelf(ctx context.Context, client netip.AddrPort, port uint16) (net.Conn, error) {
	addr := s.selfAddress
	if port == 80 {
		addr = s.selfPlain
	}
	if addr == "" {
		return nil, fmt.Errorf("no listener for port %d with an IPv4 address", port)
	}
	id, _, ok := s.network.Owner(client.Addr())
	if !ok {
		return nil, fmt.Errorf("no sandbox has the address %s", client.Addr())
	}
	ep, ok := s.manager.Endpoint(id)
	if !ok || !ep.Record.Lease.Addr4.IsValid() {
		return nil, sandbox.NotFound(id)
	}
	from := loopbackOf(ep.Record.Lease.Addr4.Addr())
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	return d.DialContext(ctx, "tcp4", addr)
}

// loopbackOf returns the loopback address that stands for a sandbox's: 10.223.0.2
// is 127.223.0.2. The network of all sandboxes is a /8 or smaller.
func loopbackOf(addr netip.Addr) netip.Addr {
	b := addr.As4()
	b[0] = 127
	return netip.AddrFrom4(b)
}

// sandboxBehind is the inverse of loopbackOf for the sandboxes of a network. Each
// has the third address of a /30, so 127.0.0.1 stands for none.
func sandboxBehind(src netip.Addr, subnet netip.Prefix) (netip.Addr, bool) {
	if !src.Is4() || !src.IsLoopback() {
		return netip.Addr{}, false
	}
	b := src.As4()
	b[0] = subnet.Addr().As4()[0]
	addr := netip.AddrFrom4(b)
	return addr, b[3]%4 == 2 && subnet.Contains(addr)
}
