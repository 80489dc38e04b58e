package main

import (
	"fmt"
	"net/http"
	"net/url"
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
	var admin bool
	create := &cobra.Command{
		Use:   "create <name>",
		Short: "Make a key and print it; it is stored hashed and cannot be shown again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var made control.Key
			err := a.call(cmd.Context(), http.MethodPost, "/keys", control.CreateKeyJSONBody{Name: args[0], Admin: admin}, &made)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, made.Key)
			return nil
		},
	}
	create.Flags().BoolVar(&admin, "admin", false, "may manage keys and see every key's sandboxes")
	return create
}

func keyListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the keys",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var keys []control.Key
			if err := a.call(cmd.Context(), http.MethodGet, "/keys", nil, &keys); err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tNAME\tSTARTS\tADMIN\tCREATED")
			for _, k := range keys {
				fmt.Fprintf(w, "%s\t%s\t%s…\t%v\t%s\n", k.Id, k.Name, k.Hint, k.Admin, k.Created.Format(time.DateTime))
			}
			return w.Flush()
		},
	}
}

func keyDeleteCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "delete <id>",
		Short: "Revoke a key at once",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), http.MethodDelete, "/keys/"+url.PathEscape(args[0]), nil, nil)
		},
	}
}
