package resolver

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// Denial is how the resolver answers a question about a name that a policy denies.
type Denial string

// The forms of a denial. NODATA says that the name has no record of the type;
// every resolver takes that as final. musl takes REFUSED for a server in trouble
// and asks again until its timeout of five seconds.
const (
	DenialNoData  Denial = "nodata"
	DenialRefused Denial = "refused"
)

// ParseDenial reads a Denial; "" is DenialNoData.
func ParseDenial(s string) (Denial, error) {
	switch d := Denial(s); d {
	case "":
		return DenialNoData, nil
	case DenialNoData, DenialRefused:
		return d, nil
	}
	return "", errs.New(errs.Invalid, `%q is no form of a DNS denial: use "nodata" or "refused"`, s)
}

// denyName answers a question about a name that the policy denies. There is no SOA
// in it: a cache in the sandbox must not keep it, because the rules may change.
func (r *Resolver) denyName(q *query, v policy.Verdict) outcome {
	if r.cfg.Denial == DenialRefused {
		return q.refuse(v)
	}
	m := q.reply(dns.RcodeSuccess)
	q.explain(m, dns.ExtendedErrorCodeBlocked, denialText(v.Reason))
	return outcome{reply: m, verdict: v}
}

// denyServer answers a question to a server that the policy denies. If another
// server would answer it, the reply is REFUSED, on which a client goes on to its
// next server; no data would be taken as the answer. If none would, the name
// itself is denied.
func (r *Resolver) denyServer(q *query, denied policy.Verdict) outcome {
	owner, _, ok := q.checkName(q.msg.Question[0].Name)
	if !ok || !q.served() {
		return r.denyName(q, denied)
	}
	if v := judge(q.policy, q.name, owner); !v.Allow {
		return r.denyName(q, v)
	}
	return q.refuse(denied)
}

// served reports whether the policy allows one of the servers that a sandbox is
// set up with.
func (q *query) served() bool {
	for _, a := range []netip.Addr{policy.DefaultNameserver, policy.SecondNameserver} {
		if q.policy.Decide(policy.Flow{Proto: q.proto, Dst: netip.AddrPortFrom(a, 53)}).Allow {
			return true
		}
	}
	return false
}

// refuse answers REFUSED and says why to clients that sent EDNS (RFC 8914).
func (q *query) refuse(v policy.Verdict) outcome {
	m := q.reply(dns.RcodeRefused)
	q.explain(m, dns.ExtendedErrorCodeBlocked, denialText(v.Reason))
	return outcome{reply: m, verdict: v}
}

func denialText(why policy.Reason) string {
	return fmt.Sprintf("denied by the sandbox's network policy: %s", why)
}

// One look-up of a denied name is several questions: for each address family, to
// each server, and again where the client retries. They are one event. An answer that
// is final is not asked for again: the same question is then another look-up.
const (
	sameLookup   = time.Second     // a look-up that is answered asks all at once
	sameRefused  = 5 * time.Second // until the last retry of one that is refused
	maxLookups   = 128             // remembered for one sandbox
	addressTypes = dns.TypeA       // stands for all types that one look-up of addresses asks for
)

// lookupKey is what the questions of one look-up have in common.
type lookupKey struct {
	generation uint64 // of the policy
	name       string
	qtype      uint16
	rcode      int
	reason     policy.Reason
}

// lookupSeen is what was asked of one look-up.
type lookupSeen struct {
	began time.Time
	asked []lookupPart // as many as there are types and servers
}

// lookupPart tells the questions of one look-up apart.
type lookupPart struct {
	qtype  uint16
	server netip.AddrPort
	proto  policy.Proto
}

// maxParts bounds what is kept of one look-up: three types, each to some servers.
const maxParts = 16

// isRepeat reports whether a denial belongs to a look-up that was recorded already.
func (b *budget) isRepeat(q *query, out outcome) bool {
	if q.msg == nil || out.reply == nil || out.verdict.Allow || out.failed {
		return false
	}
	part := lookupPart{q.msg.Question[0].Qtype, q.dst, q.proto}
	k := lookupKey{q.policy.Generation(), q.name, part.qtype, out.reply.Rcode, out.verdict.Reason}
	switch k.qtype {
	case dns.TypeAAAA, dns.TypeHTTPS:
		k.qtype = addressTypes
	}
	final, within := true, sameLookup
	if k.rcode == dns.RcodeRefused {
		final, within = false, sameRefused
	}
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if seen := b.denied[k]; seen != nil && now.Sub(seen.began) < within {
		again := slices.Contains(seen.asked, part)
		if !again && len(seen.asked) < maxParts {
			seen.asked = append(seen.asked, part)
			return true
		}
		if !final {
			return true
		}
	}
	if len(b.denied) >= maxLookups {
		for old, seen := range b.denied {
			if now.Sub(seen.began) >= sameRefused {
				delete(b.denied, old)
			}
		}
		if len(b.denied) >= maxLookups { // then events are recorded once too often
			clear(b.denied)
		}
	}
	b.denied[k] = &lookupSeen{now, []lookupPart{part}}
	return false
}
