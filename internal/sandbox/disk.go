package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
)

// Layers, checkpoints and records share a file system, and the layers' quotas
// may add up to more than it has. So some of it is kept free: below MinFree
// nothing new is put on it, and below a quarter of that the sandbox with the
// largest layer is killed, before the layers' next page is the one that is not
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
	free, total, err := freeSpace(m.cfg.SnapshotDir)
	if err != nil {
		return 0, 0, err
	}
	if keep = m.cfg.MinFree; keep == 0 {
		keep = defaultMinFree(total)
	}
	return free, max(keep, 0), nil
}

// room says why there is no place for anything more.
func (m *Manager) room() error {
	free, keep, err := m.space()
	if err != nil {
		return err
	}
	if free < keep {
		return noRoom(free, keep, 0)
	}
	return nil
}

// hoard holds place for need bytes that are about to be written, until release is
// called, or says why there is none: of many that are written at a time, each would
// find the same place free. What is written already counts twice meanwhile.
func (m *Manager) hoard(need int64) (release func(), err error) {
	free, keep, err := m.space()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if free-m.hoarded-need < keep {
		return nil, noRoom(free, keep, m.hoarded+need)
	}
	m.hoarded += need
	return sync.OnceFunc(func() {
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

// guardDisk kills the sandbox with the largest layer while the disk is about
// to be full.
func (m *Manager) guardDisk(ctx context.Context) {
	free, keep, err := m.space()
	if err != nil || free >= keep/4 {
		return
	}
	var largest *entry
	var most int64
	for _, e := range m.entries() {
		rec := e.view.Load().rec
		if rec.State != Running {
			continue
		}
		if s, err := m.cfg.Runtime.Stats(ctx, rec.ID); err == nil && s.DiskBytes > most {
			largest, most = e, s.DiskBytes
		}
	}
	if largest == nil {
		return
	}
	id := largest.view.Load().rec.ID
	m.cfg.Log.Error("disk almost full: the sandbox with the largest layer is killed", "sandbox", id, "free", free, "layer", most)
	why := Event{Name: "kill", Detail: "the server's disk was almost full and this sandbox used most of it"}
	if err := m.remove(ctx, id, why); err != nil && !errs.Is(err, errs.NotFound) {
		m.cfg.Log.Error("kill for disk space", "sandbox", id, "err", err)
	}
}
