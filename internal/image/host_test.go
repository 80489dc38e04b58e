package image

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHostTemplateShowsOnlyWhatIsListed(t *testing.T) {
	privileged(t)
	l := library(t, t.TempDir())
	img, err := l.Resolve(t.Context(), HostTemplate)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(img.Digest, "host:") || img.User != "user" || img.Workdir != "/home/user" {
		t.Errorf("%+v", img)
	}
	for _, b := range img.Binds {
		if b.Host == "/" || !strings.HasPrefix(b.Guest, "/usr/") || strings.HasPrefix(b.Guest, "/usr/local") {
			t.Errorf("bind %+v is not on the list", b)
		}
		if fi, err := os.Lstat(filepath.Join(img.Rootfs, b.Guest)); err != nil || !fi.IsDir() {
			t.Errorf("no mount point for %s: %v", b.Guest, err)
		}
	}
	checkRootfs(t, img.Rootfs)
	for _, secret := range []string{"etc/ssl/private", "etc/ssh", "etc/apt/auth.conf", "etc/apt/auth.conf.d", "etc/apt/sources.list", "etc/apt/sources.list.d", "etc/apt/trusted.gpg.d", "root/.ssh", "etc/krb5.keytab", "var/lib/dpkg", "usr/local/share/ca-certificates"} {
		if _, err := os.Lstat(filepath.Join(img.Rootfs, secret)); err == nil {
			t.Errorf("/%s of the machine is visible", secret)
		}
	}
	machine, err := os.ReadFile("/etc/shadow")
	if err != nil {
		t.Fatal(err)
	}
	shadow, err := os.ReadFile(filepath.Join(img.Rootfs, "etc/shadow"))
	if err != nil || string(shadow) == string(machine) || !strings.Contains(string(shadow), "user:*:") {
		t.Errorf("shadow: %q, %v", shadow, err)
	}
	again, err := l.Resolve(t.Context(), HostTemplate)
	if err != nil || again.Rootfs != img.Rootfs {
		t.Errorf("resolved again: %s, %v", again.Rootfs, err)
	}
}

// TestHostTemplateRuns starts programs in the template as the runtime would show
// it: the skeleton with the binds, under a root of its own.
func TestHostTemplateRuns(t *testing.T) {
	privileged(t)
	img, err := library(t, t.TempDir()).Resolve(t.Context(), HostTemplate)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range img.Binds {
		guest := filepath.Join(img.Rootfs, b.Guest)
		if err := unix.Mount(b.Host, guest, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(guest, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		if err := unix.Mount("", guest, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
	}
	for command, want := range map[string]string{
		"id -un; whoami; umask; echo ~": "user\nuser\n0022\n/home/user",
		"cat /etc/hostname":             "sandbox",
		"cat /etc/shadow":               "Permission denied",
		"awk 'BEGIN { print 6*7 }'":     "42", // through /etc/alternatives
		"touch /usr/bin/x":              "Read-only file system",
		"apt-config dump":               `APT::Update::Error-Mode "any";`,
	} {
		out := chrootRun(t, img.Rootfs, command)
		if !strings.Contains(out, want) {
			t.Errorf("%s:\n%s\nwant %q", command, out, want)
		}
	}
}

// chrootRun runs a login shell as the default user in a root file system.
func chrootRun(t *testing.T, rootfs, command string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/bash", "-lc", command)
	cmd.SysProcAttr = &unix.SysProcAttr{Chroot: rootfs, Credential: credential(rootfs)}
	cmd.Dir = "/home/user"
	cmd.Env = []string{"PATH=" + envPath, "HOME=/home/user", "USER=user", "LANG=" + locale}
	out, _ := cmd.CombinedOutput()
	return string(out)
}

func TestFingerprintFollowsThePackages(t *testing.T) {
	root := t.TempDir()
	status := filepath.Join(root, "var/lib/dpkg/status")
	if err := os.MkdirAll(filepath.Dir(status), 0o755); err != nil {
		t.Fatal(err)
	}
	h := hostSource{root: root, dir: t.TempDir()}
	seen := map[string]bool{h.fingerprint(): true}
	for _, text := range []string{"Package: a\n", "Package: a\nPackage: b\n"} {
		if err := os.WriteFile(status, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if f := h.fingerprint(); seen[f] || f != h.fingerprint() {
			t.Errorf("fingerprint %s after %q", f, text)
		} else {
			seen[f] = true
		}
	}
}
