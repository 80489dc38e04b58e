package cli

import (
	"context"
	"fmt"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
)

func urlCommand(a *app) *cobra.Command {
	var signed bool
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "url <sandbox> <port>",
		Short: "Print the public URL of a port, or make a signed one",
		Long: `Print the public URL of a port. With --signed make a URL that opens one port of a
private sandbox for whoever has it, until its time is over or it is revoked.`,
		Example: `  cordon url isd2… 3000
  cordon url --signed --ttl 1h isd2… 3000
  cordon url list isd2…
  cordon url revoke isd2… --all`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := portArg(args[1])
			if err != nil {
				return err
			}
			if !signed {
				if cmd.Flags().Changed("ttl") {
					return errs.New(errs.Invalid, "--ttl is of a signed URL: add --signed")
				}
				s, err := a.connect(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				fmt.Fprintln(a.out, "https://"+s.Host(port))
				return nil
			}
			if err := positive(cmd, "ttl"); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			u, err := c.SignURL(cmd.Context(), args[0], port, ttl)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, u.URL)
			return nil
		},
	}
	cmd.Flags().BoolVar(&signed, "signed", false, "make a URL that opens the port without a token")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long a signed URL opens, at most 168h")
	cmd.AddCommand(urlListCommand(a), urlRevokeCommand(a))
	return cmd
}

// portArg reads the port of a command line.
func portArg(s string) (int, error) {
	port, err := strconv.ParseUint(s, 10, 16)
	if err != nil || port == 0 {
		return 0, errs.New(errs.Invalid, "port %q: use a number from 1 to 65535", s)
	}
	return int(port), nil
}

func urlListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list <sandbox>", Aliases: []string{"ls"}, Short: "List the signed URLs in force", Args: cobra.ExactArgs(1),
		Example: `  cordon url list iabc…`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.SignedURLs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tPORT\tCREATED\tEXPIRES IN")
			for _, u := range list {
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", u.ID, u.Port, u.Created.Local().Format(time.DateTime), time.Until(u.Expires).Round(time.Second))
			}
			return w.Flush()
		},
	}
}

func urlRevokeCommand(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "revoke <sandbox> [<url ID>...]",
		Short: "Revoke signed URLs at once; what is open through them is cut",
		Example: `  cordon url revoke iabc… 6glbf4pwndmv6rr4
  cordon url revoke iabc… --all`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 1) {
				return errs.New(errs.Invalid, "name the URLs' IDs (cordon url list %s), or give --all", args[0])
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if all {
				return c.RevokeURLs(cmd.Context(), args[0])
			}
			return revokeEach(cmd.Context(), c, args[0], args[1:])
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all of the sandbox's")
	return cmd
}

func revokeEach(ctx context.Context, c *client.Client, sandbox string, ids []string) error {
	for _, id := range ids {
		if err := c.RevokeURL(ctx, sandbox, id); err != nil {
			return err
		}
	}
	return nil
}
