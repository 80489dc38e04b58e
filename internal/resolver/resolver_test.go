package resolver

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

func TestMain(m *testing.M) {
	if os.Getenv(lookupInGo) != "" {
		lookUpInGo(os.Args[len(os.Args)-1])
		return
	}
	goleak.VerifyTestMain(m)
}

// upstream is a DNS server on the loopback with a zone of its own; it keeps every
// message it receives.
type upstream struct {
	addr netip.AddrPort

	mu      sync.Mutex // guards all below
	records map[string][]string
	rcode   int
	delay   time.Duration
	asked   []*dns.Msg
	tcp     int
	silent  bool
	broken  map[uint16]int // what questions of a type are answered with; -1: nothing
}

func newUpstream(t testing.TB, zone string) *upstream {
	t.Helper()
	u := &upstream{records: map[string][]string{}}
	for line := range strings.Lines(zone) {
		if fields := strings.Fields(line); len(fields) > 3 {
			key := fields[0] + " " + fields[3]
			u.records[key] = append(u.records[key], line)
			u.records[fields[0]] = append(u.records[fields[0]], line)
		}
	}
	p, l := samePort(t)
	u.addr = netip.MustParseAddrPort(p.LocalAddr().String())
	for _, srv := range []*dns.Server{{PacketConn: p, Handler: u}, {Listener: l, Handler: u}} {
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := srv.ActivateAndServe(); err != nil {
				t.Error(err)
			}
		}()
		<-started
		t.Cleanup(func() {
			_ = srv.Shutdown()
			<-done
		})
	}
	return u
}

// samePort listens on one port of the loopback, over UDP and TCP.
func samePort(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 20 {
		p, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp4", p.LocalAddr().String())
		if err == nil {
			return p, l
		}
		p.Close() // the port is somebody's over TCP
	}
	t.Fatal("found no port that is free for both")
	return nil, nil
}

func (u *upstream) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	u.mu.Lock()
	u.asked = append(u.asked, r)
	_, udp := w.RemoteAddr().(*net.UDPAddr)
	if !udp {
		u.tcp++
	}
	m := new(dns.Msg).SetRcode(r, u.rcode)
	delay := u.delay
	q := r.Question[0]
	rcode, broken := u.broken[q.Qtype]
	if u.silent {
		rcode, broken = -1, true
	}
	u.mu.Unlock()
	time.Sleep(delay)
	if broken {
		if rcode >= 0 {
			_ = w.WriteMsg(m.SetRcode(r, rcode))
		}
		return
	}
	name := strings.ToLower(q.Name)
	for range 5 {
		lines := u.records[name+" "+dns.TypeToString[q.Qtype]]
		alias := u.records[name+" CNAME"]
		for _, line := range append(slices.Clone(lines), alias...) {
			rr, err := dns.NewRR(line)
			if err != nil {
				panic(err)
			}
			m.Answer = append(m.Answer, rr)
			if c, ok := rr.(*dns.CNAME); ok {
				name = c.Target
			}
		}
		if len(alias) == 0 {
			break
		}
	}
	if len(m.Answer) == 0 && m.Rcode == 0 {
		if len(u.records[name]) == 0 {
			m.Rcode = dns.RcodeNameError
		}
		soa, _ := dns.NewRR("test. 30 IN SOA a. b. 1 2 3 4 7")
		m.Ns = []dns.RR{soa}
	}
	if opt := r.IsEdns0(); udp && opt != nil {
		m.Truncate(int(opt.UDPSize()))
	}
	_ = w.WriteMsg(m)
}

// set looks at or changes how the server behaves.
func (u *upstream) set(f func(*upstream)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f(u)
}

// questions returns what was asked so far, "name type", and forgets it.
func (u *upstream) questions() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []string
	for _, m := range u.asked {
		out = append(out, m.Question[0].Name+" "+dns.TypeToString[m.Question[0].Qtype])
	}
	u.asked = nil
	return out
}

// events keeps what was recorded.
type events struct {
	mu   sync.Mutex // guards list
	list []flowlog.Event
}

func (e *events) Record(ev flowlog.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, ev)
}

func (e *events) last(t testing.TB) flowlog.Event {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.list) == 0 {
		t.Fatal("nothing was logged")
	}
	return e.list[len(e.list)-1]
}

// len is how many events there are; since returns those after the first n.
func (e *events) len() int { return len(e.since(0)) }

func (e *events) since(n int) []flowlog.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.list[n:])
}

// settle waits for the look-ups that outlive whoever began them.
func settle(r *Resolver) {
	for {
		r.mu.Lock()
		n := len(r.calls)
		r.mu.Unlock()
		for _, s := range r.servers {
			s.mu.Lock()
			if s.probing {
				n++
			}
			s.mu.Unlock()
		}
		if n == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// textLog is a log that a test can read.
func textLog(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

const zone = `
a.test.         60 IN A     198.51.100.10
a.test.         60 IN AAAA  2001:db8:80::10
a.test.         60 IN TXT   "hello"
_dmarc.a.test.  60 IN TXT   "v=DMARC1"
x.wild.test.    60 IN A     198.51.100.40
y.wild.test.    60 IN A     198.51.100.40
b.test.         60 IN A     198.51.100.20
alias.test.     60 IN CNAME b.test.
alias-priv.test. 60 IN CNAME private.test.
private.test.   60 IN A     10.0.0.5
loop.test.      60 IN A     127.0.0.1
loop.test.      60 IN A     127.8.8.8
loop.test.      60 IN AAAA  ::1
loop.test.      60 IN HTTPS 1 . ipv4hint=127.0.0.1,10.0.0.5 ipv6hint=::1
alias-loop.test. 60 IN CNAME loop.test.
loop-priv.test. 60 IN A     127.0.0.1
loop-priv.test. 60 IN A     10.0.0.5
loop-mapped.test. 60 IN AAAA ::ffff:127.0.0.1
printer.local.  60 IN A     198.51.100.10
mixed.test.     60 IN A     10.0.0.5
mixed.test.     60 IN A     198.51.100.10
meta.test.      60 IN A     169.254.169.254
mapped.test.    60 IN AAAA  ::ffff:10.0.0.5
zero.test.       0 IN A     198.51.100.10
long.test.  604800 IN A     198.51.100.10
ech.test.       60 IN HTTPS 1 . alpn="h2" ipv4hint=198.51.100.50,10.0.0.5 ech="AEX+DQ==" ipv6hint=2001:db8:80::32,fd00::5
must.test.      60 IN HTTPS 1 . mandatory=ech alpn="h2" ech="AEX+DQ=="
priv.test.      60 IN SVCB  1 a.test. ipv4hint=10.0.0.5
under_score.test. 60 IN A   198.51.100.10
`

func bigZone() string {
	var b strings.Builder
	b.WriteString(zone)
	for i := range 100 {
		fmt.Fprintf(&b, "big.test. 60 IN TXT \"%03d %s\"\n", i, strings.Repeat("x", 100))
	}
	return b.String()
}

// fixture is a resolver with one sandbox, "s1" at 10.223.0.2.
type fixture struct {
	*Resolver
	up     *upstream
	flows  *events
	policy *policy.Compiled
	pins   []Pin
}

var (
	sandboxAddr = netip.MustParseAddrPort("10.223.0.2:40000")
	strictInput = policy.Input{
		AllowOut: []string{"a.test", "*.wild.test", "alias.test", "alias-priv.test", "private.test", "mixed.test", "meta.test",
			"mapped.test", "loop.test", "alias-loop.test", "loop-priv.test", "loop-mapped.test", "zero.test", "long.test", "ech.test", "must.test", "priv.test", "big.test", "gone.test", "db.wild.test:5432", "own.cordon.localhost"},
		DenyOut: []string{"0.0.0.0/0"},
	}
)

func compile(t testing.TB, in policy.Input) *policy.Compiled {
	t.Helper()
	p, err := policy.Compile(in, &policy.Operator{SelfDomains: []string{"cordon.localhost"}}, 7)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func newFixture(t testing.TB, in policy.Input, change ...func(*Config)) *fixture {
	t.Helper()
	f := &fixture{up: newUpstream(t, bigZone()), flows: &events{}, policy: compile(t, in)}
	cfg := Config{
		Owner: func(a netip.Addr) (string, *policy.Compiled, bool) {
			return "s1", f.policy, a == sandboxAddr.Addr()
		},
		Policy:    func(id string) (*policy.Compiled, bool) { return f.policy, id == "s1" },
		Upstreams: []netip.AddrPort{f.up.addr},
		Pin: func(p Pin) error {
			f.pins = append(f.pins, p)
			return nil
		},
		IPv6: true, Flows: f.flows, Log: slog.New(slog.DiscardHandler),
	}
	for _, c := range change {
		c(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.Resolver = r
	t.Cleanup(func() { settle(r) })
	return f
}

// send sends a message as sandbox s1 to 8.8.8.8 and returns the reply, nil for none.
func (f *fixture) send(t testing.TB, m *dns.Msg) *dns.Msg {
	t.Helper()
	wire, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return f.sendWire(t, wire)
}

func (f *fixture) sendWire(t testing.TB, wire []byte) *dns.Msg {
	t.Helper()
	reply := f.answer(t.Context(), transport{policy.UDP, sandboxAddr, netip.MustParseAddrPort("8.8.8.8:53")}, wire)
	if reply == nil {
		return nil
	}
	m := new(dns.Msg)
	if err := m.Unpack(reply); err != nil {
		t.Fatalf("the reply cannot be read: %v", err)
	}
	return m
}

func ask(name string, qtype uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
}

// answersOf returns the data of the answers: "198.51.100.10".
func answersOf(m *dns.Msg) string {
	var out []string
	for _, rr := range m.Answer {
		out = append(out, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(out, ", ")
}

func TestStrictModeAnswersListedNamesOnly(t *testing.T) {
	const denied = -1 // NODATA, and a denial in the log
	for _, c := range []struct {
		name    string // of the case
		query   string
		qtype   uint16
		rcode   int
		answers string
		reason  policy.Reason
		asked   string // upstream
	}{
		{"a listed name", "a.test", dns.TypeA, dns.RcodeSuccess, "198.51.100.10", policy.ReasonAllowName, "a.test. A"},
		{"a listed name over IPv6", "a.test", dns.TypeAAAA, dns.RcodeSuccess, "2001:db8:80::10", policy.ReasonAllowName, "a.test. AAAA"},
		{"a name below a wildcard", "x.wild.test", dns.TypeA, dns.RcodeSuccess, "198.51.100.40", policy.ReasonAllowName, "x.wild.test. A"},
		{"the case of letters stays in the host", "A.tEsT", dns.TypeA, dns.RcodeSuccess, "198.51.100.10", policy.ReasonAllowName, "a.test. A"},
		{"a name listed with a port", "db.wild.test", dns.TypeA, dns.RcodeNameError, "", policy.ReasonAllowName, "db.wild.test. A,db.wild.test. AAAA"},
		{"an attribute of a listed name", "_dmarc.a.test", dns.TypeTXT, dns.RcodeSuccess, `"v=DMARC1"`, policy.ReasonAllowName, "_dmarc.a.test. TXT"},
		{"a listed name that is not there", "gone.test", dns.TypeA, dns.RcodeNameError, "", policy.ReasonAllowName, "gone.test. A,gone.test. AAAA"},
		{"no data of the type", "a.test", dns.TypeMX, dns.RcodeSuccess, "", policy.ReasonAllowName, "a.test. MX"},
		{"an alias to elsewhere is judged by the name asked", "alias.test", dns.TypeA, dns.RcodeSuccess, "b.test., 198.51.100.20", policy.ReasonAllowName, "alias.test. A"},
		{"another name", "b.test", dns.TypeA, denied, "", policy.ReasonNameDenied, ""},
		{"a wildcard's apex", "wild.test", dns.TypeA, denied, "", policy.ReasonNameDenied, ""},
		{"a tunnel to an unlisted zone", "c2VjcmV0.t.evil.test", dns.TypeTXT, denied, "", policy.ReasonNameDenied, ""},
		{"a name that only ends alike", "nota.test", dns.TypeA, denied, "", policy.ReasonNameDenied, ""},
		{"an attribute of another name", "_dmarc.b.test", dns.TypeTXT, denied, "", policy.ReasonNameDenied, ""},
		{"too many attributes", "_a._b._c._d.a.test", dns.TypeTXT, denied, "", policy.ReasonNameDenied, ""},
		{"an underscore within", "under_score.test", dns.TypeA, denied, "", policy.ReasonNameDenied, ""},
		{"an underscore and a hyphen under a wildcard", "data_set.x-.wild.test", dns.TypeA, dns.RcodeNameError, "", policy.ReasonAllowName, "data_set.x-.wild.test. A,data_set.x-.wild.test. AAAA"},
		{"an escaped dot", `a\.test.evil.test`, dns.TypeA, denied, "", ReasonBadName, ""},
		{"a NUL", `a.test\000.evil.test`, dns.TypeA, denied, "", ReasonBadName, ""},
		{"the root", ".", dns.TypeNS, denied, "", ReasonBadName, ""},
		{"a number that reads as an address", "2130706433", dns.TypeA, denied, "", ReasonBadName, ""},
		{"an odd type", "a.test", dns.TypeNULL, dns.RcodeRefused, "", ReasonQueryType, ""},
		{"ANY", "a.test", dns.TypeANY, dns.RcodeRefused, "", ReasonQueryType, ""},
		{"a zone transfer", "a.test", dns.TypeAXFR, dns.RcodeRefused, "", ReasonQueryType, ""},
		{"an address of one's own backwards", "2.0.223.10.in-addr.arpa", dns.TypePTR, dns.RcodeNameError, "", ReasonLocal, ""},
		{"a private range backwards", "10.in-addr.arpa", dns.TypePTR, dns.RcodeNameError, "", ReasonLocal, ""},
		{"IPv6 loopback backwards", "1." + strings.Repeat("0.", 31) + "ip6.arpa", dns.TypePTR, dns.RcodeNameError, "", ReasonLocal, ""},
		{"a public address backwards", "8.8.8.8.in-addr.arpa", dns.TypePTR, denied, "", policy.ReasonNameDenied, ""},
		{"our own domain", "own.cordon.localhost", dns.TypeA, dns.RcodeSuccess, "192.0.0.8", policy.ReasonAllowName, ""},
		{"our own domain over IPv6", "own.cordon.localhost", dns.TypeAAAA, dns.RcodeSuccess, "", policy.ReasonAllowName, ""},
		{"our own domain, not listed", "other.cordon.localhost", dns.TypeA, denied, "", policy.ReasonNameDenied, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, strictInput)
			m := ask(c.query, c.qtype)
			r := f.send(t, m)
			if r.Id != m.Id || !r.Response || len(r.Question) != 1 || r.Question[0] != m.Question[0] {
				t.Errorf("the reply is not one to the question: %v", r)
			}
			want := flowlog.Allowed
			if c.rcode == denied || c.rcode == dns.RcodeRefused {
				want = flowlog.Denied
			}
			if c.rcode == denied {
				c.rcode = dns.RcodeSuccess
				if len(r.Ns)+len(r.Extra) > 0 || !r.RecursionAvailable {
					t.Errorf("the denial has other records, or offers no recursion: %v", r)
				}
			}
			if r.Rcode != c.rcode || answersOf(r) != c.answers {
				t.Errorf("got %s %q, want %s %q", dns.RcodeToString[r.Rcode], answersOf(r), dns.RcodeToString[c.rcode], c.answers)
			}
			if got := strings.Join(f.up.questions(), ","); got != c.asked {
				t.Errorf("upstream was asked %q, want %q", got, c.asked)
			}
			e := f.flows.last(t)
			if e.Verdict != want || e.Reason != c.reason || e.Sandbox != "s1" || e.Generation != 7 || e.Proto != "dns" || e.Layer != flowlog.LayerResolver {
				t.Errorf("logged %+v, want %s %s", e, want, c.reason)
			}
		})
	}
}

func TestOpenModeAnswersEveryName(t *testing.T) {
	f := newFixture(t, policy.Input{})
	for name, want := range map[string]int{
		"b.test": 0, "under_score.test": 0, "8.8.8.8.in-addr.arpa": dns.RcodeNameError, ".": dns.RcodeNameError,
		"10.0.0.1": dns.RcodeSuccess, `a\000.test`: dns.RcodeSuccess, // denied
		"_dns.resolver.arpa": dns.RcodeNameError, "use-application-dns.net": dns.RcodeNameError, "x.localhost": 0,
		"a.invalid": dns.RcodeNameError, "a.onion": dns.RcodeNameError, "a.alt": dns.RcodeNameError, "printer.local": dns.RcodeNameError,
	} {
		if r := f.send(t, ask(name, dns.TypeA)); r.Rcode != want {
			t.Errorf("%s: got %s, want %s", name, dns.RcodeToString[r.Rcode], dns.RcodeToString[want])
		}
	}
	asked := f.up.questions()
	for _, name := range []string{"_dns.resolver.arpa", "x.localhost", "a.invalid", "a.onion", "a.alt", "printer.local"} {
		if slices.Contains(asked, name+". A") {
			t.Errorf("a local name was asked for upstream: %v", asked)
		}
	}
}

// sendTo sends a question as sandbox s1 to a server.
func (f *fixture) sendTo(t testing.TB, server string, m *dns.Msg) *dns.Msg {
	t.Helper()
	wire, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	r := new(dns.Msg)
	if err := r.Unpack(f.answer(t.Context(), transport{policy.UDP, sandboxAddr, netip.MustParseAddrPort(server)}, wire)); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAServerThePolicyDeniesIsNotServed(t *testing.T) {
	all := []string{"0.0.0.0/0"}
	for _, c := range []struct {
		name   string
		rules  policy.Input
		server string
		query  string
		rcode  int
		reason policy.Reason
	}{
		{"another server would answer", policy.Input{AllowOut: []string{"a.test"}, DenyOut: all}, "1.1.1.1:53", "a.test", dns.RcodeRefused, policy.ReasonDenyAddr},
		{"the name is denied too", policy.Input{AllowOut: []string{"a.test"}, DenyOut: all}, "1.1.1.1:53", "b.test", dns.RcodeSuccess, policy.ReasonNameDenied},
		{"no server is allowed", policy.Input{DenyOut: all}, "8.8.8.8:53", "a.test", dns.RcodeSuccess, policy.ReasonDenyAddr},
		{"only a server that is not set up is allowed", policy.Input{AllowOut: []string{"9.9.9.9"}, DenyOut: all}, "8.8.8.8:53", "a.test", dns.RcodeSuccess, policy.ReasonDenyAddr},
		{"the first of two is denied", policy.Input{DenyOut: []string{"8.8.8.8"}}, "8.8.8.8:53", "a.test", dns.RcodeRefused, policy.ReasonDenyAddr},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, c.rules)
			r := f.sendTo(t, c.server, ask(c.query, dns.TypeA))
			if e := f.flows.last(t); r.Rcode != c.rcode || len(r.Answer) > 0 || e.Verdict != flowlog.Denied || e.Reason != c.reason {
				t.Errorf("got %v, logged %s %s", r, e.Verdict, e.Reason)
			}
			if got := f.up.questions(); got != nil {
				t.Errorf("upstream was asked %v", got)
			}
		})
	}
	f := newFixture(t, strictInput)
	wire, err := ask("a.test", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	stranger := netip.MustParseAddrPort("10.223.0.6:40000")
	if reply := f.answer(t.Context(), transport{policy.UDP, stranger, netip.MustParseAddrPort("8.8.8.8:53")}, wire); reply != nil {
		t.Error("a source without a sandbox got a reply")
	}
}

func TestDeniedNamesAreRefusedWhereTheOperatorSaysSo(t *testing.T) {
	f := newFixture(t, strictInput, func(c *Config) { c.Denial = DenialRefused })
	if r := f.send(t, ask("b.test", dns.TypeA)); r.Rcode != dns.RcodeRefused {
		t.Errorf("got %v", r)
	}
	if _, err := ParseDenial("nxdomain"); err == nil || !strings.Contains(err.Error(), "nodata") {
		t.Errorf("ParseDenial: %v, want an error that says what to use", err)
	}
}

func TestALookUpOfADeniedNameIsOneEvent(t *testing.T) {
	for denial, retry := range map[Denial]time.Duration{DenialNoData: 0, DenialRefused: 2500 * time.Millisecond} { // musl's
		synctest.Test(t, func(t *testing.T) {
			f := &fixture{flows: &events{}, policy: compile(t, strictInput)}
			var err error
			f.Resolver, err = New(Config{
				Owner:     func(netip.Addr) (string, *policy.Compiled, bool) { return "s1", f.policy, true },
				Policy:    func(string) (*policy.Compiled, bool) { return f.policy, true },
				Upstreams: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}, Denial: denial, Flows: f.flows, Log: slog.New(slog.DiscardHandler),
			})
			if err != nil {
				t.Fatal(err)
			}
			tries := 1
			if retry > 0 {
				tries = 2
			}
			lookUp := func(name string) {
				for range tries {
					for _, server := range []string{"8.8.8.8:53", "1.1.1.1:53"} {
						for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
							f.sendTo(t, server, ask(name, qtype))
						}
					}
					time.Sleep(retry)
				}
			}
			lookUp("b.test")
			if n := f.flows.len(); n != 1 {
				t.Errorf("%s: %d events, want one", denial, n)
			}
			f.sendTo(t, "8.8.8.8:53", ask("b.test", dns.TypeTXT)) // not of that look-up
			if denial == DenialRefused {
				time.Sleep(sameLookup)
			}
			lookUp("b.test")
			if n := f.flows.len(); n != 3 {
				t.Errorf("%s: %d events after another question and another look-up, want three", denial, n)
			}
			for i := range 10 * maxLookups {
				f.sendTo(t, "8.8.8.8:53", ask(fmt.Sprintf("b%d.test", i), dns.TypeA))
			}
			if n := f.flows.len(); n != 3+10*maxLookups {
				t.Errorf("%s: %d events, want one for each name", denial, n)
			}
			if n := len(f.budgets.of("s1").denied); n > maxLookups {
				t.Errorf("%s: %d look-ups are remembered", denial, n)
			}
		})
	}
}

func TestPrivateAddressesAreRemoved(t *testing.T) {
	f := newFixture(t, strictInput)
	for _, c := range []struct {
		query   string
		qtype   uint16
		answers string
		verdict flowlog.Verdict
	}{
		{"private.test", dns.TypeA, "", flowlog.Denied},
		{"meta.test", dns.TypeA, "", flowlog.Denied},
		{"mapped.test", dns.TypeAAAA, "", flowlog.Denied},
		{"alias-priv.test", dns.TypeA, "", flowlog.Denied},
		{"loop.test", dns.TypeA, "127.0.0.1, 127.8.8.8", flowlog.Allowed},
		{"loop.test", dns.TypeAAAA, "::1", flowlog.Allowed},
		{"loop.test", dns.TypeHTTPS, `1 . ipv4hint="127.0.0.1" ipv6hint="::1"`, flowlog.Allowed},
		{"alias-loop.test", dns.TypeA, "loop.test., 127.0.0.1, 127.8.8.8", flowlog.Allowed},
		{"loop-priv.test", dns.TypeA, "127.0.0.1", flowlog.Allowed},
		{"loop-mapped.test", dns.TypeAAAA, "", flowlog.Denied},
		{"mixed.test", dns.TypeA, "198.51.100.10", flowlog.Allowed},
		{"ech.test", dns.TypeHTTPS, `1 . alpn="h2" ipv4hint="198.51.100.50" ipv6hint="2001:db8:80::32"`, flowlog.Allowed},
		{"must.test", dns.TypeHTTPS, "", flowlog.Allowed},
		{"priv.test", dns.TypeSVCB, "1 a.test.", flowlog.Allowed},
	} {
		r := f.send(t, ask(c.query, c.qtype))
		e := f.flows.last(t)
		if r.Rcode != dns.RcodeSuccess || answersOf(r) != c.answers || e.Verdict != c.verdict {
			t.Errorf("%s: got %s %q, logged %s %s", c.query, dns.RcodeToString[r.Rcode], answersOf(r), e.Verdict, e.Reason)
		}
		if c.verdict == flowlog.Denied && e.Reason != ReasonRebinding {
			t.Errorf("%s: reason %s", c.query, e.Reason)
		}
	}
	for name, kind := range map[string]errs.Kind{"private.test": errs.Forbidden, "loop.test": errs.Forbidden, "gone.test": errs.NotFound} {
		if a, err := f.Resolve(t.Context(), "s1", name); !errs.Is(err, kind) {
			t.Errorf("Resolve(%s): %v, %v; want %v", name, a, err, kind)
		}
	}
}

func TestLocalhostIsTheSandboxItself(t *testing.T) {
	for rules, in := range map[string]policy.Input{
		"no rules": {}, "strict": strictInput, "no server allowed": {DenyOut: []string{"0.0.0.0/0"}},
	} {
		f := newFixture(t, in, func(c *Config) { c.IPv6 = false }) // the loopback has both families anyway
		for _, c := range []struct {
			query string
			qtype uint16
			want  string
		}{
			{"localhost", dns.TypeA, "127.0.0.1"}, {"T1.LocalHost", dns.TypeA, "127.0.0.1"}, {"a.b_c.localhost", dns.TypeAAAA, "::1"},
			{"localhost", dns.TypeMX, ""}, {"_http._tcp.localhost", dns.TypeSRV, ""},
		} {
			r := f.send(t, ask(c.query, c.qtype))
			if e := f.flows.last(t); r.Rcode != dns.RcodeSuccess || answersOf(r) != c.want || e.Verdict != flowlog.Allowed || e.Reason != ReasonLocal {
				t.Errorf("%s: %s: got %v, logged %s %s", rules, c.query, r, e.Verdict, e.Reason)
			}
		}
		for _, name := range []string{"notlocalhost", "localhost.test", "x.cordon.localhost"} {
			if r := f.send(t, ask(name, dns.TypeA)); strings.Contains(answersOf(r), "127.") {
				t.Errorf("%s: %s: got %v", rules, name, r)
			}
		}
		for _, name := range f.up.questions() {
			if strings.Contains(name, "localhost. ") && !strings.HasPrefix(name, "notlocalhost") {
				t.Errorf("%s: upstream was asked for %s", rules, name)
			}
		}
	}
}

func TestAListedNameBelowLocalIsAskedFor(t *testing.T) {
	f := newFixture(t, policy.Input{AllowOut: []string{"*.local"}, DenyOut: []string{"0.0.0.0/0"}})
	if r := f.send(t, ask("printer.local", dns.TypeA)); answersOf(r) != "198.51.100.10" {
		t.Errorf("got %v", r)
	}
}

func TestLoopbackAnswersAreNotPinned(t *testing.T) {
	f := newFixture(t, policy.Input{AllowOut: []string{"loop.test:5432"}, DenyOut: []string{"0.0.0.0/0"}})
	if r := f.send(t, ask("loop.test", dns.TypeA)); answersOf(r) != "127.0.0.1, 127.8.8.8" || f.pins != nil {
		t.Errorf("got %v, pinned %v", r, f.pins)
	}
}

func TestNothingOfTheClientsMessageGoesUpstream(t *testing.T) {
	f := newFixture(t, strictInput)
	m := ask("a.test", dns.TypeA)
	m.Id = 4242
	m.CheckingDisabled, m.AuthenticatedData, m.Zero = true, true, true
	m.SetEdns0(4096, true)
	m.IsEdns0().Option = []dns.EDNS0{
		&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("smuggled")},
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "736d7567676c6564"},
	}
	if r := f.send(t, m); r.Rcode != 0 {
		t.Fatal(r)
	}
	var got *dns.Msg
	f.up.set(func(u *upstream) { got = u.asked[0] })
	opt := got.IsEdns0()
	if got.Id == 4242 || got.CheckingDisabled || got.AuthenticatedData || got.Zero || opt == nil || len(opt.Option) != 0 || opt.Do() || opt.UDPSize() != maxUDP {
		t.Errorf("upstream received %v", got)
	}
}

// TestAnAttributeDoesNotHideANameThatTheOperatorDenies: a name with attribute labels is
// judged by its host, and as itself.
func TestAnAttributeDoesNotHideANameThatTheOperatorDenies(t *testing.T) {
	deny := []string{"*.a.test", "_own.wild.test"}
	for mode, in := range map[string]policy.Input{"open": {}, "strict": {AllowOut: []string{"a.test", "wild.test"}, DenyOut: []string{"0.0.0.0/0"}}} {
		p, err := policy.Compile(in, &policy.Operator{AlwaysDeny: deny}, 7)
		if err != nil {
			t.Fatal(err)
		}
		f := newFixture(t, in)
		f.policy = p
		for _, name := range []string{"_x.a.test", "_443._tcp.a.test", "_own.wild.test", "_x.b.a.test"} {
			f.send(t, ask(name, dns.TypeTXT))
			if e := f.flows.last(t); e.Verdict != flowlog.Denied || e.Reason != policy.ReasonOperator {
				t.Errorf("%s: %s: %+v", mode, name, e)
			}
		}
		if got := f.up.questions(); got != nil {
			t.Errorf("%s: the upstream was asked %v", mode, got)
		}
		f.send(t, ask("_x.wild.test", dns.TypeTXT))
		if e := f.flows.last(t); e.Verdict != flowlog.Allowed {
			t.Errorf("%s: another attribute: %+v", mode, e)
		}
	}
}

func TestRefusalsExplainThemselvesToThoseWhoSpeakEDNS(t *testing.T) {
	f := newFixture(t, strictInput)
	m := ask("b.test", dns.TypeA)
	if r := f.send(t, m); r.IsEdns0() != nil {
		t.Error("a client without EDNS got an option")
	}
	m.SetEdns0(1232, false)
	r := f.send(t, m)
	opt := r.IsEdns0()
	if opt == nil || len(opt.Option) != 1 {
		t.Fatalf("got %v", r)
	}
	if e, ok := opt.Option[0].(*dns.EDNS0_EDE); !ok || e.InfoCode != dns.ExtendedErrorCodeBlocked {
		t.Errorf("got %v, want extended error 15", opt.Option[0])
	}
}

func TestRepliesFitTheClient(t *testing.T) {
	f := newFixture(t, strictInput)
	for _, c := range []struct {
		name  string
		proto policy.Proto
		size  uint16 // of EDNS, 0 for none
		limit int
		whole bool
	}{
		{"512 octets without EDNS", policy.UDP, 0, 512, false},
		{"what EDNS offers", policy.UDP, 1000, 1000, false},
		{"never more than 1232", policy.UDP, 65535, 1232, false},
		{"all of it over TCP", policy.TCP, 0, 65535, true},
	} {
		m := ask("big.test", dns.TypeTXT)
		if c.size > 0 {
			m.SetEdns0(c.size, false)
		}
		wire, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		reply := f.answer(t.Context(), transport{c.proto, sandboxAddr, netip.MustParseAddrPort("8.8.8.8:53")}, wire)
		r := new(dns.Msg)
		if err := r.Unpack(reply); err != nil {
			t.Fatal(err)
		}
		if len(reply) > c.limit || r.Truncated == c.whole || c.whole != (len(r.Answer) == 100) {
			t.Errorf("%s: %d octets, truncated %v, %d records", c.name, len(reply), r.Truncated, len(r.Answer))
		}
	}
	tcp := 0
	f.up.set(func(u *upstream) { tcp = u.tcp })
	if tcp == 0 {
		t.Error("the truncated answer of the upstream was not fetched over TCP")
	}
}

func TestMalformedMessages(t *testing.T) {
	f := newFixture(t, strictInput)
	pack := func(change func(*dns.Msg)) []byte {
		m := ask("a.test", dns.TypeA)
		change(m)
		wire, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return wire
	}
	rr, err := dns.NewRR("a.test. 1 IN TXT smuggled")
	if err != nil {
		t.Fatal(err)
	}
	badVersion := func(m *dns.Msg) { m.SetEdns0(1232, false).IsEdns0().SetVersion(1) }
	for _, c := range []struct {
		name string
		wire []byte
		want int // -1: no reply
	}{
		{"nothing", nil, -1},
		{"less than a header", []byte("GET / HTTP"), -1},
		{"a response", pack(func(m *dns.Msg) { m.Response = true }), -1},
		{"no question", pack(func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		{"two questions", pack(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		{"an answer in a query", pack(func(m *dns.Msg) { m.Answer = []dns.RR{rr} }), dns.RcodeFormatError},
		{"an authority in a query", pack(func(m *dns.Msg) { m.Ns = []dns.RR{rr} }), dns.RcodeFormatError},
		{"many additional records", pack(func(m *dns.Msg) { m.Extra = []dns.RR{rr, rr, rr} }), dns.RcodeFormatError},
		{"a cut question", pack(func(*dns.Msg) {})[:20], dns.RcodeFormatError},
		{"a pointer to itself", append([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 0xc0, 12, 0, 1, 0, 1), dns.RcodeFormatError},
		{"an update", pack(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		{"class CHAOS", pack(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
		{"a later EDNS", pack(badVersion), dns.RcodeBadVers},
		{"text on the port", []byte("SSH-2.0-OpenSSH_9.2p1 Debian"), dns.RcodeNotImplemented},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := f.sendWire(t, c.wire)
			if c.want < 0 && r != nil || c.want >= 0 && (r == nil || r.Rcode != c.want) {
				t.Errorf("got %v, want %s", r, dns.RcodeToString[c.want])
			}
			if e := f.flows.last(t); e.Verdict != flowlog.Denied {
				t.Errorf("logged %s", e.Verdict)
			}
		})
	}
	if got := f.up.questions(); got != nil {
		t.Errorf("upstream was asked %v", got)
	}
}

func TestWithoutIPv6NobodyIsToldAnAddress(t *testing.T) {
	f := newFixture(t, strictInput, func(c *Config) { c.IPv6 = false })
	if r := f.send(t, ask("a.test", dns.TypeAAAA)); r.Rcode != 0 || len(r.Answer) != 0 || len(r.Ns) != 1 {
		t.Errorf("AAAA: got %v", r)
	}
	if got := f.up.questions(); got != nil {
		t.Errorf("upstream was asked %v", got)
	}
	if r := f.send(t, ask("ech.test", dns.TypeHTTPS)); strings.Contains(answersOf(r), "ipv6hint") {
		t.Errorf("HTTPS: got %v", r)
	}
	if a, err := f.Resolve(t.Context(), "s1", "a.test"); err != nil || len(a) != 1 {
		t.Errorf("Resolve: %v, %v", a, err)
	}
}

func TestAnswersOfNamesWithPortsArePinned(t *testing.T) {
	f := newFixture(t, policy.Input{AllowOut: []string{"a.test:5432", "private.test:5432", "*.wild.test"}, DenyOut: []string{"0.0.0.0/0"}})
	f.send(t, ask("a.test", dns.TypeA))
	f.send(t, ask("x.wild.test", dns.TypeA))  // no port
	f.send(t, ask("private.test", dns.TypeA)) // no address
	f.send(t, ask("a.test", dns.TypeTXT))
	want := []Pin{{Sandbox: "s1", Name: "a.test", Addr: netip.MustParseAddr("198.51.100.10"), Ports: f.policy.PinPorts("a.test")}}
	if diff := cmp.Diff(want, f.pins, cmpopts.EquateComparable(netip.Addr{}), cmpopts.IgnoreFields(Pin{}, "TTL")); diff != "" {
		t.Fatal(diff)
	}
	if ttl := f.pins[0].TTL; len(want[0].Ports) != 1 || ttl > time.Minute || ttl < 50*time.Second {
		t.Errorf("pinned %v for %v, want one port for the minute of the answer", want[0].Ports, ttl)
	}
}

// TestAQuestionIsRefusedWhereItsPinsAreTooMany: an address that is told but not pinned
// would look like a server that is down.
func TestAQuestionIsRefusedWhereItsPinsAreTooMany(t *testing.T) {
	pins := 0
	f := newFixture(t, policy.Input{AllowOut: []string{"a.test:5432"}, DenyOut: []string{"0.0.0.0/0"}}, func(c *Config) {
		c.Pin = func(Pin) error {
			pins++
			return errs.New(errs.Exhausted, "too many")
		}
	})
	if r := f.send(t, ask("a.test", dns.TypeA)); r.Rcode != dns.RcodeRefused || len(r.Answer) != 0 || pins != 1 {
		t.Errorf("got %v after %d pins, want REFUSED after one", r, pins)
	}
	if e := f.flows.since(0); len(e) != 1 || e[0].Reason != ReasonPins || e[0].Verdict != flowlog.Denied || !strings.Contains(e[0].Detail, "too many") {
		t.Errorf("recorded %+v", e)
	}
}

func TestAnswersAreKeptForTheirTime(t *testing.T) {
	f := newFixture(t, strictInput)
	for range 3 {
		f.send(t, ask("a.test", dns.TypeA))
		f.send(t, ask("gone.test", dns.TypeA))
	}
	if got := f.up.questions(); len(got) != 3 { // what is missing is asked for in both families
		t.Errorf("upstream was asked %v", got)
	}
	r := f.send(t, ask("long.test", dns.TypeA))
	if ttl := r.Answer[0].Header().Ttl; ttl > 3600 {
		t.Errorf("a TTL of %d seconds was passed on", ttl)
	}
}

func TestCacheExpiresAndIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache()
		now := time.Now()
		life := func(q question, m *dns.Msg) time.Duration { return readAnswers(q, m, now).expires.Sub(now) }
		rr := func(s string) dns.RR {
			r, err := dns.NewRR(s)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		q := question{"a", "a.test", dns.TypeA}
		for _, c := range []struct {
			name string
			msg  dns.Msg
			want time.Duration
		}{
			{"the smallest TTL of the chain", dns.Msg{Answer: []dns.RR{rr("a.test. 50 IN CNAME b.test."), rr("b.test. 90 IN A 1.2.3.4")}}, 50 * time.Second},
			{"no TTL", dns.Msg{Answer: []dns.RR{rr("a.test. 0 IN A 1.2.3.4")}}, time.Second},
			{"a week", dns.Msg{Answer: []dns.RR{rr("a.test. 604800 IN A 1.2.3.4")}}, time.Hour},
			{"negative, by the SOA's minimum", dns.Msg{Ns: []dns.RR{rr("test. 30 IN SOA a. b. 1 2 3 4 7")}}, 7 * time.Second},
			{"negative for a day", dns.Msg{Ns: []dns.RR{rr("test. 86400 IN SOA a. b. 1 2 3 4 86400")}}, 5 * time.Minute},
			{"negative without SOA", dns.Msg{}, 5 * time.Second},
			{"records of another name do not count", dns.Msg{Answer: []dns.RR{rr("c.test. 50 IN A 1.2.3.4")}}, 5 * time.Second},
		} {
			if got := life(q, &c.msg); got != c.want {
				t.Errorf("%s: kept for %v, want %v", c.name, got, c.want)
			}
		}
		c.put(q, &answers{expires: now.Add(10 * time.Second)})
		time.Sleep(9 * time.Second)
		if _, ok := c.get(q); !ok {
			t.Error("gone too early")
		}
		time.Sleep(time.Second)
		if _, ok := c.get(q); ok {
			t.Error("kept too long")
		}
		for i := range cacheEntries + 500 {
			c.put(question{fmt.Sprint("sbx", i%20), fmt.Sprint(i), dns.TypeA}, &answers{expires: now.Add(time.Hour)})
		}
		kept := func() (total int) {
			for _, share := range c.shares {
				total += len(share)
			}
			return total
		}
		if kept() != cacheEntries || c.size != cacheEntries {
			t.Errorf("%d entries, counted %d", kept(), c.size)
		}
		for i := range cacheEntries {
			c.put(question{"greedy", fmt.Sprint(i), dns.TypeA}, &answers{expires: now.Add(time.Hour)})
		}
		if n := len(c.shares["greedy"]); n > cacheShare || kept() != c.size || c.size > cacheEntries {
			t.Errorf("one sandbox has %d of %d entries, counted %d", n, kept(), c.size)
		}
		if _, ok := c.get(question{"another", fmt.Sprint(cacheEntries - 1), dns.TypeA}); ok {
			t.Error("an answer was kept for who did not ask")
		}
		c.put(question{"a", "large", dns.TypeA}, &answers{expires: now.Add(time.Hour), size: cacheLargest + 1})
		if _, ok := c.get(question{"a", "large", dns.TypeA}); ok {
			t.Error("an answer beyond the limit was kept")
		}
	})
}

func TestATunnelBelowAnAllowedWildcardRunsOutOfBudget(t *testing.T) {
	f := newFixture(t, policy.Input{AllowOut: []string{"*.wild.test", "a.test"}, DenyOut: []string{"0.0.0.0/0"}},
		func(c *Config) { c.Budget.LabelsPerMinute = 10 })
	refused := 0
	for i := range 30 { // REFUSED, as the name is allowed and may be asked for later
		if r := f.send(t, ask(fmt.Sprintf("chunk%d.wild.test", i), dns.TypeA)); r.Rcode == dns.RcodeRefused {
			refused++
		}
	}
	left := map[string]bool{}
	for _, q := range f.up.questions() {
		left[strings.Fields(q)[0]] = true // both families of a name
	}
	if len(left) != 10 || refused != 20 {
		t.Errorf("%d names left, %d were refused", len(left), refused)
	}
	if e := f.flows.last(t); e.Reason != ReasonLabels || e.Verdict != flowlog.Denied {
		t.Errorf("logged %+v", e)
	}
	for i := range 30 { // attribute labels are as good a tunnel
		f.send(t, ask(fmt.Sprintf("_chunk%d.a.test", i), dns.TypeTXT))
	}
	if n := len(f.up.questions()); n != 10 {
		t.Errorf("%d questions left by attributes", n)
	}
	if r := f.send(t, ask("a.test", dns.TypeA)); r.Rcode != 0 {
		t.Error("the exact name itself is out of budget")
	}
}

func TestUpstreamFailures(t *testing.T) {
	dead, err := net.ListenPacket("udp4", "127.0.0.1:0") // takes queries, never answers
	if err != nil {
		t.Fatal(err)
	}
	defer dead.Close()
	broken := newUpstream(t, "")
	broken.set(func(u *upstream) { u.rcode = dns.RcodeServerFailure })
	f := newFixture(t, strictInput, func(c *Config) {
		c.Upstreams = append([]netip.AddrPort{netip.MustParseAddrPort(dead.LocalAddr().String()), broken.addr}, c.Upstreams...)
	})
	began := time.Now()
	if r := f.send(t, ask("a.test", dns.TypeA)); answersOf(r) != "198.51.100.10" {
		t.Fatalf("got %v", r)
	}
	if took := time.Since(began); took > 2*tryTimeout {
		t.Errorf("failing over took %v", took)
	}
	began = time.Now()
	f.send(t, ask("zero.test", dns.TypeA))
	if took := time.Since(began); took > tryTimeout {
		t.Errorf("the server that answered is not preferred: %v", took)
	}
	f.up.set(func(u *upstream) { u.rcode = dns.RcodeRefused })
	f.servers = newServers([]netip.AddrPort{broken.addr, f.up.addr})
	if r := f.send(t, ask("long.test", dns.TypeA)); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %v", r)
	}
	if e := f.flows.last(t); e.Verdict != flowlog.Failed || e.Reason != ReasonUpstream {
		t.Errorf("logged %+v", e)
	}
}

func TestForgedRepliesArePassedOver(t *testing.T) {
	p, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		n, from, err := p.ReadFrom(buf)
		if err != nil {
			return
		}
		var q dns.Msg
		if q.Unpack(buf[:n]) != nil {
			return
		}
		send := func(addr string, change func(*dns.Msg)) {
			m := new(dns.Msg).SetReply(&q)
			rr, _ := dns.NewRR("a.test. 60 IN A " + addr)
			m.Answer = []dns.RR{rr}
			change(m)
			wire, _ := m.Pack()
			_, _ = p.WriteTo(wire, from)
		}
		send("198.51.100.66", func(m *dns.Msg) { m.Id++ })
		send("198.51.100.66", func(m *dns.Msg) { m.Question[0].Name = "b.test." })
		send("198.51.100.66", func(m *dns.Msg) { m.Response = false })
		_, _ = p.WriteTo([]byte("junk"), from)
		send("198.51.100.10", func(*dns.Msg) {})
	}()
	defer func() { p.Close(); <-done }()
	f := newFixture(t, strictInput, func(c *Config) {
		c.Upstreams = []netip.AddrPort{netip.MustParseAddrPort(p.LocalAddr().String())}
	})
	if r := f.send(t, ask("a.test", dns.TypeA)); answersOf(r) != "198.51.100.10" {
		t.Errorf("got %v", r)
	}
}

func TestObserveModeAnswersAndSaysWhatItWouldRefuse(t *testing.T) {
	in := strictInput
	in.Mode = policy.ModeObserve
	f := newFixture(t, in)
	r := f.send(t, ask("b.test", dns.TypeA))
	if e := f.flows.last(t); answersOf(r) != "198.51.100.20" || e.Verdict != flowlog.Observed || e.Reason != policy.ReasonNameDenied {
		t.Errorf("got %v, logged %+v", r, e)
	}
}

func TestResolveForTheProxy(t *testing.T) {
	f := newFixture(t, strictInput)
	for name, want := range map[string]string{
		"a.test": "[198.51.100.10 2001:db8:80::10]", "mixed.test": "[198.51.100.10]", "x.cordon.localhost": "[192.0.0.8]",
	} {
		if a, err := f.Resolve(t.Context(), "s1", name); err != nil || fmt.Sprint(a) != want {
			t.Errorf("%s: got %v, %v, want %s", name, a, err, want)
		}
	}
	if _, err := f.Resolve(t.Context(), "nobody", "a.test"); !errs.Is(err, errs.NotFound) {
		t.Errorf("an unknown sandbox: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.up.set(func(u *upstream) { u.delay = 50 * time.Millisecond })
	if _, err := f.Resolve(ctx, "s1", "y.wild.test"); err == nil {
		t.Error("a cancelled lookup must end")
	}
}

func TestHasAsksAgainForAPinnedName(t *testing.T) {
	f := newFixture(t, policy.Input{AllowOut: []string{"a.test:5432", "private.test:5432"}, DenyOut: []string{"0.0.0.0/0"}})
	for _, c := range []struct {
		name, addr string
		want       bool
	}{
		{"a.test", "198.51.100.10", true}, {"a.test", "2001:db8:80::10", true}, {"a.test", "198.51.100.99", false},
		{"private.test", "10.0.0.5", false}, {"b.test", "198.51.100.20", false},
	} {
		ttl, has, err := f.Has(t.Context(), "s1", c.name, netip.MustParseAddr(c.addr))
		if err != nil || has != c.want || has && (ttl <= 0 || ttl > time.Minute) {
			t.Errorf("%s at %s: %v for %s, %v", c.name, c.addr, has, ttl, err)
		}
	}
	for _, q := range f.up.questions() {
		if strings.HasPrefix(q, "b.test") {
			t.Error("a name that the rules deny was asked for")
		}
	}
	f.up.set(func(u *upstream) { u.rcode = dns.RcodeServerFailure })
	f.policy = compile(t, policy.Input{AllowOut: []string{"*.wild.test:5432"}, DenyOut: []string{"0.0.0.0/0"}})
	if _, _, err := f.Has(t.Context(), "s1", "x.wild.test", netip.MustParseAddr("198.51.100.40")); err == nil {
		t.Error("an upstream's failure was taken for an answer")
	}
	if _, _, err := f.Has(t.Context(), "s2", "a.test", netip.MustParseAddr("198.51.100.10")); !errs.Is(err, errs.NotFound) {
		t.Errorf("an unknown sandbox: %v", err)
	}
}

func TestNewNamesWhatIsWrong(t *testing.T) {
	f := newFixture(t, policy.Input{})
	for want, change := range map[string]func(*Config){
		"required":      func(c *Config) { c.Owner = nil },
		"dns.upstreams": func(c *Config) { c.Upstreams = nil },
		"8.8.8.8:0":     func(c *Config) { c.Upstreams = []netip.AddrPort{netip.MustParseAddrPort("8.8.8.8:0")} },
	} {
		cfg := f.cfg
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
}

func TestHostUpstreams(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	const public = "[8.8.8.8:53 1.1.1.1:53]"
	for content, want := range map[string]string{
		"nameserver 192.0.2.1\nsearch x\nnameserver 2001:db8::1\n": "[192.0.2.1:53 [2001:db8::1]:53]",
		"nameserver fe80::1%eth0\nnameserver nonsense\n":           "[[fe80::1%eth0]:53]",
		"search x\n": public,
		"":           public,
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := HostUpstreams(path); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%q: got %s, %v, want %s", content, got, err, want)
		}
	}
	if got, err := HostUpstreams(path + ".missing"); err != nil || fmt.Sprint(got) != public {
		t.Errorf("no file: got %v, %v", got, err)
	}
	if err := os.WriteFile(path, []byte("nameserver nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := HostUpstreams(path); err == nil || !strings.Contains(err.Error(), "network.upstreams") {
		t.Errorf("a server that cannot be read: got %v, %v; want an error, and no public server", got, err)
	}
	if got, err := HostUpstreams(filepath.Dir(path)); err == nil {
		t.Errorf("a file that cannot be read: got %v; want an error, and no public server", got)
	}
}

// TestASandboxDoesNotChooseTheServer: the owner of a name can make any server fail for
// it, or stay silent. The other names are asked for where they were.
func TestASandboxDoesNotChooseTheServer(t *testing.T) {
	second := newUpstream(t, zone)
	f := newFixture(t, strictInput, func(c *Config) { c.Upstreams = append(c.Upstreams, second.addr) })
	f.up.set(func(u *upstream) { u.broken = map[uint16]int{dns.TypeTXT: -1, dns.TypeMX: dns.RcodeServerFailure} })
	for _, qtype := range []uint16{dns.TypeTXT, dns.TypeMX} {
		f.send(t, ask("a.test", qtype))
		if got := second.questions(); len(got) != 1 {
			t.Errorf("%s: the second server was asked %v", dns.TypeToString[qtype], got)
		}
	}
	for end := time.Now().Add(5 * time.Second); f.order()[0].addr != f.up.addr; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the first server replies to our question, and is not asked first again")
		}
	}
	if r := f.send(t, ask("b.test", dns.TypeA)); r.Rcode != dns.RcodeSuccess {
		t.Error(r)
	}
	f.send(t, ask("a.test", dns.TypeA))
	if got := second.questions(); got != nil {
		t.Errorf("the second server was asked %v", got)
	}
}

// TestAServerThatDoesNotReplyComesLast until it replies.
func TestAServerThatDoesNotReplyComesLast(t *testing.T) {
	f := newFixture(t, strictInput)
	second := newUpstream(t, zone)
	f.servers = newServers([]netip.AddrPort{f.up.addr, second.addr})
	f.up.set(func(u *upstream) { u.silent = true })
	f.send(t, ask("a.test", dns.TypeA))
	began := time.Now()
	f.send(t, ask("a.test", dns.TypeTXT))
	if took := time.Since(began); took > tryTimeout/2 {
		t.Errorf("the silent server was waited for again: %s", took)
	}
	f.up.set(func(u *upstream) { u.silent = false })
	first := f.servers[0]
	for end := time.Now().Add(10 * time.Second); f.order()[0] != first; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it replies, and is not asked first again")
		}
		first.mu.Lock() // the five seconds until the next question pass at once
		first.probed = time.Time{}
		first.mu.Unlock()
	}
}

// BenchmarkCachedAnswer is a query answered from the cache, judged, logged and packed.
func BenchmarkCachedAnswer(b *testing.B) {
	f := newFixture(b, strictInput, func(c *Config) {
		c.Budget = Budget{QueriesPerSecond: 1e9, Burst: 1e9}
		c.Flows = discard{}
	})
	wire, err := ask("a.test", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	t := transport{policy.UDP, sandboxAddr, netip.MustParseAddrPort("8.8.8.8:53")}
	b.ReportAllocs()
	for b.Loop() {
		if len(f.answer(b.Context(), t, wire)) == 0 {
			b.Fatal("no answer")
		}
	}
}

type discard struct{}

func (discard) Record(flowlog.Event) {}
