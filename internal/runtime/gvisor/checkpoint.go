package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
	Args    []string `json:"args"`
	Rootfs  string   `json:"rootfs"`
}

const metaFile = "cordon.json"

// Checkpoint implements sandbox.Runtime. dir is made if it does not exist; it
// must not contain a checkpoint.
func (r *Runtime) Checkpoint(ctx context.Context, id sandbox.ID, dir string, leaveRunning bool) error {
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
		opts := gsandbox.CheckpointOpts{Compression: statefile.CompressionLevelNone, Resume: leaveRunning}
		if err := c.Checkpoint(conf, dir, opts); err != nil {
			return err
		}
		meta := checkpointMeta{Runtime: how.Runtime, Args: c.Spec.Process.Args, Rootfs: c.Spec.Root.Path}
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

// Restore implements sandbox.Runtime.
func (r *Runtime) Restore(ctx context.Context, s sandbox.RuntimeSpec, dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, metaFile))
	if errors.Is(err, os.ErrNotExist) {
		return errs.New(errs.NotFound, "folder %s contains no checkpoint", dir)
	} else if err != nil {
		return fmt.Errorf("read the checkpoint: %w", err)
	}
	var meta checkpointMeta
	if err := json.Unmarshal(b, &meta); err != nil {
		return fmt.Errorf("read the checkpoint: %w", err)
	}
	if meta.Runtime != r.name {
		return errs.New(errs.Conflict, "the checkpoint was made by %s and cannot be restored by %s: create the sandbox anew", meta.Runtime, r.name)
	}
	if err := r.Create(ctx, s); err != nil {
		return err
	}
	err = r.run(ctx, request{Step: stepRestore, ID: string(s.ID), Image: dir})
	if err != nil {
		return errors.Join(err, r.Destroy(context.WithoutCancel(ctx), s.ID))
	}
	return nil
}
