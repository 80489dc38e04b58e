package gvisor

import (
	"fmt"
	"io"
	"math"
	"os"
	"runtime/debug"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"

	"github.com/cordonhq/cordon/internal/runtime/gvisor/filters"

	_ "unsafe" // for go:linkname
)

// The names under which this binary executes itself. The first is ours, the
// others are gVisor's; "/proc/self/exe" is its helper that unmounts /proc.
const (
	workerArg0  = "cordon-worker"
	runscArg0   = "runsc"
	sandboxArg0 = "runsc-sandbox"
	goferArg0   = "runsc-gofer"
	execArg0    = "runsc-exec"
	selfArg0    = "/proc/self/exe"
)

// module is gVisor's path in the build information.
const module = "gvisor.dev/gvisor"

// runscVersion is what a restore compares with the version in a checkpoint. It
// is the same for all builds unless it is set, so every process sets it.
//
//go:linkname runscVersion gvisor.dev/gvisor/runsc/version.version
var runscVersion string

// Dispatch must be the first statement of main. A sandbox is made of processes
// that are this binary under other names; in one of them Dispatch does that
// process's work and never returns. In the server and the command line it
// returns at once. Each start of a sandbox executes the binary four times, so
// whatever package initialisation costs, a start pays four times.
func Dispatch() {
	switch os.Args[0] {
	case workerArg0:
		os.Exit(runWorker())
	case sandboxArg0:
		filters.RegisterSentry()
		setStackDefaults()
	case goferArg0:
		filters.RegisterGofer()
	case runscArg0, execArg0, selfArg0:
	default:
		keepDescriptors()
		return
	}
	runscVersion = version()
	cli.Run(nil, commands(), nil)
	os.Exit(0)
}

// keepDescriptors keeps what the caller of this process left open from the
// programs it starts: a sentry meets numbers it needs for itself taken, and a
// sandbox's processes would hold a stranger's pipe. Kernels before 5.11 do not
// know the flag and lose only this.
func keepDescriptors() {
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
}

// commands are the runsc commands that are linked in.
func commands() map[util.SubCommand]string {
	return map[util.SubCommand]string{
		new(cmd.Create): "", new(cmd.Start): "", new(cmd.Run): "", new(cmd.Restore): "",
		new(cmd.Checkpoint): "", new(cmd.Delete): "", new(cmd.Exec): "", new(cmd.State): "",
		new(cmd.Wait): "", new(cmd.Kill): "", new(cmd.Tar): "", new(cmd.List): "",
		new(cmd.PS): "", new(cmd.Events): "", new(cmd.Debug): "",
		new(sentrycmd.Boot): "internal", new(cmd.Gofer): "internal", new(sentrycmd.Umount): "internal",
	}
}

// RunCLI replaces this process by gVisor's own command line, for debugging, as
// in "cordon debug runsc list". stateDir is the runtime's Config.StateDir. It
// returns only when it fails.
func RunCLI(stateDir string, args, environ []string) error {
	argv := append([]string{runscArg0, "--root=" + runscRoot(stateDir)}, args...)
	return fmt.Errorf("execute runsc: %w", syscall.Exec("/proc/self/exe", argv, environ))
}

// pinned is the version in go.mod, for binaries without build information:
// test binaries have none of their modules. A test compares the two.
const pinned = "v0.0.0-20260905035102-160fafc42237"

// version returns the version of gVisor in this binary.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return pinned
	}
	for _, m := range info.Deps {
		if m.Path != module {
			continue
		}
		if m.Replace != nil {
			m = m.Replace
		}
		return m.Version
	}
	return pinned
}

// parseFlags turns runsc's flags into its configuration.
func parseFlags(flags []string) (*config.Config, error) {
	fs := flag.NewFlagSet(runscArg0, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	config.RegisterFlags(fs)
	if err := fs.Parse(flags); err != nil {
		return nil, fmt.Errorf("parse runsc's flags: %w", err)
	}
	conf, err := config.NewFromFlags(fs)
	if err != nil {
		return nil, fmt.Errorf("configure runsc: %w", err)
	}
	return conf, nil
}

// silence sends the library's own log lines to w; by default they go to
// standard error.
func silence(w io.Writer) { log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: w}}) }

// tableFD is a descriptor that makes the table of the process that holds it, and
// of the processes it makes, large enough for the sentry, which puts its
// standard files at 253 to 255. Growing a table that threads share waits for an
// RCU grace period, 10 ms; a process that is made with a large one need not.
const tableFD = 300

// holdTable duplicates fd to tableFD or above, for as long as the process lives.
func holdTable(fd int) error {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, tableFD); err != nil {
		return fmt.Errorf("enlarge the file table: %w", err)
	}
	return nil
}

// tableOnce enlarges the server's own table, from which the workers' are
// made.
var tableOnce = sync.OnceValue(func() error {
	f, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("enlarge the file table: %w", err)
	}
	defer f.Close()
	return holdTable(int(f.Fd()))
})
