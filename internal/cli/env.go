package cli

import "github.com/spf13/cobra"

func envCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "env",
		Short:   "Print the lines that point the SDKs at this server",
		Long:    `Print the lines that point the SDKs, and cordon's own command line, at this server.`,
		Example: `  eval "$(sudo cordon env)"`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			return cfg.PrintEnv(a.out)
		},
	}
}
