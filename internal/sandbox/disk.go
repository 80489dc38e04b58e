package sandbox

import (
	"context"
	"time"

	"github.com/cordonhq/cordon/internal/checkpoint"
	"github.com/cordonhq/cordon/internal/errs"
)

// Below a quarter of what checkpoint.Space keeps free, a sandbox of the owner that uses
// most is killed: a sentry ends when its layer cannot grow, and records must always have
// room.

// guardTick is how often the disk is looked at.
const guardTick = 500 * time.Millisecond

// stored is what an owner has on the disk: layers, the memory and files of paused
// sandboxes, snapshots, and what its records hold beside.
type stored struct {
	bytes int64
	// largest is the running sandbox with the largest layer.
	largest *entry
	layer   int64
	layers  int64 // of all running sandboxes together
}

// disk counts what owners have on the disk.
type disk struct {
	table     *table
	snapshots *snapshots
	history   *history
	vault     *checkpoint.Vault
}

// shares is how many bytes each owner has.
func (d *disk) shares() map[string]int64 {
	out := map[string]int64{}
	for owner, s := range d.use() {
		out[owner] = s.bytes
	}
	return out
}

// use looks at what each owner has. Layers are those of the last sample.
func (d *disk) use() map[string]*stored {
	use := map[string]*stored{}
	of := func(owner string) *stored {
		if use[owner] == nil {
			use[owner] = &stored{}
		}
		return use[owner]
	}
	for _, e := range d.table.all() {
		rec := &e.view.Load().rec
		s := of(rec.Owner)
		for _, labels := range []map[string]string{rec.Metadata, rec.EnvVars} {
			for k, v := range labels {
				s.bytes += int64(len(k) + len(v))
			}
		}
		if rec.State != Running {
			s.bytes += d.vault.Size(rec.Checkpoint)
			continue
		}
		layer := d.history.layer(rec.ID)
		s.bytes += layer
		s.layers += layer
		if s.largest == nil || layer > s.layer {
			s.largest, s.layer = e, layer
		}
	}
	for _, snap := range d.snapshots.all() {
		of(snap.Owner).bytes += snap.Bytes
	}
	return use
}

// worthwhile is how large an owner's layers must be together for their end to make room.
const worthwhile = 64 << 20

// guardDisk kills a sandbox of the owner that uses most while the disk is about to be
// full: the one with the largest layer.
func (m *Manager) guardDisk(ctx context.Context) {
	free, keep, err := m.launch.space.Free()
	if err != nil || free >= keep/4 {
		return
	}
	m.sample(ctx) // the last one may be seconds old
	owner, worst := toBlame(m.disk.use())
	if worst == nil {
		return
	}
	id := worst.largest.view.Load().rec.ID
	m.cfg.Log.Error("disk almost full: the largest sandbox of the key that uses most is killed", "sandbox", id, "key", owner, "free", free, "layer", worst.layer, "used", worst.bytes)
	why := Event{Name: "kill", Detail: "the server's disk was almost full, this sandbox's key used most of it, and of that key's sandboxes this one"}
	if err := m.remove(ctx, id, why); err != nil && !errs.Is(err, errs.NotFound) {
		m.cfg.Log.Error("kill for disk space", "sandbox", id, "err", err)
	}
}

// toBlame is the owner that uses most of the disk, of those whose layers are worth it;
// without one, that with the largest layer. It looks at an owner's layers together, or
// many small ones would never be to blame.
func toBlame(use map[string]*stored) (owner string, worst *stored) {
	for _, least := range []int64{worthwhile, 1} {
		for who, s := range use {
			if s.layers >= least && (worst == nil || least > 1 && s.bytes > worst.bytes || least == 1 && s.layer > worst.layer) {
				owner, worst = who, s
			}
		}
		if worst != nil {
			return owner, worst
		}
	}
	return "", nil
}
