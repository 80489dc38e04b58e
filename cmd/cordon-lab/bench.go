package main

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/image"
	"github.com/cordonhq/cordon/proving/bench"
)

func benchCommand(a *app) *cobra.Command {
	var o bench.Options
	var versus string
	cmd := &cobra.Command{
		Use:   "bench [" + strings.Join(bench.Tables(), "|") + "|all]...",
		Short: "Measure cordon on this machine, side by side with what else is installed",
		Long: `Measure cordon on this machine, side by side with what else is installed.

Everything happens in namespaces without an uplink; the machine's network is not
touched. Figures are medians over rounds, with the range of the
middle half; they are compared with the first column, in turns within one run. See docs/performance.md.`,
		Example: `  sudo cordon-lab bench egress
  sudo cordon-lab bench all --rounds 21 --each 300ms
  sudo cordon-lab bench egress ingress --vs /tmp/cordon-lab-before`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if os.Geteuid() != 0 {
				return errNotRoot("bench")
			}
			server, err := a.program()
			if err != nil {
				return err
			}
			for _, table := range args {
				if table != "all" {
					o.Tables = append(o.Tables, table)
				}
			}
			if len(args) > len(o.Tables) {
				o.Tables = nil // all of them
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Self, o.Server, o.CacheDir = []string{self, benchProcess}, []string{server}, a.cacheDir()
			if versus != "" {
				o.Versus = []string{versus, benchProcess}
			}
			if err := builtTemplates(cmd.Context(), &o); err != nil {
				return err
			}
			return bench.Run(cmd.Context(), o, a.out, a.errOut)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Rounds, "rounds", 0, "how often each thing is measured (default 11)")
	f.DurationVar(&o.Each, "each", 0, "how long one measurement takes (default 100ms)")
	f.IntVar(&o.Sandboxes, "sandboxes", 0, "sandboxes registered beside the measured one (default 1000)")
	f.IntVar(&o.Flows, "flows", 0, "idle connections when memory is measured (default 10000, or what the limit on open files allows)")
	f.IntVar(&o.Starts, "starts", 0, "sandboxes started one by one (default 30)")
	f.IntVar(&o.Burst, "burst", 0, "sandboxes started ten at a time (default 100)")
	f.StringVar(&versus, "vs", "", "another build's program with a bench; egress and ingress are compared with its instead of with peers")
	f.StringArrayVar(&o.Rows, "rows", nil, "of egress with --vs: only rows whose names contain one of these (\"proxy path: new TLS\")")
	f.StringVar(&o.Template, "template", "", "what sandboxes start from (default base, or host while that is not built)")
	return cmd
}

// builtTemplates chooses from the templates whose images are there: the bench has
// no network to build one.
func builtTemplates(ctx context.Context, o *bench.Options) error {
	state, err := os.MkdirTemp("", "cordon-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	images, err := image.New(image.Config{Dir: filepath.Join(o.CacheDir, "images"), StateDir: state, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer images.Close()
	list, err := images.List(ctx)
	if err != nil {
		return err
	}
	usual := "host"
	for _, t := range list {
		switch {
		case !t.Built:
		case t.Name == "base":
			usual = t.Name
		case t.Name == "code-interpreter-v1":
			o.Interpreter = t.Name
		}
	}
	o.Template = cmp.Or(o.Template, usual)
	return nil
}

const benchProcess = "bench-process"

// benchProcessCommand is one of the processes that the bench consists of.
func benchProcessCommand() *cobra.Command {
	return &cobra.Command{
		Use: benchProcess + " <role> <config>", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if os.Geteuid() != 0 {
				return errs.New(errs.Invalid, "%s is started by cordon-lab bench", benchProcess)
			}
			return bench.Process(cmd.Context(), args[0], args[1])
		},
	}
}
