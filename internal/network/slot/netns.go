package slot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NewNetns makes an empty network namespace, which lasts until its handle is closed.
func NewNetns() (netns.NsHandle, error) {
	ns, done := netns.None(), make(chan error, 1)
	go func() { done <- newNetns(&ns) }()
	err := <-done
	return ns, err
}

// newNetns must be the last call of its goroutine: a thread that cannot go back to its
// namespace stays locked and ends with the goroutine. Letting every thread end would do
// as well, were it not for the first one: it cannot end, and /proc/self would show the
// sandbox's namespace as the server's.
func newNetns(out *netns.NsHandle) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		return fmt.Errorf("open this thread's namespace: %w", err)
	}
	defer home.Close()
	ns, err := netns.New()
	if err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	if err := netns.Set(home); err != nil {
		return errors.Join(fmt.Errorf("go back to this thread's namespace: %w", err), ns.Close())
	}
	runtime.UnlockOSThread()
	*out = ns
	return nil
}

// CreateNetns makes an empty network namespace and binds it to path.
func CreateNetns(path string) (netns.NsHandle, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return netns.None(), fmt.Errorf("make the namespaces' directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0)
	if err != nil {
		return netns.None(), fmt.Errorf("make the namespace's file: %w", err)
	}
	f.Close()
	ns, err := NewNetns()
	if err != nil {
		return netns.None(), err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", int(ns)), path, "", unix.MS_BIND, ""); err != nil {
		return netns.None(), errors.Join(fmt.Errorf("bind namespace to %s: %w", path, err), ns.Close())
	}
	return ns, nil
}

// RemoveNetns unbinds a namespace from path and removes the file; what is absent already
// is no error.
func RemoveNetns(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace: %w", err)
	}
	return nil
}

// IsNetns reports whether path is a namespace's bind mount: after a restart of the
// machine only the empty file under it is left.
func IsNetns(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.NSFS_MAGIC
}

// Inside runs fn with a connection into a namespace.
func Inside(ns netns.NsHandle, fn func(*netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("enter namespace: %w", err)
	}
	defer h.Close()
	return fn(h)
}
