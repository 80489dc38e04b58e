package gvisor

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"gvisor.dev/gvisor/runsc/boot"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// Fixed sizes. Everything else comes from sandbox.Resources.
const (
	// sentryMB is what a sandbox's cgroup gets over its plan for the sentry and the
	// gofer, which live there too.
	sentryMB = 64
	// burstMB, or a quarter of the plan if that is more, is what it gets besides.
	// When the limit is hit the kernel kills the sentry, which is the whole sandbox.
	// The agent kills a process before that, but a process goes on filling memory
	// until it is dead, and no signal interrupts a system call that fills it.
	burstMB = 64
	// cpuPeriod is CFS's default, in microseconds.
	cpuPeriod = 100_000
	// hostThreads is what the sentry and the gofer need of the cgroup's limit of
	// threads before the first process of the sandbox runs.
	hostThreads = 256
	// oomScore makes the kernel prefer sandboxes to the server when the host
	// itself runs out of memory.
	oomScore  = 500
	openFiles = 1 << 20
	softFiles = 1 << 16
)

// capabilities are those of root inside the sandbox. They are the sentry's
// invention: none is a capability on the host, where the sentry holds its own
// few in a user namespace of its own. The list is Docker's default without
// NET_RAW, which would let root forge packets of its own network stack, and
// with SYS_PTRACE and SYS_NICE, which debuggers and schedulers expect.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	"CAP_SYS_PTRACE", "CAP_SYS_NICE",
}

// adminCapabilities let root mount, and configure the sentry's own network stack:
// what every user of the sandbox may do in a user namespace already. The host's
// rules do not trust that stack, whoever configures it.
var adminCapabilities = []string{"CAP_SYS_ADMIN", "CAP_NET_ADMIN"}

// check says what is wrong with a specification before anything is made.
func check(s sandbox.RuntimeSpec) error {
	switch {
	case !s.ID.Valid():
		return errs.New(errs.Invalid, "sandbox ID %q: want \"i\" and 20 characters of 0-9 and a-z", s.ID)
	case !filepath.IsAbs(s.Rootfs):
		return errs.New(errs.Invalid, "rootfs %q: want an absolute path", s.Rootfs)
	case len(s.Args) == 0:
		return errs.New(errs.Invalid, "args: want the agent's command line, got none")
	case s.NetNS != "" && !filepath.IsAbs(s.NetNS):
		return errs.New(errs.Invalid, "netns %q: want an absolute path", s.NetNS)
	}
	r := s.Resources
	for _, v := range []struct {
		name     string
		got, max int64
	}{
		{"cpus", int64(r.CPUs), 1 << 12},
		{"memoryMB", r.MemoryMB, 1 << 24},
		{"diskMB", r.DiskMB, 1 << 30},
		{"processes", r.Processes, 1 << 22},
	} {
		if v.got < 1 || v.got > v.max {
			return errs.New(errs.Invalid, "%s %d: want 1 to %d", v.name, v.got, v.max)
		}
	}
	for _, b := range s.Binds {
		if !filepath.IsAbs(b.Host) || !filepath.IsAbs(b.Guest) {
			return errs.New(errs.Invalid, "bind of %q to %q: want absolute paths", b.Host, b.Guest)
		}
		if b.Guest = filepath.Clean(b.Guest); b.Guest == "/" {
			return errs.New(errs.Invalid, "bind of %q: cannot replace / itself", b.Host)
		}
	}
	if fi, err := os.Stat(s.Rootfs); err != nil {
		return fmt.Errorf("look at the rootfs: %w", err)
	} else if !fi.IsDir() {
		return errs.New(errs.Invalid, "rootfs %q: not a directory", s.Rootfs)
	}
	return nil
}

// rootSize is the annotation with the size of the root's writable layer.
const rootSize = boot.RootfsPrefix + "options"

// quota is the size of each writable layer, in MiB. gVisor gives every mount a
// layer and a size of its own; only the root's may differ from the others'.
type quota struct{ root, bind int64 }

// quotas divides the disk. Files that are bound get next to nothing, just enough
// to be edited, and so do sealed directories. With another directory among them,
// the binds share half of the disk.
func quotas(s sandbox.RuntimeSpec) quota {
	disk := s.Resources.DiskMB
	for _, b := range s.Binds {
		if fi, err := os.Stat(b.Host); err == nil && fi.IsDir() && !b.Sealed {
			return quota{root: max(disk/2, 1), bind: max(disk/2/int64(len(s.Binds)), 1)}
		}
	}
	return quota{root: disk, bind: 1}
}

// ociSpec describes the sandbox in OCI's terms. A checkpoint is restored only
// under the same args, capabilities and mounts, so nothing here depends on the
// sandbox's ID but the cgroup's path.
func (r *Runtime) ociSpec(s sandbox.RuntimeSpec) *specs.Spec {
	return &specs.Spec{
		Version:  specs.Version,
		Hostname: s.Hostname,
		Root:     &specs.Root{Path: s.Rootfs},
		Annotations: map[string]string{ // the root's layer has another size than the binds'
			boot.RootfsPrefix + "source":  s.Rootfs,
			boot.RootfsPrefix + "type":    "bind",
			boot.RootfsPrefix + "overlay": "dir=" + r.cfg.DataDir,
			rootSize:                      fmt.Sprintf("size=%dm", quotas(s).root),
		},
		Process: &specs.Process{
			Args:         s.Args,
			Env:          s.Env,
			Cwd:          "/",
			Capabilities: caps(s),
			OOMScoreAdj:  new(oomScore),
			Rlimits: []specs.POSIXRlimit{
				{Type: "RLIMIT_NOFILE", Hard: openFiles, Soft: softFiles},
				{Type: "RLIMIT_NPROC", Hard: uint64(processes(s.Resources)), Soft: uint64(processes(s.Resources))},
			},
		},
		Mounts: mounts(s),
		Linux: &specs.Linux{
			CgroupsPath: r.groups.path(s.ID, s.Owner),
			Namespaces:  namespaces(s.NetNS),
			Resources:   limits(s.Resources),
		},
	}
}

// caps are root's capabilities. A checkpoint is restored under those it began with:
// older ones, whose agent has its key on the command line, without the admin's.
func caps(s sandbox.RuntimeSpec) *specs.LinuxCapabilities {
	all := capabilities
	if !slices.Contains(s.Args, "--control-hash") {
		all = slices.Concat(capabilities, adminCapabilities)
	}
	return &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
}

func namespaces(netns string) []specs.LinuxNamespace {
	out := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
	}
	if netns != "" {
		out = append(out, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: netns})
	}
	return out
}

// mounts are the sentry's own file systems and the binds.
//
// /tmp/.X11-unix is there for /tmp: gVisor puts a file system in memory, without
// a limit, over a /tmp that is empty, and leaves alone one that has a mount
// below it. So /tmp is on disk, under the quota.
func mounts(s sandbox.RuntimeSpec) []specs.Mount {
	shm := fmt.Sprintf("size=%dm", max(64, s.Resources.MemoryMB/2))
	out := []specs.Mount{
		{Type: "proc", Source: "proc", Destination: "/proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Type: "sysfs", Source: "sysfs", Destination: "/sys", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Type: "cgroup", Source: "cgroup", Destination: "/sys/fs/cgroup", Options: []string{"nosuid", "noexec", "nodev"}}, // the sentry's own
		{Type: "dev", Source: "dev", Destination: "/dev"},
		{Type: "devpts", Source: "devpts", Destination: "/dev/pts"},
		{Type: "tmpfs", Source: "tmpfs", Destination: "/dev/shm", Options: []string{"nosuid", "nodev", "mode=1777", shm}},
		{Type: "tmpfs", Source: "tmpfs", Destination: "/tmp/.X11-unix", Options: []string{"nosuid", "nodev", "mode=1777", "size=1m"}},
	}
	for _, b := range s.Binds {
		out = append(out, specs.Mount{
			Type: "bind", Source: filepath.Clean(b.Host), Destination: filepath.Clean(b.Guest),
			Options: []string{"bind"},
		})
	}
	return out
}

// limits are the cgroup's when the sandbox is created, and what it sees as its
// own: gVisor reads them back once. Create raises the memory's afterwards.
func limits(r sandbox.Resources) *specs.LinuxResources {
	memory := r.MemoryMB << 20
	res := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &memory},
		CPU:    &specs.LinuxCPU{Quota: new(int64(r.CPUs) * cpuPeriod), Period: new(uint64(cpuPeriod))},
		Pids:   &specs.LinuxPids{Limit: threads(r)},
	}
	if hasSwap() {
		res.Memory.Swap = &memory // memory and swap together: no swap
	}
	return res
}

// hardMemory is the limit of a sandbox's memory on the host, in bytes.
func hardMemory(r sandbox.Resources) int64 {
	return (r.MemoryMB + sentryMB + max(burstMB, r.MemoryMB/4)) << 20
}

// processes is how many processes and threads a sandbox may have: as many as it
// asks for, but no more than its memory has room for. Each process costs the host
// some 700 KiB besides the memory it knows of, and a fork bomb must meet a limit
// before the kernel ends the sentry for it. The agent enforces it, by the sentry's
// own cgroups: when the host refuses the sentry a thread, it panics.
func processes(r sandbox.Resources) int64 { return max(min(r.Processes, r.MemoryMB*7/10), 1) }

// threads is how many threads of the host a sandbox may have. Each of its
// processes is one on the host with a thread for each CPU it runs on at once.
func threads(r sandbox.Resources) int64 {
	n := r.Processes*int64(2+r.CPUs) + hostThreads
	return min(n, math.MaxInt32)
}

// hasSwap reports whether the host swaps at all. Where it does not, the kernel
// may lack the files that limit it.
func hasSwap() bool {
	b, err := os.ReadFile("/proc/swaps")
	return err == nil && strings.Count(string(b), "\n") > 1
}
