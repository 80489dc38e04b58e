package egress

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	pipeSize  = 512 << 10 // of the kernel's pipe; more bytes a system call than its default 64 KiB
	idlePipes = 64        // kept for reuse
)

// pipe is what splice(2) moves bytes through.
type pipe struct{ r, w int }

func newPipe() (*pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("make a pipe to splice through: %w", err)
	}
	// Over the user's limit it stays small: slower, not wrong.
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{fds[0], fds[1]}, nil
}

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

// pipes lends empty pipes. io.Copy splices too, but holds its pipe while it waits
// for bytes: two of them, with four descriptors and 20 KiB of kernel memory, for
// every idle flow. The speed is the same (BenchmarkSplice).
type pipes struct {
	answers sync.Pool // of *answer, empty

	mu   sync.Mutex // guards free
	free []*pipe
}

func (ps *pipes) getAnswer() *answer {
	if a, ok := ps.answers.Get().(*answer); ok {
		return a
	}
	return new(answer)
}

func (ps *pipes) get() (*pipe, error) {
	ps.mu.Lock()
	if n := len(ps.free); n > 0 {
		p := ps.free[n-1]
		ps.free = ps.free[:n-1]
		ps.mu.Unlock()
		return p, nil
	}
	ps.mu.Unlock()
	return newPipe()
}

// put takes an empty pipe back.
func (ps *pipes) put(p *pipe) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if len(ps.free) >= idlePipes {
		p.close()
		return
	}
	ps.free = append(ps.free, p)
}

// close frees the pipes not lent.
func (ps *pipes) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.free {
		p.close()
	}
	ps.free = nil
}

// copy moves bytes from src to dst until src ends.
func (ps *pipes) copy(dst, src net.Conn) (int64, error) {
	return ps.copyN(dst, src, math.MaxInt64)
}

// copyN moves limit bytes from src to dst, or fewer without an error if src ends
// before; inside the kernel where both are TCP connections.
func (ps *pipes) copyN(dst, src net.Conn, limit int64) (int64, error) {
	s := splicing{ps: ps}
	return s.run(dst, src, limit)
}

// move is copy for a direction of a guarded flow. held is set when the guard wants
// what the client sent to be looked at; nothing of it was taken then.
func (ps *pipes) move(dst, src net.Conn, settled *atomic.Bool, from side) (n int64, held bool, err error) {
	if _, ok := dst.(*net.TCPConn); !ok && from == fromClient && !settled.Load() {
		return 0, true, nil // no kernel to look in
	}
	s := splicing{ps: ps, settled: settled, side: from}
	n, err = s.run(dst, src, math.MaxInt64)
	return n, s.held, err
}

func (s *splicing) run(dst, src net.Conn, limit int64) (int64, error) {
	to, ok1 := dst.(*net.TCPConn)
	from, ok2 := src.(*net.TCPConn)
	if !ok1 || !ok2 {
		return io.Copy(dst, &io.LimitedReader{R: src, N: limit})
	}
	var err error
	if s.in, err = from.SyscallConn(); err != nil {
		return 0, err
	}
	if s.out, err = to.SyscallConn(); err != nil {
		return 0, err
	}
	for s.total < limit {
		n, err := s.take(min(limit-s.total, pipeSize))
		if n == 0 || err != nil {
			return s.total, err
		}
		if err := s.give(n); err != nil {
			s.pipe.close() // what is left in it is lost
			return s.total, err
		}
	}
	if s.pipe != nil {
		s.ps.put(s.pipe)
	}
	return s.total, nil
}

// splicing is one direction of a flow.
type splicing struct {
	ps      *pipes
	in, out syscall.RawConn
	pipe    *pipe // lent while there are bytes to move
	total   int64
	settled *atomic.Bool // of a guarded flow
	answer  *answer      // lent while more of it may come
	side    side
	held    bool // what the client sent has to be looked at
}

const spliceFlags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE

// take waits for bytes and moves at most limit of them into a pipe; 0 is the end
// of the stream. While it waits it holds no pipe.
func (s *splicing) take(limit int64) (n int64, err error) {
	var failed error
	err = s.in.Read(func(fd uintptr) bool {
		most := limit
		if s.side != unguarded {
			var wait bool
			if most, wait = s.look(int(fd), limit); wait || s.held {
				return s.held
			}
		}
		if s.pipe == nil {
			if s.pipe, failed = s.ps.get(); failed != nil {
				return true
			}
		}
		n, failed = splice(int(fd), s.pipe.w, most)
		if n > 0 {
			return true
		}
		s.ps.put(s.pipe)
		s.pipe = nil
		return !errors.Is(failed, unix.EAGAIN)
	})
	if err = errors.Join(err, failed); err != nil && s.pipe != nil {
		s.ps.put(s.pipe) // the wait was ended from outside, after a splice of nothing
		s.pipe = nil
	}
	return n, err
}

// give moves n bytes out of the pipe.
func (s *splicing) give(n int64) error {
	for n > 0 {
		var moved int64
		var failed error
		err := s.out.Write(func(fd uintptr) bool {
			moved, failed = splice(s.pipe.r, int(fd), n)
			return !errors.Is(failed, unix.EAGAIN)
		})
		if err := errors.Join(err, failed); err != nil {
			return err
		}
		if moved == 0 {
			return io.ErrNoProgress
		}
		n -= moved
		s.total += moved
	}
	return nil
}

// splice is splice(2) once, not interrupted.
func splice(from, to int, n int64) (int64, error) {
	for {
		moved, err := unix.Splice(from, nil, to, nil, int(n), spliceFlags)
		if !errors.Is(err, unix.EINTR) {
			return max(moved, 0), err
		}
	}
}
