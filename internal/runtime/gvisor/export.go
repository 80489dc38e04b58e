package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// exportSlack is what a tar stream may have over the contents of its files: a
// header for each, at a kilobyte or so.
const exportSlack = 256 << 20

// ExportUpper implements sandbox.Runtime. Files changed below a bind are not
// part of it. The stream is never longer than twice the disk quota and 256 MiB:
// a sparse file takes no room in a sandbox and as much as it likes in a stream.
// Names and links in it are the sandbox's: whoever unpacks it must not follow them.
//
// gVisor reads each file into the sentry's memory as a whole. A sandbox whose
// largest changed file does not fit into what is left of its memory ends.
func (r *Runtime) ExportUpper(ctx context.Context, id sandbox.ID, w io.Writer) error {
	return r.within(ctx, id, "export", func(c *container.Container, _ *config.Config) error {
		quota, err := rootQuota(c.Spec)
		if err != nil {
			return err
		}
		pr, pw, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("open a pipe: %w", err)
		}
		defer pr.Close()
		stop := context.AfterFunc(ctx, func() { _ = pr.SetReadDeadline(time.Now()) })
		defer stop()
		done := make(chan error, 1)
		go func() {
			defer pw.Close()
			done <- c.TarRootfsUpperLayer(pw)
		}()
		most := 2*quota + exportSlack
		n, err := io.Copy(w, io.LimitReader(pr, most+1))
		if n > most {
			err = errs.New(errs.Exhausted, "the changed files are more than %d MiB as a tar stream: are there large sparse files?", most>>20)
		}
		pr.Close() // whoever still writes gets EPIPE
		if sent := <-done; err == nil && sent != nil {
			err = r.exportFailed(ctx, id, sent)
		}
		return errors.Join(ctx.Err(), err)
	})
}

// exportFailed says whether the sandbox itself ended during its export.
func (r *Runtime) exportFailed(ctx context.Context, id sandbox.ID, err error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second) // the sentry's sockets close before it has ended
	defer cancel()
	if r.Wait(ctx, id) != nil {
		return err
	}
	return errs.Wrap(errs.Exhausted, err, "sandbox %s ended during its export: its largest changed file must fit into its memory", id)
}
