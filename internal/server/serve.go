// Package server makes the server of one machine: it reads the configuration, makes
// every part, connects them and runs them until the process is told to end.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/statefile"
)

// Options are what Serve is given besides the configuration. All are required.
type Options struct {
	Programs fs.FS // holds cordon-agent, the program of sandboxes
	Version  string
	Log      *slog.Logger
	Out      *os.File // gets the lines for users
}

// Serve builds the server, adopts what runs, and answers until ctx ends.
func Serve(ctx context.Context, cfg Config, o Options) (err error) {
	began := time.Now()
	name, err := holdName(ctx, locksDir, cfg.Name)
	if err != nil {
		return err
	}
	defer name.Close()
	s, err := build(ctx, cfg, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	// The listeners of the proxy and the resolver come before any rule that
	// leads to them, and both before the first request.
	if err := s.listen(ctx); err != nil {
		return err
	}
	s.warnDenied()
	if err := s.denyNames(ctx); err != nil {
		return fmt.Errorf("deny names: %w", err)
	}
	if err := s.manager.Reconcile(ctx); err != nil {
		return fmt.Errorf("adopt sandboxes: %w", err)
	}
	first, err := s.adminKey(ctx)
	if err != nil {
		return err
	}
	if err := greet(o.Out, &cfg, first); err != nil {
		return err
	}
	o.Log.Info("cordon serves", "domain", cfg.PublicDomain(), "api", cfg.APIURL(), "version", o.Version, "took", time.Since(began))
	return s.run(ctx)
}

// greet says how to use the server. The admin key is shown on a terminal only: any
// other output is kept by a journal or a log, which more people may read than the
// key's file.
func greet(out *os.File, cfg *Config, first bool) error {
	if first {
		fmt.Fprintf(out, "cordon is set up in %s: a CA, and an admin API key in %s.\n\n", cfg.StateDir, cfg.AdminKeyFile())
	}
	if isTerminal(out) {
		return cfg.PrintEnv(out)
	}
	_, err := fmt.Fprintf(out, "The admin API key is in %s: sudo cordon env prints the lines that point the SDKs at this server.\n", cfg.AdminKeyFile())
	return err
}

// PrintEnv prints what both SDKs in both languages need. The plain API needs no
// name and no certificate; sandbox URLs need both, and the server tells each
// client its domain.
func (c *Config) PrintEnv(w io.Writer) error {
	key, err := c.AdminKey()
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not exist: start the server once (sudo cordon serve)", c.AdminKeyFile())
	}
	if err != nil {
		return err
	}
	for _, sdk := range []string{"NOVITA", "E2B"} {
		fmt.Fprintf(w, "export %s_API_URL=%s\n", sdk, c.APIURL())
		fmt.Fprintf(w, "export %s_DOMAIN=%s\n", sdk, c.PublicDomain())
		fmt.Fprintf(w, "export %s_API_KEY=%s\n", sdk, key)
	}
	// The same key for cordon's own verbs, run by who may not read its file.
	fmt.Fprintf(w, "export CORDON_API_URL=%s\nexport CORDON_API_KEY=%s\n", c.APIURL(), key)
	if c.TLS.LocalCA() {
		fmt.Fprintf(w, "export NODE_EXTRA_CA_CERTS=%s   # Node\n", c.CaFile())
		fmt.Fprintf(w, "export SSL_CERT_FILE=%s   # Python and curl\n", c.HostBundle())
	}
	return nil
}

// nameWait is how long a name may stay taken after its server was killed: a process
// that it was just starting has the server's files until it is another program.
const nameWait = time.Second

// locksDir is where servers of this machine lock their names. Only root opens files in
// it, so that no other user can hold a server's name before it starts.
const locksDir = "/run/cordon-locks"

// holdName makes this the only server of its name in the network namespace: a second
// one would replace the first one's rules. The lock ends with its process (flock(2)).
func holdName(ctx context.Context, dir, name string) (io.Closer, error) {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &ns); err != nil {
		return nil, fmt.Errorf("look at the network namespace: %w", err)
	}
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, 0o700)); err != nil {
		return nil, fmt.Errorf("make the folder of locks: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%d", name, ns.Ino))
	for deadline := time.Now().Add(nameWait); ; {
		f, err := lockFile(path)
		if f != nil || err != nil {
			return f, err
		}
		if time.Now().After(deadline) {
			return nil, errs.New(errs.Conflict, "another cordon server on this machine has the name %s: stop it, or set another name for this one", name)
		}
		select {
		case <-time.After(nameWait / 20):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// nameLock is a locked file that goes when it is closed.
type nameLock struct{ *os.File }

// Close removes the file first: whoever opened it meanwhile sees that it is gone.
func (l nameLock) Close() error { return errors.Join(os.Remove(l.Name()), l.File.Close()) }

// lockFile returns nil without an error when another process has the lock.
func lockFile(path string) (io.Closer, error) {
	f, err := statefile.TryLock(path, false)
	if f == nil || err != nil {
		return nil, err
	}
	opened, openErr := f.Stat()
	named, nameErr := os.Stat(path)
	if openErr == nil && nameErr == nil && os.SameFile(opened, named) {
		return nameLock{f}, nil
	}
	return nil, f.Close() // it was removed between opening and locking: again
}

// run serves until ctx ends or a part fails. The parts that end others' flows
// end last: requests drain while the proxies still carry them.
func (s *server) run(ctx context.Context) error {
	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	below, innerCtx := errgroup.WithContext(inner)
	for name, run := range s.below() {
		below.Go(func() error { return named(name, run(innerCtx)) })
	}
	front, frontCtx := errgroup.WithContext(ctx)
	front.Go(func() error { return named("ingress", s.runIngress(frontCtx)) })
	front.Go(func() error { // a part below that fails ends the front as well
		select {
		case <-innerCtx.Done():
			return context.Cause(innerCtx)
		case <-frontCtx.Done():
			return nil
		}
	})
	err := front.Wait()
	stop()
	if ended := below.Wait(); ended != nil {
		err = ended
	}
	return err
}

func named(part string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}

// adminKey makes the admin key on the first start and keeps its secret in a file
// only root can read, so that `cordon env` can print it again. It reports
// whether this was the first start.
func (s *server) adminKey(ctx context.Context) (first bool, err error) {
	secret, err := s.cfg.AdminKey()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		first = true
	case err != nil:
		return false, err
	}
	if first {
		_, secret = auth.NewKey("admin", true, time.Now())
		if err := statefile.Replace(s.cfg.AdminKeyFile(), []byte(secret+"\n"), 0o600); err != nil {
			return false, fmt.Errorf("keep admin key: %w", err)
		}
	}
	keys, err := s.store.Keys(ctx)
	if err != nil {
		return false, err
	}
	for _, k := range keys {
		if k.Hash == auth.HashOf(secret) {
			return first, nil
		}
	}
	key := auth.KeyFor(secret, "admin", true, time.Now())
	key.Note = s.cfg.AdminKeyFile()
	return first, s.store.PutKey(ctx, key)
}

// AdminKey reads the admin key that the first start made.
func (c *Config) AdminKey() (string, error) {
	b, err := os.ReadFile(c.AdminKeyFile())
	if err != nil {
		return "", fmt.Errorf("read admin key: %w", err)
	}
	secret := strings.TrimSpace(string(b))
	if !auth.ValidKeyForm(secret) {
		return "", errs.New(errs.Invalid, "%s does not hold an API key (e2b_ and 40 hexadecimal digits): remove it and a new one is made", c.AdminKeyFile())
	}
	return secret, nil
}

// NewLogger writes what the configuration asks for to w.
func NewLogger(c LogConfig, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, errs.New(errs.Invalid, "configuration: log.level is %q: use debug, info, warn or error", c.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch c.Format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, errs.New(errs.Invalid, "configuration: log.format is %q: use text or json", c.Format)
}

// isTerminal reports whether a person reads what is written to f.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
