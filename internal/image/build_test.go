package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	for name, more := range map[string][]string{"base": nil, "code-interpreter-v1": {"/usr/bin/node", "/usr/bin/npm", "/usr/bin/esbuild", "/usr/lib/python3/dist-packages/ipykernel_launcher.py"}} {
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
			if starts := len(img.Start) > 0 && img.Ready.Port != 0; starts != (name == "code-interpreter-v1") {
				t.Errorf("it starts %q, ready by %+v", img.Start, img.Ready)
			}
			checkRootfs(t, img.Rootfs)
			root := writable(t, img.Rootfs)
			checkCommands(t, root)
			if name == "code-interpreter-v1" {
				checkNpm(t, root)
			}
			start = time.Now()
			if err := l.Verify(t.Context(), name); err != nil {
				t.Error(err)
			}
			t.Logf("verified in %v", time.Since(start).Round(time.Millisecond))
		})
	}
}

// checkCommands runs what SDKs and users rely on, over a writable layer as the
// runtime adds one.
func checkCommands(t *testing.T, root string) {
	t.Helper()
	for command, want := range map[string]string{
		"id": "uid=1000(user) gid=1000(user) groups=1000(user)", "sudo -n id -u": "0", "umask": "0022", "pwd; echo ~": "/home/user\n/home/user",
		"python -c 'print(6*7)'": "42", "python3 -m venv --without-pip v && v/bin/python -c 'print(1)'": "1", "pip --version": "pip ",
		"pip install --no-index nothing": "Could not find a version", // not: externally-managed-environment
		"tput -T xterm-256color colors":  "256", "git --version": "git version", "git daemon --bad 2>&1": "usage: git daemon", "locale": "LANG=C.UTF-8",
		"curl --version": "https", "touch /usr/x": "Permission denied", "sudo -n touch /usr/x && ls /usr/x": "/usr/x",
		"cat /etc/apt/sources.list.d/*": "Suites: ",
		// Nothing listens at that address: a loopback interface is all there is to it.
		"echo 'deb [trusted=yes] http://127.0.0.1:1/ x main' | sudo tee /etc/apt/sources.list.d/x.list >x; sudo apt-get -o Dir::Etc::sourceparts=/ -o Dir::Etc::sourcelist=/etc/apt/sources.list.d/x.list -o Acquire::Retries=0 update; echo exit $?": "exit 100",
	} {
		if out := chrootRun(t, root, command); !strings.Contains(out, want) {
			t.Errorf("%s:\n%s\nwant %q", command, out, want)
		}
	}
}

// checkNpm sees that the settings of the image reach npm, and that a user's own win.
func checkNpm(t *testing.T, root string) {
	t.Helper()
	for _, own := range []struct{ set, want string }{
		{"", "1000\n5000"},
		{"printf 'fetch-retry-mintimeout=7000\\n' >.npmrc; ", "7000\n5000"},
		{"rm .npmrc; export npm_config_fetch_retry_maxtimeout=8000; ", "1000\n8000"},
	} {
		const command = "npm config get fetch-retry-mintimeout; npm config get fetch-retry-maxtimeout"
		if out := chrootRun(t, root, own.set+command); !strings.Contains(out, own.want) {
			t.Errorf("%s%s:\n%s\nwant %q", own.set, command, out, own.want)
		}
	}
}

// writable mounts a layer over an image that nothing is to be written to.
func writable(t *testing.T, rootfs string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(dir, "root")
	if err := unix.Mount("overlay", root, "overlay", 0, "lowerdir="+rootfs+",upperdir="+dir+"/upper,workdir="+dir+"/work"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	null := filepath.Join(root, "dev/null") // git wants one
	if err := unix.Mknod(null, unix.S_IFCHR, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(null, 0o666); err != nil {
		t.Fatal(err)
	}
	return root
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
