package relay

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// side is one end of a tunnel.
type side struct {
	net.Conn
	socket syscall.RawConn // nil where Conn is not a socket, nor TLS on one
	sealed bool            // by TLS, which may hold octets that are not on the socket any more
	err    error           // what its reading has ended with
}

func sideOf(c net.Conn) side {
	for { // what a server has put around a connection is not needed any more
		outer, ok := c.(interface{ NetConn() net.Conn })
		if _, secure := c.(*tls.Conn); secure || !ok {
			break
		}
		c = outer.NetConn()
	}
	s := side{Conn: c}
	on := c
	if secure, ok := c.(*tls.Conn); ok {
		s.sealed, on = true, secure.NetConn()
	}
	if sc, ok := on.(syscall.Conn); ok {
		s.socket, _ = sc.SyscallConn() // nil: it is read with a buffer
	}
	return s
}

// copyTo copies like io.Copy. While nothing comes, which is most of the time, it
// holds no buffer and little of a stack. What TLS holds must have been asked for.
func (s *side) copyTo(dst io.Writer) (total int64, err error) {
	if s.socket == nil {
		return copyIdle(dst, s.Conn)
	}
	for s.err == nil {
		s.wait()
		n, err := copyCome(dst, s.Conn)
		total += n
		if err != nil {
			return total, whole(err)
		}
		if b := s.held(); len(b) > 0 {
			total += int64(len(b))
			if _, err := dst.Write(b); err != nil {
				return total, err
			}
		}
	}
	return total, whole(s.err)
}

// whole makes of an end that is none of an error what io.Copy makes of it.
func whole(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// wait returns when there is something to read, or to be told by a read.
func (s *side) wait() {
	s.socket.Read(func(fd uintptr) bool { //nolint:errcheck // shows in the read
		var b [1]byte
		for {
			_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
			if !errors.Is(err, syscall.EINTR) {
				return !errors.Is(err, syscall.EAGAIN)
			}
		}
	})
}

// held returns what TLS has read off the socket and not handed out: whole records
// behind the one that was asked for. A deadline that is over keeps the socket out of it.
func (s *side) held() (b []byte) {
	if !s.sealed || s.socket == nil {
		return nil
	}
	s.SetReadDeadline(longAgo)           //nolint:errcheck // a dead connection shows in the read
	defer s.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	for s.err == nil {
		n, err := s.Read(buf[:])
		b = append(b, buf[:n]...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		s.err = err
	}
	return b
}

// sips are buffers to wait with: who sends half a record and stops holds no more.
var sips = sync.Pool{New: func() any { return new([512]byte) }}

// copyCome copies what has come, with a large buffer if it is much.
func copyCome(dst io.Writer, src io.Reader) (total int64, err error) {
	sip := sips.Get().(*[512]byte)
	n, err := src.Read(sip[:])
	if n > 0 {
		if _, werr := dst.Write(sip[:n]); werr != nil {
			err = werr
		}
	}
	full := n == len(sip)
	sips.Put(sip)
	if err != nil || !full {
		return int64(n), err
	}
	more, err := copyBurst(dst, src)
	return int64(n) + more, err
}

// copyIdle copies like io.Copy, but waits for bytes with a small buffer.
func copyIdle(dst io.Writer, src io.Reader) (total int64, err error) {
	for {
		n, err := copyCome(dst, src)
		total += n
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// burstWait is how long more of a burst is waited for with a large buffer.
const burstWait = 100 * time.Millisecond

// copyBurst copies until a read does not fill half the buffer, or nothing more comes
// for a moment where src can tell.
func copyBurst(dst io.Writer, src io.Reader) (total int64, err error) {
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	timed, _ := src.(interface{ SetReadDeadline(t time.Time) error })
	if timed != nil {
		defer timed.SetReadDeadline(time.Time{}) //nolint:errcheck // a dead connection shows in the read
	}
	for {
		if timed != nil {
			timed.SetReadDeadline(time.Now().Add(burstWait)) //nolint:errcheck // as above
		}
		n, err := src.Read(buf[:])
		total += int64(n)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return total, err
			}
		}
		if timed != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		if n < len(buf)/2 {
			return total, nil
		}
	}
}
