// Command cordon-lab shows what cordon does and proves it: the demo, the
// conformance suite and the benchmarks, each with a server of its own in network
// namespaces without a link to the world.
package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/cli/usage"
	"github.com/cordonhq/cordon/internal/errs"
)

// embedded holds the probe that `make build` put there.
//
//go:embed all:embedded
var embedded embed.FS

// errInterrupted ends the program as a shell says it of Ctrl-C.
var errInterrupted = errors.New("interrupted")

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := newRoot(&app{environ: environMap(os.Environ()), out: os.Stdout, errOut: os.Stderr}).ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errInterrupted):
		return 130
	}
	fmt.Fprintln(os.Stderr, "cordon-lab:", err)
	if errs.Is(err, errs.Invalid) {
		return 2
	}
	return 1
}

// app is what every verb shares.
type app struct {
	environ map[string]string
	binary  string // the cordon program; empty: beside this one
	out     *os.File
	errOut  *os.File
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "cordon-lab",
		Short: "See cordon work, try to get round it, measure it",
		Long: `cordon-lab runs the cordon program beside it in network namespaces without a link
to the world. The machine's own network is not touched.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&a.binary, "cordon", "", "the cordon program to run (default the one beside this program)")
	root.AddCommand(demoCommand(a), conformanceCommand(a), benchCommand(a), benchProcessCommand())
	usage.Explain(root)
	return root
}

// program is the path of the cordon program.
func (a *app) program() (string, error) {
	if a.binary != "" {
		return filepath.Abs(a.binary) // servers start in other folders
	}
	own, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(own), "cordon")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("no cordon program beside this one: build it with make build, or name it with --cordon: %w", err)
	}
	return path, nil
}

// cacheDir is where the machine's images are, as for a server.
func (a *app) cacheDir() string {
	if dir := a.environ["CORDON_CACHE_DIR"]; dir != "" {
		return dir
	}
	return "/var/cache/cordon"
}

// errNotRoot is the one sentence for verbs that change the machine.
func errNotRoot(verb string) error {
	return fmt.Errorf("cordon-lab %s needs root, for namespaces, mounts and nftables: run it with sudo", verb)
}

// environMap turns os.Environ's form into a map.
func environMap(environ []string) map[string]string {
	out := make(map[string]string, len(environ))
	for _, kv := range environ {
		if k, v, ok := strings.Cut(kv, "="); ok {
			out[k] = v
		}
	}
	return out
}
