package server

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/cordonhq/cordon/internal/agent/agentctl"
	"github.com/cordonhq/cordon/internal/api"
	"github.com/cordonhq/cordon/internal/egress"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/image"
	"github.com/cordonhq/cordon/internal/ingress"
	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
	"github.com/cordonhq/cordon/internal/network"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/resolver"
	"github.com/cordonhq/cordon/internal/runtime/gvisor"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/share"
	"github.com/cordonhq/cordon/internal/store"
)

// server is the whole graph. build makes it, listen opens what it answers on,
// and run blocks.
type server struct {
	cfg      Config
	programs fs.FS
	version  string
	log      *slog.Logger
	metrics  *prometheus.Registry
	operator *policy.Operator

	deniedNow deniedNames
	tls       *tls.Config
	acme      *tlsconf.ACME // nil: certificates come from elsewhere
	store     *store.Store
	flows     *flowlog.Log
	network   *network.Network
	manager   *sandbox.Manager
	images    *image.Library
	agents    *agentctl.Client
	resolver  *resolver.Resolver
	egress    *egress.Proxy
	ingress   *ingress.Ingress

	pools       []*share.Pool
	closers     []io.Closer // in the order of acquisition
	ingressOn   []ingress.Listener
	egressOn    []net.Listener
	resolverOn  []func(context.Context) error // one for each socket
	metricsOn   net.Listener
	descriptors int    // how many this process may have
	selfAddress string // where the egress proxy reaches the ingress with TLS
	selfPlain   string // and without
}

// build makes every part and connects them; nothing runs yet.
func build(ctx context.Context, cfg Config, o Options) (_ *server, err error) {
	s := &server{cfg: cfg, log: o.Log, programs: o.Programs, version: o.Version, metrics: prometheus.NewRegistry(), operator: operatorPolicy(&cfg),
		deniedNow: deniedNames{seen: map[netip.AddrPort]time.Time{}, by: map[netip.AddrPort]int{}}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.descriptors, err = descriptors(); err != nil {
		return nil, fmt.Errorf("read the limit of descriptors: %w", err)
	}
	s.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, dir := range []string{cfg.StateDir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	for _, step := range []struct {
		name string
		make func(context.Context) error
	}{
		{"store", s.makeStore}, {"flow log", s.makeFlows}, {"network", s.makeNetwork}, {"certificates", s.makeCertificates},
		{"sandboxes", s.makeManager}, {"resolver", s.makeResolver}, {"egress", s.makeEgress}, {"ingress", s.makeIngress},
	} {
		if err := step.make(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	s.metrics.MustRegister(share.NewCollector(s.pools...))
	return s, nil
}

// closer makes an io.Closer of a method.
type closer func() error

func (f closer) Close() error { return f() }

// Close gives back what the process holds; sandboxes and their rules stay.
func (s *server) Close() error {
	var failed []error
	for _, c := range slices.Backward(s.closers) {
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			failed = append(failed, err)
		}
	}
	s.closers = nil
	return errors.Join(failed...)
}

// storeDir is the store's folder in state_dir.
const storeDir = "store"

func (s *server) makeStore(ctx context.Context) (err error) {
	s.store, err = store.Open(ctx, store.Config{Dir: filepath.Join(s.cfg.StateDir, storeDir), Log: s.log})
	if err == nil {
		s.closers = append(s.closers, s.store)
	}
	return err
}

func (s *server) makeFlows(context.Context) (err error) {
	s.flows, err = flowlog.New(flowlog.Config{Metrics: s.metrics, Owner: s.keyOf})
	return err
}

// forNetwork is what the network package is told of the server.
func forNetwork(cfg *Config) (network.Config, error) {
	n := cfg.Network
	ports, err := network.ParseSourcePorts(n.SourcePorts)
	if err != nil {
		return network.Config{}, err
	}
	return network.Config{
		Name: cfg.Name, RunDir: cfg.RunDir, Subnet4: n.Subnet4,
		ProxyPort: n.ProxyPort, DNSPort: n.DNSPort, NFLogGroup: n.LogGroup, SourcePorts: ports,
		PublicAddresses: n.Public(),
		Sandboxes:       cfg.Sandboxes.Max,
		MaxFlows:        clamp32(n.Limits.Connections), MaxNewFlows: clamp32(n.Limits.NewConnections), MaxBytesOut: uint64(n.Limits.BytesOut),
		MaxQueries: max(network.DefaultQueries, clamp32(4*n.Limits.DNSQueries)),
	}, nil
}

func (s *server) makeNetwork(context.Context) error {
	c, err := forNetwork(&s.cfg)
	if err != nil {
		return err
	}
	c.Flows, c.Lost, c.Log = s.flows, s.flows.Lost, s.log
	s.network, err = network.New(c)
	if err == nil {
		s.pools = append(s.pools, s.network.Pools()...)
		s.operator.DeniedAddr = s.network.Denied
		s.operator.IsHost = s.network.IsHost // names that resolve to the machine are refused like its addresses
		s.closers = append(s.closers, s.network)
	}
	return err
}

// clamp32 turns a limit into the kernel's width.
func clamp32(n int) uint32 { return uint32(min(n, math.MaxUint32)) }

// proxy is the part of the limits that the proxy keeps, within what the process
// can hold at all.
func (l LimitsConfig) proxy(out egress.Limits) egress.Limits {
	out.Conns, out.NewPerSecond = min(l.Connections, out.TotalConns/8), l.NewConnections
	out.Pending = min(out.Conns, 1024)
	return out
}

// budget is the part that the resolver keeps.
func (l LimitsConfig) budget() resolver.Budget {
	return resolver.Budget{QueriesPerSecond: float64(l.DNSQueries), Burst: 3 * l.DNSQueries}
}

// operatorPolicy is the policy layer over every sandbox's rules.
func operatorPolicy(cfg *Config) *policy.Operator {
	n := cfg.Network
	return &policy.Operator{
		FloorOpen: n.FloorOpen, AlwaysAllow: n.AlwaysAllow, AlwaysDeny: n.AlwaysDeny,
		SelfDomains: cfg.allDomains(),
	}
}

// forRuntime is what the runtime is told of the server.
func forRuntime(cfg *Config, log *slog.Logger) gvisor.Config {
	return gvisor.Config{
		StateDir: filepath.Join(cfg.RunDir, "gvisor"), DataDir: filepath.Join(cfg.StateDir, "layers"),
		CgroupParent: "/cordon/" + cfg.Name, LogDir: filepath.Join(cfg.StateDir, "log"), Log: log,
	}
}

func (s *server) makeManager(context.Context) error {
	all, err := gvisor.All(s.cfg.Sandboxes.ReserveMemoryMB << 20)
	if err != nil {
		return err
	}
	c := forRuntime(&s.cfg, s.log)
	c.All = all
	run, err := gvisor.New(c)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, closer(run.Close))
	cas, err := sandboxCAs(&s.cfg, s.log)
	if err != nil {
		return err
	}
	agentDir, err := installAgent(s.programs, s.cfg.StateDir, cas)
	if err != nil {
		return err
	}
	images, err := s.cfg.Images(s.progress(), s.log)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, images)
	s.images = images
	// A machine that takes long to start a sandbox takes long to answer as well.
	s.agents = agentctl.New(agentctl.Config{CallTimeout: max(5*time.Second, s.cfg.Sandboxes.StartTimeout/6)})
	proof, err := s.cfg.domainProof()
	if err != nil {
		return err
	}
	s.manager = sandbox.New(sandbox.Config{
		Proof: proof, DefaultPrivate: s.cfg.Sandboxes.DefaultPrivate,
		Runtime: run, Network: s.network, Images: images, Store: s.store, Agents: s.agents,
		Operator:    s.operator,
		AgentArgs:   []string{guestAgent},
		Binds:       []sandbox.Bind{{Host: agentDir, Guest: filepath.Dir(guestAgent), Sealed: true}},
		CommandEnv:  cas.environment(),
		SnapshotDir: filepath.Join(s.cfg.StateDir, "snapshots"),
		Defaults:    s.cfg.resources(), DefaultTemplate: s.cfg.Sandboxes.DefaultTemplate,
		Host: all, HostFree: hostFree,
		Spares: s.cfg.Sandboxes.Spares, MaxSandboxes: s.cfg.Sandboxes.Max, MaxTimeout: s.cfg.Sandboxes.MaxTimeout,
		StartTimeout: s.cfg.Sandboxes.StartTimeout,
		MaxSnapshots: s.cfg.Sandboxes.MaxSnapshots, MinFree: s.cfg.Sandboxes.MinFreeDiskMB << 20,
		MaxPaused: s.cfg.Sandboxes.MaxPaused, Allowance: s.allowance,
		InUse:  func(id sandbox.ID) bool { return s.ingress.InUse(string(id)) },
		Refuse: s.refuse,
		Log:    s.log,
	})
	s.manager.Subscribe(func(id sandbox.ID, c sandbox.Change) {
		if c == sandbox.Gone {
			s.flows.Forget(string(id))
		}
	})
	s.pools = append(s.pools, s.manager.Pools()...)
	return nil
}

// hostFree is how much memory the machine has for sandboxes, whatever else uses it. Half
// of the smallest reserve stays out of reach, for what begins at the same time.
func hostFree() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return math.MaxInt64 // the groups' limits still hold
	}
	_, after, _ := strings.Cut(string(b), "MemAvailable:")
	line, _, _ := strings.Cut(after, "kB")
	kib, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		return math.MaxInt64
	}
	return kib<<10 - 256<<20
}

// refuse says why no new sandbox is made of a template.
func (s *server) refuse(template string) error {
	if template != image.HostTemplate {
		return nil
	}
	keys, err := s.store.Keys(context.Background()) // from memory
	if err != nil {
		return err
	}
	return s.cfg.hostTemplate(len(keys))
}

// allowance is how many sandboxes a key may have. What a key that was revoked left
// counts like any other's; admin keys have the server's limits only.
func (s *server) allowance(owner string) sandbox.Allowance {
	c := s.cfg.Sandboxes
	out := sandbox.Allowance{Sandboxes: c.MaxPerKey, Paused: c.MaxPausedPerKey}
	keys, err := s.store.Keys(context.Background()) // from memory
	if err != nil {
		s.log.Warn("limits of a key not read", "key", owner, "err", err)
		return out
	}
	for _, k := range keys {
		if k.ID != owner {
			continue
		}
		if k.Admin {
			out = sandbox.Allowance{}
		}
		out.Sandboxes, out.Paused = cmp.Or(k.MaxSandboxes, out.Sandboxes), cmp.Or(k.MaxPaused, out.Paused)
	}
	return out
}

// progress shows image builds, which may take a minute, in the log.
func (s *server) progress() io.Writer { return logWriter{s.log} }

// logWriter logs each line written to it.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" {
			w.log.Info("image", "progress", line)
		}
	}
	return len(b), nil
}

// closeCache closes the cache folder to other users, if nothing but images is in it:
// an operator may have named one that other programs share. The folder of the images
// itself is closed in any case.
func (c *Config) closeCache() error {
	if err := os.MkdirAll(c.CacheDir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(c.CacheDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(c.ImagesDir()) {
			return nil
		}
	}
	return os.Chmod(c.CacheDir, 0o700)
}

// Images opens the image store.
func (c *Config) Images(progress io.Writer, log *slog.Logger) (*image.Library, error) {
	if err := c.closeCache(); err != nil {
		return nil, err
	}
	return image.New(image.Config{
		Dir: c.ImagesDir(), StateDir: filepath.Join(c.StateDir, "images"),
		Progress: progress, Log: log,
	})
}

func (s *server) makeResolver(context.Context) (err error) {
	upstreams, err := s.upstreams()
	if err != nil {
		return err
	}
	s.resolver, err = resolver.New(resolver.Config{
		Owner: func(a netip.Addr) (string, *policy.Compiled, bool) {
			id, p, ok := s.network.Owner(a)
			return string(id), p, ok
		},
		Key: s.keyOf,
		Policy: func(id string) (*policy.Compiled, bool) {
			if id == serverItself {
				return resolvable, true
			}
			return s.manager.Policy(sandbox.ID(id))
		},
		Upstreams: upstreams,
		Pin:       s.pin,
		IPv6:      s.network.HasIPv6(),
		Denial:    resolver.Denial(s.cfg.Network.DNSDeny),
		Budget:    s.cfg.Network.Limits.budget(),
		Flows:     s.flows, Log: s.log,
	})
	if err == nil {
		s.pools = append(s.pools, s.resolver.Pools()...)
	}
	return err
}

// keyOf returns the API key that a sandbox belongs to.
func (s *server) keyOf(id string) string {
	if s.manager == nil {
		return "" // the server is being built
	}
	ep, _ := s.manager.Endpoint(sandbox.ID(id))
	return ep.Record.Owner
}

// upstreams are the configured DNS servers, else the machine's.
func (s *server) upstreams() ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for _, up := range s.cfg.Network.Upstreams {
		a, err := upstream(up)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	if len(out) > 0 {
		return out, nil
	}
	return resolver.HostUpstreams("/etc/resolv.conf")
}

// pin opens ports of an address that the resolver just handed out for a name.
func (s *server) pin(p resolver.Pin) error {
	ports := make([]uint16, len(p.Ports))
	for i, port := range p.Ports {
		ports[i] = port.Port
	}
	return s.network.Pin(sandbox.ID(p.Sandbox), p.Name, p.Addr, ports, p.TTL)
}

// pinned returns the names that are pinned to dst, after it asked again for those
// that are due. If a name lost the address, expired says so.
func (s *server) pinned(ctx context.Context, sandboxID string, dst netip.AddrPort) (names []string, expired string) {
	id := sandbox.ID(sandboxID)
	names, due, lost := s.network.Pinned(id, dst)
	if lost != "" {
		expired = fmt.Sprintf("the pin of %s expired: it no longer has this address", lost)
	}
	for _, name := range due {
		ttl, has, err := s.resolver.Has(ctx, sandboxID, name, dst.Addr())
		switch {
		case err == nil && has:
			if err := s.network.Pin(id, name, dst.Addr(), []uint16{dst.Port()}, ttl); err != nil {
				s.log.Warn("pin not renewed", "sandbox", id, "host", name, "dst", dst, "err", err)
			}
			names = append(names, name)
		case err == nil:
			expired = fmt.Sprintf("the pin of %s expired: it no longer has this address", name)
			if err := s.network.Unpin(id, name, dst); err != nil {
				s.log.Warn("pin not removed", "sandbox", id, "host", name, "dst", dst, "err", err)
			}
		case !errs.Is(err, errs.Exhausted) && s.network.Confirm(id, name, dst): // a sandbox can use up its budget on purpose
			names = append(names, name)
		default:
			expired = fmt.Sprintf("the pin of %s expired, and it could not be asked for again: %v", name, err)
		}
	}
	return names, expired
}

func (s *server) makeEgress(context.Context) (err error) {
	s.egress, err = egress.New(egress.Config{
		Owner: func(a netip.Addr) (egress.Owner, bool) {
			id, p, ok := s.network.Owner(a)
			return egress.Owner{Sandbox: string(id), Policy: p}, ok
		},
		Key:      s.keyOf,
		Resolve:  s.resolver.Resolve,
		Pinned:   s.pinned,
		DialSelf: s.dialSelf,
		Limits:   s.cfg.Network.Limits.proxy(egressLimits(s.descriptors)),
		Flows:    s.flows, Log: s.log,
	})
	if err != nil {
		return err
	}
	s.pools = append(s.pools, s.egress.Pools()...)
	s.manager.Subscribe(func(id sandbox.ID, c sandbox.Change) {
		switch c {
		case sandbox.PolicyChanged:
			s.egress.Revoke(string(id))
		case sandbox.Stopped:
			s.egress.Cut(string(id))
		}
	})
	return nil
}

func (s *server) makeCertificates(context.Context) (err error) {
	s.tls, s.acme, err = s.cfg.serverTLS(s.domainOwner, func(ctx context.Context, name string) error { return s.manager.Proven(ctx, name) }, s.log)
	if s.acme != nil {
		s.pools = append(s.pools, s.acme.Pools()...)
	}
	return err
}

// domainOwner returns whose a custom domain is.
func (s *server) domainOwner(name string) (owner string, ok bool) {
	id, _, ok := s.manager.ByDomain(name)
	if !ok {
		return "", false
	}
	ep, ok := s.manager.Endpoint(id)
	return ep.Record.Owner, ok
}

// custom shows a custom domain to the ingress.
func (s *server) custom(host string) (id string, port uint16, ok bool) {
	sandboxID, port, ok := s.manager.ByDomain(host)
	return string(sandboxID), port, ok
}

// challenge answers certificate authorities; nil without ACME.
func (s *server) challenge() func(http.ResponseWriter, *http.Request) bool {
	if s.acme == nil {
		return nil
	}
	return s.acme.HTTPChallenge
}

func (s *server) makeIngress(ctx context.Context) (err error) {
	proxies, err := s.cfg.Listen.proxies()
	if err != nil {
		return err
	}
	s.ingress, err = ingress.New(ingress.Config{
		Domains: s.cfg.allDomains(), Custom: s.custom, Challenge: s.challenge(), HSTS: s.cfg.TLS.HSTS,
		Lookup: s.target,
		Wake: func(ctx context.Context, id string, by ingress.Waker) error {
			return s.manager.Wake(ctx, sandbox.ID(id), sandbox.Waker(by))
		},
		Traffic:        func(id string) { s.manager.Touch(context.WithoutCancel(ctx), sandbox.ID(id)) },
		Inside:         func(src netip.Addr) (netip.Addr, bool) { return sandboxBehind(src, s.cfg.Network.Subnet4) },
		TrustedProxies: proxies, ProxyProtocol: s.cfg.Listen.ProxyProtocol, LogRequests: s.cfg.Log.Requests,
		Limits: s.cfg.Listen.ingressLimits(s.descriptors),
		API:    s.api(), TLS: s.tls, HTTPSPort: s.httpsPort(), Log: s.log, Metrics: s.metrics,
	})
	if err != nil {
		return err
	}
	s.pools = append(s.pools, s.ingress.Pools()...)
	s.manager.Subscribe(func(id sandbox.ID, c sandbox.Change) {
		if c == sandbox.AccessChanged {
			s.ingress.Recheck(string(id))
		}
	})
	return nil
}

func (s *server) httpsPort() uint16 {
	if len(s.cfg.Listen.HTTPS) == 0 {
		return 0
	}
	_, port, _ := net.SplitHostPort(s.cfg.Listen.HTTPS[0])
	n, _ := strconv.ParseUint(port, 10, 16)
	return uint16(n)
}

func (s *server) api() http.Handler {
	shares := api.NewShares()
	s.pools = append(s.pools, shares.Pools()...)
	return api.New(api.Config{
		Sandboxes: s.manager, Snapshots: s.manager, Keys: s.store, Flows: s.flows, Operator: s.operator,
		Templates: s.templates, Shares: shares,
		Forward: func(w http.ResponseWriter, r *http.Request, id string, port uint16) error {
			return s.ingress.Forward(w, r, id, port)
		},
		Domain: s.cfg.PublicDomain(), Version: s.version, Log: s.log,
	})
}

// templates shows the images to the API.
func (s *server) templates(ctx context.Context) ([]sandbox.Template, error) {
	list, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []sandbox.Template
	for _, t := range list {
		if s.refuse(t.Name) == nil {
			out = append(out, sandbox.Template{ID: t.Name, Names: []string{t.Name}, Resources: s.cfg.resources(), Created: t.Created, Ready: t.Built})
		}
	}
	return out, nil
}

// target shows a sandbox to the ingress.
func (s *server) target(id string) (*ingress.Target, bool) {
	ep, ok := s.manager.Endpoint(sandbox.ID(id))
	if !ok {
		return nil, false
	}
	rec := ep.Record
	addr := rec.Agent()
	state := ingress.Running
	if rec.State != sandbox.Running {
		state = ingress.Paused
	}
	return &ingress.Target{
		ID: id, State: state, Addr: rec.Lease.Addr4.Addr(), AgentPort: sandbox.AgentPort,
		DialLoopback: func(ctx context.Context, port uint16) (net.Conn, error) { return s.agents.DialPort(ctx, addr, port) },
		Public:       rec.Public(), TrafficToken: rec.TrafficToken, MaskHost: rec.MaskRequestHost, MaskOrigin: rec.MaskOrigin, HTTPSPorts: rec.HTTPSPorts,
		AutoResume: rec.AutoResume, WakeOn: ingress.WakeOn(rec.AutoResumeOn), TrafficExtends: rec.IdleTimeout > 0, Done: ep.Done,
		AccessToken: rec.AccessToken, Owner: rec.Owner, AllowIn: rec.AllowIn,
		LinkKey: rec.LinkKey, Link: rec.HasLink,
	}, true
}
