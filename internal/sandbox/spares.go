package sandbox

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/sandboxid"
)

// spares is a pool of running sandboxes without an owner, by template. A
// create takes one; run refills. Spares are not recorded: after a crash they are
// orphans and the next server destroys them.
type spares struct {
	*launcher
	busy func() bool   // whether sandboxes are being started for owners
	wake chan struct{} // a spare was taken

	mu     sync.Mutex // guards the rest
	pool   map[string][]*started
	failed map[string]failure
	asked  map[string]asked // by owner
}

// failure is what is known of a template whose last spares could not be made.
type failure struct {
	wait  time.Duration // after the last one
	again time.Time     // when the next is tried
}

func newSpares(l *launcher, busy func() bool) *spares {
	return &spares{launcher: l, busy: busy, wake: make(chan struct{}, 1), pool: map[string][]*started{}, failed: map[string]failure{}, asked: map[string]asked{}}
}

// A key that creates sandboxes in a loop would take every spare as soon as it is ready. So
// while several keys use them, that is asked for one within sharedFor, the last spare is not
// for a key that asks much more often than another.
const (
	sharedFor = time.Minute
	askedFor  = 10 * time.Second // what was asked for this long ago counts for a third
	muchMore  = 2
)

// asked is how often an owner asked for a spare of late, as of a time.
type asked struct {
	at time.Time
	n  float64
}

func (a asked) by(now time.Time) float64 {
	return a.n * math.Exp(-now.Sub(a.at).Seconds()/askedFor.Seconds())
}

// take returns a spare that runs exactly the image of o, or nil.
func (s *spares) take(ctx context.Context, o *origin) (*started, error) {
	if o.dir != "" {
		return nil, nil
	}
	release, err := s.host.fit(ctx, o)
	if err != nil {
		return nil, err
	}
	release() // a spare has its memory already
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[o.owner] = asked{now, s.asked[o.owner].by(now) + 1}
	list := s.pool[o.img.Name]
	if len(list) == 1 && s.greedy(o.owner, now) {
		return nil, nil
	}
	i := slices.IndexFunc(list, func(up *started) bool { return up.img.Digest == o.img.Digest })
	if i < 0 {
		return nil, nil
	}
	up := list[i]
	s.pool[o.img.Name] = slices.Delete(list, i, i+1)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	up.spare, up.img = true, o.img
	return up, nil
}

// greedy reports whether an owner asks for spares much more often than another that uses
// them. It needs s.mu.
func (s *spares) greedy(owner string, now time.Time) bool {
	mine := s.asked[owner].by(now)
	greedy := false
	for who, a := range s.asked {
		switch {
		case now.Sub(a.at) > sharedFor:
			delete(s.asked, who)
		case who != owner && a.by(now)*muchMore < mine:
			greedy = true
		}
	}
	return greedy
}

// owed reports whether no spare is left of a template while some key asks much more often
// than another: the next spare is for the other one.
func (s *spares) owed(template string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pool[template]) > 0 {
		return false
	}
	now := time.Now()
	for owner := range s.asked {
		if s.greedy(owner, now) {
			return true
		}
	}
	return false
}

func (s *spares) put(template string, up *started) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pool[template] = append(s.pool[template], up)
}

// short returns a template that lacks a spare and may be tried now; if there is none,
// how long until one may. A wait of 0 is one for a spare to be taken.
func (s *spares) short(now time.Time) (template string, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for template, n := range s.cfg.Spares {
		if len(s.pool[template]) >= n {
			continue
		}
		left := s.failed[template].again.Sub(now)
		if left <= 0 {
			return template, 0
		}
		if wait == 0 || left < wait {
			wait = left
		}
	}
	return "", wait
}

// A template whose spares cannot be made is tried again after spareRetry, and each
// time after twice as long, up to spareRetryMost: an attempt takes as much of the
// machine as a start.
const (
	spareRetry     = 10 * time.Second
	spareRetryMost = 10 * time.Minute
)

// outcome notes whether a spare could be made, and reports whether that is news.
func (s *spares) outcome(template string, ok bool, now time.Time) (news bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, failing := s.failed[template]
	if ok {
		delete(s.failed, template)
		return failing
	}
	f.wait = min(max(2*f.wait, spareRetry), spareRetryMost)
	f.again = now.Add(f.wait)
	s.failed[template] = f
	return !failing
}

// drain takes all spares out of the pool.
func (s *spares) drain() []*started {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*started
	for _, list := range s.pool {
		all = append(all, list...)
	}
	s.pool = map[string][]*started{}
	return all
}

// run keeps the pool full, one start at a time so that requests come
// first, and empties it when ctx ends.
func (s *spares) run(ctx context.Context) {
	defer func() {
		ctx := context.WithoutCancel(ctx)
		for _, up := range s.drain() {
			if err := up.discard(ctx); err != nil {
				s.cfg.Log.Warn("spare not freed", "sandbox", up.id, "err", err)
			}
		}
	}()
	for ctx.Err() == nil {
		template, wait := s.short(time.Now())
		if template == "" {
			s.idle(ctx, wait)
			continue
		}
		err := s.make(ctx, template)
		if ctx.Err() != nil {
			return
		}
		news := s.outcome(template, err == nil, time.Now())
		switch {
		case err != nil && news: // the next ones are no news
			s.cfg.Log.Warn("spare not started; it is tried again, less and less often", "template", template, "err", err)
		case err != nil:
			s.cfg.Log.Debug("spare not started", "template", template, "err", err)
		case news:
			s.cfg.Log.Info("spares can be started again", "template", template)
		}
	}
}

// idle waits until a spare is taken, for d at the most unless that is 0, or until ctx
// ends.
func (s *spares) idle(ctx context.Context, d time.Duration) {
	var after <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		after = t.C
	}
	select {
	case <-ctx.Done():
	case <-s.wake:
	case <-after:
	}
}

func (s *spares) make(ctx context.Context, template string) error {
	if err := s.cfg.Refuse(template); err != nil {
		return err
	}
	img, err := s.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return err
	}
	s.waitQuiet(ctx, template)
	up, err := s.fromImage("", img).Start(ctx, sandboxid.New(), nil)
	if err != nil {
		return err
	}
	s.put(template, up)
	return nil
}

// waitQuiet lets starts for owners finish first, for a while: a spare is for
// the next request, not against the present one. Those of a key that creates sandboxes all
// the time do not finish, so a spare that another key will need does not wait.
func (s *spares) waitQuiet(ctx context.Context, template string) {
	for range 100 {
		if !s.busy() || s.owed(template) {
			return
		}
		pause(ctx, 10*time.Millisecond)
	}
}

// pause sleeps for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
