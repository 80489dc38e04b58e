package checkpoint

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
)

// keep puts a checkpoint of two files into v.
func keep(t *testing.T, v *Vault, m Manifest) string {
	t.Helper()
	name := NewName()
	_, err := v.Keep(name, m, func(dir string) error {
		return errors.Join(
			os.WriteFile(filepath.Join(dir, "state"), []byte("small"), 0o644),
			os.WriteFile(filepath.Join(dir, "memory"), make([]byte, smallFile+1), 0o644),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// in lists what is in a folder.
func in(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func newTestVault(t *testing.T) *Vault {
	t.Helper()
	v := NewVault(filepath.Join(t.TempDir(), "snapshots"))
	if err := v.Sweep(nil); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestADroppedCheckpointLastsUntilItsLastReaderCloses(t *testing.T) {
	v := newTestVault(t)
	name := keep(t, v, Manifest{Token: "token"})
	first, err := v.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	second, err := v.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	if first.Token != "token" || first.Bytes() != int64(len("small"))+smallFile+1 || v.Size(name) != first.Bytes() {
		t.Errorf("token %q, %d bytes, size %d", first.Token, first.Bytes(), v.Size(name))
	}
	if err := errors.Join(v.Drop(name), first.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	if err := second.Verify(t.Context()); err != nil {
		t.Errorf("while one still reads: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if left := in(t, v.dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestAChangedFileIsFound(t *testing.T) {
	for _, tt := range []struct {
		name, file string
		change     func(path string) error
		atOpen     bool
	}{
		{"a small file has another byte", "state", func(p string) error { return os.WriteFile(p, []byte("smelt"), 0o600) }, true},
		{"a large file is shorter", "memory", func(p string) error { return os.Truncate(p, smallFile) }, true},
		{"a large file has another byte", "memory", func(p string) error {
			b := make([]byte, smallFile+1)
			b[smallFile] = 1
			return os.WriteFile(p, b, 0o600)
		}, false},
		{"a file is missing", "state", os.Remove, true},
		{"the manifest is missing", manifestFile, os.Remove, true},
		{"the manifest is no JSON", manifestFile, func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) }, true},
		{"the manifest has another format", manifestFile, func(p string) error { return os.WriteFile(p, []byte(`{"format":9}`), 0o600) }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newTestVault(t)
			name := keep(t, v, Manifest{})
			if err := tt.change(filepath.Join(v.Path(name), tt.file)); err != nil {
				t.Fatal(err)
			}
			r, err := v.Open(name)
			if !tt.atOpen {
				if err != nil {
					t.Fatal(err)
				}
				err = errors.Join(r.Verify(t.Context()), r.Close())
			}
			if !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "damaged or missing") {
				t.Errorf("error %v", err)
			}
			if err := v.Drop(name); err != nil || len(in(t, v.dir)) > 0 {
				t.Errorf("drop: %v, left %v", err, in(t, v.dir))
			}
		})
	}
}

func TestAFailedCheckpointLeavesNothing(t *testing.T) {
	v := newTestVault(t)
	broken := errors.New("broken on purpose")
	save := func(dir string) error {
		return errors.Join(os.WriteFile(filepath.Join(dir, "state"), nil, 0o600), broken)
	}
	if _, err := v.Keep(NewName(), Manifest{}, save); !errors.Is(err, broken) {
		t.Errorf("keep: %v", err)
	}
	if _, _, err := v.Temporary(save); !errors.Is(err, broken) {
		t.Errorf("temporary: %v", err)
	}
	if left := in(t, v.dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestACopyOutlivesItsOriginal(t *testing.T) {
	v := newTestVault(t)
	name := keep(t, v, Manifest{Token: "token"})
	copied, man, err := v.Copy(name)
	if err != nil || man.Token != "token" {
		t.Fatalf("token %q, %v", man.Token, err)
	}
	if err := v.Drop(name); err != nil {
		t.Fatal(err)
	}
	r, err := v.Open(copied)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Verify(t.Context()), r.Close()); err != nil {
		t.Error(err)
	}
}

func TestSweepKeepsWhatIsNamedAndClosesIt(t *testing.T) {
	v := newTestVault(t)
	kept, other := keep(t, v, Manifest{}), keep(t, v, Manifest{})
	partial := NewName() + partialSuffix
	if err := errors.Join(
		os.Mkdir(v.Path(partial), 0o700), os.WriteFile(v.Path("notes"), nil, 0o600),
		os.Chmod(v.Path(kept), 0o755), os.Chmod(filepath.Join(v.Path(kept), "memory"), 0o644), os.Chmod(v.dir, 0o755),
	); err != nil {
		t.Fatal(err)
	}
	if err := v.Sweep(map[string]bool{kept: true}); err != nil {
		t.Fatal(err)
	}
	left, want := in(t, v.dir), []string{kept, "notes"}
	if slices.Sort(want); !slices.Equal(left, want) {
		t.Errorf("left %v, want %v, without %s", left, want, other)
	}
	for path, want := range map[string]fs.FileMode{v.dir: 0o700, v.Path(kept): 0o700, filepath.Join(v.Path(kept), "memory"): 0o600} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %v", path, fi.Mode().Perm(), err, want)
		}
	}
}

func TestANameThatIsNoCheckpointsIsNotOpened(t *testing.T) {
	v := newTestVault(t)
	for _, name := range []string{"", "..", "../" + NewName(), NewName() + partialSuffix} {
		if _, err := v.Open(name); err == nil {
			t.Errorf("%q was opened", name)
		}
	}
}

func TestAWarmCopyReplacesItsTemplatesOthers(t *testing.T) {
	v := newTestVault(t)
	w := NewWarm(v)
	old, other := keep(t, v, Manifest{Label: "base 1"}), keep(t, v, Manifest{Label: "web 1"})
	refused := keep(t, v, Manifest{Label: "api 1"})
	snapshot := keep(t, v, Manifest{})
	found := w.Load(func(dir string) error {
		if dir == v.Path(refused) {
			return errors.New("of another runtime")
		}
		return nil
	})
	if len(found) != 2 || !found[old] || !found[other] {
		t.Errorf("found %v, want %s and %s, not %s or %s", found, old, other, refused, snapshot)
	}
	if w.Begin("base 1") {
		t.Error("one that is there is made again")
	}
	if !w.Begin("base 2") || w.Begin("base 2") {
		t.Error("one is not made once")
	}
	if replaced := w.End("base 2", "new"); !slices.Equal(replaced, []string{old}) {
		t.Errorf("replaced %v, want %s", replaced, old)
	}
	if name, ok := w.Find("base 2"); !ok || name != "new" {
		t.Errorf("found %q, %v", name, ok)
	}
	if name, ok := w.Find("base 1"); ok {
		t.Errorf("a replaced one is found: %s", name)
	}
	if err := w.Forget("web 1", other); err != nil {
		t.Fatal(err)
	}
	if _, ok := w.Find("web 1"); ok || slices.Contains(in(t, v.dir), other) {
		t.Error("a forgotten one is still there")
	}
	if !w.Begin("web 1") || w.End("web 1", "") != nil || !w.Begin("web 1") {
		t.Error("after a failure it is not tried again")
	}
}

func TestReservedRoomIsNotGivenTwice(t *testing.T) {
	free := int64(10 << 30)
	s := NewSpace("", 4<<30, func() map[string]int64 { return map[string]int64{"a": 1 << 30, "b": 1 << 30} })
	s.Stat = func(string) (int64, int64, error) { return free, 100 << 30, nil }
	release, err := s.Reserve("", 5<<30)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve("", 2<<30); !errs.Is(err, errs.Unavailable) {
		t.Errorf("a second that does not fit beside the first: %v", err)
	}
	release()
	release()
	again, err := s.Reserve("", 5<<30)
	if err != nil {
		t.Fatalf("after the release: %v", err)
	}
	again()
	if _, err := s.Reserve("a", 6<<30); !errs.Is(err, errs.Exhausted) {
		t.Errorf("more than the key's share: %v", err)
	}
	if err := s.Check("a"); err != nil {
		t.Error(err)
	}
	free = 4<<30 - 1
	if err := s.Check("a"); !errs.Is(err, errs.Unavailable) {
		t.Errorf("less is free than is kept: %v", err)
	}
	if err := s.Explain(errors.New("short write")); !errs.Is(err, errs.Unavailable) {
		t.Errorf("an error while the disk is full: %v", err)
	}
	free = 10 << 30
	if err := s.Explain(unix.ENOSPC); !errs.Is(err, errs.Unavailable) {
		t.Errorf("a disk that was full: %v", err)
	}
	if err := s.Explain(unix.EIO); errs.KindOf(err) != errs.Internal {
		t.Errorf("another error: %v", err)
	}
}
