package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// target is a file that gets new content.
type target struct {
	user user
	f    *os.File
	path string
	made bool // path was created for this
	late bool // it is to become the user's once it holds nothing but what is written
	kept bool
}

// open opens the target and makes it, with the directories above it, where it is
// missing; what it makes is the user's.
func (up upload) open(p string) (to *target, err error) {
	to = &target{user: up.user, path: p}
	err = up.user.orRoot(to.make, to.makeAsRoot)
	if err != nil {
		to.discard()
		return nil, err
	}
	return to, nil
}

// make opens the target with the user's rights.
func (t *target) make() (err error) {
	if err := os.MkdirAll(path.Dir(t.path), 0o755); err != nil {
		if fi, statErr := os.Stat(t.path); statErr == nil {
			return errors.Join(regular(t.path, fi), err)
		}
		return err
	}
	t.f, err = os.OpenFile(t.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NONBLOCK, 0o666)
	if err == nil {
		t.made = true
		t.give()
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	return t.openOld(os.O_CREATE)
}

// makeAsRoot opens the target with root's rights; it becomes the user's in any case,
// which takes set-user-ID bits away. What is there already does so when nothing of its
// old content is left: a program may have laid a file there that it cannot read.
func (t *target) makeAsRoot() error {
	if t.f != nil { // seen by the user, but not his to write
		t.f.Close()
		t.f = nil
	}
	s, err := finder{maker: &t.user, last: true}.find(t.path)
	if err != nil {
		return err
	}
	defer s.close()
	if s.ours() {
		return errOurs
	}
	const flags = unix.O_WRONLY | unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(s.fd(), s.name, flags|unix.O_CREAT|unix.O_EXCL, 0o666)
	t.made = err == nil
	if errors.Is(err, fs.ErrExist) {
		fd, err = unix.Openat(s.fd(), s.name, flags, 0)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: t.path, Err: err}
	}
	t.f = os.NewFile(uintptr(fd), t.path)
	fi, err := t.f.Stat()
	if err == nil {
		err = errors.Join(regular(t.path, fi), notOurs(t.f, fi))
	}
	if err != nil {
		return err
	}
	if !t.made {
		t.late = true
		return nil
	}
	return t.f.Chown(int(t.user.UID), int(t.user.GID))
}

// give gives what was made to the user, whose it is already: watches tell that a
// file was made, given away and written.
func (t *target) give() {
	_ = t.f.Chown(int(t.user.UID), int(t.user.GID)) // its owner is right without it
}

// check refuses what could not be written, before a large body is received for it.
func (up upload) check(p string) error {
	t := &target{user: up.user, path: p}
	defer t.discard()
	err := up.user.as(func() error { return t.openOld(0) })
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil // it may be made, or written with root's rights
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
	if err := errors.Join(regular(t.path, fi), notOurs(t.f, fi)); err != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid == t.user.UID && flags != 0 {
		return t.f.Chown(int(st.Uid), int(st.Gid)) // as after making it
	}
	return nil
}

// setMetadata makes the file's metadata exactly want.
func (t *target) setMetadata(want map[string]string) error {
	var attr error
	raw, err := t.f.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { attr = setMetadata(int(fd), want) })
	}
	return errors.Join(err, attr)
}

// keep ends the target's writing.
func (t *target) keep() error {
	t.kept = true
	if t.late {
		return errors.Join(t.f.Chown(int(t.user.UID), int(t.user.GID)), t.f.Close())
	}
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
	if there, err := os.Lstat(t.path); err == nil && os.SameFile(mine, there) { // not another's by now
		_ = t.user.remove(t.path)
	}
}

// notOurs refuses files of the agent's own process in a procfs: what they show, the
// control key among it, is no user's. They all claim to be empty.
func notOurs(f *os.File, fi fs.FileInfo) error {
	var st unix.Statfs_t
	if fi.Size() != 0 || unix.Fstatfs(int(f.Fd()), &st) != nil || st.Type != unix.PROC_SUPER_MAGIC {
		return nil
	}
	at, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil || slices.Contains(strings.Split(at, "/"), strconv.Itoa(os.Getpid())) {
		return fmt.Errorf("%s belongs to the sandbox's agent: %w", utf8(at), errOurs)
	}
	return nil
}

// errOurs is a permission that nobody has.
var errOurs = errors.New("permission denied, to root too")
