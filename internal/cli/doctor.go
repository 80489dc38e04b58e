package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/internal/server"
	"github.com/google/nftables"
	"github.com/spf13/cobra"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network"
)

// finding is the outcome of one check of the host.
type finding struct {
	name string
	ok   bool
	warn bool   // not ok, but cordon works without
	say  string // what was seen
	mend string // what to do about it
}

func doctorCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "doctor",
		Short:   "Check this machine and say how to mend what is missing",
		Example: `  sudo cordon doctor`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			failed, findings := 0, examine(cmd.Context(), &cfg)
			for _, f := range findings {
				mark := "ok  "
				switch {
				case f.ok:
				case f.warn:
					mark = "warn"
				default:
					mark = "FAIL"
					failed++
				}
				fmt.Fprintf(a.out, "%s  %-12s %s\n", mark, f.name, f.say)
				if !f.ok && f.mend != "" {
					fmt.Fprintf(a.out, "      %-12s → %s\n", "", f.mend)
				}
			}
			if failed > 0 {
				return fmt.Errorf("%d of %d checks failed: cordon serve will not work until they are mended", failed, len(findings))
			}
			return nil
		},
	}
}

// examine checks everything cordon needs of the host, in the order a person
// would mend it.
func examine(ctx context.Context, cfg *server.Config) []finding {
	if root := checkRoot(); !root.ok { // the other checks would blame the machine for it
		return []finding{root, checkKernel(), checkCgroups(), checkMmdebstrap(), checkNames(ctx, cfg)}
	}
	out := []finding{checkRoot(), checkKernel(), checkNetns(), checkNftables(), checkGuard(cfg), checkForward(cfg), checkCgroups(), checkMmdebstrap()}
	out = append(out, checkSourcePorts(ctx, cfg), checkPublic(cfg), checkTracker(ctx, cfg))
	out = append(out, checkPorts(ctx, cfg)...)
	return append(out, checkNames(ctx, cfg), checkDisk("state", cfg.StateDir, 1), checkDisk("images", cfg.CacheDir, 3), checkImages(cfg.ImagesDir()))
}

func checkRoot() finding {
	f := finding{name: "root", ok: os.Geteuid() == 0, say: "user ID " + strconv.Itoa(os.Geteuid())}
	f.mend = "run with sudo: namespaces, nftables and cgroups need it, and so do the other checks"
	return f
}

// oldestKernel is the first with everything used: nft reject in prerouting
// (5.9), iifname in verdict maps with wildcards, seccomp user notification.
const oldestKernel = "5.10"

func checkKernel() finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return finding{name: "kernel", say: err.Error()}
	}
	release := unix.ByteSliceToString(u.Release[:])
	return finding{
		name: "kernel", ok: atLeast(release, oldestKernel), say: release + " " + runtime.GOARCH,
		mend: "cordon needs Linux " + oldestKernel + " or newer, found " + release,
	}
}

// atLeast compares the first two numbers of two kernel releases.
func atLeast(release, want string) bool {
	major, minor := kernelVersion(release)
	wantMajor, wantMinor := kernelVersion(want)
	return major > wantMajor || major == wantMajor && minor >= wantMinor
}

func kernelVersion(release string) (major, minor int) {
	_, _ = fmt.Sscanf(release, "%d.%d", &major, &minor)
	return major, minor
}

func checkNetns() finding {
	f := finding{name: "namespaces", mend: "enable network namespaces (CONFIG_NET_NS); inside a container, run it with --privileged"}
	done := make(chan error, 1)
	go func() {
		// The thread is tainted by the new namespace: never unlocked, it ends here.
		runtime.LockOSThread()
		ns, err := netns.New()
		if err == nil {
			ns.Close()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		f.say = err.Error()
		return f
	}
	f.ok, f.say = true, "a network namespace can be made"
	return f
}

func checkNftables() finding {
	f := finding{name: "nftables", mend: "load it: sudo modprobe nf_tables nft_tproxy nft_ct nft_masq"}
	conn, err := nftables.New()
	if err == nil {
		_, err = conn.ListTables()
	}
	if err != nil {
		f.say = err.Error()
		return f
	}
	f.ok, f.say = true, "the kernel answers"
	return f
}

// checkGuard looks at the fail-closed guard, which drops packets while the nftables rules are gone.
func checkGuard(cfg *server.Config) finding {
	f := finding{name: "fail-closed guard", warn: true, mend: "load it: sudo modprobe sch_ingress cls_bpf, then restart the server; without it, flushing the nftables rules opens the sandboxes until the server puts them back"}
	if err := network.CheckGuard(cfg.Name); err != nil {
		f.say = err.Error()
		return f
	}
	f.ok, f.say = true, "without nftables rules nothing passes from a sandbox"
	return f
}

// checkForward looks for another firewall whose FORWARD policy drops what we
// accept: a packet must pass every table.
func checkForward(cfg *server.Config) finding {
	f := finding{name: "forwarding", warn: true}
	conn, err := nftables.New()
	if err != nil {
		f.say = err.Error()
		return f
	}
	chains, err := conn.ListChains()
	if err != nil {
		f.say = err.Error()
		return f
	}
	for _, c := range chains {
		if c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			f.say = fmt.Sprintf("table %s chain %s drops forwarded packets by default", c.Table.Name, c.Name)
			f.mend = fmt.Sprintf("let sandbox links pass there: for Docker, sudo iptables -I DOCKER-USER -i 'cd%s-+' -j ACCEPT and the same with -o", cfg.Name)
			return f
		}
	}
	f.ok, f.say = true, "no other firewall drops forwarded packets"
	return f
}

// checkSourcePorts looks for services of this machine among the ports that sandboxes'
// connections have outside.
func checkSourcePorts(ctx context.Context, cfg *server.Config) finding {
	f := finding{name: "source ports", warn: true}
	ports, err := network.ParseSourcePorts(cfg.Network.SourcePorts)
	if err != nil {
		f.say = err.Error()
		return f
	}
	found := network.CheckSourcePorts(ports)
	if serves(ctx, cfg) {
		found = append(found, network.CheckReserved(ports)...)
	}
	if len(found) > 0 {
		f.say = strings.Join(found, " ")
		return f
	}
	f.ok, f.say = true, "no service of this machine listens in "+ports.String()
	return f
}

// checkTracker looks at what the server sets of the connection tracker at start.
func checkTracker(ctx context.Context, cfg *server.Config) finding {
	f := finding{name: "conntrack", warn: true}
	switch found := network.CheckTracker(); {
	case !serves(ctx, cfg):
		f.ok, f.say = true, "the server sets what it needs when it starts"
	case len(found) > 0:
		f.say = strings.Join(found, " ")
	default:
		f.ok, f.say = true, "the flow log gets its figures"
	}
	return f
}

// checkPublic looks whether the addresses of this machine are known to it.
func checkPublic(cfg *server.Config) finding {
	f := finding{name: "addresses", warn: true}
	if found := network.CheckPublic(cfg.Network.Public()); len(found) > 0 {
		f.say = strings.Join(found, " ")
		return f
	}
	f.ok, f.say = true, "every address of this machine is known"
	return f
}

func checkCgroups() finding {
	f := finding{name: "cgroups", mend: "boot with the memory, cpu and pids controllers (systemd hosts have them)"}
	if b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		f.say = "v2: " + strings.TrimSpace(string(b))
		f.ok = true
		for _, c := range []string{"memory", "cpu", "pids"} {
			f.ok = f.ok && strings.Contains(string(b), c)
		}
		return f
	}
	var missing []string
	for _, c := range []string{"memory", "cpu", "pids"} {
		if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", c)); err != nil {
			missing = append(missing, c)
		}
	}
	f.ok, f.say = len(missing) == 0, "v1"
	if !f.ok {
		f.say = "v1, without " + strings.Join(missing, ", ")
	}
	return f
}

func checkMmdebstrap() finding {
	path, err := exec.LookPath("mmdebstrap")
	return finding{
		name: "mmdebstrap", ok: err == nil, warn: true, say: cmp.Or(path, "not found"),
		mend: "sudo apt-get install mmdebstrap, to build the base image; the host template works without",
	}
}

// checkPorts tries to listen where the server would. While it runs, its ports
// are rightly taken.
func checkPorts(ctx context.Context, cfg *server.Config) []finding {
	var out []finding
	addrs := slices.Concat(cfg.Listen.HTTPS, cfg.Listen.HTTP, []string{cfg.Listen.Plain})
	if cfg.Listen.Metrics != "" {
		addrs = append(addrs, cfg.Listen.Metrics)
	}
	running := serves(ctx, cfg)
	for _, addr := range addrs {
		f := finding{name: "port", say: addr + " is free", mend: "stop what listens there, or set listen in the configuration"}
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		switch {
		case err == nil:
			l.Close()
			f.ok = true
		case strings.HasPrefix(addr, "[::1]") && errors.Is(err, unix.EADDRNOTAVAIL):
			f.ok, f.say = true, addr+": this machine has no IPv6"
		case running && errors.Is(err, unix.EADDRINUSE):
			f.ok, f.say = true, addr+" is taken, and cordon runs"
		default:
			f.say = err.Error()
		}
		out = append(out, f)
	}
	return out
}

// serves reports whether a cordon answers where this configuration's would.
func serves(ctx context.Context, cfg *server.Config) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, cfg.APIURL()+"/health", nil)
	if err != nil {
		return false
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	return res.StatusCode/100 == 2
}

func checkNames(ctx context.Context, cfg *server.Config) finding {
	name := "3000-i00000000000000000000." + cfg.Domain
	f := finding{name: "names", mend: "make *." + cfg.Domain + " resolve to this machine: a wildcard DNS record, or for a .localhost domain sudo apt-get install libnss-myhostname"}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// getent asks as glibc programs do; Go's own resolver knows .localhost by itself.
	b, err := exec.CommandContext(ctx, "getent", "ahosts", name).Output()
	if err != nil {
		f.say = name + " does not resolve"
		return f
	}
	addr, _, _ := strings.Cut(string(b), " ")
	f.ok, f.say = true, name+" is "+addr
	return f
}

func checkDisk(what, dir string, wantGiB uint64) finding {
	f := finding{name: "disk", mend: fmt.Sprintf("free at least %d GiB, or set another directory", wantGiB)}
	at := dir
	for at != "/" {
		if _, err := os.Stat(at); err == nil {
			break
		}
		at = filepath.Dir(at)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(at, &s); err != nil {
		f.say = err.Error()
		return f
	}
	free := s.Bavail * uint64(s.Bsize) >> 30
	f.ok, f.say = free >= wantGiB, fmt.Sprintf("%d GiB free for %s in %s", free, what, dir)
	return f
}

// checkImages looks whether other users of the machine can reach the images: programs
// with set-user-ID bits are in them.
func checkImages(dir string) finding {
	f := finding{name: "images", mend: "sudo chown root " + dir + " && sudo chmod 700 " + dir + " (a start of the server closes it too); cordon image verify tells whether an image was changed"}
	fi, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.ok, f.say = true, dir+" is made at the first start"
	case err != nil:
		f.say = err.Error()
	case fi.Mode().Perm()&0o077 != 0:
		f.say = fmt.Sprintf("%s is open to other users (mode %04o): images hold set-user-ID programs", dir, fi.Mode().Perm())
	case fi.Sys().(*syscall.Stat_t).Uid != 0:
		f.say = fmt.Sprintf("%s belongs to user %d, who could change images in use", dir, fi.Sys().(*syscall.Stat_t).Uid)
	default:
		f.ok, f.say = true, "only root enters "+dir
	}
	return f
}
