package demo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// seat is what a demo's server has of its own: a folder and a name. A seat is
// locked by who sits in it; one whose lock is free was left, perhaps by a demo
// that was killed, and is cleared when it is taken.
type seat struct {
	name string // of the server, so of its cgroups
	dir  string
	lock *os.File
}

// maxSeats is how many demos may play at once.
const maxSeats = 10

func takeSeat(below string) (*seat, error) {
	for i := range maxSeats {
		s := &seat{name: "dem" + strconv.Itoa(i), dir: filepath.Join(below, strconv.Itoa(i))}
		taken, err := s.take()
		if err != nil {
			return nil, fmt.Errorf("prepare %s: %w", s.dir, err)
		}
		if taken {
			return s, nil
		}
	}
	return nil, fmt.Errorf("%d demos are running: wait for one to end", maxSeats)
}

// take locks the seat's folder, if nobody has, and clears it.
func (s *seat) take() (bool, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return false, err
	}
	lock, err := os.Open(s.dir)
	if err != nil {
		return false, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return false, err
	}
	s.lock = lock
	if err := s.clear(); err != nil {
		lock.Close()
		return false, err
	}
	return true, nil
}

// leave clears the seat and gives it free.
func (s *seat) leave() error { return errors.Join(s.clear(), s.lock.Close()) }

// clear removes the files and cgroups of the seat's last server. Its processes
// ended with its lab, or are about to.
func (s *seat) clear() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(s.dir, e.Name())))
	}
	for range 100 {
		busy := s.clearCgroups()
		if busy == nil {
			return err
		}
		if !errors.Is(busy, unix.EBUSY) {
			return errors.Join(err, busy)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.Join(err, fmt.Errorf("cgroups of %s: processes in them do not end", s.name))
}

// clearCgroups removes the server's cgroups in every hierarchy, of version 2 or 1.
// The kernel refuses to remove one with a process in it.
func (s *seat) clearCgroups() error {
	var failed error
	for _, pattern := range []string{"/sys/fs/cgroup/cordon/", "/sys/fs/cgroup/*/cordon/"} {
		roots, err := filepath.Glob(pattern + s.name)
		if err != nil {
			return err
		}
		for _, root := range roots {
			failed = errors.Join(failed, removeCgroup(root))
			_ = unix.Rmdir(filepath.Dir(root)) // refused while another server has cgroups there
		}
	}
	return failed
}

// removeCgroup removes a cgroup and those below it, the innermost first.
func removeCgroup(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it ended meanwhile
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for _, dir := range slices.Backward(dirs) {
		if rerr := unix.Rmdir(dir); rerr != nil && !errors.Is(rerr, unix.ENOENT) {
			err = errors.Join(err, &fs.PathError{Op: "rmdir", Path: dir, Err: rerr})
		}
	}
	return err
}
