package agent

import (
	"sync"
	"time"
)

// countdown calls a function after a time in which the sandbox ran. A plain
// timer would not do: when a paused sandbox is resumed, its clocks have gone on,
// and every command with a deadline would be killed on the spot.
type countdown struct {
	fire func()

	mu    sync.Mutex // guards what follows
	left  time.Duration
	asked time.Duration // how long the timer was to wait
	since time.Time     // when it was told to
	timer *time.Timer   // nil once stopped
}

const (
	// countTick is how often a countdown takes stock.
	countTick = time.Second
	// countLate is how much later than asked a timer may be before the sandbox is
	// taken to have been paused.
	countLate = 2 * time.Second
)

func newCountdown(d time.Duration, fire func()) *countdown {
	c := &countdown{fire: fire, left: d}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked, c.since = min(d, countTick), time.Now()
	c.timer = time.AfterFunc(c.asked, c.tick)
	return c
}

func (c *countdown) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer == nil {
		return
	}
	now := time.Now()
	c.left -= ran(now.Sub(c.since), c.asked)
	if c.left <= 0 {
		c.timer = nil
		c.fire()
		return
	}
	c.asked, c.since = min(c.left, countTick), now
	c.timer.Reset(c.asked)
}

// ran is how much of the passed time the sandbox ran, given how long a timer was
// to wait.
func ran(passed, asked time.Duration) time.Duration {
	if passed > asked+countLate {
		return asked
	}
	return passed
}

func (c *countdown) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
}
