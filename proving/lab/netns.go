package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Netns is a network namespace without a name: only open descriptors and the
// processes in it keep it alive, so that it is gone when this process is, however
// this process ends.
type Netns struct {
	file *os.File
}

// newNetns creates an empty namespace. Its loopback is down.
func newNetns() (*Netns, error) {
	var made *Netns
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network namespace: %w", err)
		}
		f, err := currentNetns()
		if err != nil {
			return err
		}
		made = &Netns{file: f}
		return nil
	})
	return made, err
}

// NewNetns creates a namespace that holds nothing but its loopback, which is up.
func NewNetns() (*Netns, error) {
	n, err := newNetns()
	if err != nil {
		return nil, err
	}
	if err := loopbackUp(n); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// OpenNetns opens the namespace that a file is bound to.
func OpenNetns(path string) (*Netns, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return &Netns{file: f}, nil
}

// currentNetns opens the calling thread's network namespace.
func currentNetns() (*os.File, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open this thread's network namespace: %w", err)
	}
	return f, nil
}

// onThread runs fn on an operating system thread of its own and puts that thread
// back into its network namespace afterwards. A thread that cannot be put back is
// never reused: it ends with its goroutine.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("the function ended its goroutine instead of returning")
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, herr := currentNetns()
		if herr != nil {
			runtime.UnlockOSThread()
			err = herr
			return
		}
		defer home.Close()
		ferr := fn()
		if rerr := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); rerr != nil {
			err = errors.Join(ferr, fmt.Errorf("return to the first network namespace: %w", rerr))
			return
		}
		runtime.UnlockOSThread()
		err = ferr
	}()
	return <-done
}

// Do runs fn in the namespace, on a locked thread. Sockets that fn creates belong
// to the namespace for ever; goroutines that fn starts do not run in it. fn must
// return: a test's FailNow inside fn is reported as an error.
func (n *Netns) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// FD is the descriptor of the namespace, for netlink libraries. It is valid
// until the Lab, or the test that made the namespace, is closed.
func (n *Netns) FD() int { return int(n.file.Fd()) }

// Path names the namespace for as long as this process lives, for programs that
// want a file ("nsenter --net=…").
func (n *Netns) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD()) }

// Listen listens in the namespace. The address holds an IP, not a name.
func (n *Netns) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(ctx, network, address)
		return err
	})
	return l, err
}

// ListenPacket opens a datagram socket in the namespace. The address holds an IP.
func (n *Netns) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var p net.PacketConn
	err := n.Do(func() (err error) {
		p, err = (&net.ListenConfig{}).ListenPacket(ctx, network, address)
		return err
	})
	return p, err
}

// Dial connects from the namespace. The address holds an IP: resolving a name
// would leave the thread, and so the namespace. Lab.Dial takes names.
func (n *Netns) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial %s: the address must be an IP and a port: %w", address, err)
	}
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Close lets go of the namespace, which ends with the last process or socket in it.
func (n *Netns) Close() error { return n.file.Close() }

func (n *Netns) handle() netns.NsHandle { return netns.NsHandle(n.FD()) }
