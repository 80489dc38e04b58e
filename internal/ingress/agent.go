package ingress

import (
	"net/url"
	"path"
	"strings"
)

// controlRoute reports whether a request target is one of the agent's routes
// that only the host may use, however it is written: an agent and its libraries
// may decode, clean or fold more than we think, so every reading counts.
func controlRoute(target string) bool {
	p, _, _ := strings.Cut(target, "?")
	for range 4 {
		if controlPath(p) {
			return true
		}
		decoded, err := url.PathUnescape(p)
		if err != nil || decoded == p {
			return false
		}
		p = decoded
	}
	return true // nobody encodes an honest path four times
}

func controlPath(p string) bool {
	p = strings.ToLower(strings.ReplaceAll(p, `\`, "/"))
	p = path.Clean("/" + p)
	first, _, _ := strings.Cut(p[1:], "/")
	first, _, _ = strings.Cut(first, ";")
	first = strings.TrimFunc(first, func(r rune) bool { return r <= ' ' })
	switch first {
	case "init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade", "cordon":
		return true
	}
	return false
}
