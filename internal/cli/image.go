package cli

import (
	"fmt"
	"log/slog"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/image"
)

func imageCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Build, import and list the images sandboxes start from"}
	cmd.AddCommand(
		&cobra.Command{
			Use: "build <template>", Short: "Build a template's image from Debian packages, unless it is built",
			Example: `  sudo cordon image build code-interpreter-v1`,
			Args:    cobra.ExactArgs(1),
			RunE: a.withImages("image build", func(cmd *cobra.Command, images *image.Library, args []string) error {
				made, err := images.Build(cmd.Context(), args[0])
				if err == nil {
					fmt.Fprintf(a.out, "%s is built: %s\n", args[0], made.Contents)
				}
				return err
			}),
		},
		&cobra.Command{
			Use: "import <reference> <name>", Short: "Make a template of an OCI image in a registry or a local layout",
			Example: `  sudo cordon image import docker.io/library/python:3.12-slim python
  sudo cordon image import ./layout my-tools`,
			Args: cobra.ExactArgs(2),
			RunE: a.withImages("image import", func(cmd *cobra.Command, images *image.Library, args []string) error {
				made, err := images.Import(cmd.Context(), args[0], args[1])
				if err == nil {
					fmt.Fprintf(a.out, "%s is imported: %s\n", args[1], made.Contents)
				}
				return err
			}),
		},
		&cobra.Command{
			Use: "verify <template>", Short: "Compare an image's files with what was built",
			Example: `  sudo cordon image verify base`,
			Args:    cobra.ExactArgs(1),
			RunE: a.withImages("image verify", func(cmd *cobra.Command, images *image.Library, args []string) error {
				return images.Verify(cmd.Context(), args[0])
			}),
		},
		&cobra.Command{
			Use: "remove <template>", Short: "Remove a built image; sandboxes that run from it must be gone",
			Example: `  sudo cordon image remove python`,
			Args:    cobra.ExactArgs(1),
			RunE: a.withImages("image remove", func(cmd *cobra.Command, images *image.Library, args []string) error {
				return images.Remove(cmd.Context(), args[0])
			}),
		},
		&cobra.Command{
			Use: "list", Short: "List the templates",
			Example: `  sudo cordon image list`,
			Args:    cobra.NoArgs,
			RunE: a.withImages("image list", func(cmd *cobra.Command, images *image.Library, _ []string) error {
				return a.printImages(cmd, images)
			}),
		},
	)
	return cmd
}

// withImages runs a verb on the image store; builds show their steps.
func (a *app) withImages(verb string, run func(*cobra.Command, *image.Library, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if os.Geteuid() != 0 {
			return errNotRoot(verb)
		}
		cfg, err := a.config()
		if err != nil {
			return err
		}
		images, err := cfg.Images(a.errOut, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		defer images.Close()
		if err = run(cmd, images, args); errs.Is(err, errs.NotFound) {
			return fmt.Errorf("%w: cordon image list shows the templates, cordon image import makes one", err)
		}
		return err
	}
}

func (a *app) printImages(cmd *cobra.Command, images *image.Library) error {
	list, err := images.List(cmd.Context())
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TEMPLATE\tKIND\tBUILT\tMIB\tDIGEST")
	for _, t := range list {
		fmt.Fprintf(w, "%s\t%s\t%v\t%d\t%s\n", t.Name, t.Kind, t.Built, t.Bytes>>20, t.Digest)
	}
	return w.Flush()
}
