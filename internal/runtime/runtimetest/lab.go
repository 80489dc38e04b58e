package runtimetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// GuestPath is where Rootfs puts the program that sandboxes run, and GuestArgs
// its command line.
const GuestPath = "/guest"

// GuestArgs is the command line of the program sandboxes run.
func GuestArgs() []string { return []string{GuestPath, "serve"} }

// Privileged skips the test when it does not run as root; with
// REQUIRE_PRIVILEGED set, as in CI, it fails instead.
func Privileged(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

// Rootfs builds the guest program and an image around it: as little as a
// sandbox can live in. The image is shared by the sandboxes of a test.
func Rootfs(t testing.TB) string {
	t.Helper()
	root := folder(t)
	for dir, mode := range map[string]fs.FileMode{
		"etc": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755, "root": 0o700, "home": 0o755, "home/user": 0o777,
		"tmp": 0o1777, "var": 0o755,
	} {
		must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
		must(t, unix.Chmod(filepath.Join(root, dir), uint32(mode)))
	}
	guest, err := built(moduleRoot(t))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(root, "guest"), guest, 0o755))
	must(t, os.WriteFile(filepath.Join(root, "suid"), guest, 0o755))
	must(t, unix.Chmod(filepath.Join(root, "suid"), 0o4755))
	must(t, os.WriteFile(filepath.Join(root, "etc", "image"), []byte("from the image"), 0o644))
	return root
}

// builder builds the guest program once for all tests of a package: linking takes
// longer than a sandbox.
type builder struct {
	sync.Once
	guest []byte
	err   error
}

var program builder

// built returns the guest program.
func built(module string) ([]byte, error) {
	program.Do(func() { program.guest, program.err = buildGuest(module) })
	return program.guest, program.err
}

func buildGuest(module string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "guest"), "main.go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false")
	build.Dir = filepath.Join(module, "internal", "runtime", "runtimetest", "testdata", "guest")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest: %w\n%s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "guest"))
}

// moduleRoot walks up from the test's folder to the module's.
func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	must(t, err)
	for dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	t.Fatal("no go.mod above the test's folder")
	return ""
}

// folder is t.TempDir, but its name has none of the test's characters and
// everybody may pass through it, as a gofer does.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "runtimetest")
	must(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	must(t, os.Chmod(dir, 0o755))
	return dir
}

// Slot is two fresh network namespaces with a cable between them: one is the
// sandbox's, the other is the test's place to dial from. There is no way out.
type Slot struct {
	NetNS string     // path of the sandbox's namespace
	Guest netip.Addr // the sandbox's address

	outer, inner netns.NsHandle
	addr         *netlink.Addr
	route        *netlink.Route
	link         *netlink.Handle
	index        int
}

const agentPort = sandbox.AgentPort

// NewSlot makes a slot; n tells the slots of one test apart.
func NewSlot(t testing.TB, n int) *Slot {
	t.Helper()
	s := &Slot{
		NetNS: filepath.Join(folder(t), "netns"),
		Guest: netip.AddrFrom4([4]byte{10, 201, byte(n), 2}),
	}
	s.inner = newNetNS(t)
	s.outer = newNetNS(t)
	must(t, os.WriteFile(s.NetNS, nil, 0o644))
	must(t, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", s.inner), s.NetNS, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(s.NetNS, unix.MNT_DETACH)) })

	outer, err := netlink.NewHandleAt(s.outer)
	must(t, err)
	t.Cleanup(outer.Close)
	s.link, err = netlink.NewHandleAt(s.inner)
	must(t, err)
	t.Cleanup(s.link.Close)

	mac := net.HardwareAddr{2, 0, 0, 1, 0, byte(n)}
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "host0"},
		PeerName:  "eth0", PeerNamespace: netlink.NsFd(s.inner), PeerHardwareAddr: mac,
	}
	must(t, outer.LinkAdd(veth))
	host, err := outer.LinkByName("host0")
	must(t, err)
	gate := net.IPv4(10, 201, byte(n), 1).To4()
	must(t, outer.AddrAdd(host, &netlink.Addr{IPNet: &net.IPNet{IP: gate, Mask: net.CIDRMask(30, 32)}}))
	must(t, outer.LinkSetUp(host))
	// A static neighbour: the first packet need not wait for an answer.
	must(t, outer.NeighSet(&netlink.Neigh{LinkIndex: host.Attrs().Index, IP: s.Guest.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}))
	peer, err := s.link.LinkByName("eth0")
	must(t, err)
	must(t, s.link.LinkSetUp(peer))
	s.index = peer.Attrs().Index
	s.addr = &netlink.Addr{IPNet: &net.IPNet{IP: s.Guest.AsSlice(), Mask: net.CIDRMask(30, 32)}}
	s.route = &netlink.Route{LinkIndex: s.index, Gw: gate}
	s.Rearm(t)
	return s
}

// Rearm puts the address and the route back that a start takes away.
func (s *Slot) Rearm(t testing.TB) {
	t.Helper()
	peer, err := s.link.LinkByIndex(s.index)
	must(t, err)
	must(t, s.link.AddrReplace(peer, s.addr))
	must(t, s.link.RouteReplace(s.route))
}

// newNetNS makes a namespace on a thread that ends afterwards.
func newNetNS(t testing.TB) netns.NsHandle {
	t.Helper()
	type made struct {
		ns  netns.NsHandle
		err error
	}
	c := make(chan made, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			c <- made{err: err}
			return
		}
		ns, err := netns.Get()
		c <- made{ns, err}
	}()
	m := <-c
	must(t, m.err)
	t.Cleanup(func() { must(t, m.ns.Close()) })
	return m.ns
}

// dial opens a connection from the slot's outer namespace.
func (s *Slot) dial(ctx context.Context) (net.Conn, error) {
	type dialled struct {
		c   net.Conn
		err error
	}
	c := make(chan dialled, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if err := netns.Set(s.outer); err != nil {
			c <- dialled{err: err}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp4", netip.AddrPortFrom(s.Guest, agentPort).String())
		c <- dialled{conn, err}
	}()
	d := <-c
	return d.c, d.err
}

// guestTimeout bounds how long a sandbox may take to answer.
const guestTimeout = 20 * time.Second

// Ask has the guest do something and returns what it answered. It waits for a
// guest that has not started yet.
func (s *Slot) Ask(ctx context.Context, do string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	var conn net.Conn
	for {
		// A SYN that came too early is repeated after a second only.
		attempt, stop := context.WithTimeout(ctx, 20*time.Millisecond)
		c, err := s.dial(attempt)
		stop()
		if err == nil {
			conn = c
			break
		}
		if ctx.Err() != nil {
			return "", fmt.Errorf("dial the guest: %w", err)
		}
		time.Sleep(time.Millisecond / 2)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	return exchange(conn, do, args...)
}

// exchange asks the guest over a connection.
func exchange(conn net.Conn, do string, args ...string) (string, error) {
	if err := json.NewEncoder(conn).Encode(map[string]any{"Do": do, "Args": args}); err != nil {
		return "", fmt.Errorf("ask the guest: %w", err)
	}
	var r struct{ Out, Err string }
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return "", fmt.Errorf("hear the guest: %w", err)
	}
	if r.Err != "" {
		return r.Out, errors.New(r.Err)
	}
	return r.Out, nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
