package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/failclosed"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/network/sysctl"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// inOwnNamespace tells the second start of the test binary, which has network and
// mounts of its own: nothing it does reaches the machine, and everything it makes
// is gone when it ends, however it ends.
const inOwnNamespace = "NETWORK_TEST_NAMESPACE"

func TestMain(m *testing.M) {
	if os.Getenv(inOwnNamespace) != "" || os.Geteuid() != 0 {
		goleak.VerifyTestMain(m)
		return
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inOwnNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "start the tests in a namespace:", err)
		os.Exit(1)
	}
}

func privileged(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_PRIVILEGED") != "" {
		t.Fatal("this test needs root, and REQUIRE_PRIVILEGED is set")
	}
	t.Skip("this test needs root")
}

// The addresses of the small internet. uplink is the host's own address there.
var (
	uplink4  = netip.MustParsePrefix("203.0.113.1/24")
	uplink6  = netip.MustParsePrefix("2001:db8:1::1/64")
	gateway4 = netip.MustParseAddr("203.0.113.254")
	gateway6 = netip.MustParseAddr("2001:db8:1::fe")
	public4  = netip.MustParseAddr("198.51.100.10")
	public6  = netip.MustParseAddr("2001:db8:2::10")
)

// world is the host of a test, its small internet and a Network between.
type world struct {
	*Network
	t        testing.TB
	internet string // path of its namespace
	flows    *recorder
	cancel   context.CancelFunc
	done     chan error
	cfg      Config
}

type recorder struct {
	mu     sync.Mutex
	events []flowlog.Event
}

func (r *recorder) Record(e flowlog.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// wait returns the first event that ok accepts, within two seconds.
func (r *recorder) wait(t testing.TB, what string, ok func(flowlog.Event) bool) flowlog.Event {
	t.Helper()
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		r.mu.Lock()
		for _, e := range r.events {
			if ok(e) {
				r.mu.Unlock()
				return e
			}
		}
		r.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t.Fatalf("no event: %s; have %+v", what, r.events)
	return flowlog.Event{}
}

// start makes a world and runs its Network until the test ends, then demands that
// nothing of it is left.
func start(t testing.TB, change ...func(*Config)) *world {
	t.Helper()
	privileged(t)
	w := &world{t: t, flows: &recorder{}}
	w.cfg = Config{
		Name: "t", RunDir: t.TempDir(), IPv6: IPv6On, ProxyPort: 15001, DNSPort: 15053, PoolSize: 2,
		Quarantine: time.Millisecond, SourcePorts: DefaultSourcePorts, Flows: w.flows, Log: slog.New(slog.DiscardHandler),
	}
	if testing.Verbose() {
		w.cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	for _, c := range change {
		c(&w.cfg)
	}
	w.internet = makeInternet(t)
	t.Cleanup(func() {
		if w.Network == nil {
			return
		}
		w.halt()
		if err := w.Uninstall(context.Background()); err != nil {
			t.Error("tear down:", err)
		}
		if err := w.Close(); err != nil {
			t.Error("close:", err)
		}
		nothingLeft(t, w.cfg)
	})
	w.boot(nil)
	return w
}

// boot starts a Network over whatever the kernel holds.
func (w *world) boot(inUse map[sandbox.ID]sandbox.Held) {
	w.t.Helper()
	n, err := New(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.Network, w.cancel, w.done = n, cancel, make(chan error, 1)
	go func() { w.done <- n.Run(ctx) }()
	if err := n.Reconcile(context.Background(), inUse); err != nil {
		w.t.Fatal("reconcile:", err)
	}
	// What happens before Run listens is not in the flow log.
	listening := func(file, line string) bool {
		b, _ := os.ReadFile(file)
		return regexp.MustCompile(`(?m)^` + line).Match(b)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if listening("/proc/thread-self/net/netfilter/nfnetlink_log", fmt.Sprintf(` *%d `, n.cfg.NFLogGroup)) && listening("/proc/thread-self/net/netlink", `\S+ 12 +\d+ +00000005 `) {
			return
		}
		if time.Now().After(end) {
			w.t.Fatal("Run does not listen")
		}
	}
}

// halt ends Run, as the end of the server does.
func (w *world) halt() {
	w.t.Helper()
	w.cancel()
	select {
	case err := <-w.done:
		if err != nil {
			w.t.Error("run:", err)
		}
	case <-time.After(5 * time.Second):
		w.t.Error("Run does not end")
	}
}

// lease acquires a slot.
func (w *world) lease() sandbox.Lease {
	w.t.Helper()
	l, err := w.Acquire(context.Background(), sandboxid.New())
	if err != nil {
		w.t.Fatal("acquire:", err)
	}
	return l
}

// apply puts rules in force.
func (w *world) apply(l sandbox.Lease, in policy.Input) *policy.Compiled {
	w.t.Helper()
	p := compiled(w.t, in, nil)
	if err := w.Apply(context.Background(), l, p); err != nil {
		w.t.Fatal("apply:", err)
	}
	return p
}

func compiled(t testing.TB, in policy.Input, op *policy.Operator) *policy.Compiled {
	t.Helper()
	if op == nil {
		op = &policy.Operator{}
	}
	p, err := policy.Compile(in, op, 1)
	if err != nil {
		t.Fatal("compile:", err)
	}
	return p
}

// makeInternet joins a namespace that owns many public and private addresses to
// the host by a veth pair, and routes everything there.
func makeInternet(t testing.TB) string {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal("make the internet:", err)
		}
	}
	path := t.TempDir() + "/internet"
	ns, err := slot.CreateNetns(path)
	must(err)
	t.Cleanup(func() {
		ns.Close()
		if l, err := netlink.LinkByName("up0"); err == nil {
			must(netlink.LinkDel(l))
		}
		must(slot.RemoveNetns(path))
	})
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: "up0"})
	veth.PeerName, veth.PeerNamespace = "net0", netlink.NsFd(ns)
	must(netlink.LinkAdd(veth))
	// Until duplicate address detection is through, a second or two, a host has no
	// link-local address to look for its neighbours with.
	must(sysctl.Write("net/ipv6/conf/up0/accept_dad", "0"))
	enter(t, path, func() error { return sysctl.Write("net/ipv6/conf/net0/accept_dad", "0") })
	must(netlink.AddrAdd(veth, slot.Address(uplink4)))
	must(netlink.AddrAdd(veth, slot.Address(uplink6)))
	must(netlink.LinkSetUp(veth))
	enter(t, path, func() error {
		for _, name := range []string{"lo", "net0"} {
			l, err := netlink.LinkByName(name)
			must(err)
			must(netlink.LinkSetUp(l))
			if name == "net0" {
				must(netlink.AddrAdd(l, slot.Address(netip.PrefixFrom(gateway4, 24))))
				must(netlink.AddrAdd(l, slot.Address(netip.PrefixFrom(gateway6, 64))))
				continue
			}
			// All of the internet is local here: any address answers. For IPv6 the
			// route stands behind the one to the host, which it would hide.
			for all, table := range map[netip.Addr]int{netip.IPv4Unspecified(): unix.RT_TABLE_LOCAL, netip.IPv6Unspecified(): 100} {
				must(netlink.RouteAdd(&netlink.Route{
					LinkIndex: l.Attrs().Index, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: table, Dst: slot.Address(slot.Everything(all)).IPNet,
				}))
			}
			r := netlink.NewRule()
			r.Family, r.Table, r.Priority = netlink.FAMILY_V6, 100, 33000
			must(netlink.RuleAdd(r))
		}
		return nil
	})
	h, err := netlink.NewHandle()
	must(err)
	defer h.Close()
	must(slot.Settle(h, "up0", uplink6.Addr()))
	must(slot.Inside(ns, func(h *netlink.Handle) error { return slot.Settle(h, "net0", gateway6) }))
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: gateway4.AsSlice(), Dst: slot.Address(slot.Everything(gateway4)).IPNet}))
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: gateway6.AsSlice(), Dst: slot.Address(slot.Everything(gateway6)).IPNet}))
	return path
}

// enter runs fn in the namespace at path.
func enter(t testing.TB, path string, fn func() error) {
	t.Helper()
	if err := inNamespace(path, fn); err != nil {
		t.Fatal(err)
	}
}

func inNamespace(path string, fn func() error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer home.Close()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		err = fn()
		if back := netns.Set(home); back == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// dial connects from inside a slot.
func dial(l sandbox.Lease, network string, to netip.AddrPort) (net.Conn, error) {
	return dialFor(l, network, to, 2*time.Second)
}

// reaches reports whether anything answers; it does not wait long for nothing.
func reaches(l sandbox.Lease, to netip.AddrPort) bool {
	c, err := dialFor(l, "tcp", to, 300*time.Millisecond)
	if err == nil {
		c.Close()
	}
	return err == nil
}

func dialFor(l sandbox.Lease, network string, to netip.AddrPort, wait time.Duration) (net.Conn, error) {
	var c net.Conn
	err := inNamespace(l.NetNS, func() (err error) {
		c, err = (&net.Dialer{Timeout: wait}).Dial(network, to.String())
		return err
	})
	return c, err
}

// serve answers TCP and UDP on ports of the internet: TCP says hello and who
// called, then echoes; UDP echoes.
func (w *world) serve(ports ...uint16) {
	w.t.Helper()
	for _, port := range ports {
		var l net.Listener
		var u *net.UDPConn
		enter(w.t, w.internet, func() (err error) {
			if l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
				return err
			}
			return nil
		})
		enter(w.t, w.internet, func() (err error) {
			u, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
			return err
		})
		w.t.Cleanup(func() { u.Close() })
		serveTCP(w.t, l)
		go serveUDP(u)
	}
}

// serveTCP says hello and who called, then echoes, until the test ends.
func serveTCP(t testing.TB, l net.Listener) {
	greet(t, l, func(c net.Conn) string {
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		return strings.TrimPrefix(host, "::ffff:")
	})
}

// greet says hello and a word to each connection, then echoes. When the test ends it closes
// the listener and the connections: their other ends may be gone without a word.
func greet(t testing.TB, l net.Listener, word func(net.Conn) string) {
	var mu sync.Mutex // guards what follows
	var conns []net.Conn
	var over bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			if over {
				c.Close()
			}
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				fmt.Fprintf(c, "hello %s\n", word(c))
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		over = true
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

// serveUDP answers from the address that was asked (the internet owns them all).
func serveUDP(u *net.UDPConn) {
	raw, err := u.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
	})
	b, oob := make([]byte, 2048), make([]byte, 256)
	for {
		k, o, _, from, err := u.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return
		}
		_, _, _ = u.WriteMsgUDPAddrPort(b[:k], oob[:o], from)
	}
}

// hello connects, reads the greeting and returns who the server says called.
func hello(l sandbox.Lease, to netip.AddrPort) (string, error) {
	c, err := dial(l, "tcp", to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	b := make([]byte, 64)
	k, err := c.Read(b)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(strings.TrimPrefix(string(b[:k]), "hello ")), nil
}

// echoUDP sends a datagram and waits for its answer.
func echoUDP(l sandbox.Lease, to netip.AddrPort, wait time.Duration) error {
	c, err := dial(l, "udp", to)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 10))
	return err
}

// refusalUDP is echoUDP for a datagram that should be refused. The kernel limits
// ICMP errors to about one a second for a destination, so a silent refusal is
// asked for again.
func refusalUDP(l sandbox.Lease, to netip.AddrPort) (err error) {
	for range 5 {
		if err = echoUDP(l, to, 700*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
	return err
}

// nothingLeft fails the test when the kernel still holds anything of ours.
func nothingLeft(t testing.TB, cfg Config) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "cd") {
			t.Errorf("link %s is left", l.Attrs().Name)
		}
	}
	if files, _ := os.ReadDir(cfg.RunDir + "/netns"); len(files) > 0 {
		t.Errorf("namespaces are left: %v", files)
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	if strings.Contains(string(mounts), cfg.RunDir) {
		t.Errorf("mounts are left:\n%s", mounts)
	}
	k := &kernel{}
	defer k.close()
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.open(); err != nil {
		t.Fatal(err)
	}
	tables, err := k.conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, tab := range tables {
		t.Errorf("table %s is left", tab.Name)
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if r.Priority == rulePriority || r.Mark == 1<<29 || r.Priority == failclosed.LocalWait {
			t.Errorf("routing rule %s is left", r)
		}
	}
}
