package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxText bounds the small text files of an image that are read and edited.
const maxText = 1 << 20

// guestAgent is where the runtime shows the agent.
const guestAgent = "/.cordon/cordon-agent"

// sharedFiles are the same in every image: a sandbox's names and resolver, and
// the mount point of the agent, which the runtime would else have to create in an
// image that is never written to. The runtime shows the sandbox's own hostname in
// /etc/hosts over this one.
func sharedFiles() []file {
	return []file{
		{guestAgent, 0o755, "The agent of the sandbox is shown here.\n"},
		{"/etc/resolv.conf", 0o644, "nameserver 8.8.8.8\nnameserver 1.1.1.1\n"},
		{"/etc/hosts", 0o644, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
		{"/etc/hostname", 0o644, "sandbox\n"},
		{"/etc/machine-id", 0o444, ""},
	}
}

// profile is what a login shell reads first, and every command runs in one. Unlike
// Debian's it starts no program (two forks are most of what a short command costs
// in gVisor) and leaves PATH as the agent set it.
const profile = `umask 022
for f in /etc/profile.d/*.sh; do [ -r "$f" ] && . "$f"; done
unset f
if [ -n "${BASH_VERSION-}" ] && [ -r /etc/bash.bashrc ]; then . /etc/bash.bashrc; fi
`

// packageFiles are for images whose user land we choose ourselves.
func packageFiles() []file {
	return slices.Concat(npmrc(), []file{
		{"/etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\n"},
		{"/etc/default/locale", 0o644, "LANG=" + locale + "\n"},
		{"/etc/profile", 0o644, profile},
		{"/etc/profile.d/cordon.sh", 0o644, "export LANG=\"${LANG:-" + locale + "}\"\n"},
		{"/etc/sudoers.d/" + userName, 0o440, sudoRule},
		{"/etc/apt/apt.conf.d/90cordon", 0o644, aptSettings},
	})
}

// npmrc is npm's configuration for all users, which pnpm up to version 10 reads too.
// npm looks for it below the prefix of the node that runs it, Debian's npm in /etc.
// A project's or user's own .npmrc, the environment and options win over it.
func npmrc() []file {
	var out []file
	for _, dir := range []string{"/etc", "/usr/etc", "/usr/local/etc"} {
		out = append(out, file{dir + "/npmrc", 0o644, npmSettings})
	}
	return out
}

// npmSettings keep npm's three tries and shorten the pauses between them: npm tries again
// after any error but an HTTP answer, so each denied name would cost it 70 seconds.
const npmSettings = `# Pauses between tries: 1 and 5 seconds instead of 10 and 60, so that a denied registry fails soon.
fetch-retry-mintimeout=1000
fetch-retry-maxtimeout=5000
`

// aptSettings make "apt-get update" fail when it fails: without, it exits 0 after a
// denial, and scripts go on with the old lists or none.
const aptSettings = `APT::Update::Error-Mode "any";
`

const sudoRule = userName + " ALL=(ALL:ALL) NOPASSWD: ALL\n"

// tree edits a root file system. Names are absolute paths in it; links in the
// tree are followed as a process with that root would, never out of it.
type tree struct{ root *os.Root }

// resolve returns name, relative to the root, with every link in its directory
// part replaced; the last element is left alone.
func (t tree) resolve(name string) (string, error) {
	done := "."
	rest := strings.Split(strings.TrimPrefix(path.Clean("/"+name), "/"), "/")
	for hops := 0; len(rest) > 1; {
		next := path.Join(done, rest[0])
		if rest[0] == ".." { // from a link; the root is its own parent
			done, rest = path.Dir(done), rest[1:]
			continue
		}
		target, err := t.root.Readlink(next)
		if err != nil { // not a link, or not there yet
			done, rest = next, rest[1:]
			continue
		}
		if hops++; hops > 40 { // as the kernel: path_resolution(7)
			return "", fmt.Errorf("%s: too many links", name)
		}
		if path.IsAbs(target) {
			done = "."
		}
		rest = slices.Concat(strings.FieldsFunc(target, func(r rune) bool { return r == '/' }), rest[1:])
	}
	if len(rest) == 0 || rest[0] == "" {
		return done, nil
	}
	return path.Join(done, rest[0]), nil
}

// follow returns what a name leads to when it is a link itself.
func (t tree) follow(name string) (string, error) {
	for range 40 { // as the kernel: path_resolution(7)
		rel, err := t.resolve(name)
		if err != nil {
			return "", err
		}
		target, err := t.root.Readlink(rel)
		if err != nil {
			return "/" + rel, nil
		}
		if name = target; !path.IsAbs(target) {
			name = path.Join("/", path.Dir(rel), target)
		}
	}
	return "", fmt.Errorf("%s: too many links", name)
}

// write creates or replaces a file.
func (t tree) write(f file) (err error) {
	defer func() { err = step("write "+f.Path, err) }()
	name, err := t.place(f.Path)
	if err != nil {
		return err
	}
	w, err := t.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, f.Text)
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	return t.root.Chmod(name, fs.FileMode(f.Mode)) // past the umask
}

// link creates or replaces a symbolic link.
func (t tree) link(l link) (err error) {
	defer func() { err = step("link "+l.Path, err) }()
	name, err := t.place(l.Path)
	if err != nil {
		return err
	}
	return t.root.Symlink(l.Target, name)
}

// place makes the directories above name and removes what is there under it.
func (t tree) place(name string) (string, error) {
	rel, err := t.resolve(name)
	if err != nil {
		return "", err
	}
	if err := t.mkdir(path.Dir(rel)); err != nil {
		return "", err
	}
	return rel, t.root.RemoveAll(rel)
}

// mkdir makes the missing directories of a resolved path with mode 0755.
func (t tree) mkdir(rel string) error {
	if rel == "." {
		return nil
	}
	if err := t.mkdir(path.Dir(rel)); err != nil {
		return err
	}
	err := t.root.Mkdir(rel, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return t.root.Chmod(rel, 0o755)
}

// read returns a small text file, or nothing when there is none.
func (t tree) read(name string) (string, error) {
	rel, err := t.resolve(name)
	if err != nil {
		return "", step("read "+name, err)
	}
	fi, err := t.root.Lstat(rel)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", step("read "+name, err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxText {
		return "", fmt.Errorf("read %s: not a regular file of at most %d bytes", name, maxText)
	}
	b, err := t.root.ReadFile(rel)
	return string(b), step("read "+name, err)
}

// strip removes what a build leaves behind and what must not be shared by all
// sandboxes of an image: caches, logs, device nodes, identities.
func (t tree) strip() error {
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache/apt", "/var/cache/debconf", "/var/lib/apt/lists"} {
		if err := t.empty(dir); err != nil {
			return step("empty "+dir, err)
		}
	}
	for _, name := range []string{
		"/var/lib/dbus/machine-id", "/var/lib/dpkg/status-old", "/var/lib/dpkg/available-old", "/etc/apt/apt.conf.d/99mmdebstrap",
		"/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/.pwd.lock", "/var/cache/ldconfig/aux-cache",
	} {
		if err := t.root.RemoveAll(strings.TrimPrefix(name, "/")); err != nil {
			return step("remove "+name, err)
		}
	}
	if err := t.barePing(); err != nil {
		return err
	}
	return t.freePip()
}

// barePing takes ping's file capability away. Sandboxes have no CAP_NET_RAW, and
// a file that demands it cannot be executed there; without, ping uses the
// unprivileged kind of socket.
func (t tree) barePing() error {
	f, err := t.root.Open("usr/bin/ping")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return step("open ping", err)
	}
	defer f.Close()
	if err := unix.Fremovexattr(int(f.Fd()), "security.capability"); err != nil && !errors.Is(err, unix.ENODATA) {
		return step("remove ping's capability", err)
	}
	return nil
}

// freePip lets pip install outside a virtual environment (PEP 668): a sandbox is
// thrown away, there is no system to protect from its user.
func (t tree) freePip() error {
	dirs, err := fs.Glob(t.root.FS(), "usr/lib/python3*/EXTERNALLY-MANAGED")
	if err != nil {
		return step("look for EXTERNALLY-MANAGED", err)
	}
	for _, name := range dirs {
		if err := t.root.Remove(name); err != nil {
			return step("remove "+name, err)
		}
	}
	return nil
}

// empty removes the contents of a directory, if there is one.
func (t tree) empty(dir string) error {
	rel := strings.TrimPrefix(dir, "/")
	entries, err := fs.ReadDir(t.root.FS(), rel)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := t.root.RemoveAll(path.Join(rel, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// step wraps err with what was being done.
func step(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
