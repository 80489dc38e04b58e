package nft

import (
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/cordonhq/cordon/internal/policy"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestWhatIsWritten compares the changes of nftables with golden text, one line a change
// and one an expression. What the kernel makes of them is golden text of the package
// network, whose tests need root.
func TestWhatIsWritten(t *testing.T) {
	table := Table{
		Name: "t", Links: "cdt-", Subnet4: netip.MustParsePrefix("10.223.0.0/16"), Subnet6: netip.MustParsePrefix("fdc0:4d00::/48"),
		Slots: 16384, ProxyPort: 15001, DNSPort: 15053, Mark: 1 << 28, FirstPort: 52000, LastPort: 59999, LogGroup: 1000,
		MaxFlows: 8192, MaxNewFlows: 500, MaxBytesOut: 1 << 30,
		Limits: Limits{KeyFlows: 1000, AllFlows: 2000, KeyRate: 100, AllRate: 200, KeyPorts: 4000, Destinations: 65536, Queries: 2000, KeyQueries: 5000},
	}
	slot := Slot{
		Num: 7, Index: 42, MAC: net.HardwareAddr{2, 0, 0, 0, 7, 2}, Key: 3, Spent: 99,
		Addr4: netip.MustParseAddr("10.223.0.30"), Addr6: netip.MustParseAddr("fdc0:4d00:0:7::2"),
	}
	addresses := policy.Input{DenyOut: []string{"198.51.100.0/24", "203.0.112.0/24", "2001:db8:5::/48"}, AllowOut: []string{"198.51.7.7", "198.51.8.0/24:8443", "[2001:db8:7::1]:22"}}
	operator := policy.Operator{FloorOpen: []string{"10.20.0.0/16:5432", "db.internal.example"}, AlwaysDeny: []string{"198.51.100.128/25"}}
	names := policy.Input{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"example.com", "db.example.com:5432"}}
	first := table.Program(slot, 1, compiled(t, addresses, operator).Kernel())
	second := table.Program(slot, 2, compiled(t, names, policy.Operator{}).Kernel())
	for name, write := range map[string]func(*Batch){
		"table": func(b *Batch) {
			table.Make(b, []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:1::/64")},
				map[netip.AddrPort]int{netip.MustParseAddrPort("198.51.100.9:0"): 0, netip.MustParseAddrPort("[2001:db8::9]:5432"): 1})
		},
		"admit":   func(b *Batch) { table.Admit(b, slot) },
		"first":   func(b *Batch) { table.Enforce(b, slot, first, nil, false) },
		"replace": func(b *Batch) { table.Enforce(b, slot, second, first.InForce(), false) },
		"pin": func(b *Batch) {
			set, elem := second.Pin(netip.MustParseAddrPort("198.51.100.10:5432"), pinFor, "db.example.com")
			b.Add(set, []nftables.SetElement{elem})
		},
		"withdraw": func(b *Batch) { table.Withdraw(b, slot, second.InForce()) },
	} {
		t.Run(name, func(t *testing.T) {
			var b Batch
			write(&b)
			var got strings.Builder
			for _, c := range b.changes {
				got.WriteString(c.text())
			}
			file := "testdata/" + name + ".golden"
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != string(want) {
				t.Errorf("the changes differ from %s (go test -update writes it anew):\n%s", file, got.String())
			}
		})
	}
}

const pinFor = 3600e9

// text is a change as the golden files have it.
func (c change) text() string {
	var out strings.Builder
	fmt.Fprint(&out, string(c.verb))
	switch {
	case c.table != nil:
		fmt.Fprintf(&out, " %s\n", c.table.Name)
	case c.set != nil:
		fmt.Fprintf(&out, " %s %s\n", c.set.Name, c.set.KeyType.Name)
		for _, e := range c.elems {
			fmt.Fprintf(&out, "    %x", e.Key)
			for _, more := range []struct {
				is   bool
				text string
			}{
				{e.KeyEnd != nil, fmt.Sprintf("-%x", e.KeyEnd)}, {e.Val != nil, fmt.Sprintf(" = %x", e.Val)}, {e.IntervalEnd, " end"},
				{e.Timeout > 0, fmt.Sprintf(" for %s", e.Timeout)}, {e.Comment != "", " " + e.Comment},
			} {
				if more.is {
					out.WriteString(more.text)
				}
			}
			if e.VerdictData != nil {
				fmt.Fprintf(&out, " goto %s", e.VerdictData.Chain)
			}
			out.WriteByte('\n')
		}
	case c.chain != nil:
		fmt.Fprintf(&out, " %s\n", c.chain.Name)
		for _, e := range c.rule {
			fmt.Fprintf(&out, "    %s\n", exprText(e))
		}
	default:
		fmt.Fprintf(&out, " %s\n", exprText(c.obj))
	}
	return out.String()
}

// exprText is the type of a value and those of its fields that are not zero.
func exprText(e any) string {
	v := reflect.ValueOf(e)
	if v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	out := strings.TrimPrefix(v.Type().String(), "expr.")
	for i := range v.NumField() {
		f := v.Field(i)
		if f.IsZero() || v.Type().Field(i).Name == "Table" {
			continue
		}
		out += " " + v.Type().Field(i).Name + "="
		switch x := f.Interface().(type) {
		case []byte:
			out += fmt.Sprintf("%x", x)
		case []expr.Any:
			for _, sub := range x {
				out += "(" + exprText(sub) + ")"
			}
		case expr.Any:
			out += "(" + exprText(x) + ")"
		default:
			out += fmt.Sprint(x)
		}
	}
	return out
}
