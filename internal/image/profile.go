package image

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// shellName is a variable that a POSIX shell can set.
var shellName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// ofTheShell are variables that a shell sets itself, and that bash refuses to set.
var ofTheShell = []string{"BASHOPTS", "BASH_VERSINFO", "EUID", "OLDPWD", "PPID", "PWD", "SHELLOPTS", "SHLVL", "UID", "_"}

// keepEnvironment makes an image's environment hold in login shells, which SDKs run
// every command in: the /etc/profile of most distributions sets PATH anew, and some
// set more. What a variable was when the shell began holds afterwards, so a value
// that a client gives for one command holds as well. PATH is put back before the
// fragments in profile.d, so that what they add stays.
//
// The file stays as the image has it, between two blocks of ours; nothing is started.
func (t tree) keepEnvironment(env map[string]string) error {
	profile, err := t.follow("/etc/profile")
	if err != nil {
		return err
	}
	text, err := t.read(profile)
	if err != nil || text == "" {
		return err // no /etc/profile: nothing sets variables anew
	}
	var keep, restore, names strings.Builder
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if !shellName.MatchString(k) || slices.Contains(ofTheShell, k) {
			continue
		}
		fmt.Fprintf(&keep, "if [ -n \"${%[1]s+x}\" ]; then _cordon_%[1]s=$%[1]s; fi\n", k)
		fmt.Fprintf(&names, " _cordon_%s", k)
		if k == "PATH" {
			restore.WriteString("case \":$PATH:\" in *\":${_cordon_PATH=$PATH}:\"*) ;; *) export PATH=\"$_cordon_PATH\" ;; esac\n")
			continue
		}
		fmt.Fprintf(&restore, "if [ -n \"${_cordon_%[1]s+x}\" ]; then export %[1]s=\"$_cordon_%[1]s\"; fi\n", k)
	}
	if !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	const mark = "# The image's environment holds in login shells too.\n"
	text = mark + keep.String() + "\n" + text + "\n" + mark + restore.String() + "unset" + names.String() + "\n"
	if err := t.write(file{"/etc/profile", 0o644, text}); err != nil {
		return err
	}
	rel, err := t.resolve("/etc/profile.d/x")
	if err != nil {
		return err
	}
	if _, err := t.root.Stat(strings.TrimSuffix(rel, "/x")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return t.write(file{"/etc/profile.d/00-cordon.sh", 0o644, "if [ -n \"${_cordon_PATH+x}\" ]; then export PATH=\"$_cordon_PATH\"; fi\n"})
}
