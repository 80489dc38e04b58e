package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/cordonhq/cordon/internal/errs"
)

// maxEntries is how many entries one list of a sandbox's rules may hold.
const maxEntries = 10_000

// Compiled is an immutable policy, safe for concurrent use. Every lookup costs
// the same whatever the number of rules: an exact map and a suffix walk for
// names, a prefix trie for addresses.
type Compiled struct {
	input      Input
	generation uint64
	dns        DNSMode
	autoDNS    bool

	rules      []Rule // by ruleRef; rules[0] is the default rule
	allow      ruleSet
	deny       ruleSet
	opAllow    ruleSet
	opDeny     ruleSet
	floorOpen  ruleSet
	hostAddrs  bart.Lite
	isHost     func(netip.Addr) bool // may be nil
	deniedAddr func(netip.AddrPort) (int, bool)
	opDenyRefs []ruleRef // by entry of AlwaysDeny

	opDenyExact bool // some entry is an exact name
	self        []string
	kernel      KernelRules
	autoDNSRef  ruleRef
}

// Compile validates in and returns what decides. Every error is of kind
// errs.Invalid, names the entry and keeps the wording SDK users match on:
//
//	invalid denied CIDR X
//	invalid allowed address X
//	When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic.
//
// generation numbers the policy within its sandbox and is carried into the flow
// log. A nil op adds nothing.
func Compile(in Input, op *Operator, generation uint64) (*Compiled, error) {
	for _, l := range []struct {
		name string
		n    int
	}{{"allowOut", len(in.AllowOut)}, {"denyOut", len(in.DenyOut)}} {
		if l.n > maxEntries {
			return nil, errs.New(errs.Invalid, "network.%s has %d entries, the most is %d: merge CIDRs or use wildcards", l.name, l.n, maxEntries)
		}
	}
	return compile(in, op, generation)
}

// compile is Compile without the limit on entries.
func compile(in Input, op *Operator, generation uint64) (*Compiled, error) {
	if op == nil {
		op = &Operator{}
	}
	c := &Compiled{
		input:      clone(in),
		generation: generation,
		rules:      []Rule{{ID: "default"}},
	}
	if err := c.options(); err != nil {
		return nil, err
	}
	if err := c.addOperator(op); err != nil {
		return nil, err
	}
	if err := c.addDenied(); err != nil {
		return nil, err
	}
	if err := c.addAllowed(); err != nil {
		return nil, err
	}
	c.derive()
	return c, nil
}

// clone makes in the policy's own, so that a caller who goes on writing to its
// lists does not change what was compiled.
func clone(in Input) Input {
	in.AllowOut, in.DenyOut = slices.Clone(in.AllowOut), slices.Clone(in.DenyOut)
	if in.AllowInternetAccess != nil {
		v := *in.AllowInternetAccess
		in.AllowInternetAccess = &v
	}
	return in
}

func (c *Compiled) options() error {
	switch c.input.DNS {
	case DNSAuto, DNSOpen, DNSStrict:
	default:
		return errs.New(errs.Invalid, `network.dns is %q: use "open", "strict" or leave it out`, c.input.DNS)
	}
	switch c.input.OnDeny {
	case "", OnDenyReset, OnDenyExplain:
	default:
		return errs.New(errs.Invalid, `network.onDeny is %q: use "explain", "reset" or leave it out`, c.input.OnDeny)
	}
	switch c.input.Mode {
	case "", ModeEnforce, ModeObserve:
	default:
		return errs.New(errs.Invalid, `network.mode is %q: use "enforce", "observe" or leave it out`, c.input.Mode)
	}
	return nil
}

func (c *Compiled) addOperator(op *Operator) error {
	lists := []struct {
		field string
		id    string
		texts []string
		set   *ruleSet
		read  func(string) ([]listed, error)
		add   func(*ruleSet, entry, ruleRef)
	}{
		{"floorOpen", "operator.open", op.FloorOpen, &c.floorOpen, expand, (*ruleSet).add},
		{"alwaysDeny", "operator.deny", op.AlwaysDeny, &c.opDeny, expandDenied, (*ruleSet).addDeny},
		{"alwaysAllow", "operator.allow", op.AlwaysAllow, &c.opAllow, expand, (*ruleSet).add},
	}
	for _, l := range lists {
		for i, text := range l.texts {
			list, err := l.read(text)
			if err == nil && l.set == &c.floorOpen && (isPreset(text) || list[0].wildcard) {
				err = errors.New("an exception to the always blocked ranges needs an exact name")
			}
			if err != nil {
				return errs.New(errs.Invalid, "operator %s[%d] is %q: %v", l.field, i, text, err)
			}
			c.addListed(list, l.id, i, func(e entry, r ruleRef) {
				l.add(l.set, e, r)
				if l.set == &c.opDeny && len(c.opDenyRefs) == i {
					c.opDenyRefs = append(c.opDenyRefs, r)
				}
			})
		}
	}
	for i, d := range op.SelfDomains {
		name, ok := CanonicalName(d)
		if !ok {
			return errs.New(errs.Invalid, "operator selfDomains[%d] is %q: not a domain name", i, d)
		}
		c.self = append(c.self, name)
	}
	c.isHost, c.deniedAddr = op.IsHost, op.DeniedAddr
	c.opDenyExact = len(op.DeniedNames()) > 0
	for i, p := range op.HostAddrs {
		if !p.IsValid() {
			return errs.New(errs.Invalid, "operator hostAddrs[%d] is not a valid prefix", i)
		}
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		c.hostAddrs.Insert(p.Masked())
	}
	return nil
}

func (c *Compiled) addDenied() error {
	for i, text := range c.input.DenyOut {
		if isPreset(text) {
			return errs.New(errs.Invalid, "invalid denied CIDR %s in network.denyOut[%d]: a preset is a list of names, and names stand in allowOut, beside 0.0.0.0/0 in denyOut", text, i)
		}
		e, err := parseEntry(text)
		if err != nil || !e.isAddr() {
			return errs.New(errs.Invalid, "invalid denied CIDR %s", text)
		}
		c.deny.addDeny(e, c.rule("deny", i, text))
		c.kernel.DenyAll = c.kernel.DenyAll || e.all() && e.port == 0
	}
	if access := c.input.AllowInternetAccess; access != nil && !*access {
		c.rules = append(c.rules, Rule{ID: "deny[internet]", Text: "allow_internet_access: false"})
		c.deny.addDeny(entry{prefix: netip.PrefixFrom(netip.IPv4Unspecified(), 0)}, ruleRef(len(c.rules)-1))
		c.kernel.DenyAll = true
	}
	return nil
}

func (c *Compiled) addAllowed() error {
	for i, text := range c.input.AllowOut {
		list, err := expand(text)
		switch {
		case err != nil && isPreset(text):
			return errs.New(errs.Invalid, "invalid allowed address %s in network.allowOut[%d]: %v", text, i, err)
		case err != nil:
			return errs.New(errs.Invalid, "invalid allowed address %s", text)
		}
		c.addListed(list, "allow", i, c.allow.add)
	}
	if c.allow.hasNames() && !c.kernel.DenyAll {
		return errs.New(errs.Invalid, "When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic.")
	}
	return nil
}

// addListed adds what one text of a list stands for. Entries with one text, the
// ports of a host, share a rule.
func (c *Compiled) addListed(entries []listed, id string, i int, add func(entry, ruleRef)) {
	var r ruleRef
	for n, e := range entries {
		if n == 0 || e.text != entries[n-1].text {
			r = c.rule(id, i, e.text)
		}
		add(e.entry, r)
	}
}

func (c *Compiled) rule(list string, i int, text string) ruleRef {
	c.rules = append(c.rules, Rule{ID: fmt.Sprintf("%s[%d]", list, i), Text: text})
	return ruleRef(len(c.rules) - 1)
}

// derive settles what follows from the rules as a whole.
func (c *Compiled) derive() {
	// A domain of the user's needs deny-all, one of the operator's may stand
	// beside default allow: then DNS needs no help.
	c.autoDNS = c.kernel.DenyAll && (c.allow.hasNames() || c.opAllow.hasNames() || c.floorOpen.hasNames())
	if c.autoDNS {
		c.rules = append(c.rules, Rule{ID: "dns", Text: DefaultNameserver.String() + ":53 (comes with a domain rule)"})
		c.autoDNSRef = ruleRef(len(c.rules) - 1)
	}
	c.dns = c.input.DNS
	if c.dns == DNSAuto {
		c.dns = c.deriveDNS()
	}
	c.deriveKernel()
}

// deriveDNS returns strict only when the nameserver is reachable because a
// domain is listed: an open resolver would then be the way around the list.
func (c *Compiled) deriveDNS() DNSMode {
	byAddr := c.opAllow.matchAddr(DefaultNameserver, 53) != 0 || c.allow.matchAddr(DefaultNameserver, 53) != 0
	if c.autoDNS && !byAddr {
		return DNSStrict
	}
	return DNSOpen
}

// Generation returns the number given to Compile.
func (c *Compiled) Generation() uint64 { return c.generation }

// Input returns what was compiled.
func (c *Compiled) Input() Input { return clone(c.input) }

// OnDeny returns how the proxy answers a denied client; never empty.
func (c *Compiled) OnDeny() OnDeny { return cmp.Or(c.input.OnDeny, OnDenyExplain) }

// Mode returns whether the rules are enforced; never empty.
func (c *Compiled) Mode() Mode { return cmp.Or(c.input.Mode, ModeEnforce) }

// DNS returns the mode in force, never DNSAuto.
func (c *Compiled) DNS() DNSMode { return c.dns }

// IsSelf reports whether name belongs to this service's own domains.
func (c *Compiled) IsSelf(name string) bool {
	for _, d := range c.self {
		rest := len(name) - len(d)
		if rest == 0 && name == d || rest > 0 && name[rest-1] == '.' && name[rest:] == d {
			return true
		}
	}
	return false
}

// WildcardOf returns the wildcard rule that allows name, if a wildcard and not
// an exact rule allows it: the resolver budgets distinct labels under it.
func (c *Compiled) WildcardOf(name string) (Rule, bool) {
	for _, s := range []*ruleSet{&c.floorOpen, &c.opAllow, &c.allow} {
		if s.exactName(name) != 0 {
			return Rule{}, false
		}
	}
	r := c.opAllow.wildName(name).or(c.allow.wildName(name))
	return c.rules[r], r != 0
}

// PinPorts returns the ports that host:port rules open for name by the name
// binding of the resolver, and the rules; nil when there are none.
func (c *Compiled) PinPorts(name string) []PinPort {
	var out []PinPort
	for _, s := range []*ruleSet{&c.floorOpen, &c.opAllow, &c.allow} {
		for port, set := range s.pinPorts {
			if c.opDeny.matchName(name, port) != 0 {
				continue
			}
			seen := slices.ContainsFunc(out, func(p PinPort) bool { return p.Port == port })
			if r := set.match(name); r != 0 && !seen {
				out = append(out, PinPort{port, c.rules[r]})
			}
		}
	}
	slices.SortFunc(out, func(a, b PinPort) int { return cmp.Compare(a.Port, b.Port) })
	return out
}

// PinPort is one port opened for the addresses of a name.
type PinPort struct {
	Port uint16
	Rule Rule
}
