package main

import (
	"os"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/errs"
)

func TestWrongUsageIsSaid(t *testing.T) {
	for name, c := range map[string]struct{ args, want string }{
		"one number of several that is none": {"conformance --case 1,x", `--case is "1,x": use whole numbers with commas between`},
		"an argument too many":               {"demo now", `cordon-lab demo takes no arguments, but was given ["now"]: see cordon-lab demo --help`},
		"a client that does not exist":       {"demo --client ruby", `--client is "ruby": use auto, js or go`},
		"a time without unit":                {"bench --each 5", `--each is "5": use a duration such as 90s or 24h`},
	} {
		t.Run(name, func(t *testing.T) {
			root := newRoot(&app{environ: map[string]string{}, out: os.Stdout, errOut: os.Stderr})
			root.SetArgs(strings.Fields(c.args))
			err := root.ExecuteContext(t.Context())
			if err == nil || err.Error() != c.want || !errs.Is(err, errs.Invalid) {
				t.Errorf("said %q (%v), want %q and the exit code of bad input", err, errs.KindOf(err), c.want)
			}
		})
	}
}

func TestEveryVerbShowsAnExample(t *testing.T) {
	for _, c := range newRoot(&app{environ: map[string]string{}}).Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" && c.Name() != "completion" && !strings.Contains(c.Example, c.CommandPath()) {
			t.Errorf("%s --help has no example", c.CommandPath())
		}
	}
}
