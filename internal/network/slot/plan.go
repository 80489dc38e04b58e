package slot

import (
	"hash/fnv"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// Plan says which addresses, names and hardware addresses slots have: number n has the
// n-th /30 of Subnet4 and the n-th /64 of Subnet6. The host has the first address of
// each, the sandbox the second.
type Plan struct {
	Name             string // of the server
	Dir              string // of the namespaces' bind mounts
	Subnet4, Subnet6 netip.Prefix
	Most             int // slots, whatever Subnet4 holds
}

// Hash spreads names of servers over numbers (FNV-1a).
func Hash(name string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // it returns no error
	return h.Sum32()
}

// Capacity is the number of slots.
func (p Plan) Capacity() int { return min(1<<(30-p.Subnet4.Bits()), p.Most) }

// Prefix starts the name of every link of this server, and of no other link.
func (p Plan) Prefix() string { return "cd" + p.Name + "-" }

// Slot returns slot i as it will be once it is built.
func (p Plan) Slot(i int, v6 bool) Slot {
	return Slot{Num: i, Lease: p.Lease(i, v6), MAC: p.mac(i, sandboxSide)}
}

// Lease describes slot i; which sandbox holds it is left open.
func (p Plan) Lease(i int, v6 bool) sandbox.Lease {
	link := p.Prefix() + strconv.Itoa(i)
	b4 := p.Subnet4.Addr().As4()
	base := uint32(b4[0])<<24 | uint32(b4[1])<<16 | uint32(b4[2])<<8 | uint32(b4[3]) + 4*uint32(i)
	at := func(k uint32) netip.Addr {
		a := base + k
		return netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)})
	}
	l := sandbox.Lease{
		Slot: i, Link: link, NetNS: filepath.Join(p.Dir, link), MAC: p.mac(i, sandboxSide).String(),
		Gate4: at(1), Addr4: netip.PrefixFrom(at(2), 30),
	}
	if v6 {
		b6 := p.Subnet6.Addr().As16()
		b6[6], b6[7] = byte(i>>8), byte(i)
		b6[15] = 1
		l.Gate6 = netip.AddrFrom16(b6)
		b6[15] = 2
		l.Addr6 = netip.PrefixFrom(netip.AddrFrom16(b6), 64)
	}
	return l
}

// The ends of a slot's veth pair, as the last octet of their hardware addresses.
const hostSide, sandboxSide = 1, 2

// mac returns a locally administered hardware address.
func (p Plan) mac(i int, side byte) net.HardwareAddr {
	h := Hash(p.Name)
	return net.HardwareAddr{0x02, byte(h >> 8), byte(h), byte(i >> 8), byte(i), side}
}

// SlotOf returns the number of the slot whose sandbox has addr.
func (p Plan) SlotOf(addr netip.Addr) (int, bool) {
	addr = addr.Unmap()
	i := 0
	switch {
	case p.Subnet4.Contains(addr):
		a, b := addr.As4(), p.Subnet4.Addr().As4()
		off := (uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])) -
			(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]))
		if off%4 != 2 {
			return 0, false
		}
		i = int(off / 4)
	case p.Subnet6.Contains(addr):
		a := addr.WithZone("").As16()
		i = int(a[6])<<8 | int(a[7])
		if addr != p.Lease(i, true).Addr6.Addr() {
			return 0, false
		}
	default:
		return 0, false
	}
	return i, i < p.Capacity()
}

// Number returns the slot number in the name of a link of this server.
func (p Plan) Number(link string) (int, bool) {
	rest, ok := strings.CutPrefix(link, p.Prefix())
	i, err := strconv.Atoi(rest)
	return i, ok && err == nil && i >= 0 && i < p.Capacity() && strconv.Itoa(i) == rest
}
