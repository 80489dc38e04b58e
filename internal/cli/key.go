package cli

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/api/gen/control"
)

func keyCommand(a *app) *cobra.Command {
	key := &cobra.Command{Use: "key", Short: "Manage API keys"}
	key.AddCommand(keyCreateCommand(a), keyListCommand(a), keyDeleteCommand(a))
	return key
}

func keyCreateCommand(a *app) *cobra.Command {
	var o control.CreateKeyJSONBody
	create := &cobra.Command{
		Use:   "create <name>",
		Short: "Make a key and print it; it is stored hashed and cannot be shown again",
		Example: `  cordon key create alice
  cordon key create ci --max-sandboxes 20 --max-paused 5`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var made control.Key
			o.Name = args[0]
			if err := a.call(cmd.Context(), http.MethodPost, "/keys", o, &made); err != nil {
				return err
			}
			fmt.Fprintln(a.out, made.Key)
			return nil
		},
	}
	f := create.Flags()
	f.BoolVar(&o.Admin, "admin", false, "may manage keys and see every key's sandboxes")
	f.IntVar(&o.MaxSandboxes, "max-sandboxes", 0, "how many of its sandboxes may run (default: sandboxes.max_per_key)")
	f.IntVar(&o.MaxPaused, "max-paused", 0, "how many paused ones it may keep (default: sandboxes.max_paused_per_key)")
	return create
}

func keyListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the keys",
		Example: `  cordon key list`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var keys []control.Key
			if err := a.call(cmd.Context(), http.MethodGet, "/keys", nil, &keys); err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tNAME\tSTARTS\tADMIN\tMAX SANDBOXES\tMAX PAUSED\tCREATED")
			for _, k := range keys {
				fmt.Fprintf(w, "%s\t%s\t%s…\t%v\t%s\t%s\t%s\n", k.Id, k.Name, k.Hint, k.Admin, orDefault(k.MaxSandboxes), orDefault(k.MaxPaused), k.Created.Format(time.DateTime))
			}
			return w.Flush()
		},
	}
}

// orDefault shows a limit of a key.
func orDefault(n int) string {
	if n == 0 {
		return "default"
	}
	return strconv.Itoa(n)
}

func keyDeleteCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "delete <id>",
		Short:   "Revoke a key at once",
		Example: `  cordon key delete k0123456789abcdef     # the ID, as cordon key list shows it`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), http.MethodDelete, "/keys/"+url.PathEscape(args[0]), nil, nil)
		},
	}
}
