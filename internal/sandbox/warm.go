package sandbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// warm knows the checkpoints of images whose start command is ready, by what
// they depend on. They are found again by a later server.
type warm struct {
	vault *vault

	mu     sync.Mutex // guards the others
	names  map[string]string
	making map[string]bool
}

func newWarm(v *vault) *warm {
	return &warm{vault: v, names: map[string]string{}, making: map[string]bool{}}
}

// known finds what earlier servers kept and this one can restore, and returns
// the names.
func (w *warm) known(r Runtime) map[string]bool {
	keep := map[string]bool{}
	entries, err := os.ReadDir(w.vault.dir)
	if err != nil {
		return keep
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range entries {
		if !checkpointForm.MatchString(e.Name()) {
			continue
		}
		man, err := w.vault.manifestOf(e.Name())
		if err != nil || man.Label == "" || r.Restorable(w.vault.path(e.Name())) != nil {
			continue
		}
		if old := w.names[man.Label]; old != "" {
			delete(keep, old)
		}
		w.names[man.Label] = e.Name()
		keep[e.Name()] = true
	}
	return keep
}

func (w *warm) find(key string) (name string, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	name, ok = w.names[key]
	return name, ok
}

// begin reports whether the caller is the one to make key's checkpoint; then it
// calls end, with the name or "".
func (w *warm) begin(key string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.making[key] || w.names[key] != "" {
		return false
	}
	w.making[key] = true
	return true
}

// end returns the checkpoints of the same template that name replaces.
func (w *warm) end(key, name string) (replaced []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.making, key)
	if name == "" {
		return nil
	}
	template, _, _ := strings.Cut(key, " ")
	for other, old := range w.names {
		if t, _, _ := strings.Cut(other, " "); t == template {
			replaced = append(replaced, old)
			delete(w.names, other)
		}
	}
	w.names[key] = name
	return replaced
}

// forget drops a checkpoint that turned out to be no good.
func (w *warm) forget(key, name string) error {
	w.mu.Lock()
	if w.names[key] == name {
		delete(w.names, key)
	}
	w.mu.Unlock()
	return w.vault.drop(name)
}

// warmKey names everything a checkpoint of an image's start command depends on,
// after the template's name and a space.
func (m *Manager) warmKey(img Image) string {
	b, err := json.Marshal([]any{
		m.cfg.Runtime.Name(), img.Digest, img.Start, img.Ready, img.User, img.Workdir, m.commandEnv(img),
		m.resources(img), img.Binds, m.cfg.Binds, m.cfg.AgentArgs, m.cfg.Env,
	})
	if err != nil {
		panic(err) // strings and numbers only
	}
	sum := sha256.Sum256(b)
	return img.Name + " " + hex.EncodeToString(sum[:16])
}

// startFrom starts a nameless sandbox from an origin, under p where it starts
// from a checkpoint whose processes go on at once.
func (m *Manager) startFrom(ctx context.Context, id ID, o *origin, p *policy.Compiled) (*started, error) {
	if o.dir != "" {
		return m.boot(ctx, id, o, p)
	}
	return m.start(ctx, id, o)
}

// start starts a nameless sandbox of an image: cold, or from the checkpoint that
// was made when its start command was ready. A checkpoint that is refused, after
// a change of the runtime say, is replaced by a new one.
func (m *Manager) start(ctx context.Context, id ID, o *origin) (*started, error) {
	img := o.img
	if len(img.Start) == 0 {
		return m.boot(ctx, id, o, nil)
	}
	key := m.warmKey(img)
	if name, ok := m.warm.find(key); ok {
		up, err := m.startWarm(ctx, id, o, name)
		if err == nil || ctx.Err() != nil {
			return up, err
		}
		m.cfg.Log.Warn("warm checkpoint refused", "template", img.Name, "err", err)
		if err := m.warm.forget(key, name); err != nil {
			m.cfg.Log.Warn("warm checkpoint not removed", "template", img.Name, "err", err)
		}
	}
	return m.warmUp(ctx, id, o, key)
}

func (m *Manager) startWarm(ctx context.Context, id ID, o *origin, name string) (*started, error) {
	from, err := m.kept(o.img, name, m.resources(o.img))
	if err != nil {
		return nil, err
	}
	defer m.finish(from)
	from.owner = o.owner
	return m.boot(ctx, id, from, nil)
}

// readyTimeout is how long a start command may take where its image does not say.
const readyTimeout = time.Minute

// warmUp starts a sandbox cold, runs its image's start command and, once that is
// ready, keeps a checkpoint for the next ones.
func (m *Manager) warmUp(ctx context.Context, id ID, o *origin, key string) (_ *started, err error) {
	began, img := time.Now(), o.img
	up, err := m.boot(ctx, id, o, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.discard(context.WithoutCancel(ctx), up))
		}
	}()
	limit := max(cmp.Or(img.Ready.Timeout, readyTimeout), m.cfg.StartTimeout)
	starting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = m.cfg.Agents.Start(starting, up.lease.agent(up.controlToken), AgentStart{
		Args: img.Start, EnvVars: m.commandEnv(img), User: img.User, Workdir: img.Workdir, Ready: img.Ready,
	})
	if err != nil {
		return nil, fmt.Errorf("start command of template %s: %w", img.Name, err)
	}
	m.cfg.Log.Info("start command ready", "template", img.Name, "took", time.Since(began))
	if m.warm.begin(key) {
		m.keepWarm(ctx, up, img, key)
	}
	return up, nil
}

// keepWarm makes the checkpoint. Without one, the next start takes as long as this.
func (m *Manager) keepWarm(ctx context.Context, up *started, img Image, key string) {
	name := newCheckpointName()
	written, err := m.hoard("", m.footprint(ctx, up.id))
	if err == nil {
		defer written()
		_, err = m.vault.keep(name, manifest{Token: up.controlToken, Label: key}, func(dir string) error {
			return m.cfg.Runtime.Checkpoint(context.WithoutCancel(ctx), up.id, dir)
		})
	}
	if err != nil {
		m.cfg.Log.Warn("warm checkpoint not kept", "template", img.Name, "err", err)
		name = ""
	}
	for _, old := range m.warm.end(key, name) {
		if err := m.vault.drop(old); err != nil {
			m.cfg.Log.Warn("warm checkpoint not removed", "template", img.Name, "err", err)
		}
	}
}
