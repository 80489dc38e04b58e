package sandbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
	"github.com/cordonhq/cordon/internal/policy"
)

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
	if name, ok := m.warm.Find(key); ok {
		up, err := m.startWarm(ctx, id, o, name)
		if err == nil || ctx.Err() != nil {
			return up, err
		}
		m.cfg.Log.Warn("warm checkpoint refused", "template", img.Name, "err", err)
		if err := m.warm.Forget(key, name); err != nil {
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
	if m.warm.Begin(key) {
		m.keepWarm(ctx, up, img, key)
	}
	return up, nil
}

// keepWarm makes the checkpoint. Without one, the next start takes as long as this.
func (m *Manager) keepWarm(ctx context.Context, up *started, img Image, key string) {
	name := checkpoint.NewName()
	written, err := m.space.Reserve("", m.footprint(ctx, up.id))
	if err == nil {
		defer written()
		_, err = m.vault.Keep(name, checkpoint.Manifest{Token: up.controlToken, Label: key}, func(dir string) error {
			return m.cfg.Runtime.Checkpoint(context.WithoutCancel(ctx), up.id, dir)
		})
	}
	if err != nil {
		m.cfg.Log.Warn("warm checkpoint not kept", "template", img.Name, "err", err)
		name = ""
	}
	for _, old := range m.warm.End(key, name) {
		if err := m.vault.Drop(old); err != nil {
			m.cfg.Log.Warn("warm checkpoint not removed", "template", img.Name, "err", err)
		}
	}
}
