package bench

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/cordonhq/cordon/internal/egress"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/resolver"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Gateway is cordon's way from a sandbox to the network, in a process of its own:
// kernel rules, proxy, resolver and flow log, wired as in the server. The limits
// that keep one sandbox from the others' share are lifted, as one client here
// loads for many.
type Gateway struct {
	ctx     context.Context
	network *network.Network
	egress  *egress.Proxy
	lease   sandbox.Lease
	policy  *policy.Compiled
	applied uint64
}

// GatewayConfig says what to set up.
type GatewayConfig struct {
	RunDir string
	Slots  int          // sandboxes, one of which is loaded
	Policy policy.Input // of that one
}

const proxyPort, dnsPort = 15001, 15053

// Setup starts the gateway and returns the namespace of the sandbox to load.
func (g *Gateway) Setup(c GatewayConfig, netns *string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	flows, err := flowlog.New(flowlog.Config{})
	if err != nil {
		return err
	}
	g.network, err = network.New(network.Config{
		Name: "bench", RunDir: c.RunDir, IPv6: network.IPv6Off, ProxyPort: proxyPort, DNSPort: dnsPort,
		PoolSize: 1, MaxFlows: 1 << 17, Flows: flows, Log: log,
	})
	if err != nil {
		return err
	}
	if err := g.makeProxy(flows, log); err != nil {
		return err
	}
	go g.report(func() error { return g.network.Run(g.ctx) })
	if err := g.network.Reconcile(g.ctx, nil); err != nil {
		return err
	}
	for i := range max(c.Slots, 1) {
		if err := g.sandbox(c, i == 0); err != nil {
			return fmt.Errorf("sandbox %d: %w", i, err)
		}
	}
	*netns = g.lease.NetNS
	return nil
}

// report says why a part ended before its time.
func (g *Gateway) report(run func() error) {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// sandbox takes a slot: the one to load, or one of the many beside it.
func (g *Gateway) sandbox(c GatewayConfig, loaded bool) error {
	lease, err := g.network.Acquire(g.ctx, sandboxid.New())
	if err != nil {
		return err
	}
	if loaded {
		g.lease = lease
		return g.apply(c.Policy)
	}
	p, err := policy.Compile(policy.Input{DenyOut: []string{refusedAddr.Addr().String()}}, &policy.Operator{}, 1)
	if err != nil {
		return err
	}
	return g.network.Apply(g.ctx, lease, p)
}

// apply puts rules in force as PUT /sandboxes/{id}/network does.
func (g *Gateway) apply(in policy.Input) error {
	g.applied++
	p, err := policy.Compile(in, &policy.Operator{}, g.applied)
	if err != nil {
		return err
	}
	g.policy = p
	if err := g.network.Apply(g.ctx, g.lease, p); err != nil {
		return err
	}
	g.egress.Revoke(string(g.lease.Sandbox))
	return nil
}

// Applied is when a policy update began and when it was answered.
type Applied struct{ Began, Ended time.Time }

// Apply replaces the rules of the sandbox that is loaded.
func (g *Gateway) Apply(in policy.Input, out *Applied) error {
	out.Began = time.Now()
	err := g.apply(in)
	out.Ended = time.Now()
	return err
}

func (g *Gateway) makeProxy(flows flowlog.Recorder, log *slog.Logger) error {
	names, err := resolver.New(resolver.Config{
		Owner: func(a netip.Addr) (string, *policy.Compiled, bool) {
			id, p, ok := g.network.Owner(a)
			return string(id), p, ok
		},
		Policy:    func(id string) (*policy.Compiled, bool) { return g.policy, id == string(g.lease.Sandbox) },
		Upstreams: []netip.AddrPort{dnsAddr}, Flows: flows, Log: log,
	})
	if err != nil {
		return err
	}
	const many = 1 << 20
	g.egress, err = egress.New(egress.Config{
		Owner: func(a netip.Addr) (egress.Owner, bool) {
			id, p, ok := g.network.Owner(a)
			return egress.Owner{Sandbox: string(id), Policy: p}, ok
		},
		Resolve: names.Resolve, Flows: flows, Log: log,
		Limits: egress.Limits{Pending: many, Conns: many, NewPerSecond: many},
	})
	if err != nil {
		return err
	}
	l, err := egress.ListenTransparent(g.ctx, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), proxyPort))
	if err != nil {
		return err
	}
	go g.report(func() error { return g.egress.Run(g.ctx, l) })
	return nil
}
