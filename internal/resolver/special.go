package resolver

import (
	"net/netip"
	"strings"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/policy"
)

// below reports whether name is domain or a name below it.
func below(name, domain string) bool {
	rest := len(name) - len(domain)
	return name == domain || rest > 0 && name[rest-1] == '.' && name[rest:] == domain
}

// localhost answers localhost and the names below it with the loopback addresses
// (RFC 6761 section 6.3), whatever the policy and whichever server was asked: the
// addresses never leave the sandbox, and the question never leaves the host. Our own
// domain may be one of these names, and is judged like any other.
func (q *query) localhost(asked dns.Question) (outcome, bool) {
	name := strings.ToLower(strings.TrimSuffix(asked.Name, "."))
	if !below(name, "localhost") || len(name) > 253 || q.policy.IsSelf(name) {
		return outcome{}, false
	}
	out := q.local(dns.RcodeSuccess)
	h := dns.RR_Header{Name: asked.Name, Rrtype: asked.Qtype, Class: dns.ClassINET, Ttl: 60}
	switch asked.Qtype {
	case dns.TypeA:
		out.reply.Answer = []dns.RR{&dns.A{Hdr: h, A: netip.AddrFrom4([4]byte{127, 0, 0, 1}).AsSlice()}}
	case dns.TypeAAAA:
		out.reply.Answer = []dns.RR{&dns.AAAA{Hdr: h, AAAA: netip.IPv6Loopback().AsSlice()}}
	}
	if len(out.reply.Answer) > 0 {
		out.reply.Ns = nil
	}
	return out, true
}

// noSuchName are the domains in which no name exists for a DNS client: the answer is
// NXDOMAIN, and the question stays in the host.
var noSuchName = []string{
	"invalid",                 // RFC 6761 section 6.4
	"onion",                   // RFC 7686: names of another network, which must not leak
	"alt",                     // RFC 9476: names that are not the DNS's
	"resolver.arpa",           // RFC 9462: discovery of encrypted resolvers
	"use-application-dns.net", // keeps browsers on the system's resolver
}

// fixed answers the names whose answer is always the same and that never leave the
// host.
func (q *query) fixed(v policy.Verdict) (outcome, bool) {
	if q.policy.IsSelf(q.name) {
		out := q.local(dns.RcodeSuccess)
		out.verdict = v
		if asked := q.msg.Question[0]; asked.Qtype == dns.TypeA {
			out.reply.Answer = []dns.RR{&dns.A{
				Hdr: dns.RR_Header{Name: asked.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
				A:   policy.ServiceAddr4.AsSlice(),
			}}
		}
		return out, true
	}
	for _, domain := range noSuchName {
		if below(q.name, domain) {
			return q.local(dns.RcodeNameError), true
		}
	}
	// RFC 6762 section 22: names of the local link are asked for by multicast. Some
	// networks have them in their own DNS; a rule that lists one says so.
	if below(q.name, "local") && v.Reason == policy.ReasonDefaultAllow {
		return q.local(dns.RcodeNameError), true
	}
	return outcome{}, false
}

// mayHave reports whether the sandbox may be told an address as an answer to q.
// Loopback addresses never leave the sandbox, so they can do no harm outside it;
// the proxy does not dial them, and they are not pinned.
func (q *query) mayHave(a netip.Addr) bool {
	return a.IsLoopback() && !a.Is4In6() || q.policy.AnswerAllowed(q.name, a)
}
