package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

// debRelease is a release of Debian or Ubuntu.
type debRelease struct {
	distro, suite string
	components    []string
	keyring       string // of the archive, when the machine's sources name none
	native        bool   // the machine itself runs it, so its sources apply
}

// stable is what is built on machines that run neither Debian nor Ubuntu.
func stable() debRelease {
	return debRelease{distro: "debian", suite: "bookworm", components: []string{"main"}, keyring: "/usr/share/keyrings/debian-archive-keyring.gpg"}
}

// release reads which release the machine runs (os-release(5)).
func release(root string) (debRelease, error) {
	b, err := os.ReadFile(filepath.Join(root, "etc/os-release"))
	if errors.Is(err, fs.ErrNotExist) {
		return stable(), nil
	}
	if err != nil {
		return debRelease{}, fmt.Errorf("read os-release: %w", err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			fields[k] = strings.Trim(v, `"'`)
		}
	}
	rel := stable()
	switch suite := fields["VERSION_CODENAME"]; {
	case fields["ID"] == "debian" && suite != "":
		rel.suite, rel.native = suite, true
	case fields["ID"] == "ubuntu" && suite != "":
		rel = debRelease{distro: "ubuntu", suite: suite, components: []string{"main", "universe"},
			keyring: "/usr/share/keyrings/ubuntu-archive-keyring.gpg", native: true}
	}
	return rel, nil
}

// bootstrap installs the recipe's packages into a new directory.
func (r recipe) bootstrap(ctx context.Context, j job) error {
	tool, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return errs.Wrap(errs.Unavailable, err, "images are built by mmdebstrap, which is not installed: run 'apt-get install mmdebstrap' as root, or use the template 'host'")
	}
	if os.Geteuid() != 0 {
		return errs.New(errs.Unavailable, "images are built as root: run cordon as root")
	}
	rel, err := release("/")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Dir(j.rootfs), "build-")
	if err != nil {
		return fmt.Errorf("create build directory: %w", err)
	}
	defer os.RemoveAll(dir)
	sources, err := machineSources("/", rel)
	if err != nil {
		return err
	}
	list := filepath.Join(dir, "cordon.sources")
	if err := os.WriteFile(list, []byte(deb822(sources)), 0o600); err != nil {
		return fmt.Errorf("write package sources: %w", err)
	}
	args, err := r.bootstrapArgs(ctx, dir)
	if err != nil {
		return err
	}
	if err := runTool(ctx, j, tool, append(args, r.Suite, j.rootfs, list)); err != nil {
		return err
	}
	return cleanSources(j.rootfs, sources)
}

func (r recipe) bootstrapArgs(ctx context.Context, dir string) ([]string, error) {
	args := []string{
		"--mode=root", "--variant=minbase", "--format=directory", "--architectures=" + r.Arch,
		"--include=" + strings.Join(r.Packages, ","),
		`--aptopt=Apt::Install-Recommends "false"`,
		"--dpkgopt=force-unsafe-io", // the whole tree is flushed once, at the end
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
	}
	for _, pattern := range r.Exclude {
		args = append(args, "--dpkgopt=path-exclude="+pattern)
	}
	acquire, err := acquireOptions(ctx)
	if err != nil || acquire == "" {
		return args, err
	}
	conf := filepath.Join(dir, "acquire.conf")
	if err := os.WriteFile(conf, []byte(acquire), 0o600); err != nil {
		return nil, fmt.Errorf("write apt options: %w", err)
	}
	return append(args, "--aptopt="+conf), nil
}

// acquireOptions returns how the machine's own apt reaches its mirrors: proxies,
// certificates, credentials (apt.conf(5), apt-transport-http(1), apt_auth.conf(5)).
func acquireOptions(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return "", fmt.Errorf("read the machine's apt configuration (apt-config dump): %w", err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "Acquire::") && !strings.HasSuffix(strings.TrimSpace(line), ` "";`) {
			b.WriteString(line)
		}
	}
	for _, o := range []struct{ option, path string }{
		{"Dir::Etc::netrc", "/etc/apt/auth.conf"},
		{"Dir::Etc::netrcparts", "/etc/apt/auth.conf.d"},
	} {
		if _, err := os.Stat(o.path); err == nil {
			fmt.Fprintf(&b, "%s \"%s\";\n", o.option, o.path)
		}
	}
	return b.String(), nil
}

// reachable shows the folder of a build at /mnt, in the build's own namespace of
// mounts only: apt downloads as a user of its own, who cannot pass the folder of
// images. Without /mnt apt downloads as root.
func reachable(rootfs, tool string, args []string) (string, []string) {
	const at = "/mnt"
	if fi, err := os.Stat(at); err != nil || !fi.IsDir() || rootfs == "" {
		return tool, args
	}
	dir := filepath.Dir(rootfs)
	out := []string{"-c", `mount --bind "$1" "$2" && shift 2 && exec "$@"`, "sh", dir, at, tool}
	for _, a := range args {
		out = append(out, strings.ReplaceAll(a, dir+"/", at+"/"))
	}
	return "/bin/sh", out
}

// runTool runs mmdebstrap, reporting its steps. Its mounts are made in a
// namespace of their own and go with it.
func runTool(ctx context.Context, j job, tool string, args []string) error {
	name, args := reachable(j.rootfs, tool, args)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Unshareflags: syscall.CLONE_NEWNS}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second // to clean up after SIGTERM
	if j.lock != nil {
		cmd.ExtraFiles = []*os.File{j.lock}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start mmdebstrap: %w", err)
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		w.Close()
		return fmt.Errorf("start mmdebstrap: %w", err)
	}
	w.Close()
	tail := make(chan []string, 1)
	go func() { tail <- follow(r, j.progress) }()
	err = cmd.Wait()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // whoever it left behind, so that the pipe ends
	lines := <-tail
	if ctx.Err() != nil {
		return fmt.Errorf("install packages: %w", ctx.Err())
	}
	if err != nil {
		return errs.Wrap(errs.Unavailable, fmt.Errorf("mmdebstrap: %w", err), "packages could not be installed: %s", strings.Join(lines, " | "))
	}
	return nil
}

// toolSteps are mmdebstrap's announcements in our words.
var toolSteps = map[string]string{
	"I: running apt-get update...":                          "reading package lists",
	"I: downloading packages with apt...":                   "downloading the essential packages",
	"I: extracting archives...":                             "extracting the essential packages",
	"I: installing essential packages...":                   "installing the essential packages",
	"I: installing remaining packages inside the chroot...": "downloading and installing the other packages",
	"I: cleaning package lists and apt cache...":            "cleaning up",
}

// follow reads the tool's output to its end, and returns the last lines that are
// errors, or else the last lines.
func follow(r io.Reader, p *progress) []string {
	var last, bad []string
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), 1<<20)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if s, ok := toolSteps[line]; ok {
			p.step("%s", s)
		}
		if strings.HasPrefix(line, "E: ") || strings.HasPrefix(line, "Err:") {
			bad = append(bad[max(0, len(bad)-4):], line)
		}
		last = append(last[max(0, len(last)-4):], line)
	}
	_, _ = io.Copy(io.Discard, r) // a line over the limit must not block the tool
	if len(bad) > 0 {
		return bad
	}
	return last
}

// source is one stanza of sources.list(5) for the release and nothing else.
type source struct {
	uris, suites, components []string
	signedBy                 string // a file, fingerprints or an armored key; empty for apt's own trust
	trusted                  bool
}

// machineSources returns the machine's package sources for its own release;
// third parties' are left out. Other machines get the distribution's.
func machineSources(root string, rel debRelease) ([]source, error) {
	var all []source
	if rel.native {
		files, err := sourceFiles(root)
		if err != nil {
			return nil, err
		}
		for name, text := range files {
			if strings.HasSuffix(name, ".sources") {
				all = append(all, parseDeb822(text)...)
			} else {
				all = append(all, parseOneLine(text)...)
			}
		}
	}
	var out []source
	for _, s := range all {
		s.suites = slices.DeleteFunc(s.suites, func(suite string) bool { return !rel.owns(suite) })
		s.components = slices.DeleteFunc(s.components, func(c string) bool { return !slices.Contains(rel.components, c) })
		if len(s.suites) > 0 && len(s.components) > 0 && len(s.uris) > 0 {
			out = append(out, s)
		}
	}
	if len(out) > 0 {
		slices.SortFunc(out, func(a, b source) int {
			return strings.Compare(strings.Join(a.suites, " "), strings.Join(b.suites, " "))
		})
		return out, nil
	}
	if rel.distro != "debian" {
		return nil, errs.New(errs.Unavailable, "no package source for %s %s in /etc/apt: add the distribution's own", rel.distro, rel.suite)
	}
	return debianSources(root, rel), nil
}

// debianSources are Debian's own mirrors (https://www.debian.org/mirror/list).
func debianSources(root string, rel debRelease) []source {
	signed := ""
	if _, err := os.Stat(filepath.Join(root, rel.keyring)); err == nil {
		signed = rel.keyring
	}
	return []source{
		{uris: []string{"http://deb.debian.org/debian"}, suites: []string{rel.suite, rel.suite + "-updates"}, components: rel.components, signedBy: signed},
		{uris: []string{"http://deb.debian.org/debian-security"}, suites: []string{rel.suite + "-security"}, components: rel.components, signedBy: signed},
	}
}

// owns reports whether a suite is the release itself or one of its updates.
func (r debRelease) owns(suite string) bool {
	rest, ok := strings.CutPrefix(suite, r.suite)
	return ok && slices.Contains([]string{"", "-updates", "-security", "/updates"}, rest)
}

func sourceFiles(root string) (map[string]string, error) {
	names := []string{"etc/apt/sources.list"}
	for _, pattern := range []string{"*.list", "*.sources"} {
		found, err := fs.Glob(os.DirFS(root), "etc/apt/sources.list.d/"+pattern)
		if err != nil {
			return nil, fmt.Errorf("look for package sources: %w", err)
		}
		names = append(names, found...)
	}
	out := map[string]string{}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read package sources: %w", err)
		}
		out[name] = string(b)
	}
	return out, nil
}

// parseOneLine reads the one-line style: deb [options] uri suite components.
func parseOneLine(text string) []source {
	var out []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		var s source
		rest = strings.TrimSpace(rest)
		if opts, ok := strings.CutPrefix(rest, "["); ok {
			if opts, rest, ok = strings.Cut(opts, "]"); !ok {
				continue
			}
			for o := range strings.FieldsSeq(opts) {
				switch k, v, _ := strings.Cut(o, "="); strings.ToLower(k) {
				case "signed-by":
					s.signedBy = v
				case "trusted":
					s.trusted = v == "yes"
				}
			}
		}
		if f := strings.Fields(rest); len(f) > 2 {
			s.uris, s.suites, s.components = f[:1], f[1:2], f[2:]
			out = append(out, s)
		}
	}
	return out
}

// parseDeb822 reads the stanza style.
func parseDeb822(text string) []source {
	var out []source
	fields, last := map[string]string{}, ""
	flush := func() {
		if slices.Contains(strings.Fields(fields["types"]), "deb") && strings.TrimSpace(fields["enabled"]) != "no" {
			out = append(out, source{
				uris:       strings.Fields(fields["uris"]),
				suites:     strings.Fields(fields["suites"]),
				components: strings.Fields(fields["components"]),
				signedBy:   strings.TrimSpace(fields["signed-by"]),
				trusted:    strings.TrimSpace(fields["trusted"]) == "yes",
			})
		}
		fields, last = map[string]string{}, ""
	}
	for line := range strings.Lines(text) {
		switch line = strings.TrimRight(line, "\r\n"); {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			fields[last] += "\n" + line
		default:
			k, v, _ := strings.Cut(line, ":")
			last = strings.ToLower(strings.TrimSpace(k))
			fields[last] = strings.TrimSpace(v)
		}
	}
	flush()
	return out
}

// deb822 writes sources in the stanza style.
func deb822(sources []source) string {
	var b strings.Builder
	for _, s := range sources {
		fmt.Fprintf(&b, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\n", strings.Join(s.uris, " "), strings.Join(s.suites, " "), strings.Join(s.components, " "))
		if s.signedBy != "" {
			fmt.Fprintf(&b, "Signed-By: %s\n", s.signedBy)
		}
		if s.trusted {
			b.WriteString("Trusted: yes\n")
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// cleanSources leaves the image with the same sources, without the machine's
// credentials and without keys the image does not have.
func cleanSources(rootfs string, sources []source) error {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return fmt.Errorf("open rootfs: %w", err)
	}
	defer root.Close()
	t := tree{root}
	clean := slices.Clone(sources)
	for i, s := range clean {
		clean[i].uris = slices.Clone(s.uris)
		for j, raw := range s.uris {
			u, err := url.Parse(raw)
			if err != nil {
				return fmt.Errorf("package source %q: %w", raw, err)
			}
			u.User = nil
			clean[i].uris[j] = u.String()
		}
		if key, ok := strings.CutPrefix(s.signedBy, "/"); ok {
			if _, err := root.Stat(key); err != nil {
				clean[i].signedBy = ""
			}
		}
	}
	if err := t.empty("/etc/apt/sources.list.d"); err != nil {
		return step("remove package sources", err)
	}
	if err := t.root.RemoveAll("etc/apt/sources.list"); err != nil {
		return step("remove package sources", err)
	}
	return t.write(file{"/etc/apt/sources.list.d/debian.sources", 0o644, deb822(clean)})
}
