package image

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// HostTemplate is the name of the template that needs no build and no network.
const HostTemplate = "host"

// hostVersion changes when sandboxes need what is new in the skeleton. A change ends paused
// sandboxes of the template, so settings that only help wait for the next change of packages.
const hostVersion = "2"

// hostSource makes skeletons for the host template: an own /etc and empty
// directories, over which allow-listed directories of the machine's /usr are
// shown read-only. What is not listed does not exist in the sandbox: not /root,
// /home, /var, /opt, /usr/local, nor any secret in /etc.
type hostSource struct {
	root string // "/", another in tests
	dir  string // where skeletons are kept
}

// usrDirs are shown from /usr, where they exist.
var usrDirs = []string{"bin", "include", "lib", "lib32", "lib64", "libexec", "libx32", "sbin", "share"}

// topDirs are links into /usr on a merged system (https://wiki.debian.org/UsrMerge)
// and directories of their own elsewhere.
var topDirs = []string{"bin", "lib", "lib32", "lib64", "libx32", "sbin"}

// hostEtc is copied from the machine's /etc: what programs need to start and
// nothing that names users, hosts or secrets.
var hostEtc = []string{
	"alternatives", "bash.bashrc", "ca-certificates.conf", "debian_version", "fonts", "inputrc", "ld.so.cache", "ld.so.conf",
	"ld.so.conf.d", "mime.types", "os-release", "perl", "pki/tls/certs", "protocols", "services", "ssl/certs", "ssl/openssl.cnf", "terminfo",
}

// resolveHost returns the host template, making its skeleton when the machine's
// packages changed.
func (l *Library) resolveHost() (sandbox.Image, error) {
	rootfs, err := l.host.skeleton()
	if err != nil {
		return sandbox.Image{}, err
	}
	binds := l.host.binds()
	if len(binds) == 0 {
		return sandbox.Image{}, errs.New(errs.Unavailable, "template 'host' needs the machine's /usr, which has none of %s", strings.Join(usrDirs, ", "))
	}
	return sandbox.Image{
		TemplateID: HostTemplate,
		Name:       HostTemplate,
		Digest:     "host:" + l.host.fingerprint(),
		Rootfs:     rootfs,
		Binds:      binds,
		Env:        defaultEnv(),
		User:       userName,
		Workdir:    userHome,
	}, nil
}

// packageMarks change whenever the machine's packages may have changed.
var packageMarks = []string{"var/lib/dpkg/status", "var/lib/rpm/rpmdb.sqlite", "var/lib/rpm/Packages", "lib/apk/db/installed", "usr/bin", "usr/lib"}

// changed is when the machine's packages changed last, or now if nothing tells.
func (h hostSource) changed(now time.Time) time.Time {
	var last time.Time
	for _, name := range packageMarks {
		if fi, err := os.Stat(filepath.Join(h.root, name)); err == nil && fi.ModTime().After(last) {
			last = fi.ModTime().UTC()
		}
	}
	return cmp.Or(last, now)
}

// fingerprint changes whenever the machine's packages may have changed: a
// snapshot of a sandbox on the host template is worthless afterwards.
func (h hostSource) fingerprint() string {
	sum := sha256.New()
	fmt.Fprintln(sum, hostVersion, "") // the empty word keeps the fingerprints of earlier releases
	for _, name := range packageMarks {
		if fi, err := os.Stat(filepath.Join(h.root, name)); err == nil {
			fmt.Fprintln(sum, name, fi.Size(), fi.ModTime().UnixNano())
		}
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// binds lists what is shown of the machine.
func (h hostSource) binds() []sandbox.Bind {
	var out []sandbox.Bind
	add := func(guest string) {
		fi, err := os.Lstat(filepath.Join(h.root, guest))
		if err == nil && fi.IsDir() {
			out = append(out, sandbox.Bind{Host: filepath.Join(h.root, guest), Guest: guest})
		}
	}
	for _, d := range usrDirs {
		add("/usr/" + d)
	}
	for _, d := range topDirs {
		add("/" + d) // not a link: the system is not merged
	}
	return out
}

// skeleton returns the directory of the present fingerprint, made if need be.
func (h hostSource) skeleton() (string, error) {
	dir := filepath.Join(h.dir, h.fingerprint())
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		return "", fmt.Errorf("create host skeleton: %w", err)
	}
	tmp, err := os.MkdirTemp(h.dir, ".tmp-")
	if err != nil {
		return "", fmt.Errorf("create host skeleton: %w", err)
	}
	defer os.RemoveAll(tmp)
	if err := h.fill(tmp); err != nil {
		return "", fmt.Errorf("create host skeleton: %w", err)
	}
	err = os.Rename(tmp, dir)
	if errors.Is(err, fs.ErrExist) || err == nil { // another request was quicker
		return dir, nil
	}
	return "", fmt.Errorf("create host skeleton: %w", err)
}

func (h hostSource) fill(dir string) (err error) {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	t := tree{root}
	if err := h.directories(t); err != nil {
		return err
	}
	for _, name := range hostEtc {
		if err := h.copyEtc(t, path.Join("etc", name)); err != nil {
			return err
		}
	}
	for _, f := range slices.Concat(sharedFiles(), packageFiles(), h.files()) {
		if err := t.write(f); err != nil {
			return err
		}
	}
	return t.addUser(nil)
}

// directories makes the empty tree and the links into /usr.
func (h hostSource) directories(t tree) error {
	for _, d := range []string{"dev", "etc/profile.d", "etc/skel", "etc/sudoers.d", "home", "media", "mnt", "opt", "proc", "run", "srv", "sys", "usr/games", "usr/local/bin", "usr/local/lib", "usr/local/sbin", "usr/local/share", "usr/src", "var/cache", "var/lib", "var/log", "var/spool"} {
		if err := t.mkdir(d); err != nil {
			return err
		}
	}
	for _, d := range []struct {
		name string
		mode fs.FileMode
	}{{"tmp", 0o777 | fs.ModeSticky}, {"var/tmp", 0o777 | fs.ModeSticky}, {"root", 0o700}} {
		if err := t.mkdir(d.name); err != nil {
			return err
		}
		if err := t.root.Chmod(d.name, d.mode); err != nil {
			return err
		}
	}
	for _, b := range h.binds() {
		if err := t.mkdir(strings.TrimPrefix(b.Guest, "/")); err != nil {
			return err
		}
	}
	for _, d := range topDirs {
		if target, err := os.Readlink(filepath.Join(h.root, d)); err == nil {
			if err := t.link(link{"/" + d, target}); err != nil {
				return err
			}
		}
	}
	if err := t.link(link{"/var/run", "/run"}); err != nil {
		return err
	}
	return t.link(link{"/var/lock", "/run/lock"})
}

// copyEtc copies a file, link or directory that everyone may read.
func (h hostSource) copyEtc(t tree, name string) error {
	src := filepath.Join(h.root, name)
	fi, err := os.Lstat(src)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		return t.link(link{"/" + name, target})
	case fi.IsDir():
		entries, err := os.ReadDir(src)
		if err != nil {
			return err
		}
		if err := t.mkdir(name); err != nil {
			return err
		}
		for _, e := range entries {
			if err := h.copyEtc(t, path.Join(name, e.Name())); err != nil {
				return err
			}
		}
	case fi.Mode().IsRegular() && fi.Mode()&0o004 != 0:
		b, err := os.ReadFile(src)
		if err != nil {
			return err
		}
		return t.write(file{"/" + name, uint32(fi.Mode().Perm()), string(b)})
	}
	return nil
}

// files are the files of /etc that must not be the machine's.
func (h hostSource) files() []file {
	shell := "/bin/bash"
	if _, err := os.Stat(filepath.Join(h.root, shell)); err != nil {
		shell = "/bin/sh"
	}
	user := fmt.Sprintf("%s:x:%d:%d::%s:%s\n", userName, userID, userID, userHome, shell)
	return []file{
		{"/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n" + user},
		{"/etc/group", 0o644, "root:x:0:\ndaemon:x:1:\ntty:x:5:\nsudo:x:27:\nwww-data:x:33:\nshadow:x:42:\nutmp:x:43:\nstaff:x:50:\nnogroup:x:65534:\n" + fmt.Sprintf("%s:x:%d:\n", userName, userID)},
		{"/etc/shadow", 0o640, "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n" + userName + ":*:19000:0:99999:7:::\n"},
		{"/etc/gshadow", 0o640, "root:*::\nsudo:*::\n" + userName + ":!::\n"},
		{"/etc/shells", 0o644, "/bin/sh\n/bin/bash\n"},
		{"/etc/environment", 0o644, ""},
		{"/etc/profile", 0o644, profile},
		{"/etc/login.defs", 0o644, "UMASK 022\nUID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\nENCRYPT_METHOD YESCRYPT\n"},
		{"/etc/sudoers", 0o440, "Defaults env_reset\nDefaults secure_path=\"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"\nroot ALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n"},
		{"/etc/pam.d/sudo", 0o644, pamPermit},
		{"/etc/pam.d/su", 0o644, pamPermit},
		{"/etc/pam.d/other", 0o644, "auth required pam_deny.so\naccount required pam_deny.so\npassword required pam_deny.so\nsession required pam_deny.so\n"},
		{"/etc/skel/.profile", 0o644, "if [ -n \"$BASH_VERSION\" ] && [ -f \"$HOME/.bashrc\" ]; then . \"$HOME/.bashrc\"; fi\n"},
		{"/etc/skel/.bashrc", 0o644, "case $- in *i*) PS1='\\u@\\h:\\w\\$ ' ;; esac\n"},
		{"/usr/local/bin/python", 0o755, "#!/bin/sh\nexec python3 \"$@\"\n"},
	}
}

// pamPermit leaves the decision to sudoers: nobody in a sandbox has a password.
const pamPermit = "auth sufficient pam_rootok.so\nauth required pam_permit.so\naccount required pam_permit.so\nsession required pam_permit.so\n"
