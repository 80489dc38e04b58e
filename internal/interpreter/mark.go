package interpreter

import (
	"slices"
	"strings"
	"unicode/utf8"
)

// splitter finds marks in a stream: NUL, 32 hex digits, NUL. What may be the
// beginning of one, or of a character, is kept until more is read.
type splitter struct{ kept []byte }

const markSize = 32

// split returns the pieces of what was kept and b.
func (s *splitter) split(b []byte) []piece {
	var out []piece
	rest := slices.Concat(s.kept, b)
	s.kept = nil
	text := func(b []byte) {
		if len(b) > 0 {
			out = append(out, piece{text: strings.ToValidUTF8(string(b), "\uFFFD")})
		}
	}
	for {
		at := findMark(rest)
		if at < 0 {
			break
		}
		text(rest[:at])
		out = append(out, piece{mark: string(rest[at+1 : at+1+markSize])})
		rest = rest[at+markSize+2:]
	}
	keep := len(rest) - unfinished(rest)
	text(rest[:keep])
	s.kept = slices.Clone(rest[keep:])
	return out
}

// findMark returns where a whole mark begins, or -1.
func findMark(b []byte) int {
	for i := 0; i+markSize+2 <= len(b); i++ {
		if b[i] == 0 && markLength(b[i:]) == markSize+2 {
			return i
		}
	}
	return -1
}

// markLength is how much of a mark b begins with: all of it, or what there is, or 0.
func markLength(b []byte) int {
	for i := range min(len(b), markSize+2) {
		c := b[i]
		ends := i == 0 || i == markSize+1
		hex := '0' <= c && c <= '9' || 'a' <= c && c <= 'f'
		if ends && c != 0 || !ends && !hex {
			return 0
		}
	}
	return min(len(b), markSize+2)
}

// unfinished is how many bytes at the end of b may go on: a mark's beginning, or a
// character's.
func unfinished(b []byte) int {
	for i := max(0, len(b)-markSize-1); i < len(b); i++ {
		if b[i] == 0 && markLength(b[i:]) == len(b)-i {
			return len(b) - i
		}
	}
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		if tail := b[len(b)-n:]; utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return n
		}
	}
	return 0
}
