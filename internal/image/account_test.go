package image

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cordonhq/cordon/internal/errs"
)

// TestTheUserOfAnImageHolds imports images that differ in USER and WORKDIR, and looks
// at who their commands run as, by the files of the image.
func TestTheUserOfAnImageHolds(t *testing.T) {
	privileged(t)
	const passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1500:1500::/srv:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\n"
	const group = "root:x:0:\napp:x:1500:\nnode:x:1000:\ndocker:x:999:\n"
	for _, c := range []struct {
		name, user, workdir string
		passwd              string
		want                string // name:uid:gid
		wantDir             string
	}{
		{"no user", "", "", passwd, "user:1001:1001", "/home/user"},
		{"a name", "app", "/srv", passwd, "app:1500:1500", "/srv"},
		{"a name without a directory", "app", "/", passwd, "app:1500:1500", "~"},
		{"the number of an account", "1000", "", passwd, "node:1000:1000", "~"},
		{"another group of an account, by name", "app:docker", "/srv", passwd, "app:1500:999", "/srv"},
		{"another group of an account, by number", "1000:0", "/srv", passwd, "node:1000:0", "/srv"},
		{"a number without an account", "1001:0", "/data", passwd, "user:1001:0", "/data"},
		{"a number without an account or a group", "1001", "", passwd, "user:1001:0", "/home/user"},
		{"the number of our own user, without accounts", "1000:1000", "", "", "user:1000:1000", "/home/user"},
		{"a number, where our name is taken", "1001:0", "", passwd + "user:x:1700:1700::/home/user:/bin/sh\n", "user1001:1001:0", "~"},
		{"root", "root", "", passwd, "root:0:0", "/home/user"},
		{"root by number", "0:0", "relative/dir", passwd, "root:0:0", "/relative/dir"},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := map[string]string{}
			if c.passwd != "" {
				files["passwd"], files["group"] = c.passwd, group
			}
			rootfs, img, err := adapted(t, v1.Config{User: c.user, WorkingDir: c.workdir}, files)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(rootfs, "etc/passwd"))
			if err != nil {
				t.Fatal(err)
			}
			line, _ := entry(string(text), img.User)
			if got := strings.Join([]string{line[0], line[2], line[3]}, ":"); got != c.want || img.Workdir != c.wantDir {
				t.Errorf("runs as %s in %s, want %s in %s", got, img.Workdir, c.want, c.wantDir)
			}
			if c.wantDir != "~" {
				if fi, err := os.Stat(filepath.Join(rootfs, c.wantDir)); err != nil || !fi.IsDir() {
					t.Errorf("%s is not there: %v", c.wantDir, err)
				}
			}
			if n := strings.Count(string(text), "\nuser:x:"); n != 1 {
				t.Errorf("%d accounts of clients' user:\n%s", n, text)
			}
		})
	}
}

// adapted makes a sandbox's root of files in /etc, as an import does after unpacking.
func adapted(t *testing.T, config v1.Config, files map[string]string) (rootfs string, man Manifest, err error) {
	t.Helper()
	rootfs = t.TempDir()
	if err := os.Mkdir(filepath.Join(rootfs, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(rootfs, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	man, err = (&Library{}).adapt(tree{root}, content{config: &v1.ConfigFile{Config: config}})
	return rootfs, man, err
}

func TestAnImageWhoseUserIsUnknownIsRefused(t *testing.T) {
	privileged(t)
	for user, want := range map[string]string{
		"nosuch":      `USER "nosuch", and its /etc/passwd has no "nosuch"`,
		"root:nosuch": `USER "root:nosuch", and its /etc/group has no "nosuch"`,
		"4294967295":  "a number from 0 to 2147483647",
		"-1":          "a number from 0 to 2147483647",
		"0:-7":        "a number from 0 to 2147483647",
	} {
		_, _, err := adapted(t, v1.Config{User: user}, map[string]string{"passwd": "root:x:0:0::/root:/bin/sh\n", "group": "root:x:0:\n"})
		if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("USER %s: %v, want a refusal that says %s", user, err, want)
		}
	}
}

// debianProfile is /etc/profile of Debian 12, alpineProfile of Alpine 3.20; both set
// PATH anew.
const debianProfile = `# /etc/profile: system-wide .profile file for the Bourne shell (sh(1))
# and Bourne compatible shells (bash(1), ksh(1), ash(1), ...).

if [ "$(id -u)" -eq 0 ]; then
  PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
else
  PATH="/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
fi
export PATH

if [ -d /etc/profile.d ]; then
  for i in $(run-parts --list --regex '^[a-zA-Z0-9_][a-zA-Z0-9._-]*\.sh$' /etc/profile.d); do
    if [ -r $i ]; then
      . $i
    fi
  done
  unset i
fi
`

const alpineProfile = `export PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export LANG=C.UTF-8
for script in /etc/profile.d/*.sh ; do
	if [ -r "$script" ] ; then
		. "$script"
	fi
done
unset script`

// TestTheEnvironmentOfAnImageHoldsInLoginShells runs real login shells on the
// /etc/profile of an adapted image.
func TestTheEnvironmentOfAnImageHoldsInLoginShells(t *testing.T) {
	for name, profile := range map[string]string{"Debian": debianProfile, "Alpine": alpineProfile, "without profile.d": "PATH=/bin; LANG=xx\nexport PATH LANG"} {
		for _, shell := range []string{"/bin/bash", "/bin/sh"} {
			if _, err := os.Stat(shell); err != nil {
				continue
			}
			t.Run(name+" "+shell, func(t *testing.T) {
				dir := t.TempDir()
				fragments := filepath.Join(dir, "etc/profile.d")
				if err := os.MkdirAll(fragments, 0o755); err != nil {
					t.Fatal(err)
				}
				write := func(path, text string) {
					t.Helper()
					if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				// The test's machine has another /etc: the profile's is found by path.
				write(filepath.Join(dir, "etc/profile"), strings.ReplaceAll(profile, "/etc/profile.d", fragments))
				write(filepath.Join(fragments, "more.sh"), "PATH=\"$PATH:/from/a/fragment\"\nGREETING=changed\n")
				root, err := os.OpenRoot(dir)
				if err != nil {
					t.Fatal(err)
				}
				defer root.Close()
				env := map[string]string{"PATH": "/opt/tool/bin:/usr/bin:/bin", "LANG": "C", "GREETING": "it's \"$HOME\" `x`", "UID": "7", "NOT-A-NAME": "x"}
				if err := (tree{root}).keepEnvironment(env); err != nil {
					t.Fatal(err)
				}
				cmd := exec.CommandContext(t.Context(), shell, "-euc", ". "+dir+"/etc/profile; env; set | grep ^_cordon || true")
				for k, v := range env {
					cmd.Env = append(cmd.Env, k+"="+v)
				}
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				wantPath := "PATH=/opt/tool/bin:/usr/bin:/bin"
				if strings.Contains(profile, "profile.d") {
					wantPath += ":/from/a/fragment"
				}
				for _, want := range []string{wantPath, "LANG=C", "GREETING=" + env["GREETING"]} {
					if !strings.Contains("\n"+string(out), "\n"+want+"\n") {
						t.Errorf("no %q in\n%s", want, out)
					}
				}
				if strings.Contains(string(out), "_cordon") {
					t.Errorf("variables of ours stay:\n%s", out)
				}
			})
		}
	}
}
