package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
)

// target is a file that gets new content.
type target struct {
	user user
	f    *os.File
	path string
	made bool // path was created for this
	kept bool
}

// open opens the target with the user's rights, which makes it and the
// directories above it the user's own.
func (up upload) open(p string) (to *target, err error) {
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
		return to.openOld(os.O_CREATE)
	})
	if err != nil {
		to.discard()
		return nil, err
	}
	return to, nil
}

// check refuses what could not be written, before a large body is received for it.
func (up upload) check(p string) error {
	err := up.user.as(func() error {
		t := &target{user: up.user, path: p}
		defer t.discard()
		return t.openOld(0)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it may be made
	}
	return err
}

// openOld opens a target that exists, or that a symbolic link leads to.
func (t *target) openOld(flags int) error {
	fi, err := os.Stat(t.path)
	if err == nil {
		if err := regular(t.path, fi); err != nil {
			return err
		}
	}
	// Not emptied: what is opened may not be what was looked at.
	t.f, err = os.OpenFile(t.path, os.O_WRONLY|syscall.O_NONBLOCK|flags, 0o666)
	if err != nil {
		return err
	}
	if fi, err = t.f.Stat(); err != nil {
		return err
	}
	return errors.Join(regular(t.path, fi), notOurs(t.f, fi))
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

// keep ends the target's writing.
func (t *target) keep() error {
	t.kept = true
	return t.f.Close()
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
