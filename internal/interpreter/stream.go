package interpreter

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
)

const (
	// silence is how long a stream says nothing before it says that it is alive.
	silence = 5 * time.Second
	// stallTimeout is how long a client may read nothing of what waits for it.
	stallTimeout = 60 * time.Second
	// maxOutput is how much one execution's answer may hold; more is dropped.
	maxOutput = 256 << 20
	// maxLine is how much one result may hold.
	maxLine = 64 << 20
)

// stream is the answer to an execution: lines of JSON, each sent at once. A client
// that left, or stalls, ends its context.
type stream struct {
	ctx    context.Context
	cancel context.CancelFunc
	w      http.ResponseWriter
	rc     *http.ResponseController

	mu     sync.Mutex // guards what follows and writes to w
	timer  *time.Timer
	sent   int64
	full   bool
	broken bool
	ended  bool
}

func newStream(ctx context.Context, w http.ResponseWriter) *stream {
	s := &stream{w: w, rc: http.NewResponseController(w)}
	s.ctx, s.cancel = context.WithCancel(ctx)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flush(nil)
	s.timer = time.AfterFunc(silence, s.keepalive)
	return s
}

// keepalive is the timer's: it says that the stream is alive.
func (s *stream) keepalive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.write(line{"type": lineKeepalive})
	}
}

// emit sends a line. It waits for a client that is slow.
func (s *stream) emit(l line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full && l["type"] != lineError && l["type"] != lineUnexpected {
		return
	}
	s.write(l)
	if s.sent > maxOutput && !s.full {
		s.full = true
		s.write(outputLines(lineStderr, "[output over 256 MiB: the rest is dropped]\n")[0])
	}
}

// end sends the last line and frees what the stream holds.
func (s *stream) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write(line{"type": lineEnd})
	s.ended = true
	s.timer.Stop()
	s.cancel()
	_ = s.rc.SetWriteDeadline(time.Time{}) // the connection may serve another request
}

func (s *stream) write(l line) {
	b, err := l.encode()
	if err == nil && len(b) > maxLine {
		err = errors.New("a result over 64 MiB")
	}
	if err != nil { // say so in its place
		if b, err = (outputLines(lineStderr, "["+err.Error()+": dropped]\n")[0]).encode(); err != nil {
			return
		}
	}
	s.sent += int64(len(b))
	s.flush(b)
	if s.timer != nil {
		s.timer.Reset(silence)
	}
}

// flush writes bytes through to the client.
func (s *stream) flush(b []byte) {
	if s.broken {
		return
	}
	err := s.rc.SetWriteDeadline(time.Now().Add(stallTimeout))
	if errors.Is(err, http.ErrNotSupported) {
		err = nil
	}
	if err == nil && len(b) > 0 {
		_, err = s.w.Write(b)
	}
	if err == nil {
		err = s.rc.Flush()
	}
	if err != nil {
		s.broken = true
		s.cancel()
	}
}
