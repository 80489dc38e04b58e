// Package image makes the root file systems of sandboxes from Debian packages, the
// machine's own /usr or an OCI image, and keeps them: each is unpacked once in a
// content-addressed directory that servers on one machine share, locked while it is
// made, verified, and never written again.
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

var _ sandbox.Images = (*Library)(nil)

// What every template offers its commands unless an OCI image says otherwise.
const (
	userName = "user"
	userHome = "/home/" + userName
	userID   = 1000
	envPath  = userHome + "/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	locale   = "C.UTF-8"
)

// Kind says what a template is made of.
type Kind string

// The kinds of templates.
const (
	Packages Kind = "packages" // built from Debian packages
	Host     Kind = "host"     // the machine's own /usr, read-only
	OCI      Kind = "oci"      // imported from a registry, a layout or a tarball
)

// Config says where images live. Zero values mean what the fields say.
type Config struct {
	// Dir holds the unpacked images. Servers on one machine share it. Required.
	Dir string
	// StateDir holds what belongs to one server: the names of imported images and
	// the skeletons of the host template. Required.
	StateDir string
	// Progress gets a line per step of a build; nil discards them.
	Progress io.Writer
	// Log is for the operator; nil discards.
	Log *slog.Logger
	// MaxBytes and MaxFiles bound an imported image: 20 GiB and 2,000,000 files.
	MaxBytes int64
	MaxFiles int
}

// Library finds, builds and imports images.
type Library struct {
	cfg     Config
	cas     cas
	host    hostSource
	recipes map[string]func() (recipe, error) // by template name

	began time.Time
	life  context.Context // of builds, which outlive the request that began them
	stop  context.CancelFunc
	wg    sync.WaitGroup // of builds

	mu     sync.Mutex // guards builds and held
	builds map[string]*build
	held   map[string]io.Closer // shared locks of the images in use, by key
}

// build is one build under way.
type build struct {
	done chan struct{}
	man  Manifest
	err  error
}

// New returns a library. It makes the directories and builds nothing; Close ends
// it.
func New(cfg Config) (*Library, error) {
	for _, d := range []struct{ field, dir string }{{"Dir", cfg.Dir}, {"StateDir", cfg.StateDir}} {
		if !filepath.IsAbs(d.dir) {
			return nil, errs.New(errs.Invalid, "images: %s is %q: set an absolute path", d.field, d.dir)
		}
		if err := private(d.dir); err != nil {
			return nil, err
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 20 << 30
	}
	if cfg.MaxFiles <= 0 {
		cfg.MaxFiles = 2_000_000
	}
	life, stop := context.WithCancel(context.Background())
	return &Library{
		cfg:     cfg,
		cas:     cas{dir: cfg.Dir},
		host:    hostSource{root: "/", dir: filepath.Join(cfg.StateDir, "host")},
		recipes: builtin(),
		began:   time.Now().UTC(),
		life:    life,
		stop:    stop,
		builds:  map[string]*build{},
		held:    map[string]io.Closer{},
	}, nil
}

// private makes a directory that only this user enters, or closes one that is
// there. Images hold programs with set-user-ID bits, which must not run outside a
// sandbox, and what they show is for their sandboxes only.
func private(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create image directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("close image directory to other users: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at image directory: %w", err)
	}
	if owner := fi.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return errs.New(errs.Conflict, "images: %s belongs to user %d, who could change images in use: run chown -R %d there", dir, owner, os.Geteuid())
	}
	return nil
}

// Close cancels builds under way, waits for them and gives the images free for
// removal. Sandboxes that run from them are not touched.
func (l *Library) Close() error {
	l.stop()
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	for key, c := range l.held {
		err = errors.Join(err, c.Close())
		delete(l.held, key)
	}
	return err
}

// Resolve implements sandbox.Images.
func (l *Library) Resolve(ctx context.Context, template string) (sandbox.Image, error) {
	if template == HostTemplate {
		return l.resolveHost()
	}
	man, err := l.manifest(ctx, template)
	if err != nil {
		return sandbox.Image{}, err
	}
	if err := l.hold(man.Key); err != nil {
		return sandbox.Image{}, err
	}
	img := sandbox.Image{
		TemplateID: template,
		Name:       template,
		Digest:     man.Contents,
		Rootfs:     l.cas.rootfs(man.Key),
		Env:        man.Env,
		User:       man.User,
		Workdir:    man.Workdir,
	}
	img.Start, img.Ready = starts(template)
	return img, nil
}

// manifest returns the manifest of a template, building it if need be.
func (l *Library) manifest(ctx context.Context, template string) (Manifest, error) {
	if recipeOf, ok := l.recipes[template]; ok {
		r, err := recipeOf()
		if err != nil {
			return Manifest{}, err
		}
		return l.built(ctx, template, r)
	}
	key, err := l.named(template)
	if err != nil {
		return Manifest{}, err
	}
	man, err := l.cas.load(key)
	if errors.Is(err, os.ErrNotExist) {
		return Manifest{}, errs.Wrap(errs.NotFound, err, "template '%s' not found: its image is no longer in %s, import it again", template, l.cfg.Dir)
	}
	return man, err
}

// built returns the image of a recipe, waiting for its build if there is none.
// The build goes on when the caller gives up: the next one finds it done.
func (l *Library) built(ctx context.Context, name string, r recipe) (Manifest, error) {
	key := r.key()
	if man, err := l.cas.load(key); err == nil || !errors.Is(err, os.ErrNotExist) {
		return man, err
	}
	l.mu.Lock()
	b := l.builds[key]
	if b == nil {
		if err := l.life.Err(); err != nil {
			l.mu.Unlock()
			return Manifest{}, errs.New(errs.Unavailable, "template '%s' cannot be built: the server is stopping", name)
		}
		b = &build{done: make(chan struct{})}
		l.builds[key] = b
		l.wg.Go(func() { l.build(b, name, r) })
	}
	l.mu.Unlock()
	select {
	case <-b.done:
		return b.man, b.err
	case <-ctx.Done():
		return Manifest{}, fmt.Errorf("wait for image of %s: %w", name, ctx.Err())
	}
}

// build runs one build to its end.
func (l *Library) build(b *build, name string, r recipe) {
	defer close(b.done)
	ctx, cancel := context.WithTimeout(l.life, buildLimit)
	defer cancel()
	p := l.progress(name)
	start := time.Now()
	l.cfg.Log.Info("image build started", "template", name, "key", r.key())
	b.man, b.err = l.cas.ensure(ctx, r.key(), p, r.build)
	if b.err != nil {
		l.cfg.Log.Error("image build broke off", "template", name, "took", time.Since(start), "err", b.err)
	} else {
		l.cfg.Log.Info("image built", "template", name, "took", time.Since(start), "bytes", b.man.Bytes)
	}
	l.mu.Lock()
	delete(l.builds, r.key())
	l.mu.Unlock()
}

// Build makes a template's image unless it is there already.
func (l *Library) Build(ctx context.Context, template string) (Manifest, error) {
	if template == HostTemplate {
		img, err := l.resolveHost()
		return Manifest{Kind: Host, Contents: img.Digest, Env: img.Env, User: img.User, Workdir: img.Workdir}, err
	}
	return l.manifest(ctx, template)
}

// Verify reads every file of a template's image and compares the digest with
// the one computed when it was made.
func (l *Library) Verify(ctx context.Context, template string) error {
	if template == HostTemplate {
		return errs.New(errs.Invalid, "template 'host' has no contents of its own to verify: it shows this machine's /usr")
	}
	key, err := l.keyOf(template)
	if err != nil {
		return err
	}
	man, err := l.cas.load(key)
	if errors.Is(err, os.ErrNotExist) {
		return errs.New(errs.NotFound, "template '%s' is not built", template)
	}
	if err != nil {
		return err
	}
	sum, err := hashTree(ctx, l.cas.rootfs(key))
	if err != nil {
		return err
	}
	if sum.digest != man.Contents {
		return errs.New(errs.Conflict, "image of template '%s' in %s was changed after it was made (contents %s, made %s): remove it and build it again",
			template, filepath.Join(l.cfg.Dir, key), sum.digest, man.Contents)
	}
	return nil
}

// Remove deletes a template's image: a name of an imported one is forgotten, a
// built-in one is built anew when it is asked for. The caller makes sure that
// none of its own sandboxes runs from it; an image that another server on this
// machine uses is errs.Conflict.
func (l *Library) Remove(_ context.Context, template string) error {
	if template == HostTemplate {
		return errs.New(errs.Invalid, "template 'host' cannot be removed: it is this machine's /usr")
	}
	key, err := l.keyOf(template)
	if err != nil {
		return err
	}
	if _, ok := l.recipes[template]; !ok {
		if err := os.Remove(l.nameFile(template)); err != nil {
			return fmt.Errorf("forget template: %w", err)
		}
		if used, err := l.anyNames(key); err != nil || used {
			return err
		}
	}
	if err := l.release(key); err != nil {
		return err
	}
	return l.cas.remove(key)
}

// Template is a line of List.
type Template struct {
	Name    string
	Kind    Kind
	Built   bool
	Digest  string // of the contents, when built
	Bytes   int64
	Created time.Time // when it was made; of the host's, when the machine's packages changed; else the library's start
	Rootfs  string
}

// List returns the templates, built or not, by name.
func (l *Library) List(ctx context.Context) ([]Template, error) {
	names, err := l.names()
	if err != nil {
		return nil, err
	}
	for name := range l.recipes {
		names = append(names, name)
	}
	slices.Sort(names)
	out := []Template{}
	for _, name := range names {
		t := Template{Name: name, Kind: OCI, Created: l.began}
		if _, ok := l.recipes[name]; ok {
			t.Kind = Packages
		}
		key, err := l.keyOf(name)
		if err != nil {
			return nil, err
		}
		man, err := l.cas.load(key)
		switch {
		case err == nil:
			t.Built, t.Digest, t.Bytes, t.Created, t.Rootfs = true, man.Contents, man.Bytes, man.Created, l.cas.rootfs(key)
		case !errors.Is(err, os.ErrNotExist):
			return nil, err
		}
		out = append(out, t)
	}
	out = append(out, Template{Name: HostTemplate, Kind: Host, Built: true, Digest: "host:" + l.host.fingerprint(), Created: l.host.changed(l.began)})
	return out, ctx.Err()
}

// keyOf returns the key of a template's image, whether or not it is there.
func (l *Library) keyOf(template string) (string, error) {
	if recipeOf, ok := l.recipes[template]; ok {
		r, err := recipeOf()
		return r.key(), err
	}
	return l.named(template)
}

// hold takes a shared lock on an image, so that no other server removes it.
func (l *Library) hold(key string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[key] != nil {
		return nil
	}
	c, err := l.cas.share(key)
	if err != nil {
		return err
	}
	if _, err := l.cas.load(key); err != nil { // removed just before
		return errors.Join(err, c.Close())
	}
	l.held[key] = c
	return nil
}

func (l *Library) release(key string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.held[key]
	delete(l.held, key)
	if c == nil {
		return nil
	}
	return c.Close()
}

// Names of imported images: one small file each, holding the image's key.

var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func (l *Library) nameFile(name string) string {
	return filepath.Join(l.cfg.StateDir, "names", name)
}

// named returns the key behind the name of an imported image.
func (l *Library) named(name string) (string, error) {
	unknown := errs.New(errs.NotFound, "template '%s' not found", name)
	if !nameForm.MatchString(name) {
		return "", unknown
	}
	b, err := os.ReadFile(l.nameFile(name))
	if errors.Is(err, os.ErrNotExist) {
		return "", unknown
	}
	if err != nil {
		return "", fmt.Errorf("read name of template: %w", err)
	}
	key := strings.TrimSpace(string(b))
	if !keyForm.MatchString(key) {
		return "", fmt.Errorf("%s is damaged: import the template again", l.nameFile(name))
	}
	return key, nil
}

func (l *Library) names() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(l.cfg.StateDir, "names"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list names of templates: %w", err)
	}
	var out []string
	for _, e := range entries {
		if nameForm.MatchString(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// anyNames reports whether a name still leads to key.
func (l *Library) anyNames(key string) (bool, error) {
	names, err := l.names()
	if err != nil {
		return false, err
	}
	for _, n := range names {
		if k, err := l.named(n); err == nil && k == key {
			return true, nil
		}
	}
	return false, nil
}

// checkName refuses names an image cannot have.
func (l *Library) checkName(name string) error {
	if !nameForm.MatchString(name) {
		return errs.New(errs.Invalid, "template name %q: use up to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit", name)
	}
	if _, ok := l.recipes[name]; ok || name == HostTemplate {
		return errs.New(errs.Invalid, "template name %q belongs to a built-in template: choose another", name)
	}
	return nil
}
