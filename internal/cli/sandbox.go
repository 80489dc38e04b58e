package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
)

func createCommand(a *app) *cobra.Command {
	var o client.CreateOptions
	var noInternet, private bool
	cmd := &cobra.Command{
		Use:   "create [template]",
		Short: "Start a sandbox and print its ID",
		Example: `  cordon create
  cordon create --deny-out 0.0.0.0/0 --allow-out preset:python --allow-out '*.example.com'
  cordon create code-interpreter-v1 --timeout 1h --env LANG=C.UTF-8 --private`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := positive(cmd, "timeout", "idle-timeout"); err != nil {
				return err
			}
			if len(args) == 1 {
				o.Template = args[0]
			}
			no := false
			if noInternet {
				o.Network.AllowInternetAccess = &no
			}
			if private {
				o.Network.AllowPublicTraffic = &no
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Create(cmd.Context(), o)
			if err != nil {
				return inFlags(err)
			}
			fmt.Fprintln(a.out, s.ID)
			return nil
		},
	}
	f := cmd.Flags()
	f.DurationVar(&o.Timeout, "timeout", 0, "how long it lives (default 5m)")
	f.StringToStringVar(&o.Env, "env", nil, "environment of every command, K=V")
	f.StringToStringVar(&o.Metadata, "metadata", nil, "metadata, K=V")
	f.BoolVar(&noInternet, "no-internet", false, "reach nothing")
	f.BoolVar(&private, "private", false, "demand a token of who calls its ports")
	f.StringSliceVar(&o.Network.AllowIn, "allow-in", nil, "address or CIDR that may reach its ports (default: every address)")
	f.DurationVar(&o.IdleTimeout, "idle-timeout", 0, "requests move the end of its life to at least this long from then")
	f.BoolVar(&o.AutoPause, "auto-pause", false, "pause it rather than kill it when its time is over")
	f.BoolVar(&o.AutoResume, "auto-resume", false, "resume it when a request arrives")
	f.StringVar(&o.AutoResumeOn, "auto-resume-on", "", "what resumes it: any, requests (no upgrades) or header (Cordon-Wake) (default any)")
	f.StringVar(&o.Network.MaskRequestHost, "mask-host", "", "the Host its services see; ${PORT} stands for the port")
	f.IntSliceVar(&o.Network.HTTPSPorts, "https-port", nil, "port whose service speaks HTTPS itself")
	f.BoolVar(&o.Network.MaskOrigin, "mask-origin", false, "its services see an Origin of their own URL as that of --mask-host")
	ruleFlags(cmd, &o.Network)
	return cmd
}

// ruleFlags are the egress rules as flags, in the words of the API.
func ruleFlags(cmd *cobra.Command, n *client.Network) {
	f := cmd.Flags()
	f.StringSliceVar(&n.AllowOut, "allow-out", nil, "address, CIDR, domain, *.domain or preset:<name> to allow; allow wins over deny")
	f.StringSliceVar(&n.DenyOut, "deny-out", nil, "address or CIDR to deny; 0.0.0.0/0 is everything")
	f.StringVar(&n.DNS, "dns", "", "open or strict (default: strict when only domains open the resolver)")
	f.StringVar(&n.OnDeny, "on-deny", "", "explain (the default) or reset")
	f.StringVar(&n.Mode, "mode", "", "enforce or observe")
}

// inFlags adds to what the API says of rules how to write it here.
func inFlags(err error) error {
	if err != nil && strings.Contains(err.Error(), "'ALL_TRAFFIC'") {
		return fmt.Errorf("%w Add --deny-out %s", err, client.AllTraffic)
	}
	return err
}

func listCommand(a *app) *cobra.Command {
	var o client.ListOptions
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List sandboxes", Args: cobra.NoArgs,
		Example: `  cordon list
  cordon list --state paused --metadata job=42`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.List(cmd.Context(), o)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "SANDBOX\tTEMPLATE\tSTATE\tSTARTED\tENDS IN")
			for _, s := range list {
				ends := time.Until(s.Ends).Round(time.Second).String()
				if s.State == "paused" {
					ends = "-" // it has no end of time
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", s.ID, s.TemplateID, s.State, s.Started.Local().Format(time.DateTime), ends)
			}
			return w.Flush()
		},
	}
	cmd.Flags().StringToStringVar(&o.Metadata, "metadata", nil, "only those with all of these, K=V")
	cmd.Flags().StringVar(&o.State, "state", "", "only running or paused")
	return cmd
}

func killCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "kill <sandbox>...", Short: "End sandboxes and free all they hold", Args: cobra.MinimumNArgs(1),
		Example: `  cordon kill iabc… idef…`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var failed []error // one that is gone keeps none of the others alive
			for _, id := range args {
				failed = append(failed, a.call(cmd.Context(), http.MethodDelete, "/sandboxes/"+url.PathEscape(id), nil, nil))
			}
			return errors.Join(failed...)
		},
	}
}

// exitError carries a command's exit code out of main.
type exitError int

func (e exitError) Error() string { return "exit status " + strconv.Itoa(int(e)) }

func execCommand(a *app) *cobra.Command {
	var o client.RunOptions
	cmd := &cobra.Command{
		Use:   "exec <sandbox> <command> [argument]...",
		Short: "Run a command in a sandbox",
		Long: `Run a command in a sandbox; its output, errors and exit code are exec's. A command
that a signal ended has 128 and the signal's number, as in a shell.

A command alone is a line for the sandbox's shell. With arguments it is a program,
which gets each of them as it is. Flags of exec's own come before the sandbox; a --
behind it is left out.`,
		Example: `  cordon exec iabc… 'cd /tmp && ls | wc -l'
  cordon exec iabc… -- ls -la /tmp
  cordon exec -i iabc… tar -x -C /tmp < files.tar
  cordon exec --user root --dir /etc iabc… cat shadow`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			words := args[1:]
			if words[0] == "--" {
				words = words[1:]
			}
			if len(words) == 0 {
				return errs.New(errs.Invalid, "cordon exec takes a command after --: see cordon exec --help")
			}
			s, err := a.connect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			o.Stdout, o.Stderr = a.out, a.errOut
			res, err := runIn(cmd.Context(), s, shellLine(words), o, a.in)
			if err != nil {
				return err
			}
			if code := exitCode(res); code != 0 {
				return exitError(code)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows is the program's
	f.StringVar(&o.User, "user", "", "who runs it (default: the template's user)")
	f.StringVar(&o.Dir, "dir", "", "where it runs")
	f.BoolVarP(&o.Stdin, "interactive", "i", false, "pass standard input to it")
	return cmd
}

// runIn runs a command in a sandbox to its end, with in as its input where o.Stdin is
// set.
func runIn(ctx context.Context, s *client.Sandbox, line string, o client.RunOptions, in io.Reader) (*client.Result, error) {
	p, err := s.Commands.Start(ctx, line, o)
	if err != nil {
		return nil, err
	}
	fed := make(chan error, 1)
	if o.Stdin {
		// It may be reading when the command ends, and ends with this process then.
		go func() { fed <- feed(ctx, p, in) }()
	}
	res, err := p.Wait(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case err := <-fed:
		if err != nil {
			return nil, err
		}
	default:
	}
	return res, nil
}

// feed passes input to a command until it ends, or the command takes no more: what it
// did not read before it closed its input or ended is not missed.
func feed(ctx context.Context, p *client.Process, in io.Reader) error {
	b := make([]byte, 64<<10)
	for {
		n, err := in.Read(b)
		if n > 0 && p.Send(ctx, b[:n]) != nil {
			return nil
		}
		if err == nil {
			continue
		}
		_ = p.CloseStdin(ctx) // one that has ended has none
		if errors.Is(err, io.EOF) {
			return nil
		}
		return fmt.Errorf("read standard input: %w", err)
	}
}

// exitCode is a command's exit code as shells and container engines report it.
func exitCode(res *client.Result) int {
	name, signalled := strings.CutPrefix(res.Status, "signal: ")
	if !signalled {
		return res.ExitCode
	}
	for n := syscall.Signal(1); n < 65; n++ {
		if n.String() == name {
			return 128 + int(n)
		}
	}
	return 128
}

// shellLine is what the sandbox's shell reads to run a command: one word is a line
// already, several are a program and its arguments.
func shellLine(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

// connect finds a sandbox without changing how long it lives by more than the
// least a connect may ask for.
func (a *app) connect(ctx context.Context, id string) (*client.Sandbox, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	return c.Connect(ctx, id, time.Second)
}
