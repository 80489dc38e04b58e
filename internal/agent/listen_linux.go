package agent

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// exclusive undoes what Go's net package sets before it binds.
func exclusive(_, _ string, c syscall.RawConn) error {
	var set error
	err := c.Control(func(fd uintptr) {
		set = os.NewSyscallError("setsockopt SO_REUSEADDR", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 0))
	})
	if err != nil {
		return err
	}
	return set
}
