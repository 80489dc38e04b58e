// Package agent serves the host and the SDKs inside a sandbox, on one HTTP port: it
// starts commands as a user, follows and reaps them, reads, writes and watches files for
// that user, and takes in the identity that the host gives the sandbox.
//
// The wire format is that of the published novita-sandbox and e2b SDKs (agent
// version 0.6.13): two Connect services, process.Process and
// filesystem.Filesystem, and plain HTTP for file contents. Routes for the host
// alone need a proof that the caller knows the control key; see package proof.
//
// Until the host's first /init the agent serves nobody: every other route but
// /health is refused.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/agent/proof"
)

// Limits on what one client, or all of them, can make the agent hold.
const (
	maxMessage   = 64 << 20 // bytes of one RPC message; standard input travels in one
	maxJSON      = 1 << 20  // bytes of a JSON body outside the RPC services
	maxHeader    = 128 << 10
	maxProcesses = 512
	maxEnded     = 4096    // ends of processes remembered for Connect
	maxWatchers  = 256     // polled watchers
	maxWatchDirs = 8192    // directories of one recursive watch
	maxQueued    = 100_000 // events of one polled watcher
	maxQueuedAll = 200_000 // of all of them
	maxEntries   = 250_000 // of one listing

	// stallTimeout is how long a client may neither read nor write while a request
	// of its is under way. A command whose reader stalls waits that long for it, as
	// for a full pipe, and then runs on unobserved.
	stallTimeout  = 60 * time.Second
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
)

// Config is what an agent is built from. ControlHash is required.
type Config struct {
	// ControlHash is the SHA-256 of the control token: what the host and the agent
	// prove to each other that they know. No user may read it.
	ControlHash proof.Key
	// Own reports whether an address is one of the agent's machine, from which no
	// host calls; nil means that none is.
	Own func(netip.Addr) bool
	// Log receives the agent's own events; nil discards them.
	Log *slog.Logger
	// ReapAll makes Run wait for every child of the process, as PID 1 and
	// subreapers must; otherwise it waits only for those it started.
	ReapAll bool
	// Path is the PATH of started processes.
	Path string
	// Etc is the directory of passwd, group, hosts, hostname and resolv.conf;
	// empty means /etc.
	Etc string
	// Proc is where procfs is mounted; empty means /proc.
	Proc string
	// Pids is a cgroup hierarchy of version 1 with the pids controller, in which
	// commands are limited to the processes and threads RLIMIT_NPROC says; empty
	// means no limit.
	Pids string
	// Spool is the folder of bodies that are being received, which no user must be
	// able to list; empty means the system's for temporary files.
	Spool string
	// AddLocal makes an address one of the machine's own; nil leaves those of earlier
	// lives alone.
	AddLocal func(netip.Addr) error
	// SetHostname changes the kernel's host name; nil leaves it alone.
	SetHostname func(string) error
}

// Agent serves one sandbox from inside.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	handler   http.Handler
	users     *users
	children  *children
	procs     *processes
	watchers  *watchers
	sampler   *sampler
	guard     *guard
	spool     spool
	filling   turns
	addresses addresses

	claiming sync.Mutex // serialises claims
	claim    atomic.Pointer[claim]
}

// New returns an agent that serves nobody until its Handler gets a claim.
func New(cfg Config) (*Agent, error) {
	if cfg.ControlHash == (proof.Key{}) {
		return nil, errors.New("agent: ControlHash is empty: pass the SHA-256 of the control token")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Own == nil {
		cfg.Own = func(netip.Addr) bool { return false }
	}
	if cfg.Etc == "" {
		cfg.Etc = "/etc"
	}
	if cfg.Proc == "" {
		cfg.Proc = "/proc"
	}
	if cfg.Path == "" {
		cfg.Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	kids := newChildren(cfg.ReapAll)
	guard := newGuard(cfg.Proc, cfg.Log)
	if cfg.Pids != "" {
		g, err := newGroup(cfg.Pids, guard.limit)
		if err != nil {
			return nil, err
		}
		kids.group, guard.barren = g, g.barren
	}
	procs := newProcesses(kids, guard.killSession)
	guard.doom = procs.doom
	a := &Agent{
		cfg:      cfg,
		log:      cfg.Log,
		users:    &users{etc: cfg.Etc},
		children: kids,
		procs:    procs,
		watchers: newWatchers(),
		sampler:  newSampler(cfg.Proc),
		guard:    guard,
		spool:    spool{dir: cfg.Spool},
	}
	a.handler = a.routes()
	return a, nil
}

// Handler answers all of the agent's routes but the host's. Processes it starts are reaped only
// while Run runs.
func (a *Agent) Handler() http.Handler { return a.handler }

// server answers all of the agent's routes.
func (a *Agent) server(ctx context.Context) *http.Server {
	return &http.Server{
		Handler:           a.handler,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withDialogue,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	}
}

// Run serves ln, reaps children and guards memory until ctx ends. It closes ln.
// The processes it started live on.
func (a *Agent) Run(ctx context.Context, ln net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	srv := a.server(ctx)
	g.Go(func() error { return a.children.run(ctx) })
	g.Go(func() error { return a.guard.run(ctx, a.procs.used) })
	g.Go(func() error {
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", ln.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		a.watchers.closeAll()
		return srv.Close()
	})
	err := g.Wait()
	a.procs.abandon()
	return err
}
