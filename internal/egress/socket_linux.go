package egress

import (
	"errors"
	"net"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peek looks at a connection without taking anything: n is 1 when a byte is
// there, 0 with a nil error at the end of the stream.
func peek(c net.Conn) (n int, err error) {
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var one [1]byte
	var failed error
	err = raw.Control(func(fd uintptr) {
		n, _, failed = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	})
	return n, errors.Join(err, failed)
}

// peekAt is peek for a descriptor. unix.Recvfrom does the same, but reads an address
// as well, for which the stack of a waiting goroutine would have to grow.
func peekAt(fd int, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// writeLast is Write for the last bytes before a FIN, which then leaves in the same
// segment: one packet and its acknowledgement less for each connection. The caller
// must end its direction next; the kernel keeps a part of a segment back until then.
func writeLast(c *net.TCPConn, b []byte) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var errno syscall.Errno
	err = raw.Write(func(fd uintptr) bool {
		for n < len(b) {
			var m uintptr
			m, _, errno = unix.Syscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[n])), uintptr(len(b)-n), unix.MSG_MORE|unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
			if errno != 0 {
				break
			}
			n += int(m)
		}
		return errno != unix.EAGAIN && errno != unix.EINTR
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return n, err
}

// silent reports whether an idle connection is open with nothing to read.
func silent(c net.Conn) bool {
	_, err := peek(c)
	return errors.Is(err, unix.EAGAIN)
}

// gone reports whether the peer reset the connection. A peer that only closed
// its own direction may still wait for an answer.
func gone(c net.Conn) bool {
	_, err := peek(c)
	return err != nil && !errors.Is(err, unix.EAGAIN)
}

// drain waits, a second at most, until the client has acknowledged what was sent
// to it: a reset would take unsent bytes along.
func (f *flow) drain() {
	if f.bytesIn.Load() == 0 {
		return
	}
	raw, err := f.client.SyscallConn()
	if err != nil {
		return
	}
	for end := time.Now().Add(farewell); time.Now().Before(end); time.Sleep(time.Millisecond) {
		left := 0
		err := raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		if err != nil || left == 0 {
			return
		}
	}
}
