package conformance

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// Columns of the table, in characters; the last has no end.
const (
	triedWidth   = 62
	arrivedWidth = 46
	loggedWidth  = 24
)

// Header writes the head of the table.
func Header(w io.Writer) error {
	_, err := fmt.Fprintf(w, "CASE  %s  %s  %s  VERDICT\n", pad("TRIED", triedWidth), pad("ARRIVED", arrivedWidth), pad("FLOW LOG", loggedWidth))
	return err
}

// WriteStep writes one line of the table, and below it what was wrong.
func WriteStep(w io.Writer, r Result, s Step) error {
	_, err := fmt.Fprintf(w, "%4d  %s  %s  %s  %s\n", r.Case, pad(s.Tried, triedWidth), pad(s.Arrived, arrivedWidth), pad(s.Logged, loggedWidth), s.Verdict)
	for _, p := range s.Problems {
		if err == nil {
			_, err = fmt.Fprintf(w, "      ! %s\n", strings.ReplaceAll(p, "\n", "\n        "))
		}
	}
	return err
}

// WriteSummary writes one line a case that did not pass, and the count.
func (r *Report) WriteSummary(w io.Writer) error {
	var b strings.Builder
	for _, res := range r.Results {
		if res.Verdict != Pass {
			fmt.Fprintf(&b, "%s case %d, %s: %s %s\n", res.Verdict, res.Case, res.Group, res.Title, res.Why)
		}
	}
	steps := 0
	for _, res := range r.Results {
		steps += len(res.Steps)
	}
	fmt.Fprintf(&b, "%d cases in %d steps: %d passed, %d failed, %d skipped, in %s\n",
		len(r.Results), steps, r.Count(Pass), r.Count(Fail), r.Count(Skip), r.Took.Round(100*time.Millisecond))
	_, err := io.WriteString(w, b.String())
	return err
}

// pad cuts or fills s to so many characters.
func pad(s string, width int) string {
	if n := utf8.RuneCountInString(s); n <= width {
		return s + strings.Repeat(" ", width-n)
	}
	return string([]rune(s)[:width-1]) + "…"
}
