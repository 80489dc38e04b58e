package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// container is a program that runs one command in a container and ends.
type container struct {
	name    string
	install string
	command func(r *run, bundle, id string) []string
	arg0    string // the name it is started under, if that is not its own
}

// containers are those that are here, and remarks about the others. All run the
// same command on the machine's own /usr, read-only, without a network: less
// than a sandbox is.
func (r *run) containers() (here []container, missing []string, err error) {
	for _, c := range []container{
		{name: "runsc run", install: "see gvisor.dev/docs/user_guide/install", command: func(r *run, bundle, id string) []string {
			return []string{"runsc", "--root", filepath.Join(r.Scratch, "runsc"), "--network=none", "--ignore-cgroups", "run", "--bundle", bundle, id}
		}},
		{name: "runsc run of this binary", arg0: "runsc", command: func(r *run, bundle, id string) []string {
			return []string{
				r.Server[0], "--root", filepath.Join(r.Scratch, "runsc"), "--network=none", "--ignore-cgroups",
				"--sidecar-usage-policy=LEGACY_DEPRECATED_SLOW_EMBEDDED_FALLBACK", "run", "--bundle", bundle, id,
			}
		}},
		{name: "runc run", install: "apt-get install runc", command: func(r *run, bundle, id string) []string {
			return []string{"runc", "--root", filepath.Join(r.Scratch, "runc"), "run", "--bundle", bundle, id}
		}},
		{name: "bwrap", install: "apt-get install bubblewrap", command: func(*run, string, string) []string {
			return append(strings.Fields("bwrap --unshare-all --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc --dev /dev"), sayHello...)
		}},
	} {
		program := c.command(r, "", "")[0]
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, fmt.Sprintf("not measured: %s is not installed: %s", program, c.install))
			continue
		}
		here = append(here, c)
	}
	return here, missing, r.makeBundle()
}

var sayHello = []string{"/usr/bin/echo", "hello"}

func (r *run) bundle() string { return filepath.Join(r.Scratch, "bundle") }

// makeBundle writes a container for runc and runsc (OCI runtime specification).
func (r *run) makeBundle() error {
	root := filepath.Join(r.bundle(), "rootfs")
	for _, dir := range []string{"usr", "proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, link := range []string{"bin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+link, filepath.Join(root, link)); err != nil {
			return err
		}
	}
	type object = map[string]any
	spec := object{
		"ociVersion": "1.0.2",
		"process":    object{"user": object{"uid": 0, "gid": 0}, "args": sayHello, "env": []string{"PATH=/usr/bin"}, "cwd": "/"},
		"root":       object{"path": "rootfs", "readonly": true},
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/usr", "type": "bind", "source": "/usr", "options": []string{"bind", "ro"}},
		},
		"linux": object{"namespaces": []object{{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}}},
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.bundle(), "config.json"), b, 0o644)
}

// container runs c's container once and notes how long its output took.
func (s *starts) container(ctx context.Context, c container) error {
	s.made++
	args := c.command(s.run, s.bundle(), fmt.Sprintf("bench%08d", s.made))
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if c.arg0 != "" {
		cmd.Args[0] = c.arg0
	}
	at := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "hello\n" {
		return fmt.Errorf("%s: %w: %s", c.name, err, out)
	}
	s.began(c.name, at)
	return nil
}
