package resolver

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// question is what is asked upstream and what answers are kept by: each sandbox has
// its own, or the time an answer takes would tell what others have asked.
type question struct {
	sandbox string
	name    string // canonical: lower case, no final dot
	qtype   uint16
}

// answers is what the upstreams said to a question. It is shared and never changed.
type answers struct {
	rcode    int
	records  []dns.RR // the chain of aliases, then the records of the type asked
	soa      dns.RR   // of a negative answer, or nil
	upstream netip.AddrPort
	stored   time.Time
	expires  time.Time
	size     int // of the message it came in
}

// Limits of how long an answer is kept. A TTL of zero is kept for a second, so
// that a name that changes with every query is not a way to make queries.
const (
	minTTL      = time.Second
	maxTTL      = time.Hour
	maxNegative = 5 * time.Minute
	noSOA       = 5 * time.Second // a negative answer that says not how long
	maxAliases  = 16
)

// read takes from an upstream's message what belongs to the question: the chain
// of aliases from the name asked and the records at its end. Whatever else is in
// the message is not looked at again.
func readAnswers(q question, m *dns.Msg, now time.Time) *answers {
	a := &answers{rcode: m.Rcode, stored: now, size: m.Len()}
	at := dns.Fqdn(q.name)
	for range maxAliases {
		alias := ""
		for _, rr := range m.Answer {
			h := rr.Header()
			if h.Class != dns.ClassINET || !strings.EqualFold(h.Name, at) {
				continue
			}
			if c, ok := rr.(*dns.CNAME); ok && alias == "" {
				alias = c.Target
				a.records = append(a.records, rr)
			} else if h.Rrtype == q.qtype {
				a.records = append(a.records, rr)
			}
		}
		if alias == "" || q.qtype == dns.TypeCNAME {
			break
		}
		at = alias
	}
	a.expires = now.Add(a.life(q, m))
	return a
}

// life is how long the answer may be kept (RFC 2181 section 5.2, RFC 2308 section 5).
func (a *answers) life(q question, m *dns.Msg) time.Duration {
	if a.rcode == dns.RcodeSuccess && slices.ContainsFunc(a.records, func(rr dns.RR) bool { return rr.Header().Rrtype == q.qtype }) {
		return min(max(lifetime(a.records), minTTL), maxTTL)
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			a.soa = soa
			return min(max(time.Duration(min(soa.Hdr.Ttl, soa.Minttl))*time.Second, minTTL), maxNegative)
		}
	}
	return noSOA
}

// lifetime is the smallest TTL of the records.
func lifetime(rrs []dns.RR) time.Duration {
	ttl := uint32(maxTTL / time.Second)
	for _, rr := range rrs {
		ttl = min(ttl, rr.Header().Ttl)
	}
	return time.Duration(ttl) * time.Second
}

// addrs returns the addresses in the answer.
func (a *answers) addrs() []netip.Addr { return addrsOf(a.records) }

func addrsOf(rrs []dns.RR) []netip.Addr {
	var out []netip.Addr
	for _, rr := range rrs {
		var a netip.Addr
		ok := false
		switch rr := rr.(type) {
		case *dns.A:
			a, ok = netip.AddrFromSlice(rr.A.To4())
		case *dns.AAAA:
			a, ok = netip.AddrFromSlice(rr.AAAA.To16())
		}
		if ok {
			out = append(out, a)
		}
	}
	return out
}

// fill puts into a reply what a sandbox may have of an answer, and returns how
// many addresses it may not have. Records keep the age they have, and the name
// that was asked is spelled as the client spelled it.
func (r *Resolver) fill(m *dns.Msg, q *query, found *answers) (removed int) {
	left := max(time.Until(found.expires), 0)
	age := func(rr dns.RR) dns.RR {
		rr = dns.Copy(rr)
		h := rr.Header()
		h.Ttl = uint32(min(time.Duration(h.Ttl)*time.Second, left) / time.Second)
		if strings.EqualFold(strings.TrimSuffix(h.Name, "."), q.name) {
			h.Name = q.msg.Question[0].Name
		}
		return rr
	}
	for _, rr := range found.records {
		rr = age(rr)
		switch v := rr.(type) {
		case *dns.A, *dns.AAAA:
			if a := addrsOf([]dns.RR{rr}); len(a) != 1 || !q.mayHave(a[0]) {
				removed++
				continue
			}
		case *dns.HTTPS:
			if !r.trimBinding(&v.SVCB, q) {
				continue
			}
		case *dns.SVCB:
			if !r.trimBinding(v, q) {
				continue
			}
		}
		m.Answer = append(m.Answer, rr)
	}
	if found.soa != nil {
		m.Ns = []dns.RR{age(found.soa)}
	}
	return removed
}

// trimBinding removes from a service binding (RFC 9460) the keys of encrypted
// hellos, which would hide the name that the proxy judges, and hints that a
// sandbox may not have. It reports whether the record is still of use: what a
// record declares mandatory must be in it.
func (r *Resolver) trimBinding(rr *dns.SVCB, q *query) bool {
	var gone []dns.SVCBKey
	kept := rr.Value[:0:0]
	for _, kv := range rr.Value {
		switch v := kv.(type) {
		case *dns.SVCBECHConfig:
			gone = append(gone, kv.Key())
			continue
		case *dns.SVCBIPv4Hint:
			v.Hint = q.allowedHints(v.Hint)
			if len(v.Hint) == 0 {
				gone = append(gone, kv.Key())
				continue
			}
		case *dns.SVCBIPv6Hint:
			if v.Hint = q.allowedHints(v.Hint); len(v.Hint) == 0 || !r.cfg.IPv6 {
				gone = append(gone, kv.Key())
				continue
			}
		}
		kept = append(kept, kv)
	}
	rr.Value = kept
	for _, kv := range kept {
		if must, ok := kv.(*dns.SVCBMandatory); ok {
			return !slices.ContainsFunc(must.Code, func(k dns.SVCBKey) bool { return slices.Contains(gone, k) })
		}
	}
	return true
}

func (q *query) allowedHints(hints []net.IP) []net.IP {
	return slices.DeleteFunc(slices.Clone(hints), func(ip net.IP) bool {
		a, ok := netip.AddrFromSlice(ip)
		return !ok || !q.mayHave(a.Unmap())
	})
}
