package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sharedCache is where images stay between test runs and where the end-to-end
// tests of other packages find them: a build takes a minute.
const sharedCache = "/var/cache/cordon/images"

// privileged skips a test that needs root; where it is required, it fails.
func privileged(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func library(t testing.TB, dir string) *Library {
	t.Helper()
	l, err := New(Config{Dir: dir, StateDir: t.TempDir(), Progress: testLog{t}, MaxBytes: 64 << 20, MaxFiles: 5000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

type testLog struct{ t testing.TB }

func (w testLog) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func TestPackageTemplates(t *testing.T) {
	if testing.Short() {
		t.Skip("builds images")
	}
	privileged(t)
	l := library(t, sharedCache)
	programs := []string{
		"/bin/bash", "/usr/bin/python3", "/usr/local/bin/python", "/usr/bin/pip3", "/usr/bin/git", "/usr/lib/git-core/git-daemon",
		"/usr/bin/curl", "/usr/bin/sudo", "/usr/bin/tput", "/usr/bin/ps", "/usr/sbin/ip", "/usr/bin/ping", "/usr/bin/dig", "/usr/bin/openssl", "/usr/bin/nc",
	}
	for name, more := range map[string][]string{"base": nil, "code-interpreter-v1": {"/usr/bin/node", "/usr/bin/npm"}} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			img, err := l.Resolve(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s after %v", img.Rootfs, time.Since(start).Round(time.Millisecond))
			for _, p := range append(more, programs...) {
				if _, err := os.Lstat(filepath.Join(img.Rootfs, p)); err != nil {
					t.Error(err)
				}
			}
			checkRootfs(t, img.Rootfs)
			start = time.Now()
			if err := l.Verify(t.Context(), name); err != nil {
				t.Error(err)
			}
			t.Logf("verified in %v", time.Since(start).Round(time.Millisecond))
		})
	}
}

// checkRootfs checks what wire formats and SDK tests rely on.
func checkRootfs(t *testing.T, rootfs string) {
	t.Helper()
	for name, want := range map[string]string{
		"/etc/passwd":                        "\nuser:x:1000:1000::/home/user:/bin/bash\n",
		"/etc/group":                         "\nuser:x:1000:\n",
		"/etc/sudoers.d/user":                "user ALL=(ALL:ALL) NOPASSWD: ALL",
		"/etc/resolv.conf":                   "nameserver 8.8.8.8",
		"/etc/nsswitch.conf":                 "hosts: files dns",
		"/etc/hosts":                         "127.0.0.1\tlocalhost",
		"/etc/ssl/certs/ca-certificates.crt": "BEGIN CERTIFICATE",
		"/home/user/.bashrc":                 "",
	} {
		b, err := os.ReadFile(filepath.Join(rootfs, name))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s lacks %q: %v", name, want, err)
		}
	}
	for name, want := range map[string]os.FileMode{
		"/": 0o755 | os.ModeDir, "/home/user": 0o755 | os.ModeDir, "/tmp": 0o777 | os.ModeSticky | os.ModeDir, "/root": 0o700 | os.ModeDir,
		"/etc/sudoers.d/user": 0o440, "/etc/machine-id": 0o444,
	} {
		fi, err := os.Lstat(filepath.Join(rootfs, name))
		if err != nil || fi.Mode() != want {
			t.Errorf("%s: %v, want mode %v, error %v", name, fi.Mode(), want, err)
		}
	}
	if uid, gid := owner(t, filepath.Join(rootfs, "home/user")); uid != 1000 || gid != 1000 {
		t.Errorf("/home/user belongs to %d:%d", uid, gid)
	}
	for _, name := range []string{"dev", "proc", "sys", "run"} {
		if e, err := os.ReadDir(filepath.Join(rootfs, name)); err != nil || len(e) != 0 {
			t.Errorf("/%s is not empty: %d entries, %v", name, len(e), err)
		}
	}
}
