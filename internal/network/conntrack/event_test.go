package conntrack

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cordonhq/cordon/internal/policy"
)

// attr is a netlink attribute.
func attr(kind uint16, parts ...[]byte) []byte {
	b := make([]byte, 4)
	for _, p := range parts {
		b = append(b, p...)
	}
	binary.NativeEndian.PutUint16(b, uint16(len(b)))
	binary.NativeEndian.PutUint16(b[2:], kind)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// endOfFlow is a message as Linux 6.18 sends it, with what we do not read left out
// but for the reply's tuple.
func endOfFlow() []byte {
	const nested = 1 << 15
	src, dst := netip.MustParseAddr("10.223.0.2").AsSlice(), netip.MustParseAddr("198.51.100.10").AsSlice()
	ports := func(a, b byte) []byte {
		return attr(2|nested, attr(1, []byte{6}), attr(2, []byte{0x80, a}), attr(3, []byte{0x1e, b}))
	}
	b := make([]byte, ctHeader)
	binary.NativeEndian.PutUint16(b[4:], ctDelete)
	for _, a := range [][]byte{
		attr(1|nested, attr(1|nested, attr(1, src), attr(2, dst)), ports(1, 0x61)),
		attr(2|nested, attr(1|nested, attr(1, dst), attr(2, src)), ports(9, 9)),
		attr(8, []byte{0xc0, 0, 0x20, 1}),
		attr(9|nested, attr(1, u64(3)), attr(2, u64(1234))),
		attr(10|nested, attr(1, u64(4)), attr(2, u64(5678))),
		attr(20|nested, attr(1, u64(1000)), attr(2, u64(3000))),
	} {
		b = append(b, a...)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestParse(t *testing.T) {
	whole := endOfFlow()
	want := Event{
		Ended: true, Mark: 0xc0002001, Proto: policy.TCP,
		Src: netip.MustParseAddrPort("10.223.0.2:32769"), Dst: netip.MustParseAddrPort("198.51.100.10:7777"),
		BytesOut: 1234, BytesIn: 5678, Start: 1000, Stop: 3000,
	}
	other := append([]byte{}, whole...)
	binary.NativeEndian.PutUint16(other[4:], 3) // NLMSG_DONE
	for _, c := range []struct {
		name string
		b    []byte
		want []Event
	}{
		{"one event", whole, []Event{want}},
		{"two in one datagram", append(append([]byte{}, whole...), whole...), []Event{want, want}},
		{"a message of another kind before it", append(other, whole...), []Event{want}},
		{"a message cut off", whole[:len(whole)-4], nil},
		{"nothing", nil, nil},
	} {
		var got []Event
		parse(c.b, func(e Event) { got = append(got, e) })
		if d := cmp.Diff(c.want, got, cmpopts.EquateComparable(netip.AddrPort{})); d != "" {
			t.Errorf("%s: -want +got\n%s", c.name, d)
		}
	}
}

func TestParseAllocatesNothing(t *testing.T) {
	b := endOfFlow()
	var sum uint64
	each := func(e Event) { sum += e.BytesIn }
	if n := testing.AllocsPerRun(100, func() { parse(b, each) }); n > 0 {
		t.Errorf("%v allocations for an event, want none", n)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(endOfFlow())
	f.Add(append(endOfFlow(), endOfFlow()[:30]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		count := 0
		parse(b, func(Event) { count++ })
		if count > len(b)/ctHeader {
			t.Errorf("%d events in %d octets", count, len(b))
		}
	})
}
