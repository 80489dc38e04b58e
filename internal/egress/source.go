package egress

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// smallBuffer holds nearly every ClientHello and request head; only what is
// longer is charged to its sandbox. copyBuffer is for bodies that cannot be spliced.
const (
	smallBuffer = 4 << 10
	copyBuffer  = 32 << 10
)

// buffers keeps small and copy buffers, and what HTTP heads are parsed into, for
// reuse.
type buffers struct{ small, large, heads sync.Pool }

func (b *buffers) getSmall() []byte {
	if v, ok := b.small.Get().(*[smallBuffer]byte); ok {
		return v[:]
	}
	return make([]byte, smallBuffer)
}

func (b *buffers) putSmall(buf []byte) {
	if cap(buf) == smallBuffer {
		b.small.Put((*[smallBuffer]byte)(buf[:smallBuffer]))
	}
}

func (b *buffers) getLarge() *[copyBuffer]byte {
	if v, ok := b.large.Get().(*[copyBuffer]byte); ok {
		return v
	}
	return new([copyBuffer]byte)
}

var (
	errTooBig = errors.New("larger than the buffer may become")
	errCharge = errors.New("sniff memory is used up")
)

// source reads from a connection through a buffer that is looked at before it
// is consumed. The buffer is taken when needed and given back when empty.
type source struct {
	conn   net.Conn
	pool   *buffers
	charge func(int64) bool // takes memory beyond smallBuffer; nil: none
	alive  func() bool      // asked every patience while nothing comes; nil: wait as the deadline says

	buf  []byte
	r, w int
	full bool // the last wide read filled its buffer
}

// patience is how long a silent upstream is waited for before the client is
// looked after.
const patience = 15 * time.Second

// pending returns what was read and not consumed.
func (s *source) pending() []byte { return s.buf[s.r:s.w] }

func (s *source) consume(n int) {
	s.r += n
	if s.r == s.w {
		s.r, s.w = 0, 0
	}
}

// fill reads once, at least one byte, keeping at most limit bytes pending.
func (s *source) fill(limit int) error {
	if err := s.room(limit); err != nil {
		return err
	}
	n, err := s.read(s.buf[s.w:min(len(s.buf), s.r+limit)])
	s.w += n
	if n > 0 {
		return nil
	}
	return err
}

// room makes space for at least one more byte.
func (s *source) room(limit int) error {
	if s.w-s.r >= limit {
		return errTooBig
	}
	if s.buf == nil {
		s.buf = s.pool.getSmall()
	}
	if s.w < len(s.buf) {
		return nil
	}
	if s.r > 0 {
		s.w = copy(s.buf, s.buf[s.r:s.w])
		s.r = 0
		return nil
	}
	size := min(2*len(s.buf), max(limit, smallBuffer))
	if s.charge != nil && !s.charge(int64(size-s.charged())) {
		return errCharge
	}
	bigger := make([]byte, size)
	copy(bigger, s.buf)
	s.pool.putSmall(s.buf)
	s.buf = bigger
	return nil
}

// charged is how much of the buffer was charged.
func (s *source) charged() int {
	if len(s.buf) <= smallBuffer {
		return 0
	}
	return len(s.buf)
}

// read is one Read of the connection; with alive set it waits in steps.
func (s *source) read(p []byte) (int, error) {
	if s.alive == nil {
		return s.conn.Read(p)
	}
	for {
		if err := s.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return 0, err
		}
		n, err := s.conn.Read(p)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if !s.alive() {
			return 0, errClientGone
		}
	}
}

// release gives the buffer back, with what is pending.
func (s *source) release() {
	if s.buf == nil {
		return
	}
	if n := s.charged(); n > 0 && s.charge != nil {
		s.charge(-int64(n))
	}
	if s.full && len(s.buf) == copyBuffer {
		s.pool.large.Put((*[copyBuffer]byte)(s.buf))
	}
	s.pool.putSmall(s.buf)
	s.buf, s.r, s.w, s.full = nil, 0, 0, false
}

// idle gives an empty buffer of fillWide back.
func (s *source) idle() {
	s.full = len(s.buf) == copyBuffer
	s.release()
}

// shrink gives a buffer back that had to grow, when nothing is pending in it.
func (s *source) shrink() {
	if len(s.buf) > smallBuffer {
		s.rest()
	}
}

// rest gives the buffer back when nothing is pending in it.
func (s *source) rest() {
	if s.r == s.w {
		s.release()
	}
}

// fillWide is fill for a body that is passed on at once: when the last read
// filled the small buffer the next one uses a large one, and gives it back as
// soon as less comes. The buffer must be empty.
func (s *source) fillWide() error {
	switch {
	case s.full && len(s.buf) == smallBuffer:
		s.pool.putSmall(s.buf)
		s.buf = s.pool.getLarge()[:]
	case !s.full && len(s.buf) == copyBuffer:
		s.pool.large.Put((*[copyBuffer]byte)(s.buf))
		s.buf = nil
	}
	if s.buf == nil {
		s.buf = s.pool.getSmall()
	}
	n, err := s.read(s.buf)
	s.r, s.w = 0, n
	s.full = n == len(s.buf) || len(s.buf) == copyBuffer && n >= smallBuffer
	if n > 0 {
		return nil
	}
	return err
}
