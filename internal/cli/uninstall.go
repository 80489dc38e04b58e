package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/server"
)

func uninstallCommand(a *app) *cobra.Command {
	var yes, keep bool
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Remove everything a server made on this machine",
		Long: `uninstall ends the sandboxes of this configuration's server and removes what the
server made: its rules, links and namespaces in the kernel, its cgroups, and its
folders with records, keys, paused sandboxes, snapshots and images. The server must
not run. What another cordon server on the machine needs stays. Without --yes it says
what it would remove and changes nothing.`,
		Example: `  sudo systemctl disable --now cordon && sudo cordon uninstall --yes
  sudo cordon uninstall --yes --keep-data     keep records, snapshots and images`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errs.New(errs.Invalid, "uninstall needs root: run sudo cordon uninstall")
			}
			folders := []string{cfg.RunDir}
			if !keep {
				folders = append(folders, cfg.StateDir, cfg.CacheDir)
			}
			if !yes {
				fmt.Fprintf(a.out, "This would end all sandboxes of the server %q and remove its rules, links and cgroups, and %s.\nAdd --yes to do it.\n",
					cfg.Name, strings.Join(folders, ", "))
				return nil
			}
			return server.Uninstall(cmd.Context(), cfg, folders, a.out)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.Flags().BoolVar(&keep, "keep-data", false, "keep the folders with records, keys, snapshots (state_dir) and images (cache_dir)")
	return cmd
}
