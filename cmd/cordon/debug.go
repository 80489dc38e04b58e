package main

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/runtime/gvisor"
)

func debugCommand(a *app) *cobra.Command {
	debug := &cobra.Command{Use: "debug", Short: "Look under the hood"}
	debug.AddCommand(&cobra.Command{
		Use:                "runsc [arguments]",
		Short:              "Run gVisor's own command line on this server's sandboxes, e.g. debug runsc list",
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			return gvisor.RunCLI(filepath.Join(cfg.RunDir, "gvisor"), args, os.Environ())
		},
	})
	return debug
}
