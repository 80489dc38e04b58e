package sandbox

import (
	"context"
	"slices"
	"sync"
	"time"
)

// spares is a pool of running sandboxes that belong to nobody, by template. A
// claim takes one; Run refills. Spares are not recorded: after a crash they are
// orphans and the next server destroys them.
type spares struct {
	want map[string]int // template name → how many to keep
	wake chan struct{}  // a spare was taken

	mu    sync.Mutex // guards ready
	ready map[string][]*started
}

func newSpares(want map[string]int) *spares {
	return &spares{want: want, wake: make(chan struct{}, 1), ready: map[string][]*started{}}
}

// take returns a spare that runs exactly img, or nil.
func (s *spares) take(img Image) *started {
	s.mu.Lock()
	defer s.mu.Unlock()
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
	return up
}

func (s *spares) put(template string, up *started) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready[template] = append(s.ready[template], up)
}

// short returns a template that lacks a spare.
func (s *spares) short() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for template, n := range s.want {
		if len(s.ready[template]) < n {
			return template, true
		}
	}
	return "", false
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

// spareRetry is how long the pool waits after a spare could not be made, so
// that a broken template costs little.
const spareRetry = 10 * time.Second

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
		template, ok := m.spares.short()
		if !ok {
			select {
			case <-ctx.Done():
			case <-m.spares.wake:
			}
			continue
		}
		if err := m.makeSpare(ctx, template); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("spare not started", "template", template, "err", err)
			pause(ctx, spareRetry)
		}
	}
}

func (m *Manager) makeSpare(ctx context.Context, template string) error {
	img, err := m.cfg.Images.Resolve(ctx, template)
	if err != nil {
		return err
	}
	m.waitQuiet(ctx)
	up, err := m.start(ctx, NewID(), m.cold(img))
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
