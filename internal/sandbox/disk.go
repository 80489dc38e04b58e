package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/share"
)

// Layers, checkpoints and records share a file system, and the layers' quotas
// may add up to more than it has. So some of it is kept free: below MinFree
// nothing new is put on it, and below a quarter of that a sandbox of the owner that uses
// most is killed, before the layers' next page is the one that is not
// there: a sentry ends when its layer cannot grow, and records must always have
// room.

// guardTick is how often the disk is looked at.
const guardTick = 500 * time.Millisecond

// defaultMinFree is 2 GiB, or a twentieth of a small file system.
func defaultMinFree(total int64) int64 { return min(2<<30, total/20) }

// freeSpace returns what may still be written to dir's file system, and its size.
func freeSpace(dir string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// space returns what is free and how much of it is kept.
func (m *Manager) space() (free, keep int64, err error) {
	free, total, err := m.cfg.space(m.cfg.SnapshotDir)
	if err != nil {
		return 0, 0, err
	}
	if keep = m.cfg.MinFree; keep == 0 {
		keep = defaultMinFree(total)
	}
	return free, max(keep, 0), nil
}

// room says why there is no place for anything more of an owner's.
func (m *Manager) room(owner string) error {
	free, keep, err := m.space()
	if err != nil {
		return err
	}
	if free < keep {
		return noRoom(free, keep, 0)
	}
	promised, err := m.within(owner, recordBytes, free-keep, keep)
	if err != nil {
		return err
	}
	promised()
	return nil
}

// recordBytes is about what a sandbox's record and its first files take.
const recordBytes = 1 << 20

// stored is what an owner has on the disk: layers, the memory and files of paused
// sandboxes, snapshots, and what its records hold beside.
type stored struct {
	bytes int64
	// largest is the running sandbox with the largest layer.
	largest *entry
	layer   int64
	layers  int64 // of all running sandboxes together
}

// diskUse looks at what each owner has on the disk. Layers are those of the last sample.
func (m *Manager) diskUse() map[string]*stored {
	use := map[string]*stored{}
	of := func(owner string) *stored {
		if use[owner] == nil {
			use[owner] = &stored{}
		}
		return use[owner]
	}
	for _, e := range m.entries() {
		rec := &e.view.Load().rec
		s := of(rec.Owner)
		for _, labels := range []map[string]string{rec.Metadata, rec.EnvVars} {
			for k, v := range labels {
				s.bytes += int64(len(k) + len(v))
			}
		}
		if rec.State != Running {
			s.bytes += m.vault.size(rec.Checkpoint)
			continue
		}
		layer := m.history.layer(rec.ID)
		s.bytes += layer
		s.layers += layer
		if s.largest == nil || layer > s.layer {
			s.largest, s.layer = e, layer
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, snap := range m.snapshots {
		of(snap.Owner).bytes += snap.Bytes
	}
	return use
}

// within holds need bytes of an owner's share of the disk until release is called. What
// all may have is what they have and what is free above what is kept.
func (m *Manager) within(owner string, need, free, keep int64) (release func(), err error) {
	if m.cfg.MinFree < 0 || owner == "" { // not looked after, or the server's own
		return func() {}, nil
	}
	all, keys := int64(0), map[string]int64{}
	for who, s := range m.diskUse() {
		keys[who] = s.bytes
		all += s.bytes
	}
	m.disk.Resize(all + free)
	m.disk.Measured(all, keys)
	release, err = m.disk.Promise(owner, need)
	var full *share.Full
	if errors.As(err, &full) && full.Scope == share.Server {
		return nil, noRoom(free+keep, keep, need)
	}
	if err != nil {
		return nil, Refused(err, "kill sandboxes that are paused or have many files, or delete snapshots")
	}
	return release, nil
}

// hoard holds place for need bytes that are about to be written, until release is
// called, or says why there is none: of many that are written at a time, each would
// find the same place free. What is written already counts twice meanwhile.
func (m *Manager) hoard(owner string, need int64) (release func(), err error) {
	free, keep, err := m.space()
	if err != nil {
		return nil, err
	}
	promised, err := m.within(owner, need, free-keep, keep)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if free-m.hoarded-need < keep {
		promised()
		return nil, noRoom(free, keep, m.hoarded+need)
	}
	m.hoarded += need
	return sync.OnceFunc(func() {
		promised()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.hoarded -= need
	}), nil
}

func noRoom(free, keep, need int64) error {
	if need > 0 {
		return errs.New(errs.Unavailable, "the server's disk is too full: %d MiB are needed, %d MiB are free and %d MiB stay so: kill sandboxes or delete snapshots, or lower sandboxes.min_free_disk_mb",
			need>>20, free>>20, keep>>20)
	}
	return errs.New(errs.Unavailable, "the server's disk is too full: %d MiB are free, and below %d MiB nothing is started or stored: kill sandboxes or delete snapshots, or lower sandboxes.min_free_disk_mb",
		free>>20, keep>>20)
}

// diskFull gives an error its kind when the disk was full.
func (m *Manager) diskFull(err error) error {
	if err == nil || errs.KindOf(err) != errs.Internal {
		return err
	}
	if free, keep, spaceErr := m.space(); errors.Is(err, unix.ENOSPC) || spaceErr == nil && free < keep {
		return errs.Wrap(errs.Unavailable, err, "the server's disk is too full to store the sandbox's memory: it runs on")
	}
	return err
}

// footprint is about how large a checkpoint of a sandbox becomes.
func (m *Manager) footprint(ctx context.Context, id ID) int64 {
	s, err := m.cfg.Runtime.Stats(ctx, id)
	if err != nil {
		return 0 // the checkpoint will tell
	}
	return s.MemoryBytes + s.DiskBytes
}

// worthwhile is how large an owner's layers must be together for their end to make room.
const worthwhile = 64 << 20

// guardDisk kills a sandbox of the owner that uses most while the disk is about to be
// full: the one with the largest layer.
func (m *Manager) guardDisk(ctx context.Context) {
	free, keep, err := m.space()
	if err != nil || free >= keep/4 {
		return
	}
	m.sample(ctx) // the last one may be seconds old
	owner, worst := toBlame(m.diskUse())
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
