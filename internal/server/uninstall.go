package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network"
	"github.com/cordonhq/cordon/internal/runtime/gvisor"
	"github.com/cordonhq/cordon/internal/store"
)

// Uninstall removes what a server made in the kernel, and the folders. It ends the
// sandboxes first: while their rules are there, nothing of them leaves the machine.
func Uninstall(ctx context.Context, cfg Config, folders []string, out io.Writer) error {
	name, err := holdName(ctx, locksDir, cfg.Name)
	if errs.Is(err, errs.Conflict) {
		return errs.New(errs.Conflict, "the server %s runs: stop it first (sudo systemctl stop cordon)", cfg.Name)
	}
	if err != nil {
		return err
	}
	defer os.Remove(locksDir) // refused while another server has a lock there
	defer name.Close()
	// The folders may be a running server's of another name: it is not this one's to end.
	state, err := store.Lock(filepath.Join(cfg.StateDir, storeDir))
	switch {
	case err == nil:
		defer state.Close()
	case !errors.Is(err, fs.ErrNotExist): // no store: it never started, or was uninstalled before
		return err
	}
	if err := endSandboxes(ctx, &cfg); err != nil {
		return fmt.Errorf("end the sandboxes: %w", err)
	}
	if err := removeNetwork(ctx, &cfg); err != nil {
		return fmt.Errorf("remove rules and links: %w", err)
	}
	for _, dir := range folders {
		if dir == cfg.CacheDir && othersRun() {
			fmt.Fprintf(out, "The images in %s stay: another cordon server runs on this machine.\n", dir)
			continue
		}
		if err := unmountBelow(dir); err != nil {
			return err
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// othersRun reports whether another server holds its name, here or in another network
// namespace: a file in locksDir beside this process's own.
func othersRun() bool {
	locks, err := os.ReadDir(locksDir)
	return err != nil || len(locks) > 1
}

// endSandboxes kills what runs, adopted or not, and removes the cgroups.
func endSandboxes(ctx context.Context, cfg *Config) error {
	run, err := gvisor.New(forRuntime(cfg, slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	ids, err := run.List(ctx)
	for _, id := range ids {
		err = errors.Join(err, run.Destroy(ctx, id))
	}
	return errors.Join(err, run.Close())
}

func removeNetwork(ctx context.Context, cfg *Config) error {
	c, err := forNetwork(cfg)
	if err != nil {
		return err
	}
	flows, err := flowlog.New(flowlog.Config{})
	if err != nil {
		return err
	}
	c.Flows, c.Log = flows, slog.New(slog.DiscardHandler)
	n, err := network.New(c)
	if err != nil {
		return err
	}
	return errors.Join(n.Uninstall(ctx), n.Close())
}

// unmountBelow takes away the mounts in a folder, the latest first, so that removing it
// cannot reach into them. The list has paths without links, so dir is resolved first.
func unmountBelow(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return err
	}
	defer f.Close()
	var points []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // an overlay mount names all its layers
	for lines.Scan() {
		// proc(5): the second field, with octal escapes for space, tab, newline and backslash.
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(fields[1])
		if rel, err := filepath.Rel(dir, point); err == nil && rel != "." && filepath.IsLocal(rel) {
			points = append(points, point)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read the list of mounts: %w", err)
	}
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	return nil
}
