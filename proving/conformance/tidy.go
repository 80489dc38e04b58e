package conformance

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// folders is the pattern of the folder a run keeps everything in. Its name ends
// in the server's.
const folders = "cordon-conformance-"

// newFolder makes the folder and a name for the server that no other run has, and
// removes what a run left that was killed. The lock is held for as long as this
// process lives.
func newFolder() (dir, name string, lock *os.File, err error) {
	if err := removeLeft(); err != nil {
		return "", "", nil, fmt.Errorf("remove what a killed run left: %w", err)
	}
	for range 100 {
		name = fmt.Sprintf("c%03s", strconv.FormatInt(rand.Int64N(36*36*36), 36))
		dir = filepath.Join(os.TempDir(), folders+name)
		if err = os.Mkdir(dir, 0o700); err == nil {
			lock, err = lockFolder(dir)
			return dir, name, lock, err
		}
		if !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	return "", "", nil, err
}

func lockFolder(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// removeLeft removes the folders that nobody holds, with the cgroups of the
// servers that were in them. Everything else of a killed run ended with it.
func removeLeft() error {
	found, err := filepath.Glob(filepath.Join(os.TempDir(), folders+"*"))
	if err != nil {
		return err
	}
	for _, dir := range found {
		lock, err := lockFolder(dir)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue // another run's, and alive
		}
		if err != nil {
			return err
		}
		name := filepath.Base(dir)[len(folders):]
		if err := errors.Join(removeCgroups(name), os.RemoveAll(dir), lock.Close()); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroups removes the cgroups of a server whose processes have ended.
func removeCgroups(name string) error {
	var all error
	for _, pattern := range []string{"/sys/fs/cgroup/cordon/", "/sys/fs/cgroup/*/cordon/"} {
		roots, err := filepath.Glob(pattern + name)
		if err != nil {
			return err
		}
		for _, root := range roots {
			var dirs []string
			_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil // what is gone already is fine
			})
			for _, dir := range slices.Backward(dirs) {
				if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
					all = errors.Join(all, fmt.Errorf("remove cgroup %s: %w", dir, err))
				}
			}
			_ = unix.Rmdir(filepath.Dir(root)) // others' may be in it
		}
	}
	return all
}
