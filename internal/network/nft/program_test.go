package nft

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/cordonhq/cordon/internal/policy"
)

// machine runs a slot's rules as the kernel does, for the first packet of a flow. It
// knows the expressions that programs consist of, and of the shared chains what they
// are for.
type machine struct {
	prog *Program
	flow policy.Flow
	host bool // the destination is the host's
	regs [64]byte
}

// offset is where a register lies: the wide ones are four of the narrow ones.
func offset(reg uint32) int {
	if reg >= word(0) {
		return 4 * int(reg-word(0))
	}
	return 16 * int(reg-reg1)
}

// run returns the chain where the flow leaves the program.
func (m *machine) run() string {
	for _, r := range m.prog.rules {
		to, jumps, matched := m.rule(r)
		switch {
		case !matched || to == "" || jumps && to == chainScreen:
		case jumps && (to == chainBlocked || to == chainBlockedNames):
			blocked := m.host || slices.ContainsFunc(policy.Floor(), func(f policy.FloorRange) bool { return f.Prefix.Contains(m.flow.Dst.Addr()) })
			if blocked && to == chainBlocked {
				return ClassBlocked.chain()
			}
			if blocked {
				return chainProxy
			}
		case jumps && to == chainDenied:
		case jumps && to == chainHostOpen:
			if m.host {
				return chainOK
			}
		case jumps && to == chainHostException:
			if m.host {
				return chainException
			}
		case jumps:
			panic("the test knows nothing of chain " + to)
		default:
			return to
		}
	}
	return "the end"
}

// rule runs one rule.
func (m *machine) rule(r Rule) (to string, jumps, matched bool) {
	for _, e := range r {
		switch e := e.(type) {
		case *expr.Ct:
			m.load(reg1, native(0)) // a new flow has no mark
		case *expr.Meta:
			m.meta(e)
		case *expr.Payload:
			m.payload(e)
		case *expr.Bitwise:
			at := offset(e.SourceRegister)
			for i := range e.Len {
				m.regs[at+int(i)] = m.regs[at+int(i)]&e.Mask[i] ^ e.Xor[i]
			}
		case *expr.Cmp:
			equal := bytes.Equal(m.regs[offset(e.Register):][:len(e.Data)], e.Data)
			if equal != (e.Op == expr.CmpOpEq) {
				return "", false, false
			}
		case *expr.Lookup:
			if !m.lookup(e) {
				return "", false, false
			}
		case *expr.Verdict:
			if e.Kind == expr.VerdictAccept {
				return "accept", false, true
			}
			return e.Chain, e.Kind == expr.VerdictJump, true
		default:
			panic(fmt.Sprintf("the test knows nothing of %T", e))
		}
	}
	return "", false, true
}

func (m *machine) load(reg uint32, b []byte) { copy(m.regs[offset(reg):], b) }

func (m *machine) meta(e *expr.Meta) {
	switch e.Key {
	case expr.MetaKeyL4PROTO:
		m.load(e.Register, []byte{byte(m.flow.Proto)})
	case expr.MetaKeyNFPROTO:
		f := familyOf(m.flow.Dst.Addr())[1].(*expr.Cmp)
		m.load(e.Register, f.Data)
	default:
		panic("meta")
	}
}

func (m *machine) payload(e *expr.Payload) {
	switch {
	case e.Base == expr.PayloadBaseNetworkHeader && (e.Offset == 16 || e.Offset == 24):
		m.load(e.DestRegister, m.flow.Dst.Addr().AsSlice())
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == 2:
		m.load(e.DestRegister, append(big16(m.flow.Dst.Port()), 0, 0))
	default:
		panic("payload")
	}
}

func (m *machine) lookup(e *expr.Lookup) bool {
	i := slices.IndexFunc(m.prog.Sets, func(s *nftables.Set) bool { return s.Name == e.SetName })
	if i < 0 {
		panic("no set " + e.SetName)
	}
	set, at := m.prog.Sets[i], offset(e.SourceRegister)
	inside := false
	for _, el := range m.prog.Elems[i] {
		key := m.regs[at : at+len(el.Key)]
		switch {
		case set.Concatenation: // each field by itself
			size := len(el.Key) - 4
			if bytes.Compare(el.Key[:size], key[:size]) <= 0 && bytes.Compare(key[:size], el.KeyEnd[:size]) <= 0 && bytes.Equal(el.Key[size:], key[size:]) {
				return true
			}
		case bytes.Compare(el.Key, key) <= 0:
			inside = !el.IntervalEnd // they are sorted
		}
	}
	return inside
}

// TestThePacketFilterDecidesAsThePolicy compiles random policies, runs their rules and
// compares with what the policy says: for what the kernel settles, whatever name could
// be shown.
func TestThePacketFilterDecidesAsThePolicy(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 16))
	hosts := netip.MustParsePrefix("203.0.113.0/31")
	addr := func() netip.Addr {
		switch rng.IntN(6) {
		case 0:
			return netip.AddrFrom4([4]byte{10, byte(rng.IntN(2)), 0, byte(rng.IntN(8))})
		case 1:
			return netip.AddrFrom4([4]byte{203, 0, 113, byte(rng.IntN(4))})
		case 2:
			return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(rng.IntN(8))})
		case 3:
			return []netip.Addr{policy.ServiceAddr4, policy.DefaultNameserver, netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("fc00::3")}[rng.IntN(5)]
		}
		return netip.AddrFrom4([4]byte{1 + byte(rng.IntN(2)), 2, 3, byte(rng.IntN(16))})
	}
	ports := []uint16{80, 443, 53, 22, 5432}
	entry := func(names bool) string {
		if names && rng.IntN(3) == 0 {
			return []string{"a.com", "*.a.com", "b:5432", "*"}[rng.IntN(4)]
		}
		a := addr()
		text := netip.PrefixFrom(a, a.BitLen()-rng.IntN(12)).Masked().String()
		if port := ports[rng.IntN(len(ports))]; rng.IntN(3) == 0 {
			if a.Is6() {
				text = "[" + text + "]"
			}
			return fmt.Sprintf("%s:%d", text, port)
		}
		return text
	}
	table := Table{Name: "t"}
	count := map[string]int{}
	for range 1500 {
		var in policy.Input
		op := policy.Operator{SelfDomains: []string{"cordon.localhost"}, HostAddrs: []netip.Prefix{hosts}}
		named := rng.IntN(2) == 0
		for _, l := range []struct {
			list  *[]string
			names bool
		}{{&in.AllowOut, named}, {&in.DenyOut, false}, {&op.AlwaysAllow, true}, {&op.AlwaysDeny, true}, {&op.FloorOpen, false}} {
			for range rng.IntN(5) {
				*l.list = append(*l.list, entry(l.names))
			}
		}
		if named || rng.IntN(3) == 0 {
			in.DenyOut = append(in.DenyOut, "0.0.0.0/0")
		}
		in.Mode = []policy.Mode{policy.ModeEnforce, policy.ModeObserve}[rng.IntN(2)]
		p := compiled(t, in, op)
		prog := table.Program(Slot{Num: 1}, 1, p.Kernel())
		for range 60 {
			f := policy.Flow{Proto: []policy.Proto{policy.TCP, policy.TCP, policy.UDP, policy.ICMP}[rng.IntN(4)], Dst: netip.AddrPortFrom(addr(), ports[rng.IntN(len(ports))])}
			m := &machine{prog: prog, flow: f, host: hosts.Contains(f.Dst.Addr())}
			got := m.run()
			count[got]++
			var allow bool
			switch got {
			case chainOK, chainException:
				allow = true
			case chainDNS:
				allow = true
			case ClassDeny.chain(), ClassBlocked.chain():
			case chainProxy:
				continue
			default:
				t.Fatalf("%+v\n%+v\n%v leaves by %s", in, op, f, got)
			}
			if got == chainException && f.Proto == policy.TCP && (f.Dst.Port() == 80 || f.Dst.Port() == 443) {
				continue // that chain hands it to the proxy
			}
			for _, f.Name = range []string{"", "a.com", "x.a.com", "b", "x.cordon.localhost"} {
				if f.Name != "" && (f.Proto != policy.TCP || f.Dst.Port() != 80 && f.Dst.Port() != 443) {
					continue // no name is seen there
				}
				if v := p.Decide(f); v.Allow != allow {
					t.Fatalf("%+v\n%+v\n%v: the rules: %s; the policy: %+v", in, op, f, got, v)
				}
			}
		}
	}
	t.Log(count)
	for _, chain := range []string{chainOK, chainException, chainProxy, ClassDeny.chain(), ClassBlocked.chain()} {
		if count[chain] < 500 {
			t.Errorf("chain %s is reached %d times only: the test is lopsided", chain, count[chain])
		}
	}
}

func compiled(t *testing.T, in policy.Input, op policy.Operator) *policy.Compiled {
	t.Helper()
	p, err := policy.Compile(in, &op, 1)
	if err != nil {
		t.Fatal("compile:", err)
	}
	return p
}
