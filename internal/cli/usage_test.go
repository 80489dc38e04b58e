package cli

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
)

func TestWrongUsageIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		args string
		want string
	}{
		"an argument is missing":                     {"url iabc", `cordon url takes <sandbox> <port>, but was given ["iabc"]: see cordon url --help`},
		"an argument too many":                       {"serve now", `cordon serve takes no arguments, but was given ["now"]: see cordon serve --help`},
		"a command is missing":                       {"exec iabc", `cordon exec takes <sandbox> <command> [argument]..., but was given ["iabc"]: see cordon exec --help`},
		"an unknown verb of a group is not its help": {"key lst", `unknown command "lst" for "cordon key": use create, delete, list`},
		"an unknown flag":                            {"list --everything", `unknown flag: --everything: see cordon list --help`},
		"a duration without unit":                    {"create --timeout 5", `--timeout is "5": use a duration such as 90s or 24h`},
		"no time at all":                             {"create --timeout 0s", `--timeout is 0s: use a duration such as 90s or 24h`},
		"a signed URL that has expired":              {"url --signed --ttl -1h iabc 3000", `--ttl is -1h0m0s: use a duration such as 90s or 24h`},
		"a number that is none":                      {"key create ci --max-paused x", `--max-paused is "x": use a whole number`},
		"a variable without value":                   {"create --env A", `--env is "A": use KEY=VALUE`},
		"a limit that shows nothing":                 {"flows --limit -5 iabc", `--limit is -5: use 1 or more; the server keeps 4096`},
		"explain without a sandbox":                  {"network explain example.com", `--sandbox is missing: name the sandbox whose rules decide (cordon list)`},
		"a command is missing after --":              {"exec iabc --", `cordon exec takes a command after --: see cordon exec --help`},
		"an unknown flag of exec":                    {"exec --nosuch iabc ls", `unknown flag: --nosuch: see cordon exec --help`},
	} {
		t.Run(name, func(t *testing.T) {
			root := newRoot(&app{environ: map[string]string{}, out: os.Stdout, errOut: os.Stderr})
			root.SetArgs(strings.Fields(c.args))
			err := root.ExecuteContext(t.Context())
			if err == nil || err.Error() != c.want {
				t.Errorf("said %q, want %q", err, c.want)
			}
			if !errs.Is(err, errs.Invalid) {
				t.Errorf("kind %v, want %v: the exit code is 2", errs.KindOf(err), errs.Invalid)
			}
		})
	}
}

func TestEveryVerbShowsAnExample(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, c := range cmd.Commands() {
			if !c.IsAvailableCommand() {
				continue
			}
			if c.Runnable() && !c.HasSubCommands() && !strings.Contains(c.Example, c.CommandPath()) {
				t.Errorf("%s --help has no example", c.CommandPath())
			}
			walk(c)
		}
	}
	walk(newRoot(&app{environ: map[string]string{}, out: os.Stdout, errOut: os.Stderr}))
}

func TestArgumentsOfExecStayAsTheyAre(t *testing.T) {
	for name, c := range map[string]struct {
		words []string
		want  string
	}{
		"one word is a line for the shell":     {[]string{"cd /tmp && ls"}, "cd /tmp && ls"},
		"several are a program's arguments":    {[]string{"sh", "-c", "echo $A; exit 3"}, `'sh' '-c' 'echo $A; exit 3'`},
		"quotes, blanks and nothing are words": {[]string{"printf", "%s", "it's", ""}, `'printf' '%s' 'it'\''s' ''`},
	} {
		t.Run(name, func(t *testing.T) {
			if got := shellLine(c.words); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}
