package main

import (
	"cmp"
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

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
)

func serveCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the server",
		Long: `Run the server: control API, ingress, egress proxy, resolver and the sandboxes.

On its first start it makes its state folder, a local CA and an admin API key.
Sandboxes outlive it: when it is started again it adopts them.`,
		Example: `  sudo cordon serve
  sudo cordon serve --config /etc/cordon/cordon.yaml
  sudo env CORDON_DOMAIN=sandbox.example.com cordon serve`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errNotRoot("serve")
			}
			cfg, err := a.config()
			if err != nil {
				return err
			}
			log, err := newLogger(cfg.Log, a.errOut)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, log, a.out)
		},
	}
}

// serve builds the server, adopts what runs, and answers until ctx ends.
func serve(ctx context.Context, cfg config, log *slog.Logger, out *os.File) (err error) {
	began := time.Now()
	name, err := holdName(ctx, locksDir, cfg.Name)
	if err != nil {
		return err
	}
	defer name.Close()
	s, err := build(ctx, cfg, log)
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
	if err := greet(out, &cfg, first); err != nil {
		return err
	}
	log.Info("cordon serves", "domain", cfg.publicDomain(), "api", cfg.apiURL(), "version", version(), "took", time.Since(began))
	return s.run(ctx)
}

// greet says how to use the server. The admin key is shown on a terminal only: any
// other output is kept by a journal or a log, which more people may read than the
// key's file.
func greet(out *os.File, cfg *config, first bool) error {
	if first {
		fmt.Fprintf(out, "cordon is set up in %s: a CA, and an admin API key in %s.\n\n", cfg.StateDir, cfg.adminKeyFile())
	}
	if isTerminal(out) {
		return printEnv(out, cfg)
	}
	_, err := fmt.Fprintf(out, "The admin API key is in %s: sudo cordon env prints the lines that point the SDKs at this server.\n", cfg.adminKeyFile())
	return err
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
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the server's name: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		opened, openErr := f.Stat()
		named, nameErr := os.Stat(path)
		if openErr == nil && nameErr == nil && os.SameFile(opened, named) {
			return nameLock{f}, nil
		}
		err = unix.EWOULDBLOCK // it was removed between opening and locking: again
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock the server's name: %w", err)
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
	secret, err := readAdminKey(&s.cfg)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		first = true
	case err != nil:
		return false, err
	}
	if first {
		_, secret = auth.NewKey("admin", true, time.Now())
		if err := writeFileSync(s.cfg.adminKeyFile(), []byte(secret+"\n"), 0o600); err != nil {
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
	key.Note = s.cfg.adminKeyFile()
	return first, s.store.PutKey(ctx, key)
}

func readAdminKey(cfg *config) (string, error) {
	b, err := os.ReadFile(cfg.adminKeyFile())
	if err != nil {
		return "", fmt.Errorf("read admin key: %w", err)
	}
	secret := strings.TrimSpace(string(b))
	if !auth.ValidKeyForm(secret) {
		return "", errs.New(errs.Invalid, "%s does not hold an API key (e2b_ and 40 hexadecimal digits): remove it and a new one is made", cfg.adminKeyFile())
	}
	return secret, nil
}

// writeFileSync writes a file that is whole or absent, also after a crash.
func writeFileSync(path string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err := cmp.Or(err, tmp.Chmod(mode), tmp.Sync()); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func newLogger(c logConfig, w io.Writer) (*slog.Logger, error) {
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
