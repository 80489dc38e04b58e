package agent

import (
	"fmt"
	"path"
	"strings"
)

// maxPath is PATH_MAX without the final NUL (path_resolution(7)). Paths below a
// long home may still be too long for the kernel, which says so.
const maxPath = 4095

// resolve turns a path as clients write it into an absolute one: "" is the
// default directory, "~" and relative paths start at the user's home.
func resolve(p string, u user, workdir string) (string, error) {
	switch {
	case strings.ContainsRune(p, 0):
		return "", fmt.Errorf("path %q contains a NUL byte", p)
	case len(p) > maxPath:
		return "", fmt.Errorf("path of %d bytes: the longest is %d", len(p), maxPath)
	case p == "" && workdir != "":
		return resolve(workdir, u, "")
	case p == "" || p == "~":
		return u.Home, nil
	case strings.HasPrefix(p, "~/"):
		return path.Join(u.Home, p[2:]), nil
	case p[0] == '~':
		return "", fmt.Errorf("path %q: only ~ itself is expanded, not another user's home; write the home out", p)
	case p[0] == '/':
		return path.Clean(p), nil
	default:
		return path.Join(u.Home, p), nil
	}
}
