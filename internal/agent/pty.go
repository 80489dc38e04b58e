package agent

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
)

// openPTY opens a terminal of the asked size and returns its other end three
// times, for the child.
//
// The master is opened non-blocking, which is why no library is used: read and
// write deadlines need it, or a terminal held open by a grandchild could never
// be let go.
func (p *process) openPTY(c command) (theirs []*os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /dev/ptmx", err)
	}
	p.pty = os.NewFile(uintptr(fd), "/dev/ptmx")
	p.stdin = newInput(p.pty)
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, os.NewSyscallError("number of the terminal", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, os.NewSyscallError("unlock the terminal", err)
	}
	if err := p.resize(c.size); err != nil {
		return nil, err
	}
	name := "/dev/pts/" + strconv.FormatUint(uint64(n), 10)
	tty, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the terminal: %w", err)
	}
	theirs = append(theirs, tty)
	// The user opens it by name too: tty(1), script(1), sudo(8).
	if err := tty.Chown(int(c.user.UID), -1); err != nil && os.Geteuid() == 0 {
		return theirs, fmt.Errorf("give the terminal to %s: %w", c.user.Name, err)
	}
	return append(theirs, tty, tty), nil
}

// resize sets the terminal's size; its foreground group gets SIGWINCH.
func (p *process) resize(size *pb.PTY_Size) error {
	raw, err := p.pty.SyscallConn()
	if err != nil {
		return err
	}
	ws := &unix.Winsize{Col: clamp16(size.GetCols()), Row: clamp16(size.GetRows())}
	var sysErr error
	err = raw.Control(func(fd uintptr) { sysErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, ws) })
	if err == nil {
		err = os.NewSyscallError("size of the terminal", sysErr)
	}
	return err
}

func clamp16(n uint32) uint16 { return uint16(min(n, 0xffff)) }
