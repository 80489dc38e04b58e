package sandbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
)

// warmKey names everything a checkpoint of an image's start command depends on,
// after the template's name and a space.
func (o *origin) warmKey() string {
	img := o.img
	b, err := json.Marshal([]any{
		o.cfg.Runtime.Name(), img.Digest, img.Start, img.Ready, img.User, img.Workdir, o.cfg.commandEnv(img),
		o.resources, img.Binds, o.cfg.Binds, o.cfg.AgentArgs,
	})
	if err != nil {
		panic(err) // strings and numbers only
	}
	sum := sha256.Sum256(b)
	return img.Name + " " + hex.EncodeToString(sum[:16])
}

// startWarm starts a sandbox of an image that has a start command, from the checkpoint
// that was made when it was ready. A checkpoint that is refused, after
// a change of the runtime say, is replaced by a new one.
func (o *origin) startWarm(ctx context.Context, id ID) (*started, error) {
	key := o.warmKey()
	if name, ok := o.warm.Find(key); ok {
		up, err := o.bootCopy(ctx, id, name)
		if err == nil || ctx.Err() != nil {
			return up, err
		}
		o.cfg.Log.Warn("warm checkpoint refused", "template", o.img.Name, "err", err)
		if err := o.warm.Forget(key, name); err != nil {
			o.cfg.Log.Warn("warm checkpoint not removed", "template", o.img.Name, "err", err)
		}
	}
	return o.warmUp(ctx, id, key)
}

func (o *origin) bootCopy(ctx context.Context, id ID, name string) (*started, error) {
	from, err := o.fromCheckpoint(o.owner, o.img, o.resources, name)
	if err != nil {
		return nil, err
	}
	defer from.close()
	return from.boot(ctx, id, nil)
}

// readyTimeout is how long a start command may take where its image does not say.
const readyTimeout = time.Minute

// warmUp starts a sandbox cold, runs its image's start command and, once that is
// ready, keeps a checkpoint for the next ones.
func (o *origin) warmUp(ctx context.Context, id ID, key string) (_ *started, err error) {
	began, img := time.Now(), o.img
	up, err := o.boot(ctx, id, nil)
	if err != nil {
		return nil, err
	}
	var undo Cleanup
	defer undo.OnError(ctx, &err)
	undo.Add("sandbox", up.discard)
	limit := max(cmp.Or(img.Ready.Timeout, readyTimeout), o.cfg.StartTimeout)
	starting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = o.cfg.Agents.Start(starting, up.agent(), AgentStart{
		Args: img.Start, EnvVars: o.cfg.commandEnv(img), User: img.User, Workdir: img.Workdir, Ready: img.Ready,
	})
	if err != nil {
		return nil, fmt.Errorf("start command of template %s: %w", img.Name, err)
	}
	o.cfg.Log.Info("start command ready", "template", img.Name, "took", time.Since(began))
	if o.warm.Begin(key) {
		o.keepWarm(ctx, up, key)
	}
	return up, nil
}

// keepWarm makes the checkpoint. Without one, the next start takes as long as this.
func (o *origin) keepWarm(ctx context.Context, up *started, key string) {
	name := ""
	written, err := o.space.Reserve("", o.footprint(ctx, up.id))
	if err == nil {
		defer written()
		name, _, err = o.checkpoint(ctx, up.id, checkpoint.Manifest{Token: up.controlToken, Label: key})
	}
	if err != nil {
		o.cfg.Log.Warn("warm checkpoint not kept", "template", o.img.Name, "err", err)
		name = ""
	}
	for _, old := range o.warm.End(key, name) {
		if err := o.vault.Drop(old); err != nil {
			o.cfg.Log.Warn("warm checkpoint not removed", "template", o.img.Name, "err", err)
		}
	}
}

// checkpoint puts a running sandbox's memory, processes and files on disk, in room that
// the caller has reserved.
func (l *launcher) checkpoint(ctx context.Context, id ID, man checkpoint.Manifest) (name string, size int64, err error) {
	name = checkpoint.NewName()
	man, err = l.vault.Keep(name, man, func(dir string) error {
		return l.cfg.Runtime.Checkpoint(context.WithoutCancel(ctx), id, dir)
	})
	return name, man.Bytes(), l.space.Explain(err)
}

// footprint is about how large a checkpoint of a sandbox becomes.
func (l *launcher) footprint(ctx context.Context, id ID) int64 {
	s, err := l.cfg.Runtime.Stats(ctx, id)
	if err != nil {
		return 0 // the checkpoint will tell
	}
	return s.MemoryBytes + s.DiskBytes
}
