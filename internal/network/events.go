package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
)

// The reasons this package adds to those of a policy.
const (
	ReasonSpoofed  policy.Reason = "spoofed-source" // the packet did not carry the sandbox's own addresses
	ReasonNoSocket policy.Reason = "no-listener"    // the proxy or the resolver does not run
	ReasonTooMany  policy.Reason = "too-many-flows" // Config.MaxFlows
	ReasonReplaced policy.Reason = "replaced"       // decided by a policy that is no longer in force
)

// eventBuffer is what the kernel keeps for us while we are slow. When it is full
// events are lost, and counted; packets are not held up.
var eventBuffer = 8 << 20

// lost tells of one overrun. The kernel does not say how many events it dropped.
func (m *machine) lost() {
	if m.cfg.Lost != nil {
		m.cfg.Lost(1)
	}
}

// followFlows records the beginning and end of flows that the kernel forwards: those
// that carry a slot's mark and are not the proxy's.
func (n *Network) followFlows(ctx context.Context) error {
	mark, mask := nft.Forwarded()
	return conntrack.Watch(ctx, conntrack.Mark{Value: mark, Mask: mask}, eventBuffer, n.recordFlow, n.lost)
}

// recordFlow records one event of the tracker, if it is about a slot's own flow.
func (n *Network) recordFlow(f conntrack.Event) {
	i, proxied, ok := nft.SlotOfMark(f.Mark)
	if !ok || proxied {
		return
	}
	if at, ours := n.plan.SlotOf(f.Src.Addr()); !ours || at != i {
		return
	}
	o := n.owners[i].Load()
	if o == nil || o.policy == nil {
		return
	}
	flow := policy.Flow{Proto: f.Proto, Dst: f.Dst}
	out := flowlog.Event{
		Time: time.Now(), Sandbox: string(o.id), Generation: o.policy.Generation(), Layer: flowlog.LayerKernel,
		Proto: protoName(flow.Proto), Src: f.Src, Dst: flow.Dst, Upstream: flow.Dst,
	}
	v := explain(o.policy, flow)
	out.Rule, out.Reason = v.rule, v.reason
	switch {
	case f.Ended:
		out.Verdict = flowlog.Closed
		out.BytesOut, out.BytesIn = int64(f.BytesOut), int64(f.BytesIn)
		if f.Start != 0 && f.Stop > f.Start {
			out.Duration = time.Duration(f.Stop - f.Start)
		}
	case v.observed:
		out.Verdict = flowlog.Observed
	default:
		out.Verdict = flowlog.Allowed
	}
	n.cfg.Flows.Record(out)
}

// explanation is why the kernel let a flow pass.
type explanation struct {
	rule     policy.Rule
	reason   policy.Reason
	observed bool
}

// explain finds the rule by which a forwarded flow was accepted.
func explain(p *policy.Compiled, f policy.Flow) explanation {
	v := p.Decide(f)
	if v.Allow {
		return explanation{rule: v.Rule, reason: v.Reason, observed: v.Observed}
	}
	return explanation{reason: ReasonReplaced}
}

// followLogs records refused packets.
func (n *Network) followLogs(ctx context.Context) error {
	nf, err := nflog.Open(&nflog.Config{
		Group: n.cfg.NFLogGroup, Copymode: nflog.CopyPacket, Bufsize: nft.Snaplen,
		QThresh: 16, Timeout: 1, // in 1/100 s: a refusal is in the log at once
	})
	if err != nil {
		return fmt.Errorf("follow refusals: open netlink: %w", err)
	}
	defer nf.Close()
	if err := nf.Con.SetReadBuffer(eventBuffer); err != nil {
		return fmt.Errorf("follow refusals: enlarge the buffer: %w", err)
	}
	failed := make(chan error, 1)
	err = nf.RegisterWithErrorFunc(ctx, func(a nflog.Attribute) int {
		n.recordRefusal(a)
		return 0
	}, func(err error) int {
		if errors.Is(err, unix.ENOBUFS) {
			n.lost()
			return 0
		}
		failed <- err
		return 1
	})
	if err != nil {
		return fmt.Errorf("follow refusals of log group %d: %w", n.cfg.NFLogGroup, err)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("follow refusals: %w", err)
	}
}

// recordRefusal records one refused packet. The slot is known by the link it came
// from, because its source address may be forged.
func (n *Network) recordRefusal(a nflog.Attribute) {
	if a.InDev == nil || a.Payload == nil || a.Prefix == nil {
		return
	}
	n.mu.Lock()
	s := n.byLink[*a.InDev]
	n.mu.Unlock()
	p, ok := parsePacket(*a.Payload)
	if s == nil || !ok {
		return
	}
	o := n.owners[s.Num].Load()
	if o == nil || o.gone {
		return // in the pool or released: the traffic of no sandbox
	}
	out := flowlog.Event{
		Time: time.Now(), Sandbox: string(o.id), Layer: flowlog.LayerKernel, Verdict: flowlog.Denied,
		Proto: protoName(p.proto), Src: p.src, Dst: p.dst,
	}
	if o.policy != nil {
		out.Generation = o.policy.Generation()
	}
	if !n.overBudget(&out, nft.Class(*a.Prefix)) && !n.overShare(&out, nft.Class(*a.Prefix)) && !n.overQueries(&out, nft.Class(*a.Prefix)) {
		judgeRefusal(&out, nft.Class(*a.Prefix), o.policy, p)
		s.explainPin(&out, o.policy, p.proto)
	}
	n.cfg.Flows.Record(out)
}

// judgeRefusal names the rule behind a refusal, by asking the policy again.
func judgeRefusal(out *flowlog.Event, c nft.Class, p *policy.Compiled, pkt packet) {
	switch c {
	case nft.ClassSpoof:
		out.Rule, out.Reason = policy.Rule{ID: "source", Text: "packets carry the sandbox's own addresses"}, ReasonSpoofed
		return
	case nft.ClassProxy:
		out.Rule, out.Reason = policy.Rule{ID: "listener", Text: "the proxy or the resolver must run"}, ReasonNoSocket
		return
	case nft.ClassLimit:
		out.Rule, out.Reason = policy.Rule{ID: "limit", Text: "flows of one sandbox at a time"}, ReasonTooMany
		return
	case nft.ClassProtocol:
		out.Rule, out.Reason = policy.Rule{ID: "protocol", Text: "only TCP, UDP and ICMP are forwarded"}, policy.ReasonProtocol
		return
	case nft.ClassBlocked:
		out.Rule, out.Reason = policy.Rule{ID: "floor", Text: "an address of the host"}, policy.ReasonFloor
	default:
		out.Rule, out.Reason = policy.Rule{}, ReasonReplaced
	}
	if p == nil {
		return
	}
	v := p.Decide(policy.Flow{Proto: pkt.proto, Dst: pkt.dst})
	if !v.Allow && (c != nft.ClassBlocked || v.Reason == policy.ReasonFloor) {
		out.Rule, out.Reason = v.Rule, v.Reason
	}
}

func protoName(p policy.Proto) string {
	switch p {
	case policy.TCP:
		return "tcp"
	case policy.UDP:
		return "udp"
	case policy.ICMP, policy.ICMPv6:
		return "icmp"
	}
	return fmt.Sprintf("ip-%d", uint8(p))
}
