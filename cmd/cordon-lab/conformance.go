package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/proving/conformance"
)

func conformanceCommand(a *app) *cobra.Command {
	var o conformance.Options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "conformance",
		Short: "Try every known way around the network rules, and show what arrived",
		Long: `Try every known way around the network rules: from inside sandboxes of a
throw-away server in a small internet of its own, with a packet recorder on the
wire. Prints what was tried, what arrived and what the flow log said; ends with
an error if a case fails. docs/conformance.md says how to read it.

With --against it runs against another server (API key in CORDON_API_KEY); cases
that need the recorder are then skipped.`,
		Example: `  sudo cordon-lab conformance
  sudo cordon-lab conformance --case 1,15,60 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.conformanceOptions(&o); err != nil {
				return err
			}
			if !asJSON {
				if err := conformance.Header(a.out); err != nil {
					return err
				}
				o.Progress = func(r conformance.Result, s conformance.Step) {
					_ = conformance.WriteStep(a.out, r, s) // the summary finds out
				}
			}
			report, err := conformance.Run(cmd.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(a.out)
				enc.SetIndent("", "  ")
				err = enc.Encode(report)
			} else {
				err = report.WriteSummary(a.out)
			}
			if failed := report.Count(conformance.Fail); failed > 0 {
				return errors.Join(err, fmt.Errorf("%d of %d cases failed", failed, len(report.Results)))
			}
			return err
		},
	}
	cmd.Flags().IntSliceVar(&o.Only, "case", nil, "run only these cases, by number")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the results as JSON")
	cmd.Flags().StringVar(&o.Against, "against", "", "API URL of a running server to test, instead of one in the lab")
	cmd.Flags().StringVar(&o.ServerLog, "server-log", "", "keep what the throw-away server logs in this file")
	return cmd
}

// conformanceOptions fills in what no flag says: the programs and the key.
func (a *app) conformanceOptions(o *conformance.Options) (err error) {
	if o.Against == "" && os.Geteuid() != 0 {
		return errNotRoot("conformance")
	}
	if o.Key = a.environ["CORDON_API_KEY"]; o.Against != "" && o.Key == "" {
		return errs.New(errs.Invalid, "conformance --against needs an API key of that server: set CORDON_API_KEY")
	}
	if o.Against == "" {
		if o.Binary, err = a.program(); err != nil {
			return err
		}
	}
	o.Probe, err = embedded.ReadFile("embedded/cordon-probe")
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("this program was built without the probe: build it with make build")
	}
	return err
}
