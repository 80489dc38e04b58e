package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/florianl/go-nflog/v2"
	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// The reasons this package adds to those of a policy.
const (
	ReasonSpoofed  policy.Reason = "spoofed-source" // the packet did not carry the sandbox's own addresses
	ReasonNoSocket policy.Reason = "no-listener"    // the proxy or the resolver does not run
	ReasonPinned   policy.Reason = "pinned"         // a host:port rule, by the address the resolver answered
	ReasonTooMany  policy.Reason = "too-many-flows" // Config.MaxFlows
	ReasonReplaced policy.Reason = "replaced"       // decided by a policy that is no longer in force
)

// Multicast groups of the connection tracker (linux/netfilter/nfnetlink.h).
const groupsNewAndDestroy = 1<<(unix.NFNLGRP_CONNTRACK_NEW-1) | 1<<(unix.NFNLGRP_CONNTRACK_DESTROY-1)

// eventBuffer is what the kernel keeps for us while we are slow. When it is full
// events are lost, and counted; packets are not held up.
const eventBuffer = 8 << 20

// followFlows records the beginning and end of flows that the kernel forwards.
func (n *Network) followFlows(ctx context.Context) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: groupsNewAndDestroy})
	if err != nil {
		return fmt.Errorf("follow flows: open netlink: %w", err)
	}
	defer c.Close()
	if err := c.SetReadBuffer(eventBuffer); err != nil {
		return fmt.Errorf("follow flows: enlarge the buffer: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		msgs, err := c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			n.stats.lostFlows.Add(1)
			continue
		case err != nil:
			return fmt.Errorf("follow flows: %w", err)
		}
		for _, m := range msgs {
			var e conntrack.Event
			if err := e.Unmarshal(m); err != nil || e.Flow == nil {
				continue // an event this version of the library does not know
			}
			n.recordFlow(&e)
		}
	}
}

// recordFlow records one event of the tracker, if it is about a slot's own flow.
func (n *Network) recordFlow(e *conntrack.Event) {
	f := e.Flow
	i, proxied, ok := slotOfMark(f.Mark)
	if !ok || proxied || e.Type != conntrack.EventNew && e.Type != conntrack.EventDestroy {
		return
	}
	src := f.TupleOrig.IP.SourceAddress
	if at, ours := n.plan.slotOf(src); !ours || at != i {
		return
	}
	o := n.owners[i].Load()
	if o == nil || o.policy == nil {
		return
	}
	flow := policy.Flow{Proto: policy.Proto(f.TupleOrig.Proto.Protocol), Dst: destination(*f)}
	out := flowlog.Event{
		Time: time.Now(), Sandbox: string(o.id), Generation: o.policy.Generation(), Layer: flowlog.LayerKernel,
		Proto: protoName(flow.Proto), Src: netip.AddrPortFrom(src, f.TupleOrig.Proto.SourcePort), Dst: flow.Dst, Upstream: flow.Dst,
	}
	v := n.explain(i, o.policy, flow)
	out.Rule, out.Reason, out.Name = v.rule, v.reason, v.name
	switch {
	case e.Type == conntrack.EventDestroy:
		out.Verdict = flowlog.Closed
		out.BytesOut, out.BytesIn = int64(f.CountersOrig.Bytes), int64(f.CountersReply.Bytes)
		if t := f.Timestamp; !t.Start.IsZero() && t.Stop.After(t.Start) {
			out.Duration = t.Stop.Sub(t.Start)
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
	name     string
	observed bool
}

// explain finds the rule by which a forwarded flow was accepted.
func (n *Network) explain(slot int, p *policy.Compiled, f policy.Flow) explanation {
	v := p.Decide(f)
	if v.Allow {
		return explanation{rule: v.Rule, reason: v.Reason, observed: v.Observed}
	}
	n.mu.Lock()
	s := n.slots[slot]
	n.mu.Unlock()
	if s == nil {
		return explanation{reason: ReasonReplaced}
	}
	s.mu.Lock()
	names := s.pins.names(f.Dst)
	s.mu.Unlock()
	for _, f.Name = range names {
		if v := p.Decide(f); v.Allow {
			return explanation{rule: v.Rule, reason: ReasonPinned, name: f.Name, observed: v.Observed}
		}
	}
	return explanation{reason: ReasonReplaced}
}

// followLogs records refused packets.
func (n *Network) followLogs(ctx context.Context) error {
	nf, err := nflog.Open(&nflog.Config{
		Group: n.cfg.NFLogGroup, Copymode: nflog.CopyPacket, Bufsize: logSnaplen,
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
			n.stats.lostLogs.Add(1)
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
// from, because its source address may be a lie.
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
	o := n.owners[s.num].Load()
	if o == nil || o.gone {
		return // in the pool or released: nobody's traffic
	}
	n.stats.logged.Add(1)
	out := flowlog.Event{
		Time: time.Now(), Sandbox: string(o.id), Layer: flowlog.LayerKernel, Verdict: flowlog.Denied,
		Proto: protoName(p.proto), Src: p.src, Dst: p.dst,
	}
	if o.policy != nil {
		out.Generation = o.policy.Generation()
	}
	judgeRefusal(&out, class(*a.Prefix), o.policy, p)
	n.cfg.Flows.Record(out)
}

// judgeRefusal names the rule behind a refusal, by asking the policy again.
func judgeRefusal(out *flowlog.Event, c class, p *policy.Compiled, pkt packet) {
	switch c {
	case classSpoof:
		out.Rule, out.Reason = policy.Rule{ID: "source", Text: "packets carry the sandbox's own addresses"}, ReasonSpoofed
		return
	case classProxy:
		out.Rule, out.Reason = policy.Rule{ID: "listener", Text: "the proxy or the resolver must run"}, ReasonNoSocket
		return
	case classLimit:
		out.Rule, out.Reason = policy.Rule{ID: "limit", Text: "flows of one sandbox at a time"}, ReasonTooMany
		return
	case classProtocol:
		out.Rule, out.Reason = policy.Rule{ID: "protocol", Text: "only TCP, UDP and ICMP are forwarded"}, policy.ReasonProtocol
		return
	case classFloor:
		out.Rule, out.Reason = policy.Rule{ID: "floor", Text: "an address of the host"}, policy.ReasonFloor
	default:
		out.Rule, out.Reason = policy.Rule{}, ReasonReplaced
	}
	if p == nil {
		return
	}
	v := p.Decide(policy.Flow{Proto: pkt.proto, Dst: pkt.dst})
	if !v.Allow && (c != classFloor || v.Reason == policy.ReasonFloor) {
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
