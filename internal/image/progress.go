package image

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progress writes one line per step of a build, readable in a terminal and in a log:
//
//	base  12.3s  installing packages
type progress struct {
	name  string
	start time.Time

	mu   sync.Mutex // guards w and last
	w    io.Writer
	last string
}

func (l *Library) progress(name string) *progress {
	return &progress{name: name, start: time.Now(), w: l.cfg.Progress}
}

// step reports what begins now. A step that is reported again says nothing.
func (p *progress) step(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	p.mu.Lock()
	defer p.mu.Unlock()
	if line == p.last {
		return
	}
	p.last = line
	fmt.Fprintf(p.w, "%s %6.1fs  %s\n", p.name, time.Since(p.start).Seconds(), line)
}
