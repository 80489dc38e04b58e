package resolver

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/policy"
)

// maxUDP is the largest datagram sent in either direction (DNS flag day 2020:
// fits an IPv6 packet of the smallest MTU, so it is never fragmented).
const maxUDP = 1232

// servedTypes are the types that strict mode resolves.
var servedTypes = []uint16{
	dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeCNAME, dns.TypeMX,
	dns.TypeTXT, dns.TypeSRV, dns.TypePTR, dns.TypeNS, dns.TypeSOA, dns.TypeCAA,
}

// verdict refuses for a reason of the resolver's own.
func verdict(reason policy.Reason, rule string) policy.Verdict {
	return policy.Verdict{Rule: policy.Rule{ID: "dns", Text: rule}, Reason: reason}
}

// read parses a message into q.msg; done means that its outcome is settled. What
// is itself a response, or shorter than a header, gets no reply: replying to it
// could be made to go on for ever.
func (q *query) read(wire []byte) (out outcome, done bool) {
	bad := verdict(ReasonMalformed, "one well-formed question")
	const response = 1 << 15
	if len(wire) < 12 || binary.BigEndian.Uint16(wire[2:])&response != 0 {
		return outcome{verdict: bad}, true
	}
	m := new(dns.Msg)
	header := &dns.Msg{MsgHdr: dns.MsgHdr{Id: binary.BigEndian.Uint16(wire)}}
	if opcode := int(wire[2]>>3) & 0xf; opcode != dns.OpcodeQuery {
		header.Opcode = opcode
		return outcome{reply: new(dns.Msg).SetRcode(header, dns.RcodeNotImplemented), verdict: verdict(ReasonQueryType, "opcode QUERY")}, true
	}
	counts := [4]uint16{} // question, answer, authority, additional
	for i := range counts {
		counts[i] = binary.BigEndian.Uint16(wire[4+2*i:])
	}
	// Counted before parsing, so that a small message cannot ask for much work.
	if counts[0] != 1 || counts[1] != 0 || counts[2] != 0 || counts[3] > 2 || m.Unpack(wire) != nil ||
		len(m.Question) != 1 || m.Question[0].Qclass == 0 { // the parser lets a question end after the name
		return outcome{reply: new(dns.Msg).SetRcode(header, dns.RcodeFormatError), verdict: bad}, true
	}
	q.msg = m
	q.name = strings.ToLower(strings.TrimSuffix(m.Question[0].Name, "."))
	if opt := m.IsEdns0(); opt != nil && opt.Version() != 0 {
		return outcome{reply: q.reply(dns.RcodeBadVers), verdict: verdict(ReasonMalformed, "EDNS version 0")}, true
	}
	return outcome{}, false
}

// strict reports whether only listed names are resolved, and that is enforced.
func (q *query) strict() bool {
	return q.policy.DNS() == policy.DNSStrict && q.policy.Mode() != policy.ModeObserve
}

// checkKind judges class and type of the question.
func (q *query) checkKind(asked dns.Question) (policy.Verdict, bool) {
	if asked.Qclass != dns.ClassINET {
		return verdict(ReasonQueryType, "class IN"), false
	}
	// OPT and the types 128 to 255 are no data, but requests to the server itself
	// (RFC 6895): ANY, AXFR, IXFR, TSIG …
	if meta := asked.Qtype == 0 || asked.Qtype == dns.TypeOPT || asked.Qtype >= 128 && asked.Qtype <= 255; meta {
		return verdict(ReasonQueryType, "data types"), false
	}
	if q.strict() && !slices.Contains(servedTypes, asked.Qtype) {
		return verdict(ReasonQueryType, "strict: the types hosts and browsers use"), false
	}
	return policy.Verdict{}, true
}

// maxAttributes is how many labels like _443._tcp may stand before a host's name.
const maxAttributes = 3

// checkName puts the canonical question into q.name and returns the host name
// it is judged by. Attribute labels (RFC 8552: _dmarc, _443._tcp) belong to the
// host below them, which is what a rule lists. In open mode underscores may stand
// anywhere, as resolvers everywhere allow, and the root may be asked for.
func (q *query) checkName(asked string) (owner string, attribute, ok bool) {
	name := strings.ToLower(strings.TrimSuffix(asked, "."))
	if len(name) > 253 {
		return "", false, false
	}
	owner = name
	for range maxAttributes {
		label, rest, found := strings.Cut(owner, ".")
		if !found || len(label) < 2 || len(label) > 63 || label[0] != '_' || !isLDH(label[1:]) {
			break
		}
		owner, attribute = rest, true
	}
	if attribute && q.strict() && q.policy.DecideQuery(name).Allow { // a rule lists the name itself
		if canonical, ok := policy.CanonicalName(name); ok {
			owner, attribute = canonical, false
		}
	}
	if canonical, ok := policy.CanonicalName(owner); ok {
		q.name = name
		return canonical, attribute, true
	}
	if q.strict() {
		return "", false, false
	}
	if name == "" {
		q.name = ""
		return "", false, true
	}
	// Reverse names end in arpa and begin with digits; names that programs read
	// as addresses stay out.
	if _, ok := policy.CanonicalName(name); !ok {
		return "", false, false
	}
	q.name = name
	return name, false, true
}

// judge decides about a name by its owner, and, where it has attribute labels, about what
// the operator denies by itself too.
func judge(p *policy.Compiled, name, owner string) policy.Verdict {
	if name != owner {
		if v := p.DecideQuery(name); !v.Allow && v.Reason == policy.ReasonOperator {
			return v
		}
	}
	return p.DecideQuery(owner)
}

func isLDH(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}

// local answers without asking a server.
func (q *query) local(rcode int) outcome {
	m := q.reply(rcode)
	m.Ns = []dns.RR{&dns.SOA{
		Hdr: dns.RR_Header{Name: q.msg.Question[0].Name, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 60},
		Ns:  "localhost.", Mbox: "nobody.invalid.", Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: 60,
	}}
	return outcome{reply: m, verdict: policy.Verdict{Allow: true, Rule: policy.Rule{ID: "dns", Text: "answered locally"}, Reason: ReasonLocal}}
}

// reply starts the reply to q.
func (q *query) reply(rcode int) *dns.Msg {
	m := new(dns.Msg).SetRcode(q.msg, rcode)
	m.RecursionAvailable = true
	m.CheckingDisabled = false // nothing is validated either way
	if q.msg.IsEdns0() != nil {
		m.SetEdns0(maxUDP, false)
	}
	return m
}

// explain adds an extended error, if the client sent EDNS.
func (q *query) explain(m *dns.Msg, code uint16, text string) {
	if opt := m.IsEdns0(); opt != nil {
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: code, ExtraText: text})
	}
}

// pack encodes a reply, cut to what the client takes.
func (q *query) pack(m *dns.Msg) []byte {
	m.Compress = true
	limit := dns.MaxMsgSize
	if q.proto == policy.UDP {
		limit = dns.MinMsgSize
		if q.msg != nil {
			if opt := q.msg.IsEdns0(); opt != nil {
				limit = min(max(limit, int(opt.UDPSize())), maxUDP)
			}
		}
	}
	m.Truncate(limit)
	wire, err := m.Pack()
	if err == nil && len(wire) <= limit {
		return wire
	}
	// An upstream's record that cannot be packed again is no answer.
	short := &dns.Msg{MsgHdr: m.MsgHdr, Question: m.Question}
	short.Rcode = dns.RcodeServerFailure
	wire, err = short.Pack()
	if err != nil {
		return nil
	}
	return wire
}

// kind names the type of the question, for the log.
func (q *query) kind() string {
	if q.msg == nil {
		return ""
	}
	t := q.msg.Question[0].Qtype
	if s, ok := dns.TypeToString[t]; ok {
		return s
	}
	return "TYPE" + strconv.Itoa(int(t))
}

// privateReverse reports whether a reverse name (RFC 1035 section 3.5, RFC 3596
// section 2.5) is of an address, or of a range, that no sandbox may reach: the
// question is answered at once, and no server outside learns of the address.
func privateReverse(name string) bool {
	p, ok := reversePrefix(name)
	if !ok {
		return false
	}
	return slices.ContainsFunc(policy.Floor(), func(f policy.FloorRange) bool {
		return f.Prefix.Bits() <= p.Bits() && f.Prefix.Contains(p.Addr())
	})
}

// reversePrefix reads a reverse name: 1.0.10.in-addr.arpa is 10.0.1.0/24.
func reversePrefix(name string) (netip.Prefix, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(rest, ".")
		if len(labels) > 4 {
			return netip.Prefix{}, false
		}
		var a [4]byte
		for i, label := range labels {
			n, err := strconv.ParseUint(label, 10, 8)
			if err != nil {
				return netip.Prefix{}, false
			}
			a[len(labels)-1-i] = byte(n)
		}
		return netip.PrefixFrom(netip.AddrFrom4(a), 8*len(labels)), true
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok {
		return netip.Prefix{}, false
	}
	labels := strings.Split(rest, ".")
	if len(labels) > 32 {
		return netip.Prefix{}, false
	}
	var a [16]byte
	for i, label := range labels {
		n, err := strconv.ParseUint(label, 16, 4)
		if err != nil || len(label) != 1 {
			return netip.Prefix{}, false
		}
		at := len(labels) - 1 - i
		a[at/2] |= byte(n) << (4 * (1 - at%2))
	}
	return netip.PrefixFrom(netip.AddrFrom16(a), 4*len(labels)), true
}
