package cli

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
)

func networkPresetsCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "presets [<name>]",
		Short: "List the presets of the server, or the hosts of one",
		Long: `List the presets of the server, or the hosts of one.

A preset is a named list of the hosts that a common tool needs. It is used like a
name in rules: --allow-out preset:python.`,
		Example: `  cordon network presets
  cordon network presets python`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []control.Preset
			if err := a.call(cmd.Context(), http.MethodGet, "/network/presets", nil, &list); err != nil {
				return err
			}
			if len(args) == 0 {
				return printPresets(a.out, newestPresets(list))
			}
			p, err := presetIn(list, args[0])
			if err != nil {
				return err
			}
			return printPreset(a.out, p)
		},
	}
}

// newestPresets keeps the last list of each name.
func newestPresets(list []control.Preset) []control.Preset {
	var out []control.Preset
	for i := range list {
		if at := slices.IndexFunc(out, func(p control.Preset) bool { return p.Name == list[i].Name }); at >= 0 {
			out[at] = list[i]
		} else {
			out = append(out, list[i])
		}
	}
	return out
}

// presetIn finds "name" or "name@version" as the server does in rules, with or
// without the word before it.
func presetIn(list []control.Preset, text string) (*control.Preset, error) {
	name, version, pinned := strings.Cut(strings.ToLower(strings.TrimPrefix(text, "preset:")), "@")
	var names []string
	for i := range slices.Backward(list) {
		p := &list[i]
		if p.Name != name && !slices.Contains(p.Aliases, name) || pinned && p.Version != version {
			names = append(names, p.Name)
			continue
		}
		return p, nil
	}
	slices.Sort(names)
	return nil, errs.New(errs.NotFound, "there is no preset %q: use %s", text, strings.Join(slices.Compact(names), ", "))
}

func printPresets(w io.Writer, list []control.Preset) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ENTRY\tVERSION\tHOSTS\tALSO")
	for i := range list {
		p := &list[i]
		fmt.Fprintf(t, "preset:%s\t%s\t%d\t%s\n", p.Name, p.Version, len(p.Hosts), strings.Join(p.Aliases, ", "))
	}
	return t.Flush()
}

func printPreset(w io.Writer, p *control.Preset) error {
	fmt.Fprintf(w, "preset:%s@%s\n", p.Name, p.Version)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, h := range p.Hosts {
		ports := strings.Trim(fmt.Sprint(h.Ports), "[]")
		fmt.Fprintf(t, "  %s\t%s\t%s\n", h.Host, ports, h.Remark)
	}
	return t.Flush()
}
