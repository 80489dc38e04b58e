package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// allEvents is more than a server keeps of one sandbox.
const allEvents = 1 << 20

func networkSuggestCommand(a *app) *cobra.Command {
	var form string
	var wildcards, presets, denied bool
	cmd := &cobra.Command{
		Use:   "suggest <sandbox>",
		Short: "Print the smallest rules that allow what a sandbox was seen to reach",
		Long: `Print the smallest rules that allow what a sandbox was seen to reach.

Start a sandbox in mode "observe", let it do its work, and ask for the rules that
would have been enough: names where a name was shown or asked for, addresses
otherwise. What is suggested is what was seen, good or bad: read it before use.`,
		Example: `  cordon network suggest i0123456789abcdefghij
  cordon network suggest --form json i0123456789abcdefghij > rules.json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			show, ok := forms[form]
			if !ok {
				return errs.New(errs.Invalid, "--form is %q: use all, json, javascript or python", form)
			}
			s, err := a.connect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			events, err := s.Events(cmd.Context(), client.EventOptions{Limit: allEvents})
			if err != nil {
				return err
			}
			seen := seenIn(events, denied)
			if len(seen) == 0 {
				return errs.New(errs.NotFound, "nothing was seen of sandbox %s yet: let it do its work first", args[0])
			}
			w := policy.Exactly
			if wildcards {
				w |= policy.Wildcards
			}
			if presets {
				w |= policy.WithPresets
			}
			return show(a.out, policy.Suggest(seen, w))
		},
	}
	cmd.Flags().StringVar(&form, "form", "all", "all, json, javascript or python")
	cmd.Flags().BoolVar(&wildcards, "wildcards", false, "make one wildcard of names with a common parent")
	cmd.Flags().BoolVar(&presets, "presets", false, "use presets for the names that they list")
	cmd.Flags().BoolVar(&denied, "denied", false, "allow what was denied as well")
	return cmd
}

// seenIn reads what was reached, or asked for, out of the flow log. Ends of flows
// say nothing that their beginnings did not.
func seenIn(events []client.Event, denied bool) []policy.Seen {
	var out []policy.Seen
	for i := range events {
		e := &events[i]
		switch {
		case e.Verdict == client.Closed, e.Verdict == client.Denied && !denied, e.Protocol == "dns" && len(e.Answers) == 0:
			continue
		}
		s := policy.Seen{Name: e.Name}
		switch e.Protocol {
		case "udp", "dns":
			s.Proto = policy.UDP
		case "icmp":
			s.Proto = policy.ICMP
		case "tcp", "tls", "http":
			s.Proto = policy.TCP
		default:
			continue // what is never forwarded
		}
		var err error
		if s.Dst, err = netip.ParseAddrPort(e.Destination); err != nil {
			addr, err := netip.ParseAddr(e.Destination)
			if err != nil {
				continue
			}
			s.Dst = netip.AddrPortFrom(addr, 0)
		}
		for _, text := range e.Answers {
			if a, err := netip.ParseAddr(text); err == nil {
				s.Answers = append(s.Answers, a)
			}
		}
		out = append(out, s)
	}
	return out
}

// forms are the ways to print rules.
var forms = map[string]func(io.Writer, policy.Input) error{
	"json":       printRulesJSON,
	"javascript": printRulesJS,
	"python":     printRulesPython,
	"all": func(w io.Writer, in policy.Input) error {
		for _, f := range []struct {
			title string
			print func(io.Writer, policy.Input) error
		}{{"API", printRulesJSON}, {"JavaScript", printRulesJS}, {"Python", printRulesPython}} {
			fmt.Fprintf(w, "# %s\n", f.title)
			if err := f.print(w, in); err != nil {
				return err
			}
		}
		return nil
	},
}

func printRulesJSON(w io.Writer, in policy.Input) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(in)
}

// quoted is a list of strings as JavaScript and Python write it alike; entries of
// rules need no escapes but those of JSON.
func quoted(list []string) string {
	parts := make([]string, len(list))
	for i, s := range list {
		b, err := json.Marshal(s)
		if err != nil {
			b = []byte(`""`) // strings always marshal
		}
		parts[i] = string(b)
	}
	return "[" + strings.Join(parts, ", ") + "]"
}

func printRulesJS(w io.Writer, in policy.Input) error {
	_, err := fmt.Fprintf(w, "const sandbox = await Sandbox.create({\n  network: {\n    allowOut: %s,\n    denyOut: %s,\n  },\n})\n", quoted(in.AllowOut), quoted(in.DenyOut))
	return err
}

func printRulesPython(w io.Writer, in policy.Input) error {
	_, err := fmt.Fprintf(w, "sandbox = Sandbox.create(\n    network={\n        \"allow_out\": %s,\n        \"deny_out\": %s,\n    },\n)\n", quoted(in.AllowOut), quoted(in.DenyOut))
	return err
}
