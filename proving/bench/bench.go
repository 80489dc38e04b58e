// Package bench measures cordon beside other programs: everything that is
// compared runs side by side, in turns, in one run, on the same wires, against
// the same servers and under the same load, and is shown as a ratio with its
// spread. Absolute figures of a shared machine mean little.
//
// A run lives in network, mount and process namespaces of its own: nothing it
// does reaches the machine's network, and however it ends, the kernel removes
// what it made. Inside, each part is a process of its own (process.go), so that
// what is measured shares no memory, no scheduler and no garbage collector with
// the load:
//
//	client ── router ── server      wires.go; one router for each thing compared:
//	                                forwarding, cordon (gateway.go), peers (peers.go)
package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
)

// Options say what to measure and how long. Zero fields take the defaults.
type Options struct {
	Tables    []string      // of Tables(); all
	Rounds    int           // how often each thing is measured; 11
	Each      time.Duration // how long one measurement takes; 100 ms
	Sandboxes int           // registered beside the one that is measured; 1000
	CIDRs     int           // in its policy then; 10,000
	Flows     int           // idle connections when memory is measured; 10,000
	Starts    int           // sandboxes started one by one, for start; 30
	Burst     int           // sandboxes started ten at a time; 100

	// Self is the command line that runs Process: the role and its configuration
	// are appended. Required.
	Self []string
	// Versus is the command line that runs Process of another build, which egress and
	// ingress are compared with instead of with the peers; may be empty.
	Versus []string
	// Rows are parts of the names of the rows of egress to compare with it; none: all.
	Rows []string
	// Server is the command line of a server, without its configuration; for start.
	Server []string
	// CacheDir has the images, and Template is the one that sandboxes start from.
	CacheDir, Template string
	// Interpreter is the template with kernels, if its image is built.
	Interpreter string

	Scratch string // set by Run: a folder that is removed afterwards
}

// tables are what can be measured, in this order.
var tables = []struct {
	name string
	run  func(context.Context, *run) error
}{
	{"egress", egressTables}, {"ingress", ingressTable}, {"start", startTable},
}

// Tables are the names of what can be measured.
func Tables() []string {
	out := make([]string, len(tables))
	for i, t := range tables {
		out[i] = t.name
	}
	return out
}

func (o *Options) fill() {
	if len(o.Tables) == 0 {
		o.Tables = Tables()
	}
	if o.Each <= 0 {
		o.Each = 100 * time.Millisecond
	}
	for _, f := range []struct {
		v *int
		d int
	}{{&o.Rounds, 11}, {&o.Sandboxes, 1000}, {&o.CIDRs, 10_000}, {&o.Flows, 10_000}, {&o.Starts, 30}, {&o.Burst, 100}} {
		if *f.v <= 0 {
			*f.v = f.d
		}
	}
}

// Run measures and prints. It needs root.
func Run(ctx context.Context, o Options, out, errOut io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the bench needs root: it creates namespaces")
	}
	o.fill()
	for _, name := range o.Tables {
		if _, ok := tableNamed(name); !ok {
			return errs.New(errs.Invalid, "no table %q: use %s", name, strings.Join(Tables(), ", "))
		}
	}
	if o.Scratch, err = os.MkdirTemp("", "cordon-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.Scratch)) }()
	config, err := json.Marshal(o)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, o.Self[0], append(append([]string{}, o.Self[1:]...), roleTables, string(config))...)
	cmd.Stdout, cmd.Stderr = out, errOut
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	// The first process of a PID namespace takes all others with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("measure: %w", errors.Join(ctx.Err(), err))
	}
	return nil
}

func tableNamed(name string) (func(context.Context, *run) error, bool) {
	for _, t := range tables {
		if t.name == name {
			return t.run, true
		}
	}
	return nil, false
}

// run is a run inside its namespaces.
type run struct {
	Options
	out   io.Writer
	cert  *certificate
	files int // that a process may open
	made  int // folders, wires: what needs a number
}

// runTables is the first process inside.
func runTables(ctx context.Context, config string) error {
	r := &run{out: os.Stdout}
	if err := json.Unmarshal([]byte(config), &r.Options); err != nil {
		return err
	}
	if err := settleIn(); err != nil {
		return err
	}
	var err error
	if r.files, err = raiseLimit(); err != nil {
		return err
	}
	if r.cert, err = newCertificate(r.Scratch); err != nil {
		return err
	}
	fmt.Fprintf(r.out, "%s, %d cores; %d rounds, %v each; load average %s\n", kernelRelease(), runtime.NumCPU(), r.Rounds, r.Each, loadAverage())
	for _, name := range r.Tables {
		table, _ := tableNamed(name)
		began := time.Now()
		if err := table(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(r.out, "\n%s took %v; load average %s\n", name, time.Since(began).Round(time.Second), loadAverage())
	}
	return nil
}

// settleIn makes the new namespaces usable: mounts stay here, /proc shows our
// processes, and the loopback is up.
func settleIn() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// raiseLimit lets this process and those it starts open as many files as the
// machine allows, and returns how many those are. A runtime that raises its own
// limit lowers it again for its children, unless it is set by hand.
func raiseLimit() (int, error) {
	const want = 1 << 20
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, err
	}
	if l.Max < want && syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: want, Max: want}) == nil {
		return want, nil
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("raise the limit on open files: %w", err)
	}
	return int(min(l.Cur, want)), nil
}

// idle is how many idle connections a program can hold that has so many files
// open for each, and some for itself.
func (r *run) idle(filesEach int) int { return min(r.Flows, (r.files-500)/filesEach) }

// folder makes a folder below the run's.
func (r *run) folder(name string) (string, error) {
	r.made++
	dir := filepath.Join(r.Scratch, fmt.Sprintf("%s-%d", name, r.made))
	return dir, os.Mkdir(dir, 0o755)
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "Linux"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}
