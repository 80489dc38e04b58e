package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// unreadable is a content whose second half the disk does not give back.
type unreadable struct{ content string }

func (u unreadable) ReadAt(b []byte, at int64) (int, error) {
	if at > 0 {
		return copy(b, u.content), nil
	}
	return 0, errors.New("the disk is broken")
}

func ownerOf(t *testing.T, path string) uint32 {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Uid
}

// A program may rename what root left in its folder, to where a request leads.
func TestComposingLendsNoRightToRead(t *testing.T) {
	needRoot(t)
	h := claimed(t)
	outer := filepath.Dir(h.home)
	const secret = "root's secret"
	h.write(outer+"/key", secret)
	h.write(h.home+"/moved", secret)
	h.give("part", "part")
	for _, err := range []error{
		os.Chmod(outer+"/key", 0o600), os.Chmod(h.home+"/moved", 0o600),
		os.Symlink(outer+"/key", h.home+"/link"), os.Lchown(h.home+"/link", testUID, testUID),
		os.Symlink(outer, h.home+"/dir"), os.Lchown(h.home+"/dir", testUID, testUID),
		os.Symlink(outer+"/key", h.home+"/rootslink"), // which the program may have moved there
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, source := range []string{"link", "moved", "dir/key", "rootslink"} {
		got := h.do("POST", "/files/compose", strings.NewReader(`{"source_paths":["part","`+source+`"],"destination":"whole-`+source+`"}`))
		if got.StatusCode != 403 {
			t.Errorf("%s: %d %s", source, got.StatusCode, got.body)
		}
	}
	left, err := filepath.Glob(h.home + "/*")
	for _, name := range left {
		if raw, _ := os.ReadFile(name); ownerOf(t, name) == testUID && strings.Contains(string(raw), secret) {
			if fi, err := os.Lstat(name); err == nil && fi.Mode().IsRegular() {
				t.Errorf("%s, a file of the user's, holds root's secret", name)
			}
		}
	}
	if err != nil || len(left) < 5 {
		t.Errorf("left are %v (%v)", left, err)
	}
	// What is the user's own is joined wherever it lies.
	deep := outer + "/deep"
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	h.write(deep+"/part", "deep")
	if err := os.Lchown(deep+"/part", testUID, testUID); err != nil {
		t.Fatal(err)
	}
	if got := h.do("POST", "/files/compose", strings.NewReader(`{"source_paths":["part","`+deep+`/part"],"destination":"whole"}`)); got.StatusCode != 200 {
		t.Errorf("%d %s", got.StatusCode, got.body)
	}
	if raw, err := os.ReadFile(h.home + "/whole"); string(raw) != "partdeep" {
		t.Errorf("whole is %q (%v)", raw, err)
	}
}

func TestAFileOfRootsIsGivenAwayWithoutItsContent(t *testing.T) {
	needRoot(t)
	h := claimed(t)
	path := h.home + "/moved"
	h.write(path, "root's secret")
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	u := user{Name: "tester", UID: testUID, GID: testUID, Groups: []uint32{testUID}, Home: h.home}
	up := upload{user: u, filling: &turns{}}
	if err := up.store(path, &content{ReaderAt: unreadable{"x"}, size: 2 * copyBuffer}); err == nil {
		t.Fatal("what could not be read was written")
	}
	if owner := ownerOf(t, path); owner != 0 {
		t.Errorf("an upload that failed left the old content to user %d", owner)
	}
	if err := up.store(path, &content{ReaderAt: strings.NewReader("new"), size: 3}); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(path); string(raw) != "new" || ownerOf(t, path) != testUID {
		t.Errorf("an upload left %q of user %d (%v)", raw, ownerOf(t, path), err)
	}
}

// exchange swaps two names again and again until the test ends.
func exchange(t *testing.T, a, b string) (stop func()) {
	t.Helper()
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE) // one may be missing
			}
		}
	}()
	return func() { close(quit); <-done }
}

const tries = time.Second // for what a race would bring about

func TestALinkIsReadAsItWasJudged(t *testing.T) {
	needRoot(t)
	d := t.TempDir()
	for _, err := range []error{
		os.Mkdir(d+"/public", 0o755), os.Mkdir(d+"/secret", 0o700),
		os.Symlink("public", d+"/roots"), os.Symlink("secret", d+"/theirs"), os.Lchown(d+"/theirs", testUID, testUID),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	secret, err := os.Stat(d + "/secret")
	if err != nil {
		t.Fatal(err)
	}
	defer exchange(t, d+"/roots", d+"/theirs")()
	passed := 0
	for end := time.Now().Add(tries); time.Now().Before(end); {
		s, err := finder{}.find(d + "/roots/file")
		if err != nil {
			continue
		}
		at, err := s.dir.Stat()
		s.close()
		if err != nil {
			t.Fatal(err)
		}
		if passed++; os.SameFile(at, secret) {
			t.Fatal("a user's link led root into another's folder")
		}
	}
	if passed == 0 {
		t.Error("root's own link was never followed")
	}
}

func TestOnlyTheDirectoryThatWasMadeIsGivenAway(t *testing.T) {
	needRoot(t)
	for _, kind := range []string{"file", "directory"} {
		t.Run(kind, func(t *testing.T) {
			d := t.TempDir()
			secret := d + "/secret"
			if kind == "directory" {
				if err := errors.Join(os.Mkdir(secret, 0o700), os.Mkdir(secret+"/below", 0o700)); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(secret, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			inode := func(path string) uint64 {
				fi, err := os.Lstat(path)
				if err != nil {
					return 0
				}
				return fi.Sys().(*syscall.Stat_t).Ino
			}
			want := inode(secret)
			dir, err := openDir(unix.AT_FDCWD, d)
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			u := user{Name: "tester", UID: testUID, GID: testUID}
			for end := time.Now().Add(tries); time.Now().Before(end); {
				stop := exchange(t, secret, d+"/new")
				err := makeDir(spot{dir, "new"}, u)
				stop()
				made := d + "/new"
				if inode(made) == want {
					made = secret
				}
				if at := map[bool]string{true: d + "/new", false: secret}[made == secret]; ownerOf(t, at) != 0 {
					t.Fatalf("root's %s was given away (%v)", kind, err)
				}
				if made == secret {
					if err := os.Rename(d+"/new", d+"/kept"); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.RemoveAll(made); err != nil {
					t.Fatal(err)
				}
				if made == secret {
					if err := os.Rename(d+"/kept", secret); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}
