package image

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/errs"
)

// login is who the commands of an image run as.
type login struct {
	name     string
	uid, gid int
	add      bool // the image has no account of that number
	group    bool // gid is not the account's own
}

// maxAccount is the highest number of a user or group that runtimes of OCI images
// take.
const maxAccount = 1<<31 - 1

// login finds the user that an image names as "user", "user:group", by name or by
// number, as container engines do: a name must be in the image's /etc/passwd or
// /etc/group, a number need not, and has group 0 then. Empty is our own user.
func (t tree) login(asked string) (login, error) {
	if asked == "" {
		return login{name: userName}, nil
	}
	passwd, err := t.read("/etc/passwd")
	if err != nil {
		return login{}, err
	}
	groups, err := t.read("/etc/group")
	if err != nil {
		return login{}, err
	}
	user, group, _ := strings.Cut(asked, ":")
	who := login{name: user}
	line, known := account(passwd, user)
	if known {
		who.name = line[0]
		if who.uid, err = number(line[2]); err == nil && len(line) > 3 {
			who.gid, err = number(line[3])
		}
		if err != nil || len(line) < 7 {
			return who, errs.New(errs.Invalid, "image runs as USER %q, whose line in its /etc/passwd is malformed: build the image with a whole account", asked)
		}
	} else {
		if who.uid, err = number(user); err != nil {
			return who, errs.New(errs.Invalid, "image runs as USER %q, and its /etc/passwd has no %q: build the image with that account, or with a number from 0 to %d", asked, user, maxAccount)
		}
		who.add, who.name = true, userName
		for _, taken := entry(passwd, who.name); taken; _, taken = entry(passwd, who.name) {
			who.name += strconv.Itoa(who.uid)
		}
	}
	if group == "" {
		return who, nil
	}
	gid, err := number(group)
	if line, ok := account(groups, group); ok {
		gid, err = number(line[2])
	}
	if err != nil {
		return who, errs.New(errs.Invalid, "image runs as USER %q, and its /etc/group has no %q: build the image with that group, or with a number from 0 to %d", asked, group, maxAccount)
	}
	who.group = known && gid != who.gid
	who.gid = gid
	return who, nil
}

// number reads the number of a user or group.
func number(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err == nil && (n < 0 || n > maxAccount) {
		err = strconv.ErrRange
	}
	return n, err
}

// enrol makes sure that the user commands run as exists, and the one that clients
// know, which is the same where the image names no other.
func (t tree) enrol(who login) error {
	switch {
	case who.add && who.name == userName:
		return t.addUser(&who)
	case who.add:
		if err := t.enroll(who.name, who.uid, who.gid, "/home/"+who.name); err != nil {
			return err
		}
		if err := t.home("/home/"+who.name, who.uid, who.gid); err != nil {
			return err
		}
	case who.group:
		if err := t.regroup(who); err != nil {
			return err
		}
	}
	return t.addUser(nil)
}

// regroup gives an account the primary group that the image runs with.
func (t tree) regroup(who login) error {
	passwd, err := t.read("/etc/passwd")
	if err != nil {
		return err
	}
	lines := strings.Split(passwd, "\n")
	for i, l := range lines {
		if f := strings.Split(l, ":"); f[0] == who.name && len(f) > 3 {
			f[3] = strconv.Itoa(who.gid)
			lines[i] = strings.Join(f, ":")
			break
		}
	}
	return t.write(file{"/etc/passwd", 0o644, strings.Join(lines, "\n")})
}

// addUser makes sure that the user of our templates exists, with a home, and may
// become root where sudo is installed. An image that has the user keeps it. numbers
// are those it must have; nil means the first that are free.
func (t tree) addUser(numbers *login) error {
	passwd, err := t.read("/etc/passwd")
	if err != nil {
		return err
	}
	uid, gid := userID, userID
	//nolint:nestif // two ways to the same two numbers
	if line, ok := entry(passwd, userName); ok {
		if uid, err = number(line[2]); err == nil && len(line) > 3 {
			gid, err = number(line[3])
		}
		if err != nil || len(line) < 7 {
			return fmt.Errorf("/etc/passwd of the image has a malformed entry for %s", userName)
		}
	} else {
		group, err := t.read("/etc/group")
		if err != nil {
			return err
		}
		for taken(passwd, uid) || taken(group, uid) {
			uid++
		}
		if gid = uid; numbers != nil {
			uid, gid = numbers.uid, numbers.gid
		}
		if err := t.enroll(userName, uid, gid, userHome); err != nil {
			return err
		}
	}
	if err := t.home(userHome, uid, gid); err != nil {
		return err
	}
	if _, err := t.root.Stat("etc/sudoers.d"); err != nil {
		return nil // no sudo here
	}
	return t.write(file{"/etc/sudoers.d/" + userName, 0o440, sudoRule})
}

// enroll adds an account, and its group where the number has none.
func (t tree) enroll(name string, uid, gid int, home string) error {
	passwd, err := t.read("/etc/passwd")
	if err != nil {
		return err
	}
	group, err := t.read("/etc/group")
	if err != nil {
		return err
	}
	if passwd == "" {
		passwd = "root:x:0:0:root:/root:/bin/sh\n"
	}
	if group == "" {
		group = "root:x:0:\n"
	}
	shell := "/bin/bash"
	if _, err := t.root.Stat("bin/bash"); err != nil {
		shell = "/bin/sh"
	}
	edits := []struct {
		name, text, line string
		mode             uint32
	}{
		{"/etc/passwd", passwd, fmt.Sprintf("%s:x:%d:%d::%s:%s", name, uid, gid, home, shell), 0o644},
		{"/etc/shadow", "", name + ":*:19000:0:99999:7:::", 0o640},
	}
	if _, named := entry(group, name); !named && !taken(group, gid) {
		edits = append(edits, []struct {
			name, text, line string
			mode             uint32
		}{
			{"/etc/group", group, fmt.Sprintf("%s:x:%d:", name, gid), 0o644},
			{"/etc/gshadow", "", name + ":!::", 0o640},
		}...)
	}
	for _, e := range edits {
		if e.text == "" {
			if e.text, err = t.read(e.name); err != nil {
				return err
			}
			if e.text == "" {
				continue // an image without shadow passwords does without
			}
		}
		if !strings.HasSuffix(e.text, "\n") {
			e.text += "\n"
		}
		if err := t.write(file{e.name, e.mode, e.text + e.line + "\n"}); err != nil {
			return err
		}
	}
	return nil
}

// home makes an account's home, with the files of /etc/skel when it is new.
func (t tree) home(dir string, uid, gid int) error {
	rel, err := t.resolve(dir)
	if err != nil {
		return step("make home", err)
	}
	if fi, err := t.root.Lstat(rel); err != nil {
		if err := t.mkdir(rel); err != nil {
			return step("make home", err)
		}
		if err := t.copySkel(rel, uid, gid); err != nil {
			return step("copy /etc/skel", err)
		}
	} else if !fi.IsDir() {
		return fmt.Errorf("make home: %s is no directory in the image", dir)
	}
	return step("own home", t.root.Lchown(rel, uid, gid))
}

// account returns the fields of the line of a name, or else of a number, in
// passwd(5) or group(5).
func account(text, which string) ([]string, bool) {
	if line, ok := entry(text, which); ok {
		return line, true
	}
	for line := range strings.Lines(text) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) > 2 && f[2] == which {
			return f, true
		}
	}
	return nil, false
}

// entry returns the fields of a name's line in passwd(5) or group(5).
func entry(text, name string) ([]string, bool) {
	for line := range strings.Lines(text) {
		if f := strings.Split(strings.TrimSpace(line), ":"); f[0] == name && len(f) > 2 {
			return f, true
		}
	}
	return nil, false
}

// taken reports whether a number is used in passwd(5) or group(5).
func taken(text string, id int) bool {
	for line := range strings.Lines(text) {
		if f := strings.Split(line, ":"); len(f) > 2 && f[2] == strconv.Itoa(id) {
			return true
		}
	}
	return false
}

// copySkel copies the plain files of /etc/skel.
func (t tree) copySkel(home string, uid, gid int) error {
	entries, err := fs.ReadDir(t.root.FS(), "etc/skel")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		text, err := t.read("/etc/skel/" + e.Name())
		if err != nil {
			return err
		}
		name := path.Join(home, e.Name())
		if err := t.write(file{name, 0o644, text}); err != nil {
			return err
		}
		if err := t.root.Lchown(name, uid, gid); err != nil {
			return err
		}
	}
	return nil
}
