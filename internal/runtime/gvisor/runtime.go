// Package gvisor runs sandboxes as gVisor's processes: it configures and creates them
// without giving them anything of the server, finds them again in a later server, and
// cleans up what they leave on the host.
//
// A sandbox is two processes that belong to nobody: the sentry, an
// application kernel in user space that runs the sandbox's processes, and the
// gofer, which opens the image's files for it. Both are this same binary; see
// Dispatch. They live in a session and a cgroup of their own, and all their
// state is on disk, so they outlive the server and any later Runtime adopts
// them.
package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

var _ sandbox.Runtime = (*Runtime)(nil)

// Config places a Runtime on the host.
type Config struct {
	// StateDir holds the bundles and gVisor's state. It must not outlive a
	// reboot: "/run/cordon/gvisor".
	StateDir string
	// DataDir holds the writable layers, so it belongs on a disk. The files in
	// it are unlinked as soon as they are open and never outlive their sandbox.
	// A checkpoint is restored only with the DataDir it was made with.
	DataDir string
	// CgroupParent is the cgroup all sandboxes' cgroups are made in, from the
	// root of the hierarchy: "/cordon/main". No two Runtimes may share it
	// unless they share StateDir.
	CgroupParent string
	// All is what all sandboxes together may hold of the host; fields that are 0 are
	// no limit.
	All sandbox.Use
	// LogDir, if set, holds a file for each sandbox that the sentry writes to
	// when it panics; what it says is logged when the sandbox is destroyed. With
	// Debug, it keeps the logs of all sentries and gofers: they contain what
	// sandboxes do, slow them down and are never removed.
	LogDir string
	Debug  bool
	Log    *slog.Logger
}

// Runtime runs sandboxes on gVisor. Its methods may be called concurrently,
// also for one sandbox.
type Runtime struct {
	cfg     Config
	name    string
	groups  cgroups
	locks   keyed // of the steps of each sandbox, which may take seconds
	reads   keyed // of each sandbox's state on disk, with the bundle; never held for long
	workers workers

	endRanks func() // waits for the goroutine that ranks the owners' groups
}

// New returns a Runtime. The binary's main must have called Dispatch first.
func New(cfg Config) (*Runtime, error) {
	for _, d := range []struct{ name, path string }{{"StateDir", cfg.StateDir}, {"DataDir", cfg.DataDir}, {"CgroupParent", cfg.CgroupParent}} {
		if !filepath.IsAbs(d.path) {
			return nil, fmt.Errorf("gvisor: %s %q: want an absolute path", d.name, d.path)
		}
	}
	if strings.ContainsAny(cfg.DataDir, ",:") {
		return nil, fmt.Errorf("gvisor: DataDir %q: gVisor cannot take a path with a comma or a colon", cfg.DataDir)
	}
	if err := checkLinked("/proc/self/exe"); err != nil {
		return nil, fmt.Errorf("gvisor: %w", err)
	}
	runscVersion = version()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	silence(io.Discard)
	for _, dir := range []string{cfg.StateDir, cfg.DataDir, filepath.Join(cfg.StateDir, "sandboxes"), cfg.LogDir} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make the runtime's folders: %w", err)
		}
	}
	if err := sweep(cfg.DataDir); err != nil {
		return nil, fmt.Errorf("sweep the data folder: %w", err)
	}
	groups, err := findCgroups(cfg.CgroupParent)
	if err != nil {
		return nil, err
	}
	groups.sweepGroups()
	if err := groups.denySwap(); err != nil {
		return nil, err
	}
	if err := tableOnce(); err != nil {
		return nil, err
	}
	if err := groups.limitAll(cfg.All); err != nil {
		return nil, err
	}
	r := &Runtime{cfg: cfg, name: "gvisor/" + runscVersion, groups: groups}
	ctx, cancel := context.WithCancel(context.Background())
	var ranks sync.WaitGroup
	ranks.Go(func() { (&ranker{groups: groups}).run(ctx) })
	r.endRanks = func() { cancel(); ranks.Wait() }
	return r, nil
}

// Name implements sandbox.Runtime.
func (r *Runtime) Name() string { return r.name }

func runscRoot(stateDir string) string { return filepath.Join(stateDir, "runsc") }
func (r *Runtime) root() string        { return runscRoot(r.cfg.StateDir) }
func (r *Runtime) bundle(id sandbox.ID) string {
	return filepath.Join(r.cfg.StateDir, "sandboxes", string(id))
}

// Files in a bundle.
const (
	specFile    = "config.json" // OCI's name
	createdFile = "created.json"
)

// created is how a sandbox was created, maybe by another version with another Config.
type created struct {
	Runtime string   // its Name
	Flags   []string // runsc's
}

// flags is runsc's configuration of one sandbox.
func (r *Runtime) flags(s sandbox.RuntimeSpec) []string {
	network := "sandbox"
	if s.NetNS == "" {
		network = "none"
	}
	flags := []string{
		"--root=" + r.root(),
		"--platform=systrap", // probing /dev/kvm hangs on some nested hosts
		"--network=" + network,
		fmt.Sprintf("--overlay2=all:dir=%s,size=%dm", r.cfg.DataDir, quotas(s).bind),
		"--allow-suid",                   // sudo
		"--file-access=exclusive",        // nobody changes an image under a sandbox
		"--file-access-mounts=exclusive", // nor what is bound into it
		"--host-settings=ignore",         // the host's settings are the administrator's
		"--sidecar-usage-policy=LEGACY_DEPRECATED_SLOW_EMBEDDED_FALLBACK", // one binary
	}
	if r.cfg.LogDir != "" {
		flags = append(flags, "--panic-log="+r.logDir(s.ID)+"/")
	}
	if r.cfg.LogDir != "" && r.cfg.Debug {
		flags = append(flags, "--debug", "--debug-log="+r.logDir(s.ID)+"/")
	}
	return flags
}

func (r *Runtime) logDir(id sandbox.ID) string { return filepath.Join(r.cfg.LogDir, string(id)) }

// Create implements sandbox.Runtime.
func (r *Runtime) Create(ctx context.Context, s sandbox.RuntimeSpec) (err error) {
	if err := check(s); err != nil {
		return err
	}
	defer r.locks.lock(s.ID)()
	bundle := r.bundle(s.ID)
	if err := os.Mkdir(bundle, 0o700); errors.Is(err, os.ErrExist) {
		return errs.New(errs.Conflict, "sandbox %s exists already", s.ID)
	} else if err != nil {
		return fmt.Errorf("make the bundle: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.erase(context.WithoutCancel(ctx), s.ID))
		}
	}()
	// Whatever has the name of a sandbox that does not exist is a leftover, and
	// limits are not set on a cgroup that is there already.
	if err := r.groups.remove(ctx, s.ID); err != nil {
		return fmt.Errorf("clear a former cgroup: %w", err)
	}
	if err := r.groups.enter(s.ID, s.Owner); err != nil {
		return err
	}
	flags := r.flags(s)
	if err := r.writeBundle(s, flags); err != nil {
		return fmt.Errorf("write the bundle: %w", err)
	}
	w, err := r.workers.take(s.ID)
	if err != nil {
		return err
	}
	if err := w.do(ctx, request{Step: stepCreate, Flags: flags, Bundle: r.bundle(s.ID), ID: string(s.ID)}); err != nil {
		w.end()
		return fmt.Errorf("create the sandbox's processes: %w", err)
	}
	if err := r.groups.limitMemory(s.ID, hardMemory(s.Resources)); err != nil {
		w.end()
		return fmt.Errorf("limit the sandbox's memory: %w", err)
	}
	r.workers.keep(s.ID, w)
	return nil
}

func (r *Runtime) writeBundle(s sandbox.RuntimeSpec, flags []string) error {
	if r.cfg.LogDir != "" {
		if err := os.MkdirAll(r.logDir(s.ID), 0o700); err != nil {
			return err
		}
	}
	if err := writeJSON(filepath.Join(r.bundle(s.ID), createdFile), created{Runtime: r.name, Flags: flags}); err != nil {
		return err
	}
	return writeJSON(filepath.Join(r.bundle(s.ID), specFile), r.ociSpec(s))
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// Start implements sandbox.Runtime.
func (r *Runtime) Start(ctx context.Context, id sandbox.ID) error {
	return r.run(ctx, request{Step: stepStart, ID: string(id)})
}

// run has a worker start or restore a sandbox that is created. What a context
// that ends leaves half done can only be destroyed.
func (r *Runtime) run(ctx context.Context, req request) error {
	id := sandbox.ID(req.ID)
	return r.within(ctx, id, req.Step, func(c *container.Container, _ *config.Config) error {
		if c.Status != container.Created {
			return r.conflict(c, "started")
		}
		how, err := r.created(id)
		if err != nil {
			return err
		}
		if how.Runtime != r.name {
			return errs.New(errs.Conflict, "sandbox %s was created by %s and cannot be started by %s: create it anew", id, how.Runtime, r.name)
		}
		w, err := r.workers.take(id)
		if err != nil {
			return err
		}
		defer r.workers.refill() // now, so as not to take the CPU from the start
		defer w.end()
		req.Flags = how.Flags
		return w.do(ctx, req)
	})
}

// pauseLimit is how long a sandbox's processes may take to stop.
const pauseLimit = time.Minute

// Pause implements sandbox.Runtime. A worker does it: stopping the processes and
// noting that they are stopped are two steps, and a worker takes both also when
// the server is killed between them. A sentry that is resumed more often than it
// was paused ends.
func (r *Runtime) Pause(ctx context.Context, id sandbox.ID) error {
	return r.within(ctx, id, "pause", func(c *container.Container, _ *config.Config) error {
		if c.Status != container.Running {
			return r.conflict(c, "paused")
		}
		how, err := r.created(id)
		if err != nil {
			return err
		}
		w, err := r.workers.take(id)
		if err != nil {
			return err
		}
		defer w.end()
		// The caller going away does not leave it half done; a sentry that hangs
		// does not hold up the sandbox's end for ever.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pauseLimit)
		defer cancel()
		return w.do(ctx, request{Step: stepFreeze, Flags: how.Flags, ID: string(id)})
	})
}

// Resume implements sandbox.Runtime.
func (r *Runtime) Resume(ctx context.Context, id sandbox.ID) error {
	return r.within(ctx, id, "resume", func(c *container.Container, _ *config.Config) error {
		if c.Status != container.Paused {
			return r.conflict(c, "resumed")
		}
		return c.Resume()
	})
}

// List implements sandbox.Runtime.
func (r *Runtime) List(context.Context) ([]sandbox.ID, error) {
	entries, err := os.ReadDir(filepath.Join(r.cfg.StateDir, "sandboxes"))
	if err != nil {
		return nil, fmt.Errorf("list the bundles: %w", err)
	}
	var ids []sandbox.ID
	for _, e := range entries {
		if id := sandbox.ID(e.Name()); id.Valid() {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Destroy implements sandbox.Runtime. It does not wait for another call on the
// sandbox to end: it kills the processes first, which ends that call.
func (r *Runtime) Destroy(ctx context.Context, id sandbox.ID) error {
	if !id.Valid() {
		return errs.New(errs.Invalid, "sandbox ID %q: want \"i\" and 20 characters of 0-9 and a-z", id)
	}
	k := killed{}
	defer k.close()
	r.groups.kill(id, k)
	r.workers.forget(id)
	defer r.locks.lock(id)()
	if err := r.erase(ctx, id); err != nil {
		return err
	}
	k.reap() // those that left their cgroup before erase looked into it
	return nil
}

// erase kills whatever runs in the sandbox's cgroup and removes all traces. The
// bundle goes last: while it is there, the sandbox is listed and can be
// destroyed again.
func (r *Runtime) erase(ctx context.Context, id sandbox.ID) error {
	r.workers.forget(id)
	if err := r.groups.remove(ctx, id); err != nil {
		return fmt.Errorf("end the sandbox's processes: %w", err)
	}
	r.reapExited(id)
	// Reading the state makes its lock file: nobody may begin to between the
	// removal of that file and of the bundle, which says that there is a state.
	defer r.reads.lock(id)()
	name := filepath.Join(r.root(), string(id)+"_sandbox:"+string(id))
	var failed []error
	for _, path := range []string{
		name + ".state", name + ".lock",
		filepath.Join(r.root(), "runsc-"+string(id)+".sock"),
	} {
		failed = append(failed, os.RemoveAll(path))
	}
	failed = append(failed, r.reportPanic(id))
	if err := errors.Join(failed...); err != nil {
		return fmt.Errorf("remove the sandbox's files: %w", err)
	}
	if err := os.RemoveAll(r.bundle(id)); err != nil {
		return fmt.Errorf("remove the bundle: %w", err)
	}
	return nil
}

const (
	// panicText is how much of a sentry's last words is logged.
	panicText = 8 << 10
	// maxSaid is how much of what it said is searched for them.
	maxSaid = 1 << 20
)

// sentryLine begins what gVisor logs while it works, such as that a program tried
// what it may not: level, month and day, time.
var sentryLine = regexp.MustCompile(`^[DIWEF]\d{4} \d\d:\d\d:\d\d\.`)

// lastWords are what a sentry said that is no line of its log: what Go prints when
// a program panics.
func lastWords(said []byte) string {
	var out strings.Builder
	for line := range bytes.Lines(said) {
		if !sentryLine.Match(line) && len(bytes.TrimSpace(line)) > 0 && out.Len() < panicText {
			out.Write(line)
		}
	}
	return out.String()[:min(out.Len(), panicText)]
}

// reportPanic logs what the sentry said before it died, if it did, and removes
// its file. A sandbox can make its sentry panic as often as it likes, so nothing
// of it may pile up.
func (r *Runtime) reportPanic(id sandbox.ID) error {
	if r.cfg.LogDir == "" || r.cfg.Debug {
		return nil
	}
	files, err := filepath.Glob(filepath.Join(r.logDir(id), "*"))
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(io.LimitReader(f, maxSaid))
		f.Close()
		if err != nil {
			return err
		}
		if last := lastWords(text); last != "" {
			r.cfg.Log.Error("sentry panicked", "sandbox", string(id), "panic", last)
		} else if len(text) > 0 {
			r.cfg.Log.Debug("sentry said", "sandbox", string(id), "text", string(text[:min(len(text), panicText)]))
		}
	}
	return os.RemoveAll(r.logDir(id))
}

// sweep removes files of writable layers that a worker was killed
// before it could unlink. Whoever uses one holds it open.
func sweep(dataDir string) error {
	files, err := filepath.Glob(filepath.Join(dataDir, layerPrefix+"*"))
	if err != nil {
		return err
	}
	var failed []error
	for _, path := range files {
		failed = append(failed, os.Remove(path))
	}
	return errors.Join(failed...)
}

// within takes one step on a sandbox that exists, one at a time for each sandbox.
func (r *Runtime) within(ctx context.Context, id sandbox.ID, step string, do func(*container.Container, *config.Config) error) error {
	defer r.locks.lock(id)()
	if err := ctx.Err(); err != nil {
		return err
	}
	c, conf, err := r.load(id)
	if err != nil {
		return err
	}
	if err := do(c, conf); err != nil {
		if errs.KindOf(err) != errs.Internal {
			return err
		}
		return fmt.Errorf("%s sandbox %s: %w", step, id, err)
	}
	return nil
}

// load reads a sandbox's state as some server left it.
func (r *Runtime) load(id sandbox.ID) (*container.Container, *config.Config, error) {
	if !id.Valid() {
		return nil, nil, errs.New(errs.Invalid, "sandbox ID %q: want \"i\" and 20 characters of 0-9 and a-z", id)
	}
	defer r.reads.lock(id)()
	how, err := r.created(id)
	if err != nil {
		return nil, nil, err
	}
	conf, err := parseFlags(how.Flags)
	if err != nil {
		return nil, nil, err
	}
	c, err := loadContainer(r.root(), string(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, errs.New(errs.NotFound, "sandbox %s does not exist", id)
	} else if err != nil {
		return nil, nil, fmt.Errorf("load the sandbox's state: %w", err)
	}
	return c, conf, nil
}

// created returns how the sandbox was created.
func (r *Runtime) created(id sandbox.ID) (created, error) {
	b, err := os.ReadFile(filepath.Join(r.bundle(id), createdFile))
	if errors.Is(err, os.ErrNotExist) {
		return created{}, errs.New(errs.NotFound, "sandbox %s does not exist", id)
	} else if err != nil {
		return created{}, fmt.Errorf("read how the sandbox was created: %w", err)
	}
	var c created
	if err := json.Unmarshal(b, &c); err != nil {
		return created{}, fmt.Errorf("read how the sandbox was created: %w", err)
	}
	return c, nil
}

// loadContainer reads gVisor's state of a sandbox, without asking whether it runs.
func loadContainer(root, id string) (*container.Container, error) {
	full := container.FullID{SandboxID: id, ContainerID: id}
	return container.Load(root, full, container.LoadOpts{Exact: true, SkipCheck: true})
}

func (r *Runtime) conflict(c *container.Container, done string) error {
	return errs.New(errs.Conflict, "sandbox %s is %s: it cannot be %s", c.ID, c.Status, done)
}

// keyed is a lock for each sandbox.
type keyed struct {
	mu   sync.Mutex // guards held
	held map[sandbox.ID]*holder
}

type holder struct {
	mu   sync.Mutex
	refs int // guarded by keyed.mu
}

// lock waits for the sandbox's lock and returns what releases it.
func (k *keyed) lock(id sandbox.ID) (unlock func()) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[sandbox.ID]*holder{}
	}
	h := k.held[id]
	if h == nil {
		h = &holder{}
		k.held[id] = h
	}
	h.refs++
	k.mu.Unlock()
	h.mu.Lock()
	return func() {
		h.mu.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if h.refs--; h.refs == 0 {
			delete(k.held, id)
		}
	}
}

// Close ends what the Runtime itself holds, removes the cgroups that no sandbox is in,
// and unmounts what gVisor leaves behind for all sandboxes together: the empty network
// namespace of the gofers. Running sandboxes go on, and keep theirs; a later Create
// makes it anew. So a server that will start again may call it or not.
func (r *Runtime) Close() error {
	r.endRanks()
	r.workers.close()
	r.groups.removeEmpty()
	path := filepath.Join(r.root(), specutils.NullNetNSFilename)
	for {
		switch err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); {
		case err == nil: // concurrent first starts stack mounts
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		default:
			return fmt.Errorf("unmount the gofers' network namespace: %w", err)
		}
	}
}
