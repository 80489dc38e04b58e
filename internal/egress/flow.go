package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// flow is one connection of a sandbox.
type flow struct {
	p       *Proxy
	sandbox string
	client  *net.TCPConn
	src     netip.AddrPort
	dst     netip.AddrPort // where the sandbox addressed it
	started time.Time
	proto   string // "tcp" until the first bytes say "tls" or "http"
	in      source // reads from client

	key         string  // the API key that owns the sandbox; set by admit
	overcharged string  // the limit that refused memory for a name
	tenant      *tenant // set by admit
	pending     bool    // no name shown yet; guarded by Proxy.mu

	bytesOut, bytesIn atomic.Int64
	pumps             atomic.Int32 // directions still copied
	settled           atomic.Bool  // the TLS server's answer asks for no second hello
	headRequest       bool         // the request going on is HEAD: an answer has no body
	wantsJSON         bool         // the request going on names JSON in Accept
	http2             bool         // it is HTTP/2 in clear text
	expired           string       // why the address is not pinned any more, if it was

	mu       sync.Mutex // guards the rest
	begun    bool       // an upstream was reached: a Closed event is due
	judged   bool       // ruling is set: Revoke may judge it
	ruling   ruling
	earlier  []ruling       // of other names that HTTP/2 requests have shown
	upAddr   netip.AddrPort // what was dialled; invalid for our own ingress
	upstream net.Conn
	cancel   context.CancelFunc // of the dial going on
	killed   policy.Reason      // why it was cut, if it was
}

// ruling is a verdict with what follows from it.
type ruling struct {
	policy *policy.Compiled
	name   string
	wire   policy.Wire
	pins   []string // names that may stand behind policy.RoutePinned
	policy.Verdict
	route policy.Route
}

// rule judges a connection to dst that shows name, or none. An address that passes
// without a name is dialled as it is; a name that was needed is dialled where we
// resolve it.
func rule(c *policy.Compiled, dst netip.AddrPort, name string, wire policy.Wire, pins []string) ruling {
	j := c.Judge(dst, name, wire, pins)
	r := ruling{policy: c, name: name, wire: wire, pins: pins, Verdict: j.Verdict, route: j.Route}
	if j.Route == policy.RoutePinned {
		r.name, r.Reason = j.Name, ReasonPinned
	}
	return r
}

// wire is what the first bytes were.
func (f *flow) wire() policy.Wire {
	switch f.proto {
	case "tls":
		return policy.WireTLS
	case "http":
		return policy.WireHTTP
	}
	return policy.WireOther
}

// judge decides the flow under the policy in force. The ruling is marked before
// the policy is looked up a second time, so that a policy update either finds
// the mark (Revoke) or is seen here. It reports false when the flow is over.
func (f *flow) judge(name string) (ruling, bool) {
	return f.judgeBy(name, nil)
}

func (f *flow) judgeBy(name string, pins []string) (ruling, bool) {
	owner, known := f.p.cfg.Owner(f.src.Addr())
	for {
		if !known || owner.Sandbox != f.sandbox || owner.Policy == nil {
			return ruling{}, false
		}
		r := rule(owner.Policy, f.dst, name, f.wire(), pins)
		f.mu.Lock()
		f.ruling, f.judged = r, true
		killed := f.killed != ""
		f.mu.Unlock()
		if killed {
			return ruling{}, false
		}
		again, still := f.p.cfg.Owner(f.src.Addr())
		if still && again == owner {
			return r, true
		}
		owner, known = again, still
	}
}

// rejudge cuts the flow if the policy now in force refuses it.
func (f *flow) rejudge() {
	f.mu.Lock()
	judged, old, earlier, up := f.judged, f.ruling, f.earlier, f.upAddr
	f.mu.Unlock()
	owner, known := f.p.cfg.Owner(f.src.Addr())
	if !known || owner.Sandbox != f.sandbox || owner.Policy == nil {
		f.kill(ReasonRevoked)
		return
	}
	if !judged || !old.Allow {
		return // its name is still to come and meets the new policy, or it is ending
	}
	if f.holds(owner.Policy, old, up) {
		for _, r := range earlier { // only ever appended to
			if !f.holds(owner.Policy, r, up) {
				return
			}
		}
	}
}

// holds cuts the flow and reports false if policy c refuses what old allowed.
func (f *flow) holds(c *policy.Compiled, old ruling, up netip.AddrPort) bool {
	name := old.name
	if old.route == policy.RoutePinned {
		name = ""
	}
	now := rule(c, f.dst, name, old.wire, old.pins)
	v := now.Verdict
	if v.Allow && old.route == policy.RouteName && up.IsValid() {
		v = c.DecideAddr(old.name, up)
	}
	if v.Allow && (old.route != policy.RouteDirect || now.route == policy.RouteDirect) {
		return true
	}
	f.record(flowlog.Denied, event{policy: c, name: old.name, rule: v.Rule, reason: ReasonRevoked, detail: "cut: the policy no longer allows it"})
	f.kill(ReasonRevoked)
	return false
}

// kill resets both sides and ends a dial that is going on.
func (f *flow) kill(why policy.Reason) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.killed == "" {
		f.killed = why
	}
	if f.cancel != nil {
		f.cancel()
	}
	reset(f.client)
	if f.upstream != nil {
		reset(f.upstream)
	}
}

// setUpstream makes c the connection that kill resets, with the address that
// rejudge judges. It closes c and reports false when the flow was killed meanwhile.
func (f *flow) setUpstream(c net.Conn, addr netip.AddrPort) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.killed != "" {
		c.Close()
		return false
	}
	f.upstream, f.upAddr = c, addr
	f.begun = true
	return true
}

func (f *flow) dropUpstream() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.upstream != nil {
		f.upstream.Close()
	}
	f.upstream, f.upAddr = nil, netip.AddrPort{}
}

// serve sniffs the flow and passes it on. It reports true when copying
// goroutines have taken it over.
func (f *flow) serve(ctx context.Context, c *policy.Compiled) (handedOver bool) {
	if settled(rule(c, f.dst, "", policy.WireOther, nil).Verdict) {
		return f.serveNameless(ctx, ReasonRevoked, "the policy changed")
	}
	if port := f.dst.Port(); port != 80 && port != 443 || c.NamesPort(port) {
		return f.serveAnyPort(ctx)
	}
	_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.SniffTimeout)) // a dead connection shows at the read
	if err := f.in.fill(smallBuffer); err != nil {
		return f.noBytes(ctx, err)
	}
	switch first := f.in.pending()[0]; {
	case recordFirst <= first && first <= recordLast && f.dst.Port() == 443: // another record than a handshake is refused
		f.proto = "tls"
		return f.serveTLS(ctx)
	case isToken(first) && f.dst.Port() == 80:
		f.proto = "http"
		return f.serveHTTP(ctx)
	}
	return f.serveNameless(ctx, ReasonProtocolMismatch, "neither TLS nor HTTP as the port demands")
}

// settled reports whether an address alone was allowed by a rule that no name
// could overrule, as the kernel would have done.
func settled(v policy.Verdict) bool {
	if !v.Allow || v.Observed {
		return false
	}
	return v.Reason == policy.ReasonAllowAddr || v.Reason == policy.ReasonFloorOpen || v.Reason == policy.ReasonOperator
}

// noBytes handles a client that sent nothing: it left, or waits for the server
// to speak first.
func (f *flow) noBytes(ctx context.Context, err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return f.serveNameless(ctx, ReasonSniffTimeout, "nothing was sent")
	}
	f.record(flowlog.Closed, event{reason: f.killedOr(ReasonNoBytes), detail: "closed before it showed a name"})
	return false
}

// serveNameless judges a flow that shows no name by its address; why replaces
// the policy's reason for a denial, being what the user can mend.
func (f *flow) serveNameless(ctx context.Context, why policy.Reason, detail string) bool {
	f.p.sniffed(f)
	r, ok := f.judge("")
	if !ok {
		f.kill(ReasonRevoked)
		return false
	}
	if !r.Allow {
		if entry, ok := r.policy.PortRule(f.dst.Port()); ok && r.Reason == policy.ReasonNoName {
			detail += "; a rule " + entry + " lets any protocol pass"
		}
		f.deny(r.policy, denial{rule: r.Rule, reason: denialReason(r.Verdict, why), detail: detail})
		return false
	}
	return f.pass(ctx, r)
}

// denialReason is why, unless the verdict's own reason says more.
func denialReason(v policy.Verdict, why policy.Reason) policy.Reason {
	if v.Reason == policy.ReasonNoName || v.Reason == policy.ReasonDenyAddr {
		return why
	}
	return v.Reason
}

// serveTLS reads the ClientHello, judges its name and splices.
func (f *flow) serveTLS(ctx context.Context) bool {
	name, size, err := readHello(&f.in)
	if err != nil {
		return f.unreadable(ctx, err)
	}
	if name == "" {
		return f.serveNameless(ctx, ReasonNoSNI, "the ClientHello has no server_name")
	}
	f.p.sniffed(f)
	r, ok := f.judge(name)
	if !ok {
		f.kill(ReasonRevoked)
		return false
	}
	if !r.Allow {
		f.deny(r.policy, denial{rule: r.Rule, reason: r.Reason, name: name, whole: true})
		return false
	}
	return f.passFirst(ctx, r, size)
}

// unreadable denies a flow whose first bytes cannot be read. Only observe mode,
// which enforces nothing above the floor, passes it to where it was going.
func (f *flow) unreadable(ctx context.Context, err error) bool {
	f.p.sniffed(f)
	r, ok := f.judge("")
	if !ok {
		f.kill(ReasonRevoked)
		return false
	}
	d := denial{rule: proxyRule, reason: ReasonBadRequest}
	if bad, ok := errors.AsType[*sniffError](err); ok {
		d.reason, d.detail = bad.reason, bad.detail
		if d.reason == ReasonBudget && f.overcharged != "" {
			d.detail = f.overcharged
		}
	} else { // the client left
		f.record(flowlog.Closed, event{reason: f.killedOr(ReasonNoBytes), detail: "closed before it showed a name"})
		return false
	}
	if r.policy.Mode() != policy.ModeObserve || !r.Allow || d.reason == ReasonBudget {
		f.deny(r.policy, d)
		return false
	}
	r.Rule, r.Reason, r.Observed = d.rule, d.reason, true
	return f.pass(ctx, r)
}

// pass connects an allowed flow and hands it over to the copying goroutines.
func (f *flow) pass(ctx context.Context, r ruling) (handedOver bool) {
	return f.passFirst(ctx, r, len(f.in.pending()))
}

// passFirst is pass that sends only the first n bytes of what is pending; the rest is
// for the goroutines to look at.
func (f *flow) passFirst(ctx context.Context, r ruling, n int) (handedOver bool) {
	up, ok := f.connect(ctx, r)
	if !ok {
		return false
	}
	f.recordAllowed(r, "")
	if !f.send(up, f.in.pending()[:n]) {
		f.record(flowlog.Failed, event{policy: r.policy, name: r.name, rule: r.Rule, reason: f.killedOr(ReasonUpstream), detail: "the upstream took no bytes"})
		f.kill(ReasonUpstream)
		return false
	}
	f.in.consume(n)
	f.in.rest()
	if f.proto == "tls" && r.name != "" {
		f.spliceTLS(up)
	} else {
		f.splice(up)
	}
	return true
}

// send writes what was sniffed. An upstream that does not take it within the
// dial's time is as good as unreachable.
func (f *flow) send(up net.Conn, b []byte) bool {
	if len(b) == 0 {
		return true
	}
	_ = up.SetWriteDeadline(time.Now().Add(f.p.lim.DialTimeout))
	n, err := up.Write(b)
	f.bytesOut.Add(int64(n))
	_ = up.SetWriteDeadline(time.Time{})
	return err == nil
}

// splice copies both ways in two new goroutines, whose stacks are small, and
// lets the one that sniffed end.
func (f *flow) splice(up net.Conn) {
	_ = f.client.SetDeadline(time.Time{})
	_ = up.SetDeadline(time.Time{})
	f.pumps.Store(2)
	f.p.conns.Add(2)
	go f.pump(up, f.client, &f.bytesOut)
	go f.pump(f.client, up, &f.bytesIn)
}

// pump copies one direction and passes its end on: FIN as FIN, RST as RST.
func (f *flow) pump(dst, src net.Conn, count *atomic.Int64) {
	defer f.p.conns.Done()
	n, err := f.p.pipes.copy(dst, src)
	count.Add(n)
	f.pumped(dst, src, err)
}

// pumped ends a direction of which all is copied.
func (f *flow) pumped(dst, src net.Conn, err error) {
	if err != nil {
		reset(dst)
		reset(src)
	}
	if f.pumps.Add(-1) == 0 { // the last one: closing sends its FIN as well
		f.finish()
	} else if err == nil {
		closeWrite(dst)
	}
}

func closeWrite(c net.Conn) {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		_ = w.CloseWrite() // the peer may be gone already
		return
	}
	c.Close()
}

// finish ends the flow's book-keeping and closes what is open.
func (f *flow) finish() {
	f.p.leave(f)
	f.in.release()
	f.client.Close()
	f.mu.Lock()
	up, begun, r, why, addr := f.upstream, f.begun, f.ruling, f.killed, f.upAddr
	f.upstream = nil
	f.mu.Unlock()
	if up != nil {
		up.Close()
	}
	if begun {
		e := event{policy: r.policy, name: r.name, rule: r.Rule, reason: r.Reason, upstream: addr}
		if why != "" {
			e.reason = why
		}
		f.record(flowlog.Closed, e)
	}
}

func (f *flow) killedOr(why policy.Reason) policy.Reason {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.killed != "" {
		return f.killed
	}
	return why
}

// sniffFailed turns an error of reading into what it means for the verdict;
// atEOF is the meaning of an end of the stream here.
func sniffFailed(err, atEOF error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &sniffError{ReasonSniffTimeout, "no complete name before the deadline"}
	case errors.Is(err, errTooBig):
		return &sniffError{ReasonSniffTooBig, "no complete name within the size cap"}
	case errors.Is(err, errCharge):
		return &sniffError{ReasonBudget, "memory for incomplete names"}
	case errors.Is(err, io.EOF):
		return atEOF
	}
	return err
}
