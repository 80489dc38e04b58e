package sandbox

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/sandboxid"
)

// spares is a pool of running sandboxes that belong to nobody, by template. A
// claim takes one; Run refills. Spares are not recorded: after a crash they are
// orphans and the next server destroys them.
type spares struct {
	want map[string]int // template name → how many to keep
	wake chan struct{}  // a spare was taken

	mu     sync.Mutex // guards the rest
	ready  map[string][]*started
	failed map[string]failure
	took   map[string]time.Time // by owner: when it last took one
}

// failure is what is known of a template whose last spares could not be made.
type failure struct {
	wait  time.Duration // after the last one
	again time.Time     // when the next is tried
}

func newSpares(want map[string]int) *spares {
	return &spares{want: want, wake: make(chan struct{}, 1), ready: map[string][]*started{}, failed: map[string]failure{}, took: map[string]time.Time{}}
}

// A key that creates sandboxes in a loop would take every spare as soon as it is ready. So
// while several keys use them, that is took one within sharedFor, the last spare is not
// for the key that took the one before.
const sharedFor = time.Minute

// take returns a spare that runs exactly img, or nil.
func (s *spares) take(owner string, img Image) *started {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready[img.Name]) == 1 && s.greedy(owner, time.Now()) {
		return nil
	}
	list := s.ready[img.Name]
	i := slices.IndexFunc(list, func(up *started) bool { return up.imageRef == img.Digest })
	if i < 0 {
		return nil
	}
	up := list[i]
	s.ready[img.Name] = slices.Delete(list, i, i+1)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	up.spare = true
	s.took[owner] = time.Now()
	return up
}

// greedy reports whether an owner took the last spare that was taken, and others use them
// too. It needs s.mu.
func (s *spares) greedy(owner string, now time.Time) bool {
	others := false
	for who, at := range s.took {
		switch {
		case now.Sub(at) > sharedFor:
			delete(s.took, who)
		case who != owner && at.After(s.took[owner]):
			return false
		case who != owner:
			others = true
		}
	}
	return others
}

func (s *spares) put(template string, up *started) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready[template] = append(s.ready[template], up)
}

// short returns a template that lacks a spare and may be tried now; if there is none,
// how long until one may. A wait of 0 is one for a spare to be taken.
func (s *spares) short(now time.Time) (template string, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for template, n := range s.want {
		if len(s.ready[template]) >= n {
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
	for _, list := range s.ready {
		all = append(all, list...)
	}
	s.ready = map[string][]*started{}
	return all
}

// fillSpares keeps the pool full, one start at a time so that requests come
// first, and empties it when ctx ends.
func (m *Manager) fillSpares(ctx context.Context) {
	defer func() {
		ctx := context.WithoutCancel(ctx)
		for _, up := range m.spares.drain() {
			if err := m.discard(ctx, up); err != nil {
				m.cfg.Log.Warn("spare not freed", "sandbox", up.id, "err", err)
			}
		}
	}()
	for ctx.Err() == nil {
		template, wait := m.spares.short(time.Now())
		if template == "" {
			m.spares.idle(ctx, wait)
			continue
		}
		err := m.makeSpare(ctx, template)
		if ctx.Err() != nil {
			return
		}
		news := m.spares.outcome(template, err == nil, time.Now())
		switch {
		case err != nil && news: // the next ones are no news
			m.cfg.Log.Warn("spare not started; it is tried again, less and less often", "template", template, "err", err)
		case err != nil:
			m.cfg.Log.Debug("spare not started", "template", template, "err", err)
		case news:
			m.cfg.Log.Info("spares can be started again", "template", template)
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

func (m *Manager) makeSpare(ctx context.Context, template string) error {
	if err := m.cfg.Refuse(template); err != nil {
		return err
	}
	img, err := m.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return err
	}
	m.waitQuiet(ctx)
	up, err := m.start(ctx, sandboxid.New(), m.cold(img))
	if err != nil {
		return err
	}
	m.spares.put(template, up)
	return nil
}

// waitQuiet lets creations under way finish first, for a while: a spare is for
// the next request, not against the present one.
func (m *Manager) waitQuiet(ctx context.Context) {
	for range 100 {
		m.mu.Lock()
		busy := len(m.reserved) > 0
		m.mu.Unlock()
		if !busy {
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
