// Package cli is the command line of cordon, a file for each verb.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/cli/usage"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/server"
)

// Main runs the command line and returns its exit code. programs holds cordon-agent,
// which the server puts into sandboxes.
func Main(programs fs.FS) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot(&app{programs: programs, environ: environMap(os.Environ()), in: os.Stdin, out: os.Stdout, errOut: os.Stderr})
	root.SetArgs(os.Args[1:])
	if err := root.ExecuteContext(ctx); err != nil {
		if exit, ok := errors.AsType[exitError](err); ok { // of a command in a sandbox, which said what it had to say
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

// Command returns the tree of verbs, for what describes them: man pages. Its verbs have
// no agent to install and no environment.
func Command() *cobra.Command {
	return newRoot(&app{in: os.Stdin, out: os.Stdout, errOut: os.Stderr})
}

// app is what every verb shares.
type app struct {
	programs   fs.FS
	environ    map[string]string
	configFile string
	in         *os.File
	out        *os.File
	errOut     *os.File
}

func (a *app) config() (server.Config, error) {
	return server.LoadConfig(a.configFile, a.environ)
}

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
	root.PersistentFlags().StringVar(&a.configFile, "config", "", "configuration file (default "+server.DefaultConfigFile+" if it exists)")
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

// errNotRoot is the one sentence for commands that change the machine.
func errNotRoot(command string) error {
	return fmt.Errorf("cordon %s needs root, for namespaces, mounts and nftables: run it with sudo", command)
}
