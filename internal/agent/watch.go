package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/fsnotify/fsnotify"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
)

// watchSpec is what the streaming and the polled form of a watch ask for.
// Network mounts are watched whether the client allows them or not: a sandbox
// has none.
type watchSpec interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
}

// watch follows one directory.
type watch struct {
	place
	root      string // path with links resolved
	hidden    string // directory that is the agent's own
	recursive bool
	entries   bool
	notify    *fsnotify.Watcher
	dirs      map[string]struct{} // watched
	// seen are entries found by listing a new directory, whose own event may still
	// come and must not be told twice.
	seen map[string]struct{}
}

// errOverflow ends a watch: the client must list the directory anew.
func errOverflow() error {
	return connect.NewError(connect.CodeDataLoss, errors.New("too many changes at once: events were lost, watch again and list the directory"))
}

func (a *Agent) openWatch(h http.Header, spec watchSpec) (*watch, error) {
	at, err := a.place(h, spec.GetPath())
	if err != nil {
		return nil, err
	}
	w := &watch{place: at, recursive: spec.GetRecursive(), entries: spec.GetIncludeEntry(), hidden: a.spool.dir, dirs: map[string]struct{}{}, seen: map[string]struct{}{}}
	if w.notify, err = fsnotify.NewWatcher(); err != nil {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("open a watch: %w", err))
	}
	if w.root, err = directoryAt(at.path); err == nil {
		_, err = w.add(w.root)
	}
	if err != nil {
		w.notify.Close()
		return nil, fileError(err)
	}
	return w, nil
}

// add watches dir, and all below it when the watch is recursive; it returns what
// it found there.
func (w *watch) add(dir string) (found []string, err error) {
	if !w.recursive {
		return nil, w.addOne(dir)
	}
	err = filepath.WalkDir(dir, func(at string, d fs.DirEntry, err error) error {
		if at == w.hidden && at != w.root {
			return fs.SkipDir
		}
		if err == nil && d.IsDir() {
			err = w.addOne(at) // before its entries are read, so that none is missed
		}
		switch {
		case err != nil && at == dir:
			return err
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
			return nil // gone, or not this user's to see
		case err != nil:
			return err
		}
		if at != dir {
			found = append(found, at)
		}
		return nil
	})
	return found, err
}

func (w *watch) addOne(dir string) error {
	if len(w.dirs) >= maxWatchDirs {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d directories to watch: watch a smaller tree", maxWatchDirs))
	}
	err := w.notify.Add(dir)
	if errors.Is(err, syscall.ENOSPC) {
		return connect.NewError(connect.CodeResourceExhausted, errors.New("the kernel's limit of watches is reached (fs.inotify.max_user_watches)"))
	}
	if err == nil {
		w.dirs[dir] = struct{}{}
	}
	return err
}

// drop forgets a directory that was removed or renamed, and all below it, which
// would go on reporting under names that are no longer theirs.
func (w *watch) drop(dir string) {
	if _, ok := w.dirs[dir]; !ok {
		return
	}
	for d := range w.dirs {
		if d == dir || strings.HasPrefix(d, dir+"/") {
			_ = w.notify.Remove(d) // the kernel dropped it already if it is gone
			delete(w.dirs, d)
		}
	}
}

// translate turns one kernel event into the SDKs' events.
func (w *watch) translate(ev fsnotify.Event) ([]*pb.FilesystemEvent, error) {
	var out []*pb.FilesystemEvent
	if _, told := w.seen[ev.Name]; told && ev.Has(fsnotify.Create) {
		ev.Op &^= fsnotify.Create
	}
	delete(w.seen, ev.Name)
	for _, k := range []struct {
		op fsnotify.Op
		as pb.EventType
	}{
		{fsnotify.Create, pb.EventType_EVENT_TYPE_CREATE},
		{fsnotify.Write, pb.EventType_EVENT_TYPE_WRITE},
		{fsnotify.Remove, pb.EventType_EVENT_TYPE_REMOVE},
		{fsnotify.Rename, pb.EventType_EVENT_TYPE_RENAME},
		{fsnotify.Chmod, pb.EventType_EVENT_TYPE_CHMOD},
	} {
		if ev.Has(k.op) {
			out = append(out, w.event(ev.Name, k.as))
		}
	}
	if ev.Has(fsnotify.Remove) || ev.Has(fsnotify.Rename) {
		w.drop(ev.Name)
	}
	if !w.recursive || !ev.Has(fsnotify.Create) {
		return out, nil
	}
	below, err := w.descend(ev.Name)
	return append(out, below...), err
}

// descend watches a directory that has just appeared and tells what was put
// into it before the watch was there.
func (w *watch) descend(dir string) ([]*pb.FilesystemEvent, error) {
	fi, err := os.Lstat(dir)
	if err != nil || !fi.IsDir() {
		return nil, nil // a file, or gone again
	}
	found, err := w.add(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		err = nil
	}
	var out []*pb.FilesystemEvent
	for _, f := range found {
		if len(w.seen) < maxQueued {
			w.seen[f] = struct{}{}
		}
		out = append(out, w.event(f, pb.EventType_EVENT_TYPE_CREATE))
	}
	return out, fileError(err)
}

func (w *watch) event(name string, as pb.EventType) *pb.FilesystemEvent {
	rel, err := filepath.Rel(w.root, name)
	if err != nil {
		rel = name
	}
	ev := &pb.FilesystemEvent{Name: utf8(rel), Type: as}
	if !w.entries {
		return ev
	}
	if e, err := entryOf(name, w.names); err == nil { // else it is gone: the event stands alone
		e.Path = utf8(filepath.Join(w.path, rel))
		ev.Entry = e
	}
	return ev
}

// run passes events to emit until ctx ends, emit fails or events are lost. tick,
// which may be nil, is called after silence.
func (w *watch) run(ctx context.Context, emit func(*pb.FilesystemEvent) error, silence time.Duration, tick func() error) error {
	idle := time.NewTimer(silence)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-idle.C:
			if err := tick(); err != nil {
				return err
			}
		case err, ok := <-w.notify.Errors:
			switch {
			case !ok:
				return connect.NewError(connect.CodeUnavailable, errors.New("the agent stops"))
			case errors.Is(err, fsnotify.ErrEventOverflow):
				return errOverflow()
			}
			return connect.NewError(connect.CodeInternal, fmt.Errorf("watch %s: %w", w.path, err))
		case ev, ok := <-w.notify.Events:
			if !ok {
				return connect.NewError(connect.CodeUnavailable, errors.New("the agent stops"))
			}
			told, err := w.translate(ev)
			for _, t := range told {
				if err := emit(t); err != nil {
					return err
				}
			}
			if err != nil {
				return err
			}
		}
		idle.Reset(silence)
	}
}

func (s filesystemService) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], out *connect.ServerStream[pb.WatchDirResponse]) error {
	w, err := s.a.openWatch(req.Header(), req.Msg)
	if err != nil {
		return err
	}
	defer w.notify.Close()
	if err := out.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}}); err != nil {
		return err
	}
	emit := func(ev *pb.FilesystemEvent) error {
		return out.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: ev}})
	}
	return w.run(ctx, emit, keepalive(req.Header()), func() error {
		return out.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}})
	})
}

// watchers are the polled watches.
type watchers struct {
	mu     sync.Mutex // guards what follows
	byID   map[string]*polled
	closed bool
	wg     sync.WaitGroup
	queued atomic.Int64 // events of all
}

// polled collects events until somebody asks for them.
type polled struct {
	stop   context.CancelFunc
	queued *atomic.Int64 // events of all watchers

	mu     sync.Mutex // guards what follows
	events []*pb.FilesystemEvent
	err    error // why no more events come
}

func newWatchers() *watchers { return &watchers{byID: map[string]*polled{}} }

func (s filesystemService) CreateWatcher(_ context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	w, err := s.a.openWatch(req.Header(), req.Msg)
	if err != nil {
		return nil, err
	}
	id, err := s.a.watchers.add(w)
	if err != nil {
		w.notify.Close()
		return nil, err
	}
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

func (t *watchers) add(w *watch) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return "", connect.NewError(connect.CodeUnavailable, errors.New("the agent stops"))
	}
	if len(t.byID) >= maxWatchers {
		return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%d watchers are open already: remove some first", maxWatchers))
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &polled{stop: stop, queued: &t.queued}
	id := "w" + strings.ToLower(rand.Text())
	t.byID[id] = p
	t.wg.Go(func() { p.collect(ctx, w) })
	return id, nil
}

// collect fills the queue until the watch ends.
func (p *polled) collect(ctx context.Context, w *watch) {
	defer w.notify.Close()
	err := w.run(ctx, func(ev *pb.FilesystemEvent) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.err != nil {
			return p.err // removed
		}
		if len(p.events) >= maxQueued || p.queued.Load() >= maxQueuedAll {
			return errOverflow()
		}
		p.queued.Add(1)
		p.events = append(p.events, ev)
		return nil
	}, time.Hour, func() error { return nil })
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
}

// forget ends the watch and what it holds.
func (p *polled) forget() {
	p.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = context.Canceled
	p.queued.Add(-int64(len(p.events)))
	p.events = nil
}

// take returns the events since the last call, or why there will be none.
func (p *polled) take() ([]*pb.FilesystemEvent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.events
	p.events = nil
	p.queued.Add(-int64(len(out)))
	if len(out) == 0 {
		return nil, p.err
	}
	return out, nil
}

func (t *watchers) find(id string) (*polled, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.byID[id]; ok {
		return p, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", id))
}

func (s filesystemService) GetWatcherEvents(_ context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	p, err := s.a.watchers.find(req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	events, err := p.take()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.GetWatcherEventsResponse{Events: events}), nil
}

func (s filesystemService) RemoveWatcher(_ context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	p, err := s.a.watchers.find(req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	p.forget()
	s.a.watchers.mu.Lock()
	delete(s.a.watchers.byID, req.Msg.GetWatcherId())
	s.a.watchers.mu.Unlock()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}

// closeAll ends every polled watch and waits for it.
func (t *watchers) closeAll() {
	t.mu.Lock()
	t.closed = true
	for id, p := range t.byID {
		p.forget()
		delete(t.byID, id)
	}
	t.mu.Unlock()
	t.wg.Wait()
}
