package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
)

func TestUnknownTemplates(t *testing.T) {
	l := library(t, t.TempDir())
	for _, name := range []string{"nope", "Base", "BASE", "", "../../etc/passwd", "base/", "host ", ".", strings.Repeat("x", 300)} {
		_, err := l.Resolve(t.Context(), name)
		if !errs.Is(err, errs.NotFound) || !strings.Contains(err.Error(), "template '"+name+"' not found") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestNewNamesTheField(t *testing.T) {
	for field, cfg := range map[string]Config{"Dir": {StateDir: "/x"}, "StateDir": {Dir: t.TempDir(), StateDir: "relative"}} {
		if _, err := New(cfg); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestKeyIsDecidedByTheRecipe(t *testing.T) {
	a, err := debian("/")
	if err != nil {
		t.Fatal(err)
	}
	same, _ := debian("/")
	if a.key() != same.key() || !keyForm.MatchString(a.key()) {
		t.Errorf("keys %s and %s", a.key(), same.key())
	}
	changes := map[string]func(*recipe){
		"a package": func(r *recipe) { r.Packages = append(slices.Clone(r.Packages), "nodejs") },
		"a file":    func(r *recipe) { r.Files = append(slices.Clone(r.Files), file{"/x", 0o644, ""}) },
		"a mode":    func(r *recipe) { r.Files = slices.Clone(r.Files); r.Files[0].Mode = 0o600 },
		"a link":    func(r *recipe) { r.Links = nil },
		"the suite": func(r *recipe) { r.Suite = "trixie" },
		"the code":  func(r *recipe) { r.Version++ },
	}
	seen := map[string]string{a.key(): "nothing"}
	for name, change := range changes {
		r := a
		change(&r)
		if other, ok := seen[r.key()]; ok {
			t.Errorf("changing %s makes the same key as changing %s", name, other)
		}
		seen[r.key()] = name
	}
}

// tiny makes an image of one file; it stands in for a build that takes a minute.
func tiny(text string) maker {
	return func(_ context.Context, j job) (Manifest, error) {
		if err := os.Mkdir(j.rootfs, 0o755); err != nil {
			return Manifest{}, err
		}
		return Manifest{Kind: Packages, User: userName}, os.WriteFile(filepath.Join(j.rootfs, "file"), []byte(text), 0o644)
	}
}

const tinyKey = "00112233445566778899aabbccddeeff"

func TestOneBuildsOthersWait(t *testing.T) {
	dir := t.TempDir()
	var made atomic.Int32
	slow := func(ctx context.Context, j job) (Manifest, error) {
		made.Add(1)
		time.Sleep(300 * time.Millisecond)
		return tiny("x")(ctx, j)
	}
	var wg sync.WaitGroup
	for range 4 { // each with a lock of its own, as processes have
		l := library(t, dir)
		wg.Go(func() {
			m, err := l.cas.ensure(context.Background(), tinyKey, l.progress("x"), slow)
			if err != nil || m.Files != 2 {
				t.Errorf("%+v, %v", m, err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 {
		t.Errorf("made %d times", made.Load())
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestWaitingEndsWithTheContext(t *testing.T) {
	l := library(t, t.TempDir())
	f, err := l.cas.tryLock(tinyKey, false)
	if err != nil || f == nil {
		t.Fatal(f, err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	if _, err := l.cas.ensure(ctx, tinyKey, l.progress("x"), tiny("x")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestFailedAndInterruptedBuildsLeaveNothing(t *testing.T) {
	dir := t.TempDir()
	l := library(t, dir)
	broken := func(ctx context.Context, j job) (Manifest, error) {
		if _, err := tiny("half")(ctx, j); err != nil {
			return Manifest{}, err
		}
		return Manifest{}, errors.New("mirror on fire")
	}
	if _, err := l.cas.ensure(t.Context(), tinyKey, l.progress("x"), broken); err == nil || !strings.Contains(err.Error(), "mirror on fire") {
		t.Fatalf("got %v", err)
	}
	if left := visible(t, dir); len(left) > 0 {
		t.Errorf("a failed build left %v", left)
	}
	// What a killed process leaves: a directory without a manifest.
	stale := filepath.Join(dir, "."+tinyKey+".tmp-123")
	if err := os.MkdirAll(filepath.Join(stale, "rootfs/etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := l.cas.ensure(t.Context(), tinyKey, l.progress("x"), tiny("whole")); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{tinyKey}, visible(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// visible lists a cache without its lock files.
func visible(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".lock") {
			out = append(out, e.Name())
		}
	}
	return out
}

func TestMountedTreesAreNotRemoved(t *testing.T) {
	privileged(t)
	dir := t.TempDir()
	inner := filepath.Join(dir, "rootfs/dev")
	if err := os.MkdirAll(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", inner, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(inner, "precious")
	err := os.WriteFile(precious, nil, 0o600)
	rm := removeTree(dir)
	_, still := os.Stat(precious)
	if err := errors.Join(err, unix.Unmount(inner, unix.MNT_DETACH)); err != nil {
		t.Fatal(err)
	}
	if rm == nil || still != nil {
		t.Errorf("removed through a mount: %v, %v", rm, still)
	}
	if err := removeTree(dir); err != nil {
		t.Error(err)
	}
}

func TestChangedImageIsNoticed(t *testing.T) {
	l := library(t, t.TempDir())
	if _, err := l.cas.ensure(t.Context(), tinyKey, l.progress("x"), tiny("x")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(l.nameFile("x")), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.nameFile("x"), []byte(tinyKey+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := l.Verify(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(l.cas.rootfs(tinyKey), "file")
	for what, change := range map[string]func() error{
		"mode":     func() error { return os.Chmod(name, 0o755) },
		"contents": func() error { return os.WriteFile(name, []byte("y"), 0o644) },
		"name":     func() error { return os.Rename(name, name+"2") },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if err := l.Verify(t.Context(), "x"); !errs.Is(err, errs.Conflict) {
			t.Errorf("changed %s: %v", what, err)
		}
		// back to what it was
		os.Rename(name+"2", name)
		os.WriteFile(name, []byte("x"), 0o644)
		os.Chmod(name, 0o644)
	}
	if err := l.Verify(t.Context(), "x"); err != nil {
		t.Errorf("after changing everything back: %v", err)
	}
}

func TestImageInUseIsNotRemoved(t *testing.T) {
	dir := t.TempDir()
	a, b := library(t, dir), library(t, dir)
	for _, l := range []*Library{a, b} {
		if _, err := l.cas.ensure(t.Context(), tinyKey, l.progress("x"), tiny("x")); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(l.nameFile("x")), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(l.nameFile("x"), []byte(tinyKey), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Resolve(t.Context(), "x"); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Remove(t.Context(), "x"); !errs.Is(err, errs.Conflict) {
		t.Fatalf("removed while the other server uses it: %v", err)
	}
	if _, err := b.Resolve(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	if left := visible(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := b.Resolve(t.Context(), "x"); !errs.Is(err, errs.NotFound) {
		t.Errorf("after removal: %v", err)
	}
}

// TestToolTroubleIsExplained runs a real process in mmdebstrap's place.
func TestToolTroubleIsExplained(t *testing.T) {
	privileged(t) // it gets a mount namespace
	l := library(t, t.TempDir())
	tool := filepath.Join(t.TempDir(), "mmdebstrap")
	script := "#!/bin/sh\necho 'I: running apt-get update...'\necho 'E: Unable to locate package nonsense' >&2\nexit 100\n"
	if err := os.WriteFile(tool, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	err := runTool(t.Context(), job{rootfs: filepath.Join(t.TempDir(), "rootfs"), progress: l.progress("x")}, tool, nil)
	if !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "Unable to locate package nonsense") {
		t.Errorf("got %v", err)
	}
	// One that hangs, and whose child holds the output open, ends with the context.
	if err := os.WriteFile(tool, []byte("#!/bin/sh\nsleep 600 &\nsleep 600\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	err = runTool(ctx, job{progress: l.progress("x")}, tool, nil)
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}

// TestTheDownloaderReachesAClosedFolder runs a program in mmdebstrap's place that
// becomes another user, as apt's downloader does.
func TestTheDownloaderReachesAClosedFolder(t *testing.T) {
	privileged(t)
	l := library(t, t.TempDir())
	closed := t.TempDir()
	build := filepath.Join(closed, "build")
	if err := errors.Join(os.Chmod(closed, 0o700), os.Mkdir(build, 0o755)); err != nil {
		t.Fatal(err)
	}
	args := []string{"--reuid=65534", "--regid=65534", "--clear-groups", "touch", filepath.Join(build, "rootfs")}
	if err := os.Chmod(build, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := runTool(t.Context(), job{rootfs: filepath.Join(build, "rootfs"), progress: l.progress("x")}, "setpriv", args); err != nil {
		t.Errorf("another user of the build: %v", err)
	}
	if uid, _ := owner(t, filepath.Join(build, "rootfs")); uid != 65534 {
		t.Errorf("the file belongs to %d, want 65534", uid)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), closed) {
		t.Errorf("the mount is seen outside the build (%v)", err)
	}
}

func TestBuildsOutliveTheirCaller(t *testing.T) {
	l := library(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := l.built(ctx, "x", recipe{Packages: []string{"x"}})
	if !errors.Is(err, context.Canceled) && err == nil {
		t.Errorf("got %v", err)
	}
	if err := l.Close(); err != nil { // ends the build
		t.Fatal(err)
	}
	if _, err := l.built(t.Context(), "x", recipe{}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestSourcesOfOthersAreLeftOut(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"etc/os-release": "ID=debian\nVERSION_CODENAME=bookworm\n",
		"etc/apt/sources.list": `# comment
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://user:secret@mirror.corp/debian bookworm main contrib
deb-src http://mirror.corp/debian bookworm main
deb [broken
deb https://packages.example.com/apt stable main
`,
		"etc/apt/sources.list.d/debian.sources": `Types: deb deb-src
URIs: http://security.corp/debian-security
Suites: bookworm-security bookworm-backports
Components: main non-free
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBG
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
Enabled: no
URIs: http://disabled.corp
Suites: bookworm
Components: main

Types: deb
URIs: https://deb.nodesource.com/node_20.x
Suites: nodistro
Components: main
`,
		"etc/apt/sources.list.d/ignored.list.save": "deb http://old.corp bookworm main\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	rel, err := release(root)
	if err != nil {
		t.Fatal(err)
	}
	got, err := machineSources(root, rel)
	if err != nil {
		t.Fatal(err)
	}
	want := `Types: deb
URIs: http://user:secret@mirror.corp/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/x.gpg

Types: deb
URIs: http://security.corp/debian-security
Suites: bookworm-security
Components: main
Signed-By: -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBG
 -----END PGP PUBLIC KEY BLOCK-----

`
	if diff := cmp.Diff(want, deb822(got)); diff != "" {
		t.Errorf("sources (-want +got):\n%s", diff)
	}
	// In the image: no credentials, no key file it does not have.
	rootfs := t.TempDir()
	if err := cleanSources(rootfs, got); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(rootfs, "etc/apt/sources.list.d/debian.sources"))
	if err != nil {
		t.Fatal(err)
	}
	if text := string(b); strings.Contains(text, "secret") || strings.Contains(text, "x.gpg") || !strings.Contains(text, "http://mirror.corp/debian") {
		t.Errorf("sources in the image:\n%s", text)
	}
}

func TestReleases(t *testing.T) {
	tests := []struct{ name, text, distro, suite string }{
		{"Debian builds its own release", "ID=debian\nVERSION_CODENAME=trixie\n", "debian", "trixie"},
		{"Ubuntu builds its own release", "ID=ubuntu\nVERSION_CODENAME=\"noble\"\n", "ubuntu", "noble"},
		{"Fedora builds Debian's", "ID=fedora\nVERSION_CODENAME=\"\"\n", "debian", "bookworm"},
		{"no os-release builds Debian's", "", "debian", "bookworm"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			if tt.text != "" {
				if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, "etc/os-release"), []byte(tt.text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			rel, err := release(root)
			if err != nil || rel.distro != tt.distro || rel.suite != tt.suite {
				t.Errorf("%+v, %v", rel, err)
			}
			sources, err := machineSources(root, rel)
			if tt.distro == "ubuntu" {
				if err == nil {
					t.Error("Ubuntu without sources was given Debian's")
				}
			} else if err != nil || len(sources) != 2 {
				t.Errorf("%v, %v", sources, err)
			}
		})
	}
}

// TestImagesAreClosedToOtherUsers looks at both folders of a library, new ones and
// ones that an earlier version left open, through another user's eyes.
func TestImagesAreClosedToOtherUsers(t *testing.T) {
	for _, c := range []struct {
		name string
		make bool
	}{{"new folders", false}, {"folders that were open", true}} {
		t.Run(c.name, func(t *testing.T) {
			root := openTempDir(t)
			cfg := Config{Dir: filepath.Join(root, "cache", "images"), StateDir: filepath.Join(root, "state", "images")}
			if c.make {
				for _, dir := range []string{cfg.Dir, cfg.StateDir} {
					if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o755)); err != nil {
						t.Fatal(err)
					}
				}
			}
			l, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			rootfs := l.cas.rootfs(strings.Repeat("0", 32))
			tool := filepath.Join(rootfs, "tool")
			if err := errors.Join(os.MkdirAll(rootfs, 0o755), os.WriteFile(tool, nil, 0o755), os.Chmod(tool, 0o755|fs.ModeSetuid)); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{cfg.Dir, cfg.StateDir} {
				fi, err := os.Stat(dir)
				if err != nil || fi.Mode().Perm() != 0o700 {
					t.Errorf("%s has mode %v (%v), want 0700", dir, fi.Mode(), err)
				}
			}
			if os.Geteuid() != 0 {
				return // cannot become another user
			}
			cmd := exec.CommandContext(t.Context(), "/bin/ls", "-l", tool)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential("")}
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "Permission denied") {
				t.Errorf("another user sees a program of an image: %s", out)
			}
		})
	}
}

// openTempDir is a temporary folder that every user may pass.
func openTempDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for at := dir; at != filepath.Clean(os.TempDir()) && at != "/"; at = filepath.Dir(at) {
		if err := os.Chmod(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestEveryTemplateHasADate(t *testing.T) {
	list, err := library(t, t.TempDir()).List(t.Context())
	if err != nil || len(list) < 3 {
		t.Fatalf("%d templates, %v", len(list), err)
	}
	for _, tt := range list {
		if age := time.Since(tt.Created); tt.Created.IsZero() || age < 0 {
			t.Errorf("%s (%s, built %v) dates from %v", tt.Name, tt.Kind, tt.Built, tt.Created)
		}
	}
}
