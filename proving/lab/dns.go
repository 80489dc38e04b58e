package lab

import (
	_ "embed" // the zone
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

//go:embed world.zone
var worldZone string

// zone is the lab's whole name space, served by one recursive and authoritative
// server at once.
type zone struct {
	records map[string][]dns.RR // by lower-case name, with the final dot
	ipv6    bool
	journal *Journal
	log     *slog.Logger
	flips   atomic.Uint64
}

// newZone reads the built-in zone and adds the names of the configuration.
func newZone(cfg Config, journal *Journal) (*zone, error) {
	z := &zone{records: map[string][]dns.RR{}, ipv6: cfg.IPv6, journal: journal, log: cfg.Log}
	parser := dns.NewZoneParser(strings.NewReader(worldZone), ".", "world.zone")
	for rr, ok := parser.Next(); ok; rr, ok = parser.Next() {
		z.add(rr)
	}
	if err := parser.Err(); err != nil {
		return nil, fmt.Errorf("read the lab's zone: %w", err)
	}
	if cfg.Domain != "" {
		for _, name := range []string{cfg.Domain, "*." + cfg.Domain} {
			z.addAddr(name, hostAddr4.Addr())
		}
	}
	for name, addrs := range cfg.Names {
		if _, ok := dns.IsDomainName(name); !ok {
			return nil, fmt.Errorf("lab name %q is not a domain name", name)
		}
		for _, a := range addrs {
			z.addAddr(name, a)
		}
	}
	if cfg.IPv6 {
		z.addTwins()
	}
	return z, nil
}

func (z *zone) add(rr dns.RR) {
	name := strings.ToLower(rr.Header().Name)
	z.records[name] = append(z.records[name], rr)
}

func (z *zone) addAddr(name string, a netip.Addr) {
	h := dns.RR_Header{Name: dns.Fqdn(name), Class: dns.ClassINET, Ttl: 60, Rrtype: dns.TypeA}
	if a.Is4() {
		z.add(&dns.A{Hdr: h, A: a.AsSlice()})
		return
	}
	h.Rrtype = dns.TypeAAAA
	z.add(&dns.AAAA{Hdr: h, AAAA: a.AsSlice()})
}

// addTwins gives each name with public IPv4 addresses only the IPv6 twins of them.
func (z *zone) addTwins() {
	for name, rrs := range z.records {
		if slices.ContainsFunc(rrs, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeAAAA }) {
			continue
		}
		for _, rr := range rrs {
			a, ok := addrOf(rr)
			if !ok || !owned(a) || a.IsPrivate() || a.IsLinkLocalUnicast() {
				continue
			}
			h := *rr.Header()
			h.Rrtype, h.Rdlength = dns.TypeAAAA, 0
			z.records[name] = append(z.records[name], &dns.AAAA{Hdr: h, AAAA: twin6(a).AsSlice()})
		}
	}
}

// owned reports whether an address in the zone is one the internet serves: not
// the host's, not a loopback, not one that cannot be a destination.
func owned(a netip.Addr) bool {
	return !hostAddr4.Contains(a) && !hostAddr6.Contains(a) && !a.IsLoopback() && !a.IsUnspecified() && !a.Is4In6()
}

// prefixes are the addresses of the zone that the internet must own.
func (z *zone) prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, rrs := range z.records {
		for _, rr := range rrs {
			a, ok := addrOf(rr)
			if !ok || !owned(a) || a.Is6() {
				continue // IPv6 comes in prefixes
			}
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// addrOf returns the address an A or AAAA record holds.
func addrOf(rr dns.RR) (netip.Addr, bool) {
	switch rr := rr.(type) {
	case *dns.A:
		return netip.AddrFromSlice(rr.A.To4())
	case *dns.AAAA:
		return netip.AddrFromSlice(rr.AAAA.To16())
	}
	return netip.Addr{}, false
}

// ServeDNS answers one question.
func (z *zone) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	m := z.answer(r, w.RemoteAddr(), w.LocalAddr())
	if m == nil {
		return
	}
	_, udp := w.RemoteAddr().(*net.UDPAddr)
	if udp {
		size := dns.MinMsgSize
		if opt := r.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		m.Truncate(size)
	}
	if err := w.WriteMsg(m); err != nil {
		z.log.Debug("lab dns reply lost", "err", err)
	}
}

// answer builds the reply, or nil where the name is one that is never answered.
func (z *zone) answer(r *dns.Msg, remote, local net.Addr) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(r)
	m.Authoritative, m.RecursionAvailable = true, true
	if len(r.Question) != 1 || r.Opcode != dns.OpcodeQuery {
		m.Rcode = dns.RcodeFormatError
		return m
	}
	q := r.Question[0]
	name := strings.ToLower(q.Name)
	z.journal.add(Request{
		Proto: "dns", Server: addrPort(local), Remote: addrPort(remote),
		Host: strings.TrimSuffix(name, "."), Method: dns.TypeToString[q.Qtype],
	})
	if opt := r.IsEdns0(); opt != nil {
		m.SetEdns0(1232, false)
	}
	if z.special(name, q, m) {
		if m.Rcode == dns.RcodeSuccess && len(m.Answer) == 0 && m.Ns == nil {
			return nil
		}
		return m
	}
	z.resolve(name, q, m)
	return m
}

// special answers the names that behave, rather than hold records. It reports
// whether name is one of them; an answer that was left empty is not to be sent.
func (z *zone) special(name string, q dns.Question, m *dns.Msg) bool {
	a := func(ttl uint32, addr string) {
		if q.Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl},
				A:   net.ParseIP(addr),
			})
		} else {
			m.Ns = []dns.RR{soa(name)}
		}
	}
	switch name {
	case "flip.test.": // rebinding: public first, then private, and so on
		if q.Qtype == dns.TypeA && z.flips.Add(1)%2 == 0 {
			a(0, "10.0.0.5")
		} else {
			a(0, "198.51.100.10")
		}
	case "rotate.test.": // public, a different address each time
		n := uint64(0)
		if q.Qtype == dns.TypeA {
			n = z.flips.Add(1)
		}
		a(0, fmt.Sprintf("198.51.100.%d", 100+n%50))
	case "slow.test.":
		time.Sleep(1500 * time.Millisecond)
		a(60, "198.51.100.14")
	case "silent.test.":
	case "servfail.test.":
		m.Rcode = dns.RcodeServerFailure
	case "refused.test.":
		m.Rcode = dns.RcodeRefused
	case "big.test.": // more than a datagram carries
		if q.Qtype == dns.TypeTXT {
			for i := range 40 {
				m.Answer = append(m.Answer, &dns.TXT{
					Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60},
					Txt: []string{fmt.Sprintf("%03d %s", i, strings.Repeat("x", 200))},
				})
			}
			return true
		}
		for i := range 100 {
			a(60, fmt.Sprintf("198.51.100.%d", 100+i))
		}
	default:
		return false
	}
	return true
}

// resolve follows the zone's records, aliases and wildcards.
func (z *zone) resolve(name string, q dns.Question, m *dns.Msg) {
	owner := q.Name // the case the client chose comes back
	for range 8 {
		rrs, exists := z.lookup(name)
		if !exists {
			m.Rcode = dns.RcodeNameError
			m.Ns = []dns.RR{soa(name)}
			return
		}
		var alias *dns.CNAME
		found := false
		for _, rr := range rrs {
			c, isAlias := rr.(*dns.CNAME)
			if rr.Header().Rrtype == q.Qtype || isAlias {
				rr = dns.Copy(rr)
				rr.Header().Name = owner
				m.Answer = append(m.Answer, rr)
				found = true
			}
			if isAlias && q.Qtype != dns.TypeCNAME {
				alias = c
			}
		}
		if alias == nil {
			if !found {
				m.Ns = []dns.RR{soa(name)}
			}
			return
		}
		owner = alias.Target
		name = strings.ToLower(owner)
	}
	m.Rcode = dns.RcodeServerFailure // an alias loop
}

// lookup returns the records of a name, or of the closest wildcard above it
// (RFC 4592); exists is also true for a name that only has names below it.
func (z *zone) lookup(name string) (rrs []dns.RR, exists bool) {
	if rrs, ok := z.records[name]; ok {
		return rrs, true
	}
	for n := range z.records {
		if strings.HasSuffix(n, "."+name) {
			return nil, true
		}
	}
	labels := dns.SplitDomainName(name)
	for i := 1; i < len(labels); i++ {
		parent := strings.Join(labels[i:], ".") + "."
		if rrs, ok := z.records["*."+parent]; ok {
			return rrs, true
		}
		if _, ok := z.records[parent]; ok {
			return nil, false // the closest encloser has no wildcard
		}
	}
	return nil, false
}

// soa is the authority for names that are not there: cached for 2 seconds.
func soa(name string) dns.RR {
	labels := dns.SplitDomainName(name)
	top := "."
	if len(labels) > 0 {
		top = labels[len(labels)-1] + "."
	}
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: top, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 2},
		Ns:  "ns.lab.test.", Mbox: "hostmaster.lab.test.", Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: 2,
	}
}

// Lookup returns the addresses the lab's DNS gives for a name, IPv4 first. Names
// that only behave (slow, silent, flip) have none here.
func (l *Lab) Lookup(name string) []netip.Addr {
	var out []netip.Addr
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		m := new(dns.Msg)
		q := dns.Question{Name: dns.Fqdn(name), Qtype: qtype, Qclass: dns.ClassINET}
		l.zone.resolve(strings.ToLower(q.Name), q, m)
		for _, rr := range m.Answer {
			if a, ok := addrOf(rr); ok {
				out = append(out, a)
			}
		}
	}
	return out
}

// serveDNS starts the DNS services on every address: UDP and TCP 53, TLS 853.
func (s *services) serveDNS(z *zone) error {
	for _, network := range s.networks("udp") {
		p, err := s.listenPacket(network, 53)
		if err != nil {
			return err
		}
		s.serveDNSOn(&dns.Server{PacketConn: p, Handler: z, UDPSize: 4096})
	}
	for _, network := range s.networks("tcp") {
		tcp, err := s.listen(network, 53)
		if err != nil {
			return err
		}
		s.serveDNSOn(&dns.Server{Listener: tcp, Handler: z})
		dot, err := s.listen(network, 853)
		if err != nil {
			return err
		}
		s.serveDNSOn(&dns.Server{Listener: tlsListener(dot, s.tlsConfig("dot")), Net: "tcp-tls", Handler: z})
	}
	return nil
}

func (s *services) serveDNSOn(srv *dns.Server) {
	started := make(chan struct{})
	srv.NotifyStartedFunc = func() { close(started) }
	ended := make(chan struct{})
	s.run(func() {
		defer close(ended)
		if err := srv.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
			s.log.Warn("lab dns server ended", "err", err)
		}
	})
	select {
	case <-started:
	case <-ended:
	}
	s.onClose(closerFunc(srv.Shutdown))
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

var _ io.Closer = closerFunc(nil)
