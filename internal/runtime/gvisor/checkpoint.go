package gvisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"
	"gvisor.dev/gvisor/pkg/state/statefile"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"
	gsandbox "gvisor.dev/gvisor/runsc/sandbox"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// checkpointMeta is what a checkpoint must agree with to be restored. gVisor
// checks more, but says so in the words of its own structures.
type checkpointMeta struct {
	Runtime string   `json:"runtime"`
	Args    []string `json:"args"` // of the agent that is in it
	Rootfs  string   `json:"rootfs"`
	Binds   []string `json:"binds"` // where inside, in order
	CPU     []string `json:"cpu"`   // features that its processes may have found and use
}

// How pages are read back. Reading around the page cache costs more where they
// are still in it, and a sandbox is resumed soon or not at all.
const (
	directRestore     = false
	backgroundRestore = true
)

const metaFile = "cordon.json"

// Checkpoint implements sandbox.Runtime. dir is made if it does not exist; it
// must not contain a checkpoint.
func (r *Runtime) Checkpoint(ctx context.Context, id sandbox.ID, dir string) error {
	return r.within(ctx, id, "checkpoint", func(c *container.Container, conf *config.Config) (err error) {
		if c.Status != container.Running && c.Status != container.Paused {
			return r.conflict(c, "checkpointed")
		}
		how, err := r.created(id) // a sentry that outlived an upgrade writes its own version's
		if err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make the checkpoint's folder: %w", err)
		}
		if _, err := os.Stat(filepath.Join(dir, metaFile)); err == nil {
			return errs.New(errs.Conflict, "folder %s contains a checkpoint already", dir)
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, removeCheckpoint(dir))
			}
		}()
		opts := gsandbox.CheckpointOpts{Compression: statefile.CompressionLevelNone, Resume: true}
		if err := c.Checkpoint(conf, dir, opts); err != nil {
			return err
		}
		meta := checkpointMeta{
			Runtime: how.Runtime, Args: c.Spec.Process.Args, Rootfs: c.Spec.Root.Path,
			Binds: bindsOf(c.Spec), CPU: cpuFeatures(),
		}
		return writeJSON(filepath.Join(dir, metaFile), meta) // last: it says that the rest is whole
	})
}

func removeCheckpoint(dir string) error {
	var failed []error
	for _, name := range []string{metaFile, checkpointfiles.StateFileName, checkpointfiles.PagesMetadataFileName, checkpointfiles.PagesFileName} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// Restore implements sandbox.Runtime. The agent goes on with the command line it
// was started with, whatever the specification says.
func (r *Runtime) Restore(ctx context.Context, s sandbox.RuntimeSpec, dir string) error {
	meta, err := readMeta(dir)
	if err != nil {
		return err
	}
	if err := r.suits(&meta, s); err != nil {
		return err
	}
	s.Args = meta.Args
	if err := r.Create(ctx, s); err != nil {
		return err
	}
	err = r.run(ctx, request{Step: stepRestore, ID: string(s.ID), Image: dir})
	if err != nil {
		return errors.Join(err, r.Destroy(context.WithoutCancel(ctx), s.ID))
	}
	return nil
}

// Restorable implements sandbox.Runtime.
func (r *Runtime) Restorable(dir string) error {
	meta, err := readMeta(dir)
	if err != nil {
		return err
	}
	return r.fits(&meta)
}

func readMeta(dir string) (meta checkpointMeta, err error) {
	b, err := os.ReadFile(filepath.Join(dir, metaFile))
	if errors.Is(err, os.ErrNotExist) {
		return meta, errs.New(errs.NotFound, "folder %s contains no checkpoint", dir)
	} else if err != nil {
		return meta, fmt.Errorf("read the checkpoint: %w", err)
	}
	if err := json.Unmarshal(b, &meta); err != nil {
		return meta, fmt.Errorf("read the checkpoint: %w", err)
	}
	return meta, nil
}

// fits says why this machine and this version cannot restore a checkpoint.
func (r *Runtime) fits(meta *checkpointMeta) error {
	if meta.Runtime != r.name {
		return errs.New(errs.Conflict, "the checkpoint was made by %s and cannot be restored by %s: create the sandbox anew", meta.Runtime, r.name)
	}
	if lacking := missing(meta.CPU, cpuFeatures()); len(lacking) > 0 {
		return errs.New(errs.Conflict, "the checkpoint was made on a CPU with features that this machine's lacks (%s): its programs may use them, so restore it on a machine that has them",
			strings.Join(lacking, ", "))
	}
	return nil
}

// suits is fits, and says what of the specification a checkpoint cannot take.
func (r *Runtime) suits(meta *checkpointMeta, s sandbox.RuntimeSpec) error {
	if err := r.fits(meta); err != nil {
		return err
	}
	binds := make([]string, len(s.Binds))
	for i, b := range s.Binds {
		binds[i] = filepath.Clean(b.Guest)
	}
	if !slices.Equal(binds, meta.Binds) {
		return errs.New(errs.Conflict, "the checkpoint was made with the host's files at %s and cannot be restored with those at %s", meta.Binds, binds)
	}
	return nil
}

// bindsOf returns where a specification shows the host's files.
func bindsOf(s *specs.Spec) []string {
	out := []string{}
	for _, m := range s.Mounts {
		if m.Type == "bind" {
			out = append(out, m.Destination)
		}
	}
	return out
}

// missing returns what of want is not in have.
func missing(want, have []string) []string {
	set := make(map[string]bool, len(have))
	for _, f := range have {
		set[f] = true
	}
	return slices.DeleteFunc(slices.Clone(want), func(f string) bool { return set[f] })
}

// cpuFeatures are the features of the first CPU, by the kernel's names. They do
// not change while the machine is up.
var cpuFeatures = sync.OnceValue(func() []string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return nil // gVisor compares its own list too
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, 64<<10))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if name = strings.TrimSpace(name); name == "flags" || name == "Features" { // x86, arm
			return strings.Fields(value)
		}
	}
	return nil
})
