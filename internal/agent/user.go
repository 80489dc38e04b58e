package agent

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// user is whom a request acts as.
type user struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // all of them, the primary one first
	Home   string
}

// users reads the account files at every question: sandboxes add users.
type users struct {
	etc string
}

const maxAccounts = 1 << 20 // bytes read of passwd and of group

// unknownUser is the error of lookup.
type unknownUser struct{ name string }

func (e unknownUser) Error() string { return fmt.Sprintf("invalid username: '%s'", e.name) }

// lookup finds a user by name.
func (s users) lookup(name string) (user, error) {
	var found *user
	err := s.each("passwd", func(f []string) {
		if found != nil || len(f) < 6 || f[0] != name || name == "" {
			return
		}
		uid, errU := strconv.ParseUint(f[2], 10, 32)
		gid, errG := strconv.ParseUint(f[3], 10, 32)
		if errU == nil && errG == nil {
			found = &user{Name: name, UID: uint32(uid), GID: uint32(gid), Home: path.Clean("/" + f[5])}
		}
	})
	if err != nil {
		return user{}, err
	}
	if found == nil {
		return user{}, unknownUser{name}
	}
	found.Groups = []uint32{found.GID}
	err = s.each("group", func(f []string) {
		if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), name) {
			return
		}
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && !slices.Contains(found.Groups, uint32(gid)) {
			found.Groups = append(found.Groups, uint32(gid))
		}
	})
	return *found, err
}

// names maps IDs to names, for listings.
type names struct {
	user, group map[uint32]string
}

// names reads both account files once.
func (s users) names() (names, error) {
	n := names{user: map[uint32]string{}, group: map[uint32]string{}}
	collect := func(into map[uint32]string) func([]string) {
		return func(f []string) {
			if len(f) < 3 {
				return
			}
			id, err := strconv.ParseUint(f[2], 10, 32)
			if _, taken := into[uint32(id)]; err == nil && !taken {
				into[uint32(id)] = strings.ToValidUTF8(f[0], "�")
			}
		}
	}
	if err := s.each("passwd", collect(n.user)); err != nil {
		return n, err
	}
	return n, s.each("group", collect(n.group))
}

func nameOf(m map[uint32]string, id uint32) string {
	if n, ok := m[id]; ok {
		return n
	}
	return strconv.FormatUint(uint64(id), 10)
}

// each calls f with the fields of every line of an account file. A missing file
// has no lines.
func (s users) each(file string, f func(fields []string)) error {
	fd, err := os.Open(filepath.Join(s.etc, file))
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the %s file: %w", file, err)
	}
	defer fd.Close()
	lines := bufio.NewScanner(io.LimitReader(fd, maxAccounts))
	for lines.Scan() {
		if line := lines.Text(); line != "" && line[0] != '#' {
			f(strings.Split(line, ":"))
		}
	}
	return nil // an overlong line ends the file: nobody behind it exists
}

// as runs f with the user's rights, so that the kernel decides what f may touch,
// through whatever symbolic links the sandbox's programs lay meanwhile. f must
// not start goroutines: rights belong to the thread it runs on. What f opened
// stays open and usable afterwards.
//
// The effective IDs are changed rather than the file system IDs because gVisor
// does not implement setfsuid(2). The real and saved IDs stay root's, so the
// user can neither signal nor trace the thread meanwhile.
func (u user) as(f func() error) error {
	if u.UID == 0 || int64(u.UID) == int64(os.Geteuid()) {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		restore, err := u.assume()
		if err != nil {
			done <- fmt.Errorf("act as %s: %w", u.Name, err)
			return // still locked: the thread dies with this goroutine
		}
		err = recovered(f)
		if restore() == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// recovered runs f and makes a panic an error: it must not pass over the thread's
// rights, nor end the agent.
func recovered(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return f()
}

// assume gives the calling thread the user's groups and effective IDs. The raw
// system calls act on one thread, the syscall package's on all.
func (u user) assume() (restore func() error, err error) {
	before, err := unix.Getgroups()
	if err != nil {
		return nil, err
	}
	was := make([]uint32, len(before))
	for i, g := range before {
		was[i] = uint32(g)
	}
	if err := setGroups(u.Groups); err != nil {
		return nil, fmt.Errorf("setgroups: %w", err)
	}
	if err := setEffective(unix.SYS_SETRESGID, u.GID); err != nil {
		return nil, fmt.Errorf("setresgid: %w", err)
	}
	if err := setEffective(unix.SYS_SETRESUID, u.UID); err != nil {
		return nil, fmt.Errorf("setresuid: %w", err)
	}
	return func() error {
		if err := setEffective(unix.SYS_SETRESUID, 0); err != nil {
			return err
		}
		if err := setEffective(unix.SYS_SETRESGID, 0); err != nil {
			return err
		}
		return setGroups(was)
	}, nil
}
