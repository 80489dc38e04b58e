package network

import (
	"fmt"
	"net"
	"net/netip"
	"sort"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// register puts rules for slots in force whose links do not exist: what the kernel
// has to check and to look through is the same, and it takes no time to make them.
func register(t testing.TB, w *world, count int) {
	t.Helper()
	p := compiled(t, policy.Input{DenyOut: []string{"198.18.0.0/15", "1.2.3.0/24"}}, nil)
	for i := range count {
		num := 8000 + i
		s := &slotState{Slot: w.plan.Slot(num, true)}
		s.Index = uint32(1e6 + num)
		if err := w.admit(s); err != nil {
			t.Fatal(err)
		}
		if err := w.install(s, p); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkApplyAmongMany(b *testing.B) {
	for _, many := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("slots=%d", many), func(b *testing.B) {
			w := start(b)
			register(b, w, many-1)
			s := w.byID[w.lease().Sandbox]
			p := compiled(b, policy.Input{DenyOut: []string{"198.51.100.0/24"}}, nil)
			for b.Loop() {
				if err := w.install(s, p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRoundTrip compares a request and its answer on one connection that the
// kernel forwards under a policy with the same over a link with nothing but
// masquerading, side by side, in interleaved rounds. The metric "ratio" is bare
// time divided by ours: 1 is no cost at all.
func BenchmarkRoundTrip(b *testing.B) {
	for _, many := range []int{1, 1000} {
		b.Run(fmt.Sprintf("slots=%d", many), func(b *testing.B) {
			w := start(b)
			w.serve(7777)
			register(b, w, many-1)
			l := w.lease()
			w.apply(l, policy.Input{DenyOut: []string{"198.51.101.0/24"}})
			to := at("198.51.100.10:7777")
			ours, bare := open(b, l, to), open(b, bareLink(b, w), to)
			var ratios []float64
			for b.Loop() {
				x, y := rounds(b, bare), rounds(b, ours)
				ratios = append(ratios, float64(x)/float64(y))
			}
			sort.Float64s(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "ratio")
		})
	}
}

// rounds times requests and answers.
func rounds(b *testing.B, c net.Conn) time.Duration {
	b.Helper()
	const count = 500
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	buf := make([]byte, 4)
	began := time.Now()
	for range count {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
	return time.Since(began)
}

// bareLink is a namespace behind a link that our table does not know, masqueraded
// by a table of its own.
func bareLink(b *testing.B, w *world) sandbox.Lease {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	l := sandbox.Lease{NetNS: b.TempDir() + "/bare", Addr4: netip.MustParsePrefix("10.99.0.2/30"), Gate4: netip.MustParseAddr("10.99.0.1")}
	ns, err := slot.CreateNetns(l.NetNS)
	must(err)
	b.Cleanup(func() {
		ns.Close()
		if l, err := netlink.LinkByName("bare0"); err == nil {
			must(netlink.LinkDel(l))
		}
		must(slot.RemoveNetns(l.NetNS))
	})
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: "bare0"})
	veth.PeerName, veth.PeerNamespace = slot.SandboxLink, netlink.NsFd(ns)
	must(netlink.LinkAdd(veth))
	must(netlink.AddrAdd(veth, slot.Address(netip.PrefixFrom(l.Gate4, 30))))
	must(netlink.LinkSetUp(veth))
	must(armBare(ns, l))
	k := &kernel{}
	b.Cleanup(k.close)
	table := &nftables.Table{Name: "bare", Family: nftables.TableFamilyINet}
	must(k.change(func(c *nftables.Conn) {
		c.AddTable(table)
		chain := c.AddChain(&nftables.Chain{Name: "post", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("up0\x00")}, &expr.Masq{},
		}})
	}))
	b.Cleanup(func() { must(k.change(func(c *nftables.Conn) { c.DelTable(table) })) })
	return l
}

func armBare(ns netns.NsHandle, l sandbox.Lease) error {
	return slot.Inside(ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(slot.SandboxLink)
		if err != nil {
			return err
		}
		if err := h.AddrAdd(link, slot.Address(l.Addr4)); err != nil {
			return err
		}
		if err := h.LinkSetUp(link); err != nil {
			return err
		}
		return h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: l.Gate4.AsSlice(), Dst: slot.Address(slot.Everything(l.Gate4)).IPNet})
	})
}
