package cli

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/runtime/gvisor"
)

func debugCommand(a *app) *cobra.Command {
	debug := &cobra.Command{Use: "debug", Short: "Look under the hood"}
	debug.AddCommand(&cobra.Command{
		Use:                "runsc [arguments]",
		Short:              "Run gVisor's own command line on this server's sandboxes, e.g. debug runsc list",
		Example:            `  sudo cordon debug runsc list`,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			args = a.ownConfig(args)
			cfg, err := a.config()
			if err != nil {
				return err
			}
			return gvisor.RunCLI(filepath.Join(cfg.RunDir, "gvisor"), args, os.Environ())
		},
	})
	return debug
}

// ownConfig takes cordon's own flag away from what is runsc's: flags of a verb that
// parses none are left in front of its arguments.
func (a *app) ownConfig(args []string) []string {
	if len(args) == 0 {
		return args
	}
	if file, ok := strings.CutPrefix(args[0], "--config="); ok {
		a.configFile = file
		return args[1:]
	}
	if args[0] == "--config" && len(args) > 1 {
		a.configFile = args[1]
		return args[2:]
	}
	return args
}
