package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/proving/lab"
)

// egressTables measures the kernel path, then the proxy path, each with wires
// and processes of its own.
func egressTables(ctx context.Context, r *run) error {
	if len(r.Versus) > 0 {
		return egressVersus(ctx, r)
	}
	for _, t := range []func(context.Context, *run, *world) error{kernelTable, proxyTable} {
		w, err := r.newWorld(ctx)
		if err == nil {
			err = t(ctx, r, w)
		}
		if err := errors.Join(err, w.close()); err != nil {
			return err
		}
	}
	return nil
}

// world is a server and the ways to it.
type world struct {
	r       *run
	server  *lab.Netns
	closers []func() error // in the order of acquisition
}

func (r *run) newWorld(ctx context.Context) (w *world, err error) {
	w = &world{r: r}
	if w.server, err = newServerNetns(); err != nil {
		return w, err
	}
	w.closers = append(w.closers, w.server.Close)
	p, err := w.start(w.server, roleServer)
	if err != nil {
		return w, err
	}
	return w, p.call(ctx, "Serve", ServerConfig{Raw: rawAddr, TLS: tlsAddr, Web: webAddr, DNS: dnsAddr, Cert: r.cert.file}, nil)
}

func (w *world) close() (err error) {
	for _, c := range slices.Backward(w.closers) {
		err = errors.Join(err, c())
	}
	return err
}

// start starts a process that ends with the world.
func (w *world) start(ns *lab.Netns, role string) (*process, error) {
	return w.startOf(w.r.Self, ns, role)
}

func (w *world) startOf(self []string, ns *lab.Netns, role string) (*process, error) {
	p, err := startProcess(ns, self, role)
	if err == nil {
		w.keep(p)
	}
	return p, err
}

func (w *world) keep(p *process) {
	w.closers = append(w.closers, func() error { p.stop(); return nil })
}

// router makes a router that ends with the world.
func (w *world) router() (*lab.Netns, error) {
	ns, err := w.r.newRouter(w.server)
	if ns != nil {
		w.closers = append(w.closers, ns.Close)
	}
	return ns, err
}

// bare is a way through forwarding, connection tracking and masquerading only.
func (w *world) bare(name string) (*way, *lab.Netns, error) {
	router, err := w.router()
	if err != nil {
		return nil, nil, err
	}
	if err := masquerade(router); err != nil {
		return nil, nil, err
	}
	client, err := w.r.newClient(router)
	if err != nil {
		return nil, nil, err
	}
	w.closers = append(w.closers, client.Close)
	p, err := w.start(client, roleClient)
	return &way{name: name, client: p}, router, err
}

// gateway is a way through cordon, as the build has it whose processes self starts.
func (w *world) gateway(ctx context.Context, name string, self []string, c GatewayConfig) (*way, error) {
	router, err := w.router()
	if err != nil {
		return nil, err
	}
	g, err := w.startOf(self, router, roleGateway)
	if err != nil {
		return nil, err
	}
	if c.RunDir, err = w.r.folder("gateway"); err != nil {
		return nil, err
	}
	var path string
	if err := g.call(ctx, "Setup", c, &path); err != nil {
		return nil, err
	}
	slot, err := lab.OpenNetns(path)
	if err != nil {
		return nil, err
	}
	w.closers = append(w.closers, slot.Close)
	if err := prepareClient(slot); err != nil {
		return nil, err
	}
	p, err := w.start(slot, roleClient)
	return &way{name: name, client: p, program: g}, err
}

// filter is a way through a peer that judges names, and why there is none.
func (w *world) filter(ctx context.Context, p peer, transparent bool) (*way, string, error) {
	if why := p.missing(); why != "" {
		return nil, why, nil
	}
	way, router, err := w.bare(p.name)
	if err != nil {
		return nil, "", err
	}
	if err := divert(router, transparent); err != nil {
		return nil, "", err
	}
	proc, err := w.r.startPeer(ctx, router, p, peerFacts{Names: names, Web: webName, TLSPort: peerTLS, WebPort: peerHTTP})
	if err != nil {
		return nil, err.Error(), ctx.Err() // a peer that does not start is a remark
	}
	w.keep(proc)
	way.program = proc
	return way, "", nil
}

// oneRule is a policy of one CIDR: no proxy on the way.
var oneRule = policy.Input{DenyOut: []string{refusedAddr.Addr().String()}}

// manyRules is the same with count CIDRs.
func manyRules(count int) policy.Input {
	in := policy.Input{DenyOut: slices.Clone(oneRule.DenyOut)}
	for i := range count - 1 {
		in.DenyOut = append(in.DenyOut, fmt.Sprintf("%d.%d.%d.0/25", 11+i/2500, i%2500/50, i%50*2))
	}
	return in
}

// kernelTable measures the path without a proxy.
func kernelTable(ctx context.Context, r *run, w *world) error {
	bare, _, err := w.bare("forwarding")
	if err != nil {
		return err
	}
	one, err := w.gateway(ctx, "cordon", r.Self, GatewayConfig{Policy: oneRule})
	if err != nil {
		return err
	}
	manyName := fmt.Sprintf("cordon, %d sandboxes, %d CIDRs", r.Sandboxes, r.CIDRs)
	many, err := w.gateway(ctx, manyName, r.Self, GatewayConfig{Policy: manyRules(r.CIDRs), Slots: r.Sandboxes})
	if err != nil {
		return err
	}
	t := &table{
		title:    "Kernel path: no name rule, no proxy. Forwarding is the same wires with connection tracking and masquerading only.",
		ways:     []*way{bare, one, many},
		measures: kernelMeasures(),
	}
	t.measures[6].unless = []string{bare.name}
	for _, m := range t.measures[:6] {
		t.goals = append(t.goals,
			goal{row: m.reads[0].name, way: one.name, against: bare.name, least: 0.97},
			goal{row: m.reads[0].name, way: many.name, against: one.name, least: 0.95})
	}
	t.goals = append(t.goals, goal{row: "refusal, SYN to ECONNREFUSED, p50", way: one.name, most: 100})
	if err := t.run(ctx, r); err != nil {
		return err
	}
	t.print(r.out)
	return r.updates(ctx, one)
}

// kernelMeasures are the rows of the kernel path; the last is of refusals.
func kernelMeasures() []measure {
	raw := func(kind string, conns int) Load { return Load{Kind: kind, Addr: rawAddr, Conns: conns} }
	return []measure{
		row("down, one stream", gigabits, raw(loadDown, 1)),
		row("up, one stream", gigabits, raw(loadUp, 1)),
		row("request/response, 1 connection", perSecond, raw(loadEcho, 1)),
		row("request/response, 32 connections", perSecond, raw(loadEcho, 32)),
		row("new connections, 1 at a time", perSecond, raw(loadConnect, 1)),
		row("new connections, 32 at a time", perSecond, raw(loadConnect, 32)),
		{load: Load{Kind: loadRefused, Addr: refusedAddr}, reads: []reading{
			{"refusal, SYN to ECONNREFUSED, p50", medianUsec}, {"refusal, p99", tailUsec},
		}},
	}
}

// updates measures how soon a policy update takes effect.
func (r *run) updates(ctx context.Context, w *way) error {
	var took updateTimes
	for range r.Rounds * 2 {
		if err := took.measure(ctx, w); err != nil {
			return err
		}
	}
	fmt.Fprintf(r.out, "\nPolicy update, %d times, from the call\n\n", len(took.cut))
	printFigures(r.out, took.figures())
	return nil
}

// updateTimes are milliseconds from the call of a policy update.
type updateTimes struct{ answered, refused, cut []float64 }

func (u *updateTimes) figures() []figure {
	return []figure{
		{"answered", "ms", u.answered, 0, 0.5}, {"first new connection refused", "ms", u.refused, 20, 0.5}, {"live connection cut", "ms", u.cut, 1000, 0.99},
	}
}

// measure adds one update.
func (u *updateTimes) measure(ctx context.Context, w *way) error {
	var done Applied
	if err := w.program.call(ctx, "Apply", oneRule, &done); err != nil {
		return err
	}
	load := Load{Kind: loadEcho, Addr: rawAddr, For: 10 * time.Second}
	if err := w.client.call(ctx, "Live", load, nil); err != nil {
		return err
	}
	var seen Watched
	watched := make(chan error, 1)
	go func() { watched <- w.client.call(ctx, "Watch", load, &seen) }()
	select {
	case err := <-watched:
		return fmt.Errorf("watch before an update: %w", err)
	case <-time.After(30 * time.Millisecond):
	}
	tight := policy.Input{DenyOut: append(slices.Clone(oneRule.DenyOut), rawAddr.Addr().String())}
	if err := w.program.call(ctx, "Apply", tight, &done); err != nil {
		return err
	}
	if err := <-watched; err != nil {
		return fmt.Errorf("watch an update: %w", err)
	}
	millis := func(to time.Time) float64 { return float64(to.Sub(done.Began).Nanoseconds()) / 1e6 }
	u.answered = append(u.answered, millis(done.Ended))
	u.refused = append(u.refused, millis(seen.Refused))
	u.cut = append(u.cut, millis(seen.Cut))
	return nil
}

// nameRules is a policy of names only: ports 80 and 443 go to the proxy.
func nameRules() policy.Input {
	in := policy.Input{DenyOut: []string{"0.0.0.0/0"}}
	for name := range names {
		in.AllowOut = append(in.AllowOut, name)
	}
	slices.Sort(in.AllowOut)
	return in
}

// proxyTable measures the path where names decide.
func proxyTable(ctx context.Context, r *run, w *world) error {
	direct, _, err := w.bare("direct")
	if err != nil {
		return err
	}
	cordon, err := w.gateway(ctx, "cordon", r.Self, GatewayConfig{Policy: nameRules()})
	if err != nil {
		return err
	}
	t := &table{
		title:    "Proxy path: names decide (SNI, Host). The same clients, wires and server for each.",
		ways:     []*way{direct, cordon},
		measures: proxyMeasures(),
		goals:    proxyGoals,
	}
	for i := range t.measures {
		if kind := t.measures[i].load.Kind; kind == loadDeniedTLS || kind == loadDeniedHTTP {
			t.measures[i].unless = []string{direct.name}
		}
	}
	for _, p := range []struct {
		peer
		transparent bool
	}{{haproxyFilter, true}, {nginxFilter, false}} {
		way, why, err := w.filter(ctx, p.peer, p.transparent)
		if err != nil {
			return err
		}
		if why != "" {
			t.remarks = append(t.remarks, "not measured: "+why)
			continue
		}
		t.ways = append(t.ways, way)
	}
	idle := r.idleLoad()
	figures := r.perConnection(ctx, t.ways[1:], idle, 12)
	if err := t.run(ctx, r); err != nil {
		return err
	}
	t.print(r.out)
	fmt.Fprintf(r.out, "\nMemory of a proxied idle connection, both directions, %d of them; the program's own, without the kernel's sockets\n\n", idle.Conns)
	printFigures(r.out, figures)
	return ctx.Err()
}

// idleLoad is what memory is measured with.
func (r *run) idleLoad() Load {
	return Load{Kind: loadEcho, Addr: rawAddr, Name: rawName, Conns: r.idle(3)} // some proxies keep pipes
}

// proxyMeasures are the rows of the proxy path. The bulk and echo loads show a
// real hello, get the head of an answer and then send plain octets: what is measured
// is the way, not AES.
func proxyMeasures() []measure {
	raw := func(kind string, conns int) Load {
		return Load{Kind: kind, Addr: rawAddr, Name: rawName, Conns: conns}
	}
	short := func(kind string, conns int) Load {
		if kind == loadTLS {
			return Load{Kind: kind, Addr: tlsAddr, Name: tlsName, Conns: conns}
		}
		return Load{Kind: kind, Addr: webAddr, Name: webName, Conns: conns}
	}
	denied := func(kind string, l Load) measure {
		l.Kind, l.Name = kind, deniedName
		return measure{load: l, reads: []reading{{kind + ", 32 at a time", perSecond}}}
	}
	latency := raw(loadConnect, 1)
	return []measure{
		row("down, one stream", gigabits, raw(loadDown, 1)),
		row("up, one stream", gigabits, raw(loadUp, 1)),
		row("request/response, 1 connection", perSecond, raw(loadEcho, 1)),
		row("request/response, 32 connections", perSecond, raw(loadEcho, 32)),
		row("new HTTP connections, 1 at a time", perSecond, short(loadHTTP, 1)),
		row("new HTTP connections, 32 at a time", perSecond, short(loadHTTP, 32)),
		row("new TLS connections, 1 at a time", perSecond, short(loadTLS, 1)),
		row("new TLS connections, 32 at a time", perSecond, short(loadTLS, 32)),
		{load: latency, reads: []reading{{"connect to first answer, p50", medianUsec}, {"connect to first answer, p99", tailUsec}}},
		denied(loadDeniedTLS, short(loadTLS, 32)),
		denied(loadDeniedHTTP, short(loadHTTP, 32)),
	}
}

var proxyGoals = []goal{
	{row: "down, one stream", way: "cordon", against: "direct", least: 0.75},
	{row: "up, one stream", way: "cordon", against: "direct", least: 0.75},
	{row: "down, one stream", way: "cordon", against: "HAProxy", least: 1.1},
	{row: "up, one stream", way: "cordon", against: "HAProxy", least: 1.1},
	{row: "new HTTP connections, 32 at a time", way: "cordon", against: "HAProxy", least: 0.8},
	{row: "new TLS connections, 32 at a time", way: "cordon", against: "HAProxy", least: 1},
	{row: "connect to first answer, p50", way: "cordon", against: "direct", most: 200},
}

// perConnection holds idle connections through each way and compares what its
// process needs more; goal is in KiB.
func (r *run) perConnection(ctx context.Context, ways []*way, l Load, goal float64) []figure {
	var out []figure
	for i, w := range ways {
		f := figure{name: w.name, unit: "KiB", quantile: 0.5}
		if i == 0 {
			f.most = goal
		}
		if w.addr != nil {
			l = w.addr(l)
		}
		if v, err := r.held(ctx, w, l); err != nil {
			f.name += " (" + strings.TrimSpace(err.Error()) + ")"
		} else {
			f.values = []float64{v}
		}
		out = append(out, f)
	}
	return out
}

func (r *run) held(ctx context.Context, w *way, l Load) (kib float64, err error) {
	before, err := w.program.memory()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.client.call(ctx, "Release", struct{}{}, nil)) }()
	if err := w.client.call(ctx, "Hold", l, nil); err != nil {
		return 0, err
	}
	select { // timers and buffers of the opening go
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(min(time.Second, 10*r.Each)):
	}
	after, err := w.program.memory()
	return float64(after-before) / float64(l.Conns) / 1024, err
}
