package cli

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
)

func pauseCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "pause <sandbox>...", Short: "Put sandboxes to disk, memory and processes included", Args: cobra.MinimumNArgs(1),
		Example: `  cordon pause iabc…`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var failed []error // one that cannot be paused keeps none of the others running
			for _, id := range args {
				failed = append(failed, a.call(cmd.Context(), http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/pause", nil, nil))
			}
			return errors.Join(failed...)
		},
	}
}

func resumeCommand(a *app) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "resume <sandbox>", Short: "Bring a paused sandbox back, or make sure that one runs long enough", Args: cobra.ExactArgs(1),
		Example: `  cordon resume --timeout 1h iabc…`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := positive(cmd, "timeout"); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			_, err = c.Connect(cmd.Context(), args[0], timeout)
			return err
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "how long it lives at least, from now (default 5m)")
	return cmd
}

func forkCommand(a *app) *cobra.Command {
	var count int
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "fork <sandbox>", Short: "Start copies of a running sandbox and print their IDs", Args: cobra.ExactArgs(1),
		Example: `  cordon fork --count 5 iabc…`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := positive(cmd, "timeout"); err != nil {
				return err
			}
			in := map[string]int64{"count": int64(count)}
			if timeout > 0 {
				in["timeout"] = int64(timeout.Round(time.Second) / time.Second)
			}
			var out []control.Forked
			if err := a.call(cmd.Context(), http.MethodPost, "/sandboxes/"+url.PathEscape(args[0])+"/fork", in, &out); err != nil {
				return err
			}
			var failed []error
			for i := range out {
				if e := out[i].Error; e != (control.Error{}) {
					failed = append(failed, fmt.Errorf("copy %d of %d: %s", i+1, len(out), e.Message))
					continue
				}
				fmt.Fprintln(a.out, out[i].Sandbox.SandboxID)
			}
			return errors.Join(failed...)
		},
	}
	f := cmd.Flags()
	f.IntVar(&count, "count", 1, "how many copies, up to 100")
	f.DurationVar(&timeout, "timeout", 0, "how long they live (default 5m)")
	return cmd
}

func snapshotCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "snapshot", Short: "Store sandboxes as templates that others start from",
		Example: `  cordon snapshot create iabc… ready
  cordon create ready
  cordon snapshot remove ready`,
	}
	cmd.AddCommand(snapshotCreateCommand(a), snapshotListCommand(a), &cobra.Command{
		Use: "remove <snapshot>", Aliases: []string{"rm"}, Short: "Remove a snapshot; sandboxes made from it go on", Args: cobra.ExactArgs(1),
		Example: `  cordon snapshot remove ready`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.DeleteSnapshot(cmd.Context(), args[0])
		},
	})
	return cmd
}

func snapshotCreateCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "create <sandbox> [name]", Short: "Store a sandbox, which goes on, and print the snapshot's ID", Args: cobra.RangeArgs(1, 2),
		Example: `  cordon snapshot create iabc… ready`,
		RunE: func(cmd *cobra.Command, args []string) error {
			in := map[string]string{}
			if len(args) == 2 {
				in["name"] = args[1]
			}
			var out control.Snapshot
			if err := a.call(cmd.Context(), http.MethodPost, "/sandboxes/"+url.PathEscape(args[0])+"/snapshots", in, &out); err != nil {
				return err
			}
			fmt.Fprintln(a.out, out.SnapshotID)
			return nil
		},
	}
}

func snapshotListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list [sandbox]", Aliases: []string{"ls"}, Short: "List snapshots, all or those of a sandbox", Args: cobra.MaximumNArgs(1),
		Example: `  cordon snapshot list`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Snapshots(cmd.Context(), strings.Join(args, ""))
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "SNAPSHOT\tNAMES")
			for _, s := range list {
				fmt.Fprintf(w, "%s\t%s\n", s.ID, strings.Join(s.Names, " "))
			}
			return w.Flush()
		},
	}
}

// positive refuses durations that were given and are not above nothing: to the
// API they would mean its default.
func positive(cmd *cobra.Command, names ...string) error {
	for _, name := range names {
		if d, err := cmd.Flags().GetDuration(name); err != nil || cmd.Flags().Changed(name) && d <= 0 {
			return errs.New(errs.Invalid, "--%s is %v: use a duration such as 90s or 24h", name, d)
		}
	}
	return nil
}
