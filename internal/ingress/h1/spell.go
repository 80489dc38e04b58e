package h1

import (
	"net/http"
	"slices"
	"strings"
)

// Spell appends the fields of h to dst, laid out as original was: those whose
// canonical names occur in original come in original's order and spelling, the
// i-th value of a name at the i-th place of it; the others come after, sorted by
// name. What original has and h has not is left out. h's names are canonical.
func Spell(dst []Field, h http.Header, original []Field) []Field {
	left := 0
	for _, values := range h {
		left += len(values)
	}
	places := tally{original: original}
	for i, f := range original {
		name := http.CanonicalHeaderKey(f.Name)
		values := h[name]
		if len(values) == 0 {
			continue
		}
		if n := places.before(i, name); n < len(values) {
			dst = append(dst, Field{f.Name, values[n]})
			left--
		}
	}
	if left == 0 {
		return dst
	}
	had := map[string]int{}
	for _, f := range original {
		had[http.CanonicalHeaderKey(f.Name)]++
	}
	var more []string
	for name, values := range h {
		if len(values) > had[name] {
			more = append(more, name)
		}
	}
	slices.Sort(more)
	for _, name := range more {
		for _, v := range h[name][had[name]:] {
			dst = append(dst, Field{name, v})
		}
	}
	return dst
}

// tally counts how often a name has come already. Headers are short: mostly it
// is quicker to look than to keep a map.
type tally struct {
	original []Field
	seen     map[string]int
}

func (t *tally) before(i int, name string) (n int) {
	if len(t.original) > 32 {
		if t.seen == nil {
			t.seen = make(map[string]int, len(t.original))
		}
		n = t.seen[name]
		t.seen[name] = n + 1
		return n
	}
	for _, f := range t.original[:i] {
		if len(f.Name) == len(name) && strings.EqualFold(f.Name, name) {
			n++
		}
	}
	return n
}
