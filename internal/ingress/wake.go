package ingress

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// How the waking of paused sandboxes is shared out. One owner's sandboxes, however
// many and however slow, leave three quarters of it to others.
const (
	ownerPart   = 4  // an owner gets at most one in so many of the wakes at a time, and of the places to wait
	waitingRoom = 16 // places to wait, for each wake at a time
	backoffMin  = time.Second
	backoffMax  = time.Minute
	setbackLife = 10 * time.Minute // how long a failure is remembered
	setbackMax  = 4096
)

// wakes decides which paused sandbox is woken when.
type wakes struct {
	limit int // at a time

	mu      sync.Mutex           // guards all below
	calls   map[string]*wakeCall // by sandbox: queued and running
	queue   []*wakeCall          // oldest first
	running int
	owners  map[string]*part
	failed  map[string]setback // by sandbox
}

// part is what one owner has of the wakes.
type part struct{ running, queued int }

// setback is a wake that failed.
type setback struct {
	count int
	until time.Time // before then it is not tried again
}

// wakeCall is one waking that any number of requests wait for.
type wakeCall struct {
	id, owner string
	by        Waker // the first request
	done      chan struct{}
	err       error // valid when done is closed
	waiting   int   // requests; guarded by wakes.mu
	started   bool  // guarded by wakes.mu
}

func newWakes(limit int) *wakes {
	return &wakes{limit: limit, calls: map[string]*wakeCall{}, owners: map[string]*part{}, failed: map[string]setback{}}
}

// WakeOn says which traffic wakes a paused sandbox.
type WakeOn string

// What wakes. A page that is open somewhere opens its WebSocket again and again, so
// that a sandbox which it wakes never sleeps.
const (
	OnAny      WakeOn = ""
	OnRequests WakeOn = "requests" // no upgrades, no tunnels
	OnHeader   WakeOn = "header"   // requests with the header Cordon-Wake
)

// wakeHeader marks requests that are to wake the sandbox; services do not get it.
const wakeHeader = "Cordon-Wake"

// Waker is the traffic that wakes a sandbox.
type Waker struct {
	Method  string // CONNECT for a tunnel that begins without a request
	Path    string // without the query, which may hold tokens
	Source  netip.Addr
	Port    uint16
	Upgrade bool
}

// waker describes the request to who has to know what woke the sandbox.
func (v *visit) waker(to route) (w Waker) {
	path, _, _ := strings.Cut(to.target, "?")
	w = Waker{Method: v.r.Method, Path: strings.Clone(path[:min(len(path), longestPath)]), Source: v.caller().addr, Port: to.port}
	w.Upgrade = v.stream != nil || v.r.Header.Get("Upgrade") != ""
	return w
}

// wakes reports whether the traffic wakes the sandbox.
func (t *Target) wakes(by Waker, marked bool) bool {
	switch t.WakeOn {
	case OnAny:
		return true
	case OnRequests:
		return !by.Upgrade && by.Method != http.MethodConnect
	case OnHeader:
		return marked
	}
	return false
}

// wake brings a paused sandbox back. Strangers cannot cause it: admit came first.
func (in *Ingress) wake(ctx context.Context, t *Target, by Waker) (*Target, *refusal) {
	if in.cfg.Wake == nil || !t.AutoResume {
		return nil, notFound(t.ID)
	}
	call, refused := in.joinWake(t, by)
	if refused != nil {
		return nil, refused
	}
	defer in.leaveWake(call)
	patience := time.NewTimer(in.cfg.Limits.WakeTimeout)
	defer patience.Stop()
	select {
	case <-call.done:
	case <-ctx.Done():
		return nil, notFound(t.ID) // nobody reads it
	case <-patience.C:
		return nil, wakeFailed(t.ID, backoffMin)
	}
	now, ok := in.cfg.Lookup(t.ID)
	switch {
	case errs.Is(call.err, errs.Exhausted):
		return nil, wakeFull(t.ID, sentence(call.err))
	case !ok || errs.Is(call.err, errs.NotFound):
		return nil, notFound(t.ID)
	case call.err != nil:
		return nil, wakeFailed(t.ID, in.wakes.pause(t.ID))
	case now.State != Running:
		return nil, notFound(t.ID)
	}
	return now, nil
}

// sentence is the part of an error that users may see.
func sentence(err error) string {
	if known, ok := errors.AsType[*errs.Error](err); ok {
		return known.Msg
	}
	return "a limit is reached"
}

// joinWake joins or queues the waking of a sandbox.
func (in *Ingress) joinWake(t *Target, by Waker) (*wakeCall, *refusal) {
	w := in.wakes
	w.mu.Lock()
	defer w.mu.Unlock()
	if call := w.calls[t.ID]; call != nil {
		call.waiting++
		return call, nil
	}
	if left := time.Until(w.failed[t.ID].until); left > 0 {
		return nil, wakeFailed(t.ID, left)
	}
	mine := w.owners[t.Owner]
	places := w.limit * waitingRoom
	if len(w.queue) >= places || mine != nil && mine.queued >= max(1, places/ownerPart) || in.base.Err() != nil {
		return nil, wakeBusy(t.ID, w.limit)
	}
	if mine == nil {
		mine = &part{}
		w.owners[t.Owner] = mine
	}
	mine.queued++
	call := &wakeCall{id: t.ID, by: by, owner: t.Owner, done: make(chan struct{}), waiting: 1}
	w.calls[t.ID] = call
	w.queue = append(w.queue, call)
	in.startWakes()
	return call, nil
}

// leaveWake takes a waking that nobody waits for any more out of the queue.
func (in *Ingress) leaveWake(call *wakeCall) {
	w := in.wakes
	w.mu.Lock()
	defer w.mu.Unlock()
	if call.waiting--; call.waiting > 0 || call.started {
		return
	}
	if i := slices.Index(w.queue, call); i >= 0 {
		w.queue = slices.Delete(w.queue, i, i+1)
		delete(w.calls, call.id)
		w.owners[call.owner].queued--
		w.forgetOwner(call.owner)
	}
}

// startWakes starts the oldest wakings whose owners have a share left. It needs w.mu.
func (in *Ingress) startWakes() {
	w := in.wakes
	for i := 0; i < len(w.queue) && w.running < w.limit; {
		call := w.queue[i]
		mine := w.owners[call.owner]
		if mine.running >= max(1, w.limit/ownerPart) {
			i++
			continue
		}
		w.queue = slices.Delete(w.queue, i, i+1)
		mine.queued--
		mine.running++
		w.running++
		call.started = true
		in.wg.Add(1)
		go in.runWake(call)
	}
}

func (in *Ingress) runWake(call *wakeCall) {
	defer in.wg.Done()
	ctx, cancel := context.WithTimeout(in.base, in.cfg.Limits.WakeTimeout)
	defer cancel()
	start := time.Now()
	call.err = in.cfg.Wake(ctx, call.id, call.by)
	if call.err != nil && in.base.Err() == nil {
		in.log.Warn("sandbox not woken by traffic", "sandbox", call.id, "err", call.err)
	}
	w := in.wakes
	w.mu.Lock()
	delete(w.calls, call.id)
	w.running--
	w.owners[call.owner].running--
	w.forgetOwner(call.owner)
	w.settle(call)
	if in.base.Err() == nil {
		in.startWakes()
	}
	w.mu.Unlock()
	close(call.done)
	in.log.Debug("sandbox woken by traffic", "sandbox", call.id, "method", call.by.Method, "path", call.by.Path, "src", call.by.Source, "took", time.Since(start), "err", call.err)
}

func (w *wakes) forgetOwner(owner string) {
	if s := w.owners[owner]; s.running+s.queued == 0 {
		delete(w.owners, owner)
	}
}

// settle remembers how a waking ended: after a failure the next is not tried for a
// second, then two, up to a minute.
func (w *wakes) settle(call *wakeCall) {
	if call.err == nil || errs.Is(call.err, errs.NotFound) {
		delete(w.failed, call.id)
		return
	}
	now := time.Now()
	if len(w.failed) >= setbackMax {
		for id, s := range w.failed {
			if now.Sub(s.until) > 0 {
				delete(w.failed, id)
			}
		}
	}
	s := w.failed[call.id]
	if now.Sub(s.until) > setbackLife {
		s.count = 0
	}
	s.until = now.Add(min(backoffMin<<min(s.count, 10), backoffMax))
	s.count++
	w.failed[call.id] = s
}

// pause is how long the sandbox is not to be tried again.
func (w *wakes) pause(id string) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return max(time.Until(w.failed[id].until), backoffMin)
}
