package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/proving/lab"
)

// The server's addresses and names (RFC 5737, RFC 6761): each kind of service
// has its own, so that a proxy that resolves names finds it.
var (
	serverNet = netip.MustParsePrefix("198.51.100.0/24")
	rawAddr   = netip.MustParseAddrPort("198.51.100.10:443")
	tlsAddr   = netip.MustParseAddrPort("198.51.100.11:443")
	webAddr   = netip.MustParseAddrPort("198.51.100.12:80")
	dnsAddr   = netip.MustParseAddrPort("198.51.100.53:53")
	// refusedAddr is denied by every policy here.
	refusedAddr = netip.MustParseAddrPort("198.51.100.66:443")
)

const (
	rawName, tlsName, webName = "raw.bench.test", "tls.bench.test", "web.bench.test"
	deniedName                = "denied.bench.test"
)

// names are what the server's DNS answers and filters allow.
var names = map[string]netip.AddrPort{rawName: rawAddr, tlsName: tlsAddr, webName: webAddr}

const uplink, inner, guest = "up0", "in0", "eth0"

// end is one end of a wire.
type end struct {
	ns      *lab.Netns
	link    string
	addr    netip.Prefix
	gateway netip.Addr // of the default route by this link, or zero
}

// join makes a wire. The index keeps the two ends' apart: for a link whose peer
// has its own index the kernel thinks there is no peer for a while.
func join(a, b end, index int) error {
	h, err := routes(a.ns)
	if err != nil {
		return err
	}
	defer h.Close()
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: a.link, Index: index, TxQLen: 1000})
	veth.PeerName, veth.PeerNamespace = b.link, netlink.NsFd(b.ns.FD())
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("join %s and %s: %w", a.link, b.link, err)
	}
	for _, e := range []end{a, b} {
		if err := e.configure(); err != nil {
			return fmt.Errorf("configure %s: %w", e.link, err)
		}
	}
	return errors.Join(a.settle(), b.settle())
}

func (e end) configure() error {
	h, err := routes(e.ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(e.link)
	if err != nil {
		return err
	}
	if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(e.addr)}); err != nil {
		return err
	}
	if err := h.LinkSetUp(link); err != nil {
		return err
	}
	if !e.gateway.IsValid() {
		return nil
	}
	return h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: e.gateway.AsSlice(), Dst: ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0))})
}

// settle waits until the kernel has put the link into operation.
func (e end) settle() error {
	h, err := routes(e.ns)
	if err != nil {
		return err
	}
	defer h.Close()
	for limit := time.Now().Add(3 * time.Second); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		if l, err := h.LinkByName(e.link); err == nil && l.Attrs().OperState == netlink.OperUp {
			return nil
		}
	}
	return fmt.Errorf("link %s does not come into operation", e.link)
}

// routes opens a namespace's route netlink.
func routes(ns *lab.Netns) (*netlink.Handle, error) {
	return netlink.NewHandleAt(netns.NsHandle(ns.FD()))
}

// newServerNetns makes the namespace in which every address of serverNet is local.
func newServerNetns() (*lab.Netns, error) {
	ns, err := lab.NewNetns()
	if err != nil {
		return nil, err
	}
	return ns, makeLocal(ns, serverNet, unix.RT_TABLE_LOCAL)
}

// makeLocal delivers what goes to a prefix to this namespace's sockets.
func makeLocal(ns *lab.Netns, p netip.Prefix, table int) error {
	h, err := routes(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(p), Table: table, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST})
}

// newRouter makes a namespace with a wire of its own to the server's.
func (r *run) newRouter(server *lab.Netns) (*lab.Netns, error) {
	ns, err := lab.NewNetns()
	if err != nil {
		return nil, err
	}
	r.made++
	near := netip.AddrFrom4([4]byte{203, 0, 113, byte(4*r.made%252 + 1)})
	err = join(
		end{server, fmt.Sprint("up", r.made), netip.PrefixFrom(near.Next(), 30), netip.Addr{}},
		end{ns, uplink, netip.PrefixFrom(near, 30), near.Next()}, 1000+r.made)
	if err != nil {
		return nil, err
	}
	return ns, sysctl(ns, map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0",
		"net/ipv4/conf/" + uplink + "/rp_filter": "0",
		// Short connections by the ten thousand: forget them soon.
		"net/netfilter/nf_conntrack_tcp_timeout_time_wait": "2", "net/netfilter/nf_conntrack_tcp_timeout_close": "2",
		"net/ipv4/ip_local_port_range": "1024 65535", "net/ipv4/tcp_tw_reuse": "1",
	})
}

// newClient makes the namespace of a client behind a router, as a sandbox's is.
func (r *run) newClient(router *lab.Netns) (*lab.Netns, error) {
	ns, err := lab.NewNetns()
	if err != nil {
		return nil, err
	}
	near := netip.MustParsePrefix("10.99.0.1/30")
	err = join(end{router, inner, near, netip.Addr{}}, end{ns, guest, netip.PrefixFrom(near.Addr().Next(), 30), near.Addr()}, 2000)
	if err != nil {
		return nil, err
	}
	return ns, errors.Join(prepareClient(ns), sysctl(router, map[string]string{"net/ipv4/conf/" + inner + "/rp_filter": "0"}))
}

// prepareClient lets a client open tens of thousands of short connections.
func prepareClient(ns *lab.Netns) error {
	return sysctl(ns, map[string]string{"net/ipv4/ip_local_port_range": "1024 65535", "net/ipv4/tcp_tw_reuse": "1"})
}

// masquerade is what any sandbox needs to reach a network: connection tracking
// and the host's address.
func masquerade(router *lab.Netns) error {
	return rules(router, func(c *nftables.Conn, t *nftables.Table) {
		post := c.AddChain(&nftables.Chain{Name: "post", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
		c.AddRule(&nftables.Rule{Table: t, Chain: post, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: linkName(uplink)},
			&expr.Masq{},
		}})
	})
}

// The ports of a peer that filters names.
const peerTLS, peerHTTP = 15443, 15080

// divertMark marks packets for transparent sockets.
const divertMark, divertTable = 1, 100

// divert hands a client's connections to ports 80 and 443 to a peer: with
// TPROXY, or for one without transparent sockets with REDIRECT.
func divert(router *lab.Netns, transparent bool) error {
	err := rules(router, func(c *nftables.Conn, t *nftables.Table) {
		kind, priority := nftables.ChainTypeNAT, nftables.ChainPriorityNATDest
		if transparent {
			kind, priority = nftables.ChainTypeFilter, nftables.ChainPriorityMangle
		}
		pre := c.AddChain(&nftables.Chain{Name: "pre", Table: t, Type: kind, Hooknum: nftables.ChainHookPrerouting, Priority: priority})
		for from, to := range map[uint16]uint16{443: peerTLS, 80: peerHTTP} {
			c.AddRule(&nftables.Rule{Table: t, Chain: pre, Exprs: append(fromClient(from), handOver(to, transparent)...)})
		}
	})
	if err != nil || !transparent {
		return err
	}
	if err := makeLocal(router, netip.PrefixFrom(netip.IPv4Unspecified(), 0), divertTable); err != nil {
		return err
	}
	h, err := routes(router)
	if err != nil {
		return err
	}
	defer h.Close()
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = netlink.FAMILY_V4, divertMark, divertTable, 100
	return h.RuleAdd(rule)
}

func fromClient(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: linkName(inner)},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

func handOver(port uint16, transparent bool) []expr.Any {
	load := &expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)}
	if !transparent {
		return []expr.Any{load, &expr.Redir{RegisterProtoMin: 2}}
	}
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: []byte{127, 0, 0, 1}}, load,
		&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: byte(nftables.TableFamilyIPv4), RegAddr: 1, RegPort: 2},
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(divertMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// rules adds to the bench's own table in a namespace.
func rules(ns *lab.Netns, add func(*nftables.Conn, *nftables.Table)) error {
	c, err := nftables.New(nftables.WithNetNSFd(ns.FD()))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	add(c, c.AddTable(&nftables.Table{Name: "bench", Family: nftables.TableFamilyIPv4}))
	if err := c.Flush(); err != nil {
		return fmt.Errorf("load nftables rules: %w", err)
	}
	return nil
}

// sysctl sets kernel parameters of a namespace. A kernel without one has
// nothing to set.
func sysctl(ns *lab.Netns, values map[string]string) error {
	return ns.Do(func() error {
		for key, value := range values {
			if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("set %s: %w", key, err)
			}
		}
		return nil
	})
}

// linkName is a name as the kernel compares it.
func linkName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
