package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// orRoot does a file operation with the user's rights, and where these do not
// suffice with the agent's, as clients expect: whoever has the access token may act
// as root anyway.
//
// What root does must not be steered by the programs in the sandbox, who have no
// token. So asRoot must reach what it changes through a place, in which only root
// laid the symbolic links.
func (u user) orRoot(asUser, asRoot func() error) error {
	err := u.as(asUser)
	if !errors.Is(err, fs.ErrPermission) || u.UID == 0 || os.Geteuid() != 0 {
		return err
	}
	return recovered(asRoot)
}

// spot is a name in a directory that is held open, so that nothing between / and it
// can be exchanged any more.
type spot struct {
	dir  *os.File
	name string
}

func (s spot) close() { s.dir.Close() }

// ours reports whether the spot is where the agent's own program lies.
func (s spot) ours() bool {
	dir, err := s.dir.Stat()
	if err != nil {
		return true
	}
	exe, err := os.Executable()
	if err != nil {
		return true
	}
	own, err := os.Stat(path.Dir(exe))
	return err == nil && os.SameFile(dir, own)
}

func (s spot) fd() int { return int(s.dir.Fd()) }

// maxLinks is how many symbolic links a path may go through (path_resolution(7)).
const maxLinks = 40

// errForeignLink says why root's rights do not help.
func errForeignLink(name string) error {
	return fmt.Errorf("%s is a symbolic link that is not root's, and leads where the user has no rights: %w", utf8(name), fs.ErrPermission)
}

// finder says how a path is resolved.
type finder struct {
	maker *user // whose missing directories become; nil: none is made
	last  bool  // a symbolic link in the last place is followed
}

// find resolves an absolute path with root's rights, up to its last name.
func (o finder) find(p string) (s spot, err error) {
	at, err := openDir(unix.AT_FDCWD, "/")
	if err != nil {
		return spot{}, err
	}
	defer func() {
		if err != nil {
			at.Close()
		}
	}()
	left := strings.Split(strings.Trim(path.Clean(p), "/"), "/")
	for links := 0; ; {
		name := left[0]
		var st unix.Stat_t
		err := unix.Fstatat(int(at.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		link := err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK
		switch {
		case link && len(left) == 1 && !o.last:
			return spot{at, name}, nil
		case link:
			if links++; links > maxLinks {
				return spot{}, &os.PathError{Op: "open", Path: p, Err: unix.ELOOP}
			}
			to, next, err := follow(at, name)
			if err != nil {
				return spot{}, err
			}
			at.Close()
			at, left = next, append(to, left[1:]...)
			continue
		case len(left) == 1:
			return spot{at, name}, nil // there, or to be made
		case errors.Is(err, fs.ErrNotExist) && o.maker != nil:
			err = makeDir(spot{at, name}, *o.maker)
		}
		if err != nil {
			return spot{}, &os.PathError{Op: "open", Path: p, Err: err}
		}
		next, err := openDir(int(at.Fd()), name)
		if err != nil {
			return spot{}, &os.PathError{Op: "open", Path: p, Err: err}
		}
		at.Close()
		at, left = next, left[1:]
	}
}

// follow returns the names a link consists of and the directory they start from. The
// link is held open, so that the one that is judged is the one that is read.
func follow(at *os.File, name string) (to []string, from *os.File, err error) {
	link, err := unix.Openat(int(at.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(link)
	var st unix.Stat_t
	if err := unix.Fstat(link, &st); err != nil {
		return nil, nil, os.NewSyscallError("fstat", err)
	}
	if st.Uid != 0 {
		return nil, nil, errForeignLink(name)
	}
	buf := make([]byte, maxPath)
	n, err := unix.Readlinkat(link, "", buf)
	if err != nil { // what was a link is none any more
		return nil, nil, os.NewSyscallError("readlinkat", err)
	}
	target := string(buf[:n])
	start, base := int(at.Fd()), "."
	if strings.HasPrefix(target, "/") {
		start, base = unix.AT_FDCWD, "/"
	}
	if from, err = openDir(start, base); err != nil {
		return nil, nil, err
	}
	if to = strings.FieldsFunc(target, func(r rune) bool { return r == '/' }); len(to) == 0 {
		to = []string{"."}
	}
	return to, from, nil
}

func openDir(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// makeDir makes a directory and gives it to a user. A program may have put something
// of root's in its place meanwhile, but only an empty directory is given away.
func makeDir(s spot, u user) error {
	if err := unix.Mkdirat(s.fd(), s.name, 0o755); err != nil {
		return err
	}
	dir, err := openDir(s.fd(), s.name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if names, err := dir.Readdirnames(1); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s was exchanged for another directory, with %q: %w", utf8(s.name), names, fs.ErrPermission)
	}
	return dir.Chown(int(u.UID), int(u.GID))
}

// makeDirs makes a directory and those above it that are missing.
func (u user) makeDirs(p string) error {
	return u.orRoot(func() error { return os.MkdirAll(p, 0o755) }, func() error {
		s, err := finder{maker: &u, last: true}.find(p)
		if err != nil {
			return err
		}
		defer s.close()
		err = makeDir(s, u)
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	})
}

// remove removes what is at a path and all below it.
func (u user) remove(p string) error {
	return u.orRoot(func() error { return os.RemoveAll(p) }, func() error {
		s, err := finder{}.find(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer s.close()
		if s.ours() {
			return errOurs
		}
		dir, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", s.fd()))
		if err != nil {
			return err
		}
		defer dir.Close()
		return dir.RemoveAll(s.name)
	})
}

// rename moves a path within a file system.
func (u user) rename(from, to string) error {
	return u.orRoot(func() error { return os.Rename(from, to) }, func() error {
		a, err := finder{}.find(from)
		if err != nil {
			return err
		}
		defer a.close()
		b, err := finder{}.find(to)
		if err != nil {
			return err
		}
		defer b.close()
		if a.ours() || b.ours() {
			return errOurs
		}
		if err := unix.Renameat(a.fd(), a.name, b.fd(), b.name); err != nil {
			return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
		}
		return nil
	})
}

// openOwn opens a regular file for reading that is the user's to read. Where root's
// rights are needed to reach it, it must be the user's own: what is read goes into a
// file that the user's programs can read.
func (u user) openOwn(p string) (f *os.File, err error) {
	err = u.orRoot(func() error {
		f, _, err = openRegular(p)
		return err
	}, func() error {
		s, err := finder{last: true}.find(p)
		if err != nil {
			return err
		}
		defer s.close()
		fd, err := unix.Openat(s.fd(), s.name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: p, Err: err}
		}
		f = os.NewFile(uintptr(fd), p)
		fi, err := f.Stat()
		if err == nil {
			err = errors.Join(regular(p, fi), notOurs(f, fi))
		}
		if err == nil && !u.owns(fi) {
			err = fmt.Errorf("%s is neither %s's own nor theirs to read: %w", utf8(p), u.Name, fs.ErrPermission)
		}
		if err != nil {
			f.Close()
			f = nil
		}
		return err
	})
	return f, err
}

func (u user) owns(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && st.Uid == u.UID
}
