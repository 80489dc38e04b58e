package demo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// stage is where players report what they saw. It compares that with the story
// and with what the lab's wire and the flow log know, and shows it.
type stage struct {
	story    []act
	code     map[string][]string // by act
	recorder *lab.Recorder
	cordon   *client.Client
	screen   *screen

	mu     sync.Mutex // guards what follows
	now    *act       // the act being played
	mark   lab.Mark   // when it began
	told   map[string]bool
	shown  int64 // the newest event of the flow log that was shown
	number int
	failed int
}

// observation is what a player reports of a fact.
type observation struct {
	Fact    string  `json:"fact"`
	Value   string  `json:"value"`
	MS      float64 `json:"ms"`
	Sandbox string  `json:"sandbox"`
}

// begin ends the act before and opens the next.
func (s *stage) begin(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.end(); err != nil {
		return err
	}
	i := slices.IndexFunc(s.story, func(a act) bool { return a.key == key })
	if i != s.number {
		return fmt.Errorf("act %q is not the next of the story", key)
	}
	s.now, s.told, s.mark = &s.story[i], map[string]bool{}, s.recorder.Mark()
	s.number++
	s.screen.title(s.number, s.now.title, s.code[key])
	return nil
}

// end closes the act: every fact must have been told, and the wire is asked what
// it saw.
func (s *stage) end() error {
	if s.now == nil {
		return nil
	}
	for _, f := range s.now.facts {
		if !s.told[f.key] {
			s.say(false, f.what, "not seen", "")
		}
	}
	q := s.now.quiet
	s.now = nil
	if q.what == "" {
		return nil
	}
	seen := s.recorder.Since(s.mark)
	if err := seen.Err(); err != nil {
		return err
	}
	some := seen.Contains([]byte(q.name)) || seen.AskedFor(q.name)
	if q.address != "" {
		some = len(seen.To(netip.MustParseAddr(q.address)).Packets()) > 0
	}
	value := "none"
	if some {
		value = "some"
	}
	s.say(!some, q.what, value, "")
	return nil
}

// finish ends the last act and reports whether all were played and as told.
func (s *stage) finish() (played, failed int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err = s.end()
	return s.number, s.failed, err
}

// saw judges one observation and shows it.
func (s *stage) saw(ctx context.Context, o observation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now == nil {
		return errors.New("no act is being played")
	}
	i := slices.IndexFunc(s.now.facts, func(f fact) bool { return f.key == o.Fact })
	if i < 0 {
		return fmt.Errorf("act %q has no fact %q", s.now.key, o.Fact)
	}
	f := s.now.facts[i]
	s.told[f.key] = true
	value := strings.TrimSpace(strings.TrimPrefix(o.Value, "000 ")) // curl's status when there was no response
	took := time.Duration(o.MS * float64(time.Millisecond))
	ok := strings.Contains(value, f.want) && (f.within == 0 || took <= f.within)
	s.say(ok, f.what, shorten(value), milliseconds(took))
	if f.denied == "" {
		return nil
	}
	e, err := s.verdict(ctx, o.Sandbox, f.denied)
	if err != nil {
		return err
	}
	if e == nil {
		s.say(false, "the flow log", "no verdict on "+f.denied, "")
		return nil
	}
	s.screen.log(e)
	return nil
}

func (s *stage) say(ok bool, what, value, took string) {
	if !ok {
		s.failed++
	}
	s.screen.fact(ok, what, value, took)
}

// verdict waits for the flow log's next denial of a destination or name: the
// kernel's arrive a moment after the packet was refused.
func (s *stage) verdict(ctx context.Context, id, of string) (*client.Event, error) {
	sandbox, err := s.cordon.Connect(ctx, id, time.Second)
	if err != nil {
		return nil, err
	}
	for range 40 {
		events, err := sandbox.Events(ctx, client.EventOptions{Verdict: client.Denied, Since: s.shown})
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(events, func(e client.Event) bool { return e.Destination == of || e.Name == of })
		if i >= 0 {
			s.shown = events[i].Seq
			return &events[i], nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil, nil //nolint:nilnil // no verdict is an answer
}

// command is the shell command that finds a fact out.
func (s *stage) command(act, fact string) string { return s.commands()[act][fact] }

func (s *stage) commands() map[string]map[string]string {
	out := map[string]map[string]string{}
	for _, a := range s.story {
		out[a.key] = map[string]string{}
		for _, f := range a.facts {
			out[a.key][f.key] = f.run
		}
	}
	return out
}

// ServeHTTP lets a player in another process report: POST /act and /saw.
func (s *stage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var said struct {
		Act string `json:"act"`
		observation
	}
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&said)
	switch {
	case err != nil:
	case r.URL.Path == "/act":
		err = s.begin(said.Act)
	default:
		err = s.saw(r.Context(), said.observation)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
	}
}

// shorten makes a program's words fit on a line: the end of OpenSSL's say what
// matters.
func shorten(value string) string {
	if i := strings.LastIndex(value, "::"); i >= 0 {
		value = value[i+2:]
	}
	if i := strings.LastIndex(value, "routines:"); i >= 0 {
		value = value[i+len("routines:"):]
	}
	return cmp.Or(strings.TrimLeft(value, ": "), "nothing")
}

func milliseconds(d time.Duration) string {
	if d == 0 {
		return ""
	}
	ms := float64(d) / float64(time.Millisecond)
	if ms < 10 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// screen prints the demo for a person.
type screen struct {
	w      io.Writer
	colour bool
}

// newScreen uses colours on a terminal, unless NO_COLOR (no-color.org) is set.
func newScreen(f *os.File, environ map[string]string) *screen {
	return &screen{w: f, colour: isTerminal(f) && environ["NO_COLOR"] == "" && environ["TERM"] != "dumb"}
}

// isTerminal reports whether a person reads what is written to f.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// The colours, as parameters of the SGR sequence (ECMA-48, 8.3.117).
const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (s *screen) paint(colour, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (s *screen) line(format string, args ...any) { fmt.Fprintf(s.w, format+"\n", args...) }

func (s *screen) title(n int, title string, code []string) {
	s.line("\n%s", s.paint(bold, fmt.Sprintf("%d. %s", n, title)))
	for _, l := range code {
		s.line("     %s", s.paint(cyan, l))
	}
}

func (s *screen) fact(ok bool, what, value, took string) {
	mark, colour := s.paint(green, "✓"), bold
	if !ok {
		mark, colour = s.paint(red, "✗"), red
	}
	if took != "" {
		value, took = fmt.Sprintf("%-26s", value), fmt.Sprintf(" %8s", took)
	}
	s.line("   %s %-54s %s%s", mark, what, s.paint(colour, value), s.paint(dim, took))
}

// log shows a verdict as the flow log has it.
func (s *screen) log(e *client.Event) {
	to := e.Destination
	if e.Name != "" && to != "" {
		to = e.Name + " at " + to
	} else if e.Name != "" {
		to = e.Name
	}
	s.line("       %s", s.paint(dim, fmt.Sprintf("%s %s %s by %s [%s]", e.Verdict, e.Protocol, to, strings.TrimSpace(e.Rule.Id+" "+e.Rule.Text), e.Reason)))
}
