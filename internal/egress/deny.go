package egress

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// farewell is how long a denied client has to read why, and how much of what it
// still sends is read away: closing with unread data would reset the connection
// and take the answer along.
const (
	farewell      = time.Second
	farewellBytes = 256 << 10
)

// alertAccessDenied is a fatal TLS alert (RFC 8446 section 6.2, access_denied).
var alertAccessDenied = [...]byte{21, 3, 3, 0, 2, 2, 49}

// denial is why a flow is refused.
type denial struct {
	rule   policy.Rule
	reason policy.Reason
	name   string // as shown, if one was
	detail string
	whole  bool  // all was read that the client says before it is answered
	call   *call // the request of HTTP/2 that was refused, if it was one
	mute   bool  // no answer can be put into what the server says
}

// deny records the denial and answers the client as its protocol and policy
// demand: an alert on TLS, a 403 on HTTP unless the policy wants a reset, else a reset.
func (f *flow) deny(c *policy.Compiled, d denial) {
	f.record(flowlog.Denied, event{policy: c, name: d.name, rule: d.rule, reason: d.reason, detail: d.detail})
	f.p.sniffed(f)
	f.in.release()
	switch {
	case d.mute:
	case d.reason == ReasonBudget: // answering is work, and work is what is short
	case f.proto == "tls":
		f.answer(alertAccessDenied[:], d.whole)
		return
	case f.proto == "http" && c.OnDeny() == policy.OnDenyExplain:
		f.answer(f.explanation(d), d.whole)
		return
	}
	f.drain() // answers to earlier requests of the connection
	reset(f.client)
}

// answer sends b as the last bytes of the connection. Where nothing more can come
// that closing would be a reset for, it does not wait for the client's end.
func (f *flow) answer(b []byte, whole bool) {
	_ = f.client.SetDeadline(time.Now().Add(farewell))
	n, err := writeLast(f.client, b)
	f.bytesIn.Add(int64(n))
	if err != nil {
		reset(f.client)
		return
	}
	if whole && silent(f.client) {
		f.client.Close()
		return
	}
	lingerClose(f.client)
}

// lingerClose sends FIN and reads away what still comes.
func lingerClose(c *net.TCPConn) {
	_ = c.SetDeadline(time.Now().Add(farewell))
	if c.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, c, farewellBytes)
	}
	c.Close()
}

// explanation is the 403 of policy.OnDenyExplain. Clients show its reason phrase or
// its body or neither; npm and yarn show "error" of a JSON body. The text begins as a
// comment, for a shell that a download is piped to.
func (f *flow) explanation(d denial) []byte {
	if f.http2 {
		return f.explainHTTP2(d)
	}
	kind, body := f.whyDenied(d)
	out := fmt.Appendf(nil, "HTTP/1.1 403 Denied by egress policy\r\nContent-Type: %s\r\nCache-Control: no-store\r\nConnection: close\r\nX-Cordon-Deny: %s\r\nContent-Length: %d\r\n\r\n",
		kind, printable(ruleOf(d)), len(body))
	if !f.headRequest {
		out = append(out, body...)
	}
	return out
}

func ruleOf(d denial) string { return strings.TrimSpace(d.rule.ID + " " + d.rule.Text) }

// whyDenied is the text of a 403 and its media type.
func (f *flow) whyDenied(d denial) (kind string, body []byte) {
	rule := ruleOf(d)
	host := cmp.Or(d.name, f.dst.String())
	const denied = "denied by egress policy: "
	if f.wantsJSON {
		kind = "application/json"
		body, _ = json.Marshal(struct { // strings always marshal
			Error   string        `json:"error"`
			Host    string        `json:"host"`
			Rule    string        `json:"rule"`
			Reason  policy.Reason `json:"reason"`
			Sandbox string        `json:"sandbox"`
		}{denied + host, host, rule, d.reason, f.sandbox})
	} else {
		why := string(d.reason)
		if d.rule == proxyRule && d.detail != "" {
			why += ", " + d.detail
		}
		kind = "text/plain; charset=utf-8"
		body = fmt.Appendf(nil, "# %s%s (%s; rule %s; sandbox %s)\n", denied, printable(host), printable(why), printable(rule), f.sandbox)
	}
	return kind, body
}

// printable makes s fit for a header: a rule may be written in any script.
func printable(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || r == '\\' }) {
		return s // nearly always
	}
	quoted := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}

// event is what record needs beside the flow.
type event struct {
	policy   *policy.Compiled
	name     string
	rule     policy.Rule
	reason   policy.Reason
	detail   string
	upstream netip.AddrPort
}

// record writes one entry to the flow log.
func (f *flow) record(v flowlog.Verdict, e event) {
	out := flowlog.Event{
		Time: time.Now(), Sandbox: f.sandbox, Layer: flowlog.LayerProxy, Verdict: v, Rule: e.rule, Reason: e.reason, Proto: f.proto,
		Src: f.src, Dst: f.dst, Upstream: e.upstream, Name: e.name, Detail: e.detail,
	}
	if e.policy != nil {
		out.Generation = e.policy.Generation()
	}
	if v == flowlog.Closed || v == flowlog.Failed {
		out.BytesOut, out.BytesIn, out.Duration = f.bytesOut.Load(), f.bytesIn.Load(), time.Since(f.started)
	}
	f.p.cfg.Flows.Record(out)
}

// recordAllowed records a ruling that lets the flow pass.
func (f *flow) recordAllowed(r ruling, detail string) {
	v := flowlog.Allowed
	if r.Observed {
		v = flowlog.Observed
	}
	f.mu.Lock()
	up := f.upAddr
	f.mu.Unlock()
	f.record(v, event{policy: r.policy, name: r.name, rule: r.Rule, reason: r.Reason, detail: detail, upstream: up})
}
