package failclosed

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/cilium/ebpf"
)

// TestTheProgramMarksPacketsAndDropsMulticast has the kernel run the program on frames.
func TestTheProgramMarksPacketsAndDropsMulticast(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_PRIVILEGED") != "" {
			t.Fatal("this test needs root, and REQUIRE_PRIVILEGED is set")
		}
		t.Skip("this test needs root")
	}
	const bit = 1 << 29
	g, err := Load(bit)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	frame := func(etherType uint16, size int, dst byte) []byte {
		b := make([]byte, size)
		binary.BigEndian.PutUint16(b[12:], etherType)
		if size > 30 {
			b[30] = dst
		}
		return b
	}
	const goesOn, dropped = ^uint32(0), 2
	for _, c := range []struct {
		name    string
		frame   []byte
		verdict uint32
		mark    uint32
	}{
		{"IPv4", frame(0x0800, 60, 198), goesOn, bit},
		{"the address below multicast", frame(0x0800, 60, 223), goesOn, bit},
		{"multicast", frame(0x0800, 60, 224), dropped, 0},
		{"broadcast", frame(0x0800, 60, 255), dropped, 0},
		{"IPv6", frame(0x86dd, 60, 255), goesOn, bit},
		{"ARP", frame(0x0806, 60, 255), goesOn, bit},
	} {
		t.Run(c.name, func(t *testing.T) {
			const size, mark = 192, 8 // of struct __sk_buff, and where the mark is in it
			out := make([]byte, size)
			got, err := g.program.Run(&ebpf.RunOptions{Data: c.frame, DataOut: make([]byte, 256), Context: make([]byte, size), ContextOut: out})
			if err != nil {
				t.Fatal(err)
			}
			if m := binary.NativeEndian.Uint32(out[mark:]); got != c.verdict || m != c.mark {
				t.Errorf("verdict %d with mark %#x; want %d with %#x", int32(got), m, int32(c.verdict), c.mark)
			}
		})
	}
}
