package pebble

import (
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// The key that updates are signed with (RFC 8945).
const (
	KeyName = "cordon-test."
	Key     = "c2VjcmV0IG9mIHRoZSB0ZXN0cyBvbmx5IQ=="
)

// Server53 is a name server for the zones of a test.
type Server53 struct {
	Addr string

	zones []string
	mu    sync.Mutex          // guards the fields below
	txt   map[string][]string // by lower-case name with the final dot
	seen  []string            // names that ever had a TXT record, in order
}

// serveDNS answers by UDP and TCP on one port.
func serveDNS(t testing.TB, o Options) *Server53 {
	t.Helper()
	s := &Server53{txt: map[string][]string{}}
	for _, d := range o.Domains {
		s.zones = append(s.zones, dns.Fqdn(d))
	}
	tcp, err := o.In.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Addr = tcp.Addr().String()
	udp, err := o.In.ListenPacket(t.Context(), "udp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, srv := range []*dns.Server{{Listener: tcp}, {PacketConn: udp}} {
		srv.Handler, srv.TsigSecret = s, map[string]string{KeyName: Key}
		srv.MsgAcceptFunc = func(dns.Header) dns.MsgAcceptAction { return dns.MsgAccept } // the default refuses updates
		ended := make(chan struct{})
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(ended)
			_ = srv.ActivateAndServe() // ends with Shutdown
		}()
		<-started
		t.Cleanup(func() {
			if err := srv.Shutdown(); err != nil {
				t.Error(err)
			}
			<-ended
		})
	}
	return s
}

// zone returns the zone that a name is in, "" for none.
func (s *Server53) zone(name string) string {
	for _, z := range s.zones {
		if dns.IsSubDomain(z, name) {
			return z
		}
	}
	return ""
}

// Left is what is left of the TXT records.
func (s *Server53) Left() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.txt {
		names = append(names, name)
	}
	return names
}

// Seen are the names that had a TXT record.
func (s *Server53) Seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.seen)
}

// Set adds or removes a TXT record, for hooks.
func (s *Server53) Set(name, value string, there bool) {
	name = strings.ToLower(dns.Fqdn(name))
	s.mu.Lock()
	defer s.mu.Unlock()
	if there {
		s.txt[name] = append(s.txt[name], value)
		s.seen = append(s.seen, name)
		return
	}
	s.txt[name] = slices.DeleteFunc(s.txt[name], func(v string) bool { return v == value })
	if len(s.txt[name]) == 0 {
		delete(s.txt, name)
	}
}

// ServeDNS implements dns.Handler.
func (s *Server53) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(r)
	m.Authoritative, m.RecursionAvailable = true, true
	switch {
	case r.Opcode == dns.OpcodeUpdate:
		m.Rcode = s.update(w, r)
	case len(r.Question) == 1:
		s.answer(r.Question[0], m)
	}
	if t := r.IsTsig(); t != nil {
		m.SetTsig(t.Hdr.Name, t.Algorithm, 300, int64(t.TimeSigned))
	}
	_ = w.WriteMsg(m) // a client that left
}

func (s *Server53) update(w dns.ResponseWriter, r *dns.Msg) int {
	if r.IsTsig() == nil || w.TsigStatus() != nil {
		return dns.RcodeNotAuth
	}
	for _, rr := range r.Ns {
		txt, ok := rr.(*dns.TXT)
		if !ok || s.zone(txt.Hdr.Name) == "" {
			return dns.RcodeRefused
		}
		s.Set(txt.Hdr.Name, strings.Join(txt.Txt, ""), txt.Hdr.Class == dns.ClassINET) // class NONE removes (RFC 2136, 2.5.4)
	}
	return dns.RcodeSuccess
}

func (s *Server53) answer(q dns.Question, m *dns.Msg) {
	name := strings.ToLower(q.Name)
	zone := s.zone(name)
	if zone == "" {
		m.Rcode = dns.RcodeNameError
		return
	}
	hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET}
	soa := &dns.SOA{Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET}, Ns: "ns." + zone, Mbox: "hostmaster." + zone, Serial: 1}
	switch {
	case q.Qtype == dns.TypeA:
		m.Answer = []dns.RR{&dns.A{Hdr: hdr, A: net.IPv4(127, 0, 0, 1)}}
	case q.Qtype == dns.TypeSOA && name == zone:
		m.Answer = []dns.RR{soa}
	case q.Qtype == dns.TypeTXT:
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, v := range s.txt[name] {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: hdr, Txt: []string{v}})
		}
	}
	if len(m.Answer) == 0 {
		m.Ns = []dns.RR{soa}
	}
}
