// Package usage says what is wrong with the arguments of a command line.
package usage

import (
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
)

// Explain makes every verb below cmd say what is wrong with its arguments in
// a sentence that names the value and the fix, with the exit code of bad input.
func Explain(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(flagError)
	for _, c := range cmd.Commands() {
		Explain(c)
	}
	switch valid := cmd.Args; {
	case valid != nil:
		cmd.Args = func(c *cobra.Command, args []string) error {
			if valid(c, args) == nil {
				return nil
			}
			return argumentError(c, args)
		}
	case cmd.HasParent() && !cmd.Runnable():
		cmd.RunE = group // else a wrong word would print the help and succeed
	}
}

// group is what a verb does that has only verbs below it.
func group(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return errs.New(errs.Invalid, "unknown command %q for %q: use %s", args[0], cmd.CommandPath(), strings.Join(names, ", "))
}

// argumentError says which arguments there must be.
func argumentError(cmd *cobra.Command, args []string) error {
	takes := strings.TrimPrefix(cmd.Use, cmd.Name())
	if takes = strings.TrimSpace(takes); takes == "" {
		return errs.New(errs.Invalid, "%s takes no arguments, but was given %q: see %[1]s --help", cmd.CommandPath(), args)
	}
	return errs.New(errs.Invalid, "%s takes %s, but was given %q: see %[1]s --help", cmd.CommandPath(), takes, args)
}

var badFlagValue = regexp.MustCompile(`^invalid argument "(?s:(.*))" for "(?:-., )?--([a-z-]+)" flag: `)

// flagForms are the types of flags in a user's words.
var flagForms = map[string]string{
	"duration": "a duration such as 90s or 24h", "int": "a whole number", "intSlice": "whole numbers with commas between",
	"stringToString": "KEY=VALUE", "bool": "true or false",
}

// flagError names the flag, the value and the form that it must have.
func flagError(cmd *cobra.Command, err error) error {
	m := badFlagValue.FindStringSubmatch(err.Error())
	if m == nil {
		return errs.New(errs.Invalid, "%v: see %s --help", err, cmd.CommandPath())
	}
	form := ""
	if f := cmd.Flag(m[2]); f != nil {
		form = flagForms[f.Value.Type()]
	}
	if form == "" || !utf8.ValidString(m[1]) {
		return errs.New(errs.Invalid, "%v: see %s --help", err, cmd.CommandPath())
	}
	return errs.New(errs.Invalid, "--%s is %q: use %s", m[2], m[1], form)
}
