package cli

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

func networkCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "network", Short: "Change and explain what a sandbox may reach"}
	cmd.AddCommand(networkSetCommand(a), networkExplainCommand(a), networkSuggestCommand(a), networkPresetsCommand(a))
	return cmd
}

func networkSetCommand(a *app) *cobra.Command {
	var n client.Network
	var noInternet bool
	cmd := &cobra.Command{
		Use: "set <sandbox>", Short: "Replace all egress rules; without flags, everything is allowed",
		Args: cobra.ExactArgs(1),
		Example: `  cordon network set iabc… --deny-out 0.0.0.0/0 --allow-out 'example.com,*.github.com'
  cordon network set iabc… --deny-out 0.0.0.0/0 --allow-out db.example.com:5432,203.0.113.0/24
  cordon network set iabc… --deny-out 0.0.0.0/0 --allow-out preset:python
  cordon network set iabc… --no-internet`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if noInternet {
				no := false
				n.AllowInternetAccess = &no
			}
			return inFlags(a.call(cmd.Context(), http.MethodPut, "/sandboxes/"+url.PathEscape(args[0])+"/network", n, nil))
		},
	}
	cmd.Flags().BoolVar(&noInternet, "no-internet", false, "reach nothing")
	ruleFlags(cmd, &n)
	return cmd
}

func networkExplainCommand(a *app) *cobra.Command {
	var req control.ExplainRequest
	var protocol string
	cmd := &cobra.Command{
		Use:   "explain --sandbox <id> <destination>",
		Short: "Say what would happen to a connection, and which rule decides",
		Example: `  cordon network explain --sandbox i0123456789abcdefghij https://example.com
  cordon network explain --sandbox i0123456789abcdefghij 10.0.0.1:5432
  cordon network explain --sandbox i0123456789abcdefghij udp://10.0.0.1:123`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if req.SandboxID == "" {
				return errs.New(errs.Invalid, "--sandbox is missing: name the sandbox whose rules decide (cordon list)")
			}
			var err error
			if req.Destination, err = destination(args[0]); err != nil {
				return err
			}
			if scheme, _, ok := strings.Cut(args[0], "://"); ok && (scheme == "udp" || scheme == "tcp") {
				if cmd.Flags().Changed("protocol") && protocol != scheme {
					return errs.New(errs.Invalid, "destination %q and --protocol %s differ: leave one out", args[0], protocol)
				}
				protocol = scheme
			}
			req.Protocol = control.ExplainRequestProtocol(protocol)
			var out control.Explanation
			if err := a.call(cmd.Context(), http.MethodPost, "/network/explain", req, &out); err != nil {
				return err
			}
			printExplanation(a.out, req.Destination, &out)
			return nil
		},
	}
	cmd.Flags().StringVar(&req.SandboxID, "sandbox", "", "whose rules decide")
	cmd.Flags().StringVar(&req.Address, "address", "", "the IP address the name is at, if that matters")
	cmd.Flags().StringVar(&protocol, "protocol", "tcp", "tcp, udp or icmp")
	return cmd
}

// destination turns a URL into host:port; anything else is left as it is.
func destination(arg string) (string, error) {
	u, err := url.Parse(arg)
	if err != nil || u.Host == "" {
		return arg, nil
	}
	port := u.Port()
	switch {
	case port != "":
	case u.Scheme == "https", u.Scheme == "wss":
		port = "443"
	case u.Scheme == "http", u.Scheme == "ws":
		port = "80"
	default:
		return "", errs.New(errs.Invalid, "destination %q: the scheme %q has no known port, write host:port", arg, u.Scheme)
	}
	host := u.Hostname()
	if u.Host[0] == '[' {
		host = "[" + host + "]"
	}
	return host + ":" + port, nil
}

func printExplanation(w *os.File, dst string, e *control.Explanation) {
	fmt.Fprintf(w, "%-8s %s\n", e.Verdict, dst)
	fmt.Fprintf(w, "%-8s %s\n", "rule", ruleText(e.Rule))
	fmt.Fprintf(w, "%-8s %s\n", "reason", e.Reason)
	if e.Reason == string(policy.ReasonNameTCP) {
		fmt.Fprintf(w, "%-8s a rule lists the name, but rules with names are for TCP: UDP needs the address in allowOut\n", "")
	}
	if o := e.OtherProtocols; o.Verdict != "" && string(o.Verdict) != string(e.Verdict) {
		fmt.Fprintf(w, "%-8s %s: a protocol that shows no name", "", o.Verdict)
		if o.Allowing != "" {
			fmt.Fprintf(w, "; %s would allow it", o.Allowing)
		}
		fmt.Fprintln(w)
	}
	if e.Dns.Mode != "" {
		fmt.Fprintf(w, "%-8s %s (%s: %s)\n", "dns", e.Dns.Verdict, e.Dns.Mode, ruleText(e.Dns.Rule))
	}
}

func ruleText(r control.Rule) string {
	if r.Text == "" {
		return r.Id
	}
	return r.Id + " " + r.Text
}

func flowsCommand(a *app) *cobra.Command {
	var o client.EventOptions
	var follow bool
	var verdict string
	cmd := &cobra.Command{
		Use: "flows <sandbox>", Short: "Show what a sandbox tried to reach, and every verdict with its rule",
		Example: `  cordon flows iabc…
  cordon flows -f --verdict deny iabc…`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("limit") && o.Limit < 1 {
				return errs.New(errs.Invalid, "--limit is %d: use 1 or more; the server keeps 4096", o.Limit)
			}
			o.Verdict = control.NetworkEventVerdict(verdict)
			s, err := a.connect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if follow {
				for e, err := range s.Follow(cmd.Context(), o) {
					if cmd.Context().Err() != nil {
						return nil // Ctrl-C is how following ends
					}
					if err != nil {
						return err
					}
					printEvent(a.out, &e)
				}
				return nil
			}
			events, err := s.Events(cmd.Context(), o)
			for i := range events {
				printEvent(a.out, &events[i])
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as they come")
	cmd.Flags().StringVar(&verdict, "verdict", "", "only allow, deny, observe, close or fail")
	cmd.Flags().IntVar(&o.Limit, "limit", 0, "the newest so many (default 1000)")
	return cmd
}

// printEvent prints one verdict a line, for people.
func printEvent(w *os.File, e *client.Event) {
	to := e.Destination
	if e.Name != "" {
		to = e.Name + " (" + e.Destination + ")"
	}
	fmt.Fprintf(w, "%s %-7s %-5s %s  %s [%s]", e.Time.Local().Format("15:04:05.000"), e.Verdict, e.Protocol, to, ruleText(e.Rule), e.Reason)
	if e.Detail != "" {
		fmt.Fprintf(w, " %s", e.Detail)
	}
	if e.Verdict == client.Closed {
		fmt.Fprintf(w, " %d out, %d in, %.0f ms", e.BytesOut, e.BytesIn, e.DurationMs)
	}
	fmt.Fprintln(w)
}
