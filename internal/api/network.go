package api

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// UpdateNetwork replaces a sandbox's egress rules.
func (s *server) UpdateNetwork(ctx context.Context, r control.UpdateNetworkRequestObject) (control.UpdateNetworkResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	egress, err := updateOf(r.Body)
	if err != nil {
		return nil, err
	}
	sources, err := sandbox.ParseSources("network.allowIn", r.Body.AllowIn)
	if err != nil {
		return nil, err
	}
	in := sandbox.NetworkUpdate{Egress: egress, AllowIn: sources}
	return control.UpdateNetwork204Response{}, s.Sandboxes.SetNetwork(ctx, owner(ctx), id, in)
}

// ListNetworkEvents returns or streams the verdicts about a sandbox.
func (s *server) ListNetworkEvents(ctx context.Context, r control.ListNetworkEventsRequestObject) (control.ListNetworkEventsResponseObject, error) {
	rec, err := s.get(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	filter, err := flowFilter(rec.ID, &r.Params)
	if err != nil {
		return nil, err
	}
	if r.Params.Follow {
		if err := s.streams.open(ctx, callerOf(ctx).ID); err != nil {
			return nil, err
		}
		return eventStream{
			ctx:    ctx,
			events: s.Flows.Follow(ctx, filter),
			gone:   func() bool { return s.ended(ctx, rec.ID) },
		}, nil
	}
	events := s.Flows.Events(filter)
	list := make(control.ListNetworkEvents200JSONResponse, len(events))
	for i := range events {
		list[i] = networkEventOf(&events[i])
	}
	return list, nil
}

// ended reports whether a stream is over: its sandbox has ended, or the caller's
// key was revoked.
func (s *server) ended(ctx context.Context, id sandbox.ID) bool {
	if _, err := s.Sandboxes.Get(ctx, owner(ctx), id); errs.Is(err, errs.NotFound) {
		return true
	}
	keys, err := s.Keys.Keys(ctx)
	return err == nil && !slices.ContainsFunc(keys, func(k auth.Key) bool { return k.ID == callerOf(ctx).ID })
}

// maxStreams is how many event streams one key may follow at a time: every verdict
// about any sandbox is offered to each of them.
const maxStreams = 64

// streams counts the streams of each key. The zero value is ready.
type streams struct {
	mu    sync.Mutex // guards byKey
	byKey map[string]int
}

// open counts a stream until ctx, its request's, ends.
func (s *streams) open(ctx context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byKey[key] >= maxStreams {
		return errs.New(errs.Exhausted, "this API key follows %d event streams already: end one first", maxStreams)
	}
	if s.byKey == nil {
		s.byKey = map[string]int{}
	}
	s.byKey[key]++
	context.AfterFunc(ctx, func() { s.closed(key) })
	return nil
}

func (s *streams) closed(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byKey[key]--; s.byKey[key] == 0 {
		delete(s.byKey, key)
	}
}

func flowFilter(id sandbox.ID, p *control.ListNetworkEventsParams) (flowlog.Filter, error) {
	none := flowlog.Filter{}
	if p.Limit < 0 {
		return none, errs.New(errs.Invalid, "parameter limit is %d, it must be at least 1", p.Limit)
	}
	if p.Verdict != "" && !p.Verdict.Valid() {
		return none, errs.New(errs.Invalid, "parameter verdict is %q: use allow, deny, observe, close or fail", p.Verdict)
	}
	since := max(p.Since, p.LastEventID)
	if p.Since < 0 || p.LastEventID < 0 {
		return none, errs.New(errs.Invalid, "parameter since is %d, it must not be negative", min(p.Since, p.LastEventID))
	}
	return flowlog.Filter{Sandbox: string(id), Verdict: flowlog.Verdict(p.Verdict), Since: uint64(since), Limit: p.Limit}, nil
}

// unnamed is the address a name is judged at when none is given: one that is
// routed nowhere (RFC 5737) and that only rules about everything cover.
var unnamed = netip.AddrFrom4([4]byte{192, 0, 2, 1})

// ExplainNetwork decides a flow without one.
func (s *server) ExplainNetwork(ctx context.Context, r control.ExplainNetworkRequestObject) (control.ExplainNetworkResponseObject, error) {
	rules, err := s.rulesOf(ctx, r.Body)
	if err != nil {
		return nil, err
	}
	flow, err := flowOf(r.Body)
	if err != nil {
		return nil, err
	}
	v := rules.Decide(flow)
	var other *policy.Verdict
	if flow.Proto == policy.TCP && flow.Name != "" {
		port := flow.Dst.Port()
		wire := policy.WireTLS
		if port == 80 {
			wire = policy.WireHTTP
		}
		v = rules.Judge(flow.Dst, flow.Name, wire, nil).Verdict
		nameless := rules.Judge(flow.Dst, "", policy.WireOther, []string{flow.Name}).Verdict
		other = &nameless
	}
	out := control.ExplainNetwork200JSONResponse{
		Verdict:    control.ExplanationVerdict(word(v)),
		Rule:       ruleOf(v.Rule),
		Reason:     string(v.Reason),
		Generation: int64(rules.Generation()),
	}
	if flow.Name != "" {
		if other != nil {
			out.OtherProtocols = control.OtherProtocols{Verdict: control.OtherProtocolsVerdict(word(*other)), Rule: ruleOf(other.Rule), Reason: string(other.Reason)}
			if entry, ok := rules.PortRule(flow.Dst.Port()); ok && !other.Allow {
				out.OtherProtocols.Allowing = entry
			}
		}
		q := rules.DecideQuery(flow.Name)
		out.Dns = control.DNSExplanation{
			Mode:    control.DNSExplanationMode(rules.DNS()),
			Verdict: control.DNSExplanationVerdict(word(q)),
			Rule:    ruleOf(q.Rule),
			Reason:  string(q.Reason),
		}
	}
	return out, nil
}

// ListPresets returns the named lists of hosts that rules may use.
func (s *server) ListPresets(context.Context, control.ListPresetsRequestObject) (control.ListPresetsResponseObject, error) {
	out := control.ListPresets200JSONResponse{}
	for _, p := range policy.Presets() {
		preset := control.Preset{Name: p.Name, Version: p.Version, Aliases: p.Aliases}
		for _, h := range p.Hosts {
			host := control.PresetHost{Host: h.Host, Remark: h.Remark}
			for _, port := range h.Ports {
				host.Ports = append(host.Ports, int(port))
			}
			preset.Hosts = append(preset.Hosts, host)
		}
		out = append(out, preset)
	}
	return out, nil
}

func word(v policy.Verdict) flowlog.Verdict {
	switch {
	case v.Observed:
		return flowlog.Observed
	case v.Allow:
		return flowlog.Allowed
	}
	return flowlog.Denied
}

// rulesOf returns the rules in force in a sandbox, or compiles those given.
func (s *server) rulesOf(ctx context.Context, b *control.ExplainRequest) (*policy.Compiled, error) {
	if b.SandboxID == "" {
		in, err := updateOf(&b.Network)
		if err != nil {
			return nil, err
		}
		return policy.Compile(in, s.Operator, 0)
	}
	if given(&b.Network) {
		return nil, errs.New(errs.Invalid, "give sandboxID or network, not both")
	}
	rec, err := s.get(ctx, b.SandboxID)
	if err != nil {
		return nil, err
	}
	rules, ok := s.Sandboxes.Policy(rec.ID)
	if !ok {
		return nil, errs.New(errs.NotFound, "Sandbox %q has no rules in force", string(rec.ID))
	}
	return rules, nil
}

// flowOf reads "name", "name:port", "address", "address:port" or "[v6]:port".
func flowOf(b *control.ExplainRequest) (policy.Flow, error) {
	none := policy.Flow{}
	proto, ok := map[control.ExplainRequestProtocol]policy.Proto{
		"": policy.TCP, control.Tcp: policy.TCP, control.Udp: policy.UDP, control.Icmp: policy.ICMP,
	}[b.Protocol]
	if !ok {
		return none, errs.New(errs.Invalid, "protocol is %q: use tcp, udp or icmp", b.Protocol)
	}
	host, port := b.Destination, uint64(443)
	if a, err := netip.ParseAddr(host); err == nil {
		host = a.String()
	} else if h, p, found := cutPort(host); found {
		if port, err = strconv.ParseUint(p, 10, 16); err != nil || port == 0 {
			return none, errs.New(errs.Invalid, "destination %q has no valid port: use 1 to 65535", b.Destination)
		}
		host = h
	}
	flow := policy.Flow{Proto: proto}
	if a, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		if proto == policy.ICMP && a.Is6() {
			flow.Proto = policy.ICMPv6
		}
		flow.Dst = netip.AddrPortFrom(a, uint16(port))
		return flow, nil
	}
	if flow.Name, ok = policy.CanonicalHost(host); !ok {
		return none, errs.New(errs.Invalid, "destination %q is neither a domain nor an IP address", b.Destination)
	}
	at := unnamed
	if b.Address != "" {
		var err error
		if at, err = netip.ParseAddr(b.Address); err != nil {
			return none, errs.New(errs.Invalid, "address %q is not an IP address", b.Address)
		}
	}
	flow.Dst = netip.AddrPortFrom(at, uint16(port))
	return flow, nil
}

func cutPort(s string) (host, port string, found bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.HasSuffix(s, "]") {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}
