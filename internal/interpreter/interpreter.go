// Package interpreter runs the code of the code-interpreter SDKs inside a sandbox.
// It has the kernels: how each is started, spoken to, interrupted and replaced
// (ipykernel in Jupyter's protocol over ZeroMQ, Node and bash by drivers of ours
// over pipes), how the variables and the randomness of a sandbox reach a kernel
// that is older than the sandbox, and how output that may be endless becomes a
// bounded stream of lines.
//
// What it serves is the wire format of the published SDKs on port 49999. It runs
// as the sandbox's user and trusts nobody: kernels run strangers' code, and callers
// are whom the sandbox's agent admits.
package interpreter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Port is where the SDKs look for the interpreter.
const Port = 49999

// Limits on what callers can make the interpreter hold.
const (
	maxBody     = 16 << 20 // bytes of a request: code and variables
	maxSmall    = 64 << 10 // bytes of a request that needs no token
	maxHeader   = 128 << 10
	maxContexts = 32   // each is a process
	maxWaiting  = 64   // executions that wait for one context
	maxEnvVars  = 1000 // of one execution

	headerTimeout = 10 * time.Second
	bodyTimeout   = 60 * time.Second
	idleTimeout   = 2 * time.Minute
)

// Config is what an interpreter is built from.
type Config struct {
	// Dir holds the kernels' sockets and programs. It is emptied. Required, and at
	// most 60 bytes long: the names of unix sockets are short.
	Dir string
	// Home is where contexts work unless they say otherwise. Required.
	Home string
	// Env is the environment of kernels, until the sandbox's own variables are known.
	Env []string
	// Agent is the base URL of the sandbox's agent, which knows who is admitted and
	// what the sandbox's variables are. Required.
	Agent string
	// Log receives the interpreter's own events; nil discards them.
	Log *slog.Logger
}

// Interpreter serves the contexts of one sandbox.
type Interpreter struct {
	cfg   Config
	log   *slog.Logger
	agent *http.Client
	http  http.Handler

	life context.Context // of kernels being replaced
	stop context.CancelFunc
	wg   sync.WaitGroup // of kernels being replaced

	known atomic.Pointer[identity] // whose sandbox it is, as last heard; nil before the first caller

	mu       sync.Mutex // guards contexts, which are in the order of their making
	contexts []*codeContext
}

// New returns an interpreter without kernels.
func New(cfg Config) (*Interpreter, error) {
	for field, value := range map[string]string{"Dir": cfg.Dir, "Home": cfg.Home} {
		if !filepath.IsAbs(value) {
			return nil, fmt.Errorf("interpreter: %s is %q: set an absolute path", field, value)
		}
	}
	if len(cfg.Dir) > 60 {
		return nil, fmt.Errorf("interpreter: Dir %s is over 60 bytes long", cfg.Dir)
	}
	if cfg.Agent == "" {
		return nil, errors.New("interpreter: Agent is empty: set the agent's base URL")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.RemoveAll(cfg.Dir); err != nil {
		return nil, fmt.Errorf("empty %s: %w", cfg.Dir, err)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make %s: %w", cfg.Dir, err)
	}
	i := &Interpreter{cfg: cfg, log: cfg.Log, agent: &http.Client{Timeout: agentTimeout, Transport: &http.Transport{Proxy: nil, IdleConnTimeout: 10 * time.Second}}}
	i.life, i.stop = context.WithCancel(context.Background())
	for _, l := range []language{python3, javascript} {
		i.contexts = append(i.contexts, i.newContext(string(l), l, cfg.Home))
	}
	i.http = i.routes()
	return i, nil
}

// warmUp is run by the default Python kernel before anybody can: what most cells
// import first takes seconds to load.
const warmUp = `
import importlib
for name in ("numpy", "pandas", "matplotlib.pyplot"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
del importlib, name
`

// Warm starts the default Python kernel and lets it load the usual modules. An
// interpreter that is not warmed starts each kernel with its first cell.
func (i *Interpreter) Warm(ctx context.Context) error {
	c := i.contexts[0]
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	k, err := c.ready(ctx)
	if err != nil {
		return err
	}
	p, ok := k.(*python)
	if !ok {
		return nil
	}
	x, err := p.request("execute_request", executeContent{Code: warmUp, Silent: true, UserExpressions: map[string]any{}}, struct{}{})
	if err != nil {
		return err
	}
	if !p.settle(x, warmPatience) {
		return errors.New("warm the Python kernel: it did not finish loading")
	}
	return nil
}

// Run serves ln until ctx ends, and then ends the kernels. It closes ln.
func (i *Interpreter) Run(ctx context.Context, ln net.Listener) (err error) {
	defer func() { err = errors.Join(err, i.Close()) }()
	g, ctx := errgroup.WithContext(ctx)
	srv := &http.Server{
		Handler:           i.http,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(i.log.Handler(), slog.LevelDebug),
	}
	g.Go(func() error {
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", ln.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
	return g.Wait()
}

// Close ends the kernels. An interpreter that ran has closed itself.
func (i *Interpreter) Close() error {
	i.stop()
	i.wg.Wait()
	for _, c := range i.list() {
		c.remove()
	}
	if err := os.RemoveAll(i.cfg.Dir); err != nil {
		return fmt.Errorf("remove the kernels' files: %w", err)
	}
	return nil
}
