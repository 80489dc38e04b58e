package cli

import (
	"fmt"
	"net/url"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/api/gen/control"
)

func domainCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "domain", Short: "Bind domains of your own to a port of a sandbox",
		Example: `  cordon domain add i2v8k… app.example.com 3000
  cordon domain list i2v8k…
  cordon domain remove i2v8k… app.example.com`,
	}
	at := func(id string, more ...string) string {
		steps := []string{"/sandboxes", url.PathEscape(id), "domains"}
		for _, m := range more {
			steps = append(steps, url.PathEscape(m))
		}
		return strings.Join(steps, "/")
	}
	cmd.AddCommand(
		&cobra.Command{
			Use: "add <sandbox> <domain> <port>", Short: "Make a domain lead to a port until the sandbox ends", Args: cobra.ExactArgs(3),
			Example: `  cordon domain add iabc… app.example.com 3000`,
			RunE: func(cmd *cobra.Command, args []string) error {
				port, err := portArg(args[2])
				if err != nil {
					return err
				}
				var d control.SandboxDomain
				if err := a.call(cmd.Context(), "PUT", at(args[0], args[1]), map[string]int{"port": port}, &d); err != nil {
					return err
				}
				fmt.Fprintln(a.out, "https://"+d.Domain)
				return nil
			},
		},
		&cobra.Command{
			Use: "list <sandbox>", Aliases: []string{"ls"}, Short: "List the domains of a sandbox", Args: cobra.ExactArgs(1),
			Example: `  cordon domain list iabc…`,
			RunE: func(cmd *cobra.Command, args []string) error {
				var list []control.SandboxDomain
				if err := a.call(cmd.Context(), "GET", at(args[0]), nil, &list); err != nil {
					return err
				}
				w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "DOMAIN\tPORT")
				for _, d := range list {
					fmt.Fprintf(w, "%s\t%d\n", d.Domain, d.Port)
				}
				return w.Flush()
			},
		},
		&cobra.Command{
			Use: "remove <sandbox> <domain>", Aliases: []string{"rm"}, Short: "Make a domain free again", Args: cobra.ExactArgs(2),
			Example: `  cordon domain remove iabc… app.example.com`,
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.call(cmd.Context(), "DELETE", at(args[0], args[1]), nil, nil)
			},
		},
	)
	return cmd
}
