package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

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

// users knows the accounts. Sandboxes add users, so each question looks whether
// the files changed; reading them each time would cost more than the rest of a
// small request.
type users struct {
	etc string

	mu      sync.Mutex // guards what follows
	passwd  account
	group   account
	byName  map[string]user
	current names
}

// account is one of the two files, and the state it was read in.
type account struct {
	lines [][]string
	state fileState
}

// fileState changes whenever a file does.
type fileState struct {
	inode    uint64
	size     int64
	modified int64 // ns
	changed  int64 // ns
}

// unknownUser is the error of lookup.
type unknownUser struct{ name string }

func (e unknownUser) Error() string { return fmt.Sprintf("invalid username: '%s'", e.name) }

// lookup finds a user by name.
func (s *users) lookup(name string) (user, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refresh(); err != nil {
		return user{}, err
	}
	if u, ok := s.byName[name]; ok {
		return u, nil
	}
	u, ok := s.parse(name)
	if !ok {
		return user{}, unknownUser{name}
	}
	s.byName[name] = u
	return u, nil
}

// parse builds a user from the lines.
func (s *users) parse(name string) (user, bool) {
	for _, f := range s.passwd.lines {
		if len(f) < 6 || f[0] != name || name == "" {
			continue
		}
		uid, errU := strconv.ParseUint(f[2], 10, 32)
		gid, errG := strconv.ParseUint(f[3], 10, 32)
		if errU != nil || errG != nil {
			continue
		}
		u := user{Name: name, UID: uint32(uid), GID: uint32(gid), Groups: []uint32{uint32(gid)}, Home: path.Clean("/" + f[5])}
		for _, g := range s.group.lines {
			if len(g) < 4 || !slices.Contains(strings.Split(g[3], ","), name) {
				continue
			}
			gid, err := strconv.ParseUint(g[2], 10, 32)
			if err == nil && !slices.Contains(u.Groups, uint32(gid)) {
				u.Groups = append(u.Groups, uint32(gid))
			}
		}
		return u, true
	}
	return user{}, false
}

// names maps IDs to names, for listings. It is not changed once made.
type names struct {
	user, group map[uint32]string
}

// names returns the names as they are now.
func (s *users) names() (names, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refresh(); err != nil {
		return names{}, err
	}
	return s.current, nil
}

// refresh reads what has changed; mu is held.
func (s *users) refresh() error {
	p, errP := s.passwd.refresh(filepath.Join(s.etc, "passwd"))
	g, errG := s.group.refresh(filepath.Join(s.etc, "group"))
	if err := errors.Join(errP, errG); err != nil {
		return err
	}
	if p || g || s.byName == nil {
		s.byName = map[string]user{}
		s.current = names{user: s.passwd.byID(), group: s.group.byID()}
	}
	return nil
}

// refresh reads the file if it changed. A missing file has no lines.
func (a *account) refresh(path string) (changed bool, err error) {
	var st unix.Stat_t
	err = unix.Stat(path, &st)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("look at %s: %w", path, err)
	}
	now := fileState{st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}
	if now == a.state {
		return false, nil
	}
	raw, err := readBounded(path)
	if err != nil {
		return false, err
	}
	a.lines = nil
	for line := range strings.Lines(string(raw)) {
		if line = strings.TrimRight(line, "\n"); line != "" && line[0] != '#' {
			a.lines = append(a.lines, strings.Split(line, ":"))
		}
	}
	a.state = now
	return true, nil
}

// byID maps the third field to the first; the first line of an ID names it.
func (a *account) byID() map[uint32]string {
	out := map[uint32]string{}
	for _, f := range a.lines {
		if len(f) < 3 {
			continue
		}
		id, err := strconv.ParseUint(f[2], 10, 32)
		if _, taken := out[uint32(id)]; err == nil && !taken {
			out[uint32(id)] = utf8(f[0])
		}
	}
	return out
}

func nameOf(m map[uint32]string, id uint32) string {
	if n, ok := m[id]; ok {
		return n
	}
	return strconv.FormatUint(uint64(id), 10)
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
	// On this very goroutine: handing f to another thread costs more, in a
	// sandbox, than the system calls.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	restore, err := u.assume()
	defer restore()
	if err != nil {
		return fmt.Errorf("act as %s: %w", u.Name, err)
	}
	return recovered(f)
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
// system calls act on one thread, the syscall package's on all. restore must be
// called also after an error.
func (u user) assume() (restore func(), err error) {
	before, err := unix.Getgroups()
	if err != nil {
		return func() {}, fmt.Errorf("getgroups: %w", err)
	}
	restore = func() { restoreRoot(before) }
	if err := setGroups(u.Groups); err != nil {
		return restore, fmt.Errorf("setgroups: %w", err)
	}
	if err := setEffective(unix.SYS_SETRESGID, u.GID); err != nil {
		return restore, fmt.Errorf("setresgid: %w", err)
	}
	if err := setEffective(unix.SYS_SETRESUID, u.UID); err != nil {
		return restore, fmt.Errorf("setresuid: %w", err)
	}
	return restore, nil
}

// restoreRoot undoes assume. The kernel cannot refuse it, because the real and
// saved IDs are root's; should it do so all the same, the agent must not go on
// with a thread that has a user's rights for everybody's requests.
func restoreRoot(groups []int) {
	ids := make([]uint32, len(groups))
	for i, g := range groups {
		ids[i] = uint32(g)
	}
	for range 3 { // ENOMEM may pass
		if setEffective(unix.SYS_SETRESUID, 0) == nil && setEffective(unix.SYS_SETRESGID, 0) == nil && setGroups(ids) == nil {
			return
		}
	}
	fmt.Fprintln(os.Stderr, "cordon-agent: a thread cannot be given root's rights back")
	os.Exit(1)
}
