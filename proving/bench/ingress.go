package bench

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/cordonhq/cordon/internal/ingress"
	"github.com/cordonhq/cordon/proving/lab"
)

// Ingress is cordon's ingress in a process of its own, in front of a service on
// this namespace's loopback.
type Ingress struct {
	ctx context.Context
}

// IngressConfig says what to route.
type IngressConfig struct {
	Listen    netip.AddrPort
	Cert      string   // PEM file with certificate and key
	Sandboxes []string // IDs; the first is the one that is loaded
	Backend   netip.AddrPort
}

// Serve starts the ingress.
func (s *Ingress) Serve(c IngressConfig, _ *struct{}) error {
	pair, err := tls.LoadX509KeyPair(c.Cert, c.Cert)
	if err != nil {
		return err
	}
	targets := make(map[string]*ingress.Target, len(c.Sandboxes))
	for _, id := range c.Sandboxes {
		targets[id] = &ingress.Target{ID: id, Addr: c.Backend.Addr(), Public: true}
	}
	in, err := ingress.New(ingress.Config{
		Domains: []string{benchDomain},
		Lookup:  func(id string) (*ingress.Target, bool) { t, ok := targets[id]; return t, ok },
		API:     http.NotFoundHandler(),
		TLS:     &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		Limits:  ingress.Limits{ConnsPerSandbox: 1 << 17}, // one client, one sandbox: a source may hold a part of these
	})
	if err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(s.ctx, "tcp", c.Listen.String())
	if err != nil {
		return err
	}
	go func() {
		if err := in.Run(s.ctx, ingress.Listener{Listener: l, Mode: ingress.TLS}); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	return nil
}

// otherBuild is the name of what Options.Versus runs.
const otherBuild = "other build"

var backendAddr = netip.MustParseAddrPort("127.0.0.1:9000")

// ingressTable measures requests to one of many sandboxes. Everything is on one
// loopback: routes and relays are compared, not wires.
func ingressTable(ctx context.Context, r *run) error {
	w := &world{r: r}
	t, figures, grown, err := w.compareFronts(ctx)
	if err == nil {
		t.print(r.out)
		fmt.Fprintf(r.out, "\nMemory of an idle WebSocket over TLS, %d of them; the program's own, without the kernel's sockets\n\n", r.idle(2))
		printFigures(r.out, figures)
		fmt.Fprintf(r.out, "\nMemory that the program needs more while %d GiB go up through it and as many down, over HTTP/1.1\n\n", bulkSize>>30)
		printFigures(r.out, grown)
		err = ctx.Err()
	}
	if cerr := w.close(); err == nil {
		err = cerr
	}
	return err
}

func (w *world) compareFronts(ctx context.Context) (t *table, figures, grown []figure, err error) {
	ns, err := lab.NewNetns()
	if err != nil {
		return nil, nil, nil, err
	}
	w.closers = append(w.closers, ns.Close)
	if err := prepareClient(ns); err != nil {
		return nil, nil, nil, err
	}
	backend, err := w.start(ns, roleServer)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := backend.call(ctx, "Serve", ServerConfig{Web: backendAddr, Cert: w.r.cert.file}, nil); err != nil {
		return nil, nil, nil, err
	}
	client, err := w.start(ns, roleClient)
	if err != nil {
		return nil, nil, nil, err
	}
	facts, ids, err := w.r.sandboxHosts()
	if err != nil {
		return nil, nil, nil, err
	}
	t = frontMeasures(&way{name: "service itself", client: client, addr: func(l Load) Load { l.Kind, l.Addr = loadPlain, backendAddr; return l }}, facts.Hosts[0])
	add := func(name string, p *process, port uint16) {
		to := netip.AddrPortFrom(backendAddr.Addr(), port)
		t.ways = append(t.ways, &way{name: name, client: client, program: p, addr: func(l Load) Load { l.Addr = to; return l }})
	}
	if err := w.fronts(ctx, ns, t, facts, ids, add); err != nil {
		return nil, nil, nil, err
	}
	grown = w.r.growth(ctx, t.ways[1:], Load{Name: facts.Hosts[0], Conns: 1}, 16)
	figures = w.r.perConnection(ctx, t.ways[1:], Load{Kind: holdUpgraded, Name: facts.Hosts[0], Conns: w.r.idle(2)}, 25)
	return t, figures, grown, t.run(ctx, w.r)
}

// fronts starts cordon's ingress and the peers that are there, each on a port of
// its own.
func (w *world) fronts(ctx context.Context, ns *lab.Netns, t *table, facts peerFacts, ids []string, add func(string, *process, uint16)) error {
	own, err := w.start(ns, roleIngress)
	if err != nil {
		return err
	}
	const port = 8443
	serve := func(p *process, port uint16) error {
		listen := netip.AddrPortFrom(backendAddr.Addr(), port)
		return p.call(ctx, "Serve", IngressConfig{Listen: listen, Cert: w.r.cert.file, Sandboxes: ids, Backend: backendAddr}, nil)
	}
	if err := serve(own, port); err != nil {
		return err
	}
	add("cordon", own, port)
	if len(w.r.Versus) > 0 {
		other, err := startProcess(ns, w.r.Versus, roleIngress)
		if err != nil {
			return err
		}
		w.keep(other)
		if err := serve(other, port+1); err != nil {
			return err
		}
		add(otherBuild, other, port+1)
		return nil
	}
	for i, p := range []peer{nginxFront, haproxyFront, caddyFront} {
		why := p.missing()
		if why == "" {
			facts.TLSPort = port + i + 1
			proc, err := w.r.startPeer(ctx, ns, p, facts)
			if err == nil {
				w.keep(proc)
				add(p.name, proc, uint16(facts.TLSPort))
				continue
			}
			why = err.Error()
		}
		t.remarks = append(t.remarks, "not measured: "+why)
	}
	return ctx.Err()
}

// sandboxHosts makes the names of as many sandboxes as the run has.
func (r *run) sandboxHosts() (facts peerFacts, ids []string, err error) {
	var hostMap strings.Builder
	for i := range r.Sandboxes {
		id := fmt.Sprintf("i%020d", i)
		host := fmt.Sprintf("%d-%s.%s", backendAddr.Port(), id, benchDomain)
		ids, facts.Hosts = append(ids, id), append(facts.Hosts, host)
		to := "sandbox"
		if i > 0 {
			to = "other"
		}
		fmt.Fprintln(&hostMap, host, to)
	}
	facts.HostMap = filepath.Join(r.Scratch, "hosts.map")
	facts.Cert, facts.Domain, facts.Backend = r.cert.file, benchDomain, backendAddr
	return facts, ids, os.WriteFile(facts.HostMap, []byte(hostMap.String()), 0o644)
}

func frontMeasures(itself *way, host string) *table {
	load := func(kind string, conns int) Load { return Load{Kind: kind, Name: host, Conns: conns} }
	const h1, h2, added, tail = "HTTP/1.1 requests, 64 connections", "HTTP/2 requests, 64 connections", "HTTP/1.1 request, 1 connection, p50", "HTTP/1.1 request, 1 connection, p99"
	t := &table{
		title: "Ingress: requests over kept TLS connections to one of many sandboxes. The service itself is asked without TLS.",
		ways:  []*way{itself},
		measures: []measure{
			row(h1, perSecond, load(loadH1, 64)),
			row(h2, perSecond, load(loadH2, 64)),
			{load: load(loadH1, 1), reads: []reading{{added, medianUsec}, {tail, tailUsec}}},
		},
		goals: []goal{{row: added, way: "cordon", against: itself.name, most: 150}, {row: tail, way: "cordon", against: itself.name, most: 2000}},
	}
	t.goals = append(t.goals, goal{row: h1, way: "cordon", against: otherBuild, least: 0.8}, goal{row: h2, way: "cordon", against: otherBuild, least: 1})
	for _, row := range []string{h1, h2} {
		t.goals = append(t.goals, goal{row: row, way: "cordon", against: "Caddy", least: 1}, goal{row: row, way: "cordon", against: "nginx", least: 0.6})
	}
	return t
}
