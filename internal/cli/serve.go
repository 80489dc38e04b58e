package cli

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/server"
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
			log, err := server.NewLogger(cfg.Log, a.errOut)
			if err != nil {
				return err
			}
			return server.Serve(cmd.Context(), cfg, server.Options{Programs: a.programs, Version: version(), Log: log, Out: a.out})
		},
	}
}
