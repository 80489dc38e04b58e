// Command cordon is the server and its command line: sandboxes for untrusted
// code, each behind its own network policy.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/cli/usage"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/runtime/gvisor"
)

func main() {
	stopSampling()
	// Before anything else: this binary is also gVisor's sentry, gofer and
	// helpers, and is started again under their names.
	gvisor.Dispatch()
	os.Exit(run())
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot(&app{environ: environMap(os.Environ()), in: os.Stdin, out: os.Stdout, errOut: os.Stderr})
	root.SetArgs(os.Args[1:])
	if err := root.ExecuteContext(ctx); err != nil {
		var exit exitError
		if errors.As(err, &exit) { // of a command in a sandbox, which said what it had to say
			return int(exit)
		}
		fmt.Fprintln(os.Stderr, "cordon:", err)
		if errs.Is(err, errs.Invalid) {
			return 2
		}
		return 1
	}
	return 0
}

// app is what every verb shares.
type app struct {
	environ    map[string]string
	configFile string
	in         *os.File
	out        *os.File
	errOut     *os.File
}

func (a *app) config() (config, error) { return loadConfig(a.configFile, a.environ) }

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "cordon",
		Short: "Sandboxes for untrusted code, each behind its own network policy",
		Long: `cordon runs sandboxes for AI agents and untrusted code on one Linux machine. The
published novita-sandbox and e2b SDKs work against it unmodified.

  sudo cordon serve          run the server
  cordon env                 print the lines that point an SDK at it
  cordon create              make a sandbox, and print its name`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version(),
	}
	root.PersistentFlags().StringVar(&a.configFile, "config", "", "configuration file (default "+defaultConfigFile+" if it exists)")
	root.AddCommand(
		serveCommand(a), envCommand(a), doctorCommand(a),
		keyCommand(a), imageCommand(a), debugCommand(a),
		createCommand(a), listCommand(a), killCommand(a), pauseCommand(a), resumeCommand(a), forkCommand(a),
		snapshotCommand(a), execCommand(a), urlCommand(a), forwardCommand(a),
		domainCommand(a), trustCommand(a), networkCommand(a), flowsCommand(a),
		versionCommand(a), uninstallCommand(a),
	)
	usage.Explain(root)
	return root
}
