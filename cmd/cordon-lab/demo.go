package main

import (
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/proving/demo"
)

func demoCommand(a *app) *cobra.Command {
	o := demo.Options{CacheDir: a.cacheDir(), Environ: a.environ, Out: a.out}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it work, in a small internet of its own",
		Long: `Start a server and a small internet in network namespaces, and play the
documentation's scenarios with the published novita-sandbox package. Nothing
leaves the machine and nothing is left behind; the image and the package are
kept for the next time.`,
		Example: `  sudo cordon-lab demo
  sudo cordon-lab demo --client go`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if !slices.Contains([]string{demo.Auto, demo.JS, demo.Go}, o.Client) {
				return errs.New(errs.Invalid, "--client is %q: use auto, js or go", o.Client)
			}
			if os.Geteuid() != 0 {
				return errNotRoot("demo")
			}
			if o.Binary, err = a.program(); err != nil {
				return err
			}
			if err = demo.Run(cmd.Context(), o); err != nil && cmd.Context().Err() != nil {
				return errInterrupted
			}
			return err
		},
	}
	cmd.Flags().StringVar(&o.Client, "client", demo.Auto, "what plays it: js (the published SDK), go (the Go client), or auto")
	return cmd
}
