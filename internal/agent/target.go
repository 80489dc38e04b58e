package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// target is a file being uploaded. Until it is kept, nothing half takes the place
// of a whole file: a file that did not exist is removed again; one that did is
// written beside itself, unless the body is there as a whole already, or the file
// cannot be replaced by another without changing what it is.
type target struct {
	user user
	f    *os.File
	path string // of f until it is kept
	over string // what keep renames path to; "" when f is in its place
	// made: path was created for this upload.
	made bool
	kept bool
}

// tempName is the pattern of files written beside another.
const tempName = ".cordon-*.part"

// open opens the target with the user's rights, which makes it and the
// directories above it the user's own.
func (up upload) open(p string, whole bool) (to *target, err error) {
	to = &target{user: up.user, path: p}
	err = up.user.as(func() error {
		if err := os.MkdirAll(path.Dir(p), 0o755); err != nil {
			if fi, statErr := os.Stat(p); statErr == nil {
				return errors.Join(regular(p, fi), err)
			}
			return err
		}
		to.f, err = os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NONBLOCK, 0o666)
		if err == nil {
			to.made = true
			return nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		return to.openOld(whole)
	})
	if err != nil {
		to.discard()
		return nil, err
	}
	return to, nil
}

// openOld opens a target that exists, or that a symbolic link leads to.
func (t *target) openOld(whole bool) error {
	fi, err := os.Stat(t.path)
	if err == nil {
		if err := regular(t.path, fi); err != nil {
			return err
		}
	}
	// Not emptied yet: it may be replaced, and what is opened may not be what was
	// looked at.
	t.f, err = os.OpenFile(t.path, os.O_WRONLY|os.O_CREATE|syscall.O_NONBLOCK, 0o666)
	if err != nil {
		return err
	}
	if fi, err = t.f.Stat(); err != nil {
		return err
	}
	if err := errors.Join(regular(t.path, fi), notOurs(t.f, fi)); err != nil {
		return err
	}
	if !whole && t.beside(fi) {
		return nil
	}
	return t.f.Truncate(0)
}

// beside opens a file next to the target that can take its place, and reports
// whether it could: with another owner, other names or a mount on it, the file
// would become another one.
func (t *target) beside(fi fs.FileInfo) bool {
	real, err := filepath.EvalSymlinks(t.path)
	if err != nil {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	dir, err := os.Stat(path.Dir(real))
	if err != nil || !ok || st.Nlink != 1 || st.Uid != t.user.UID || st.Gid != t.user.GID {
		return false
	}
	if in, ok := dir.Sys().(*syscall.Stat_t); !ok || in.Dev != st.Dev {
		return false
	}
	f, err := os.CreateTemp(path.Dir(real), tempName)
	if err != nil {
		return false
	}
	if f.Chmod(fi.Mode().Perm()) != nil {
		f.Close()
		_ = os.Remove(f.Name())
		return false
	}
	t.f.Close()
	t.f, t.path, t.over, t.made = f, f.Name(), real, true
	return true
}

// setMetadata makes the file's metadata exactly want.
func (t *target) setMetadata(want map[string]string) error {
	return t.user.as(func() error {
		var attr error
		raw, err := t.f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { attr = setMetadata(int(fd), want) })
		}
		return errors.Join(err, attr)
	})
}

// keep puts the whole file in its place.
func (t *target) keep() error {
	if err := t.f.Close(); err != nil {
		return err
	}
	if t.over != "" {
		if err := t.user.as(func() error { return os.Rename(t.path, t.over) }); err != nil {
			return err
		}
	}
	t.kept = true
	return nil
}

// discard gives up a target that is not kept.
func (t *target) discard() {
	if t.f == nil {
		return
	}
	mine, err := t.f.Stat()
	t.f.Close()
	if t.kept || !t.made || err != nil {
		return
	}
	_ = t.user.as(func() error {
		if there, err := os.Lstat(t.path); err != nil || !os.SameFile(mine, there) {
			return nil // somebody has put another there
		}
		return os.Remove(t.path)
	})
}

// notOurs refuses files of the agent's own process below /proc: to the kernel, a
// path that leads to /proc/self asks for the agent's memory, not for that of the
// user who has no such right. They all claim to be empty.
func notOurs(f *os.File, fi fs.FileInfo) error {
	if fi.Size() != 0 {
		return nil
	}
	at, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err == nil && strings.HasPrefix(at, fmt.Sprintf("/proc/%d/", os.Getpid())) {
		return fmt.Errorf("%s belongs to the sandbox's agent: %w", utf8(at), fs.ErrPermission)
	}
	return nil
}
