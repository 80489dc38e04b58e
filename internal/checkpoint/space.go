package checkpoint

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/share"
)

// Space keeps part of a file system free, and divides the rest between owners. Layers,
// checkpoints and records share it, and the layers' quotas may add up to more than it
// has. Below what is kept free, nothing new is put on it.
type Space struct {
	// Stat returns how many bytes may still be written to the file system of a folder,
	// and its size.
	Stat func(dir string) (free, total int64, err error)

	dir     string
	minFree int64
	use     func() map[string]int64
	share   *share.Meter

	mu       sync.Mutex // guards reserved
	reserved int64      // bytes that are about to be written
}

// NewSpace returns the space of the file system of dir, of which minFree bytes stay free:
// 0 means 2 GiB or a twentieth of it, whichever is less, and less than 0 none. use
// returns how many bytes each owner has there.
func NewSpace(dir string, minFree int64, use func() map[string]int64) *Space {
	return &Space{
		Stat: statfs, dir: dir, minFree: minFree, use: use,
		share: share.NewMeter(share.Disk.Of(1, 0)), // its size is what is free
	}
}

func statfs(dir string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// Pool is the count of what owners have, for metrics.
func (s *Space) Pool() *share.Pool { return s.share.Pool() }

// Free returns how many bytes are free and how many of those are kept so.
func (s *Space) Free() (free, keep int64, err error) {
	free, total, err := s.Stat(s.dir)
	if err != nil {
		return 0, 0, err
	}
	if keep = s.minFree; keep == 0 {
		keep = min(2<<30, total/20)
	}
	return free, max(keep, 0), nil
}

// recordBytes is about what a sandbox's record and its first files take.
const recordBytes = 1 << 20

// Check says why an owner can put nothing more on the disk; nil when it can.
func (s *Space) Check(owner string) error {
	free, keep, err := s.Free()
	if err != nil {
		return err
	}
	if free < keep {
		return noRoom(free, keep, 0)
	}
	release, err := s.within(owner, recordBytes, free-keep, keep)
	if err != nil {
		return err
	}
	release()
	return nil
}

// Reserve keeps room for need bytes that an owner is about to write, until release is
// called, or says why there is none: of many that are written at a time, each would
// find the same room free. What is written already counts twice meanwhile. An owner of
// "" is the server itself, which has no share.
func (s *Space) Reserve(owner string, need int64) (release func(), err error) {
	free, keep, err := s.Free()
	if err != nil {
		return nil, err
	}
	promised, err := s.within(owner, need, free-keep, keep)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if free-s.reserved-need < keep {
		promised()
		return nil, noRoom(free, keep, s.reserved+need)
	}
	s.reserved += need
	return sync.OnceFunc(func() {
		promised()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reserved -= need
	}), nil
}

// within reserves need bytes of an owner's share until release is called. What all may
// have is what they have and what is free above what is kept.
func (s *Space) within(owner string, need, free, keep int64) (release func(), err error) {
	if s.minFree < 0 || owner == "" {
		return func() {}, nil
	}
	use := s.use()
	all := int64(0)
	for _, n := range use {
		all += n
	}
	s.share.Resize(all + free)
	s.share.Measured(all, use)
	release, err = s.share.Promise(owner, need)
	var full *share.Full
	if errors.As(err, &full) && full.Scope == share.Server {
		return nil, noRoom(free+keep, keep, need)
	}
	if err != nil {
		return nil, share.Explain(err, "kill sandboxes that are paused or have many files, or delete snapshots")
	}
	return release, nil
}

func noRoom(free, keep, need int64) error {
	if need > 0 {
		return errs.New(errs.Unavailable, "the server's disk is too full: %d MiB are needed, %d MiB are free and %d MiB stay so: kill sandboxes or delete snapshots, or lower sandboxes.min_free_disk_mb",
			need>>20, free>>20, keep>>20)
	}
	return errs.New(errs.Unavailable, "the server's disk is too full: %d MiB are free, and below %d MiB nothing is started or stored: kill sandboxes or delete snapshots, or lower sandboxes.min_free_disk_mb",
		free>>20, keep>>20)
}

// Explain gives an error its kind when the disk was full.
func (s *Space) Explain(err error) error {
	if err == nil || errs.KindOf(err) != errs.Internal {
		return err
	}
	if free, keep, freeErr := s.Free(); errors.Is(err, unix.ENOSPC) || freeErr == nil && free < keep {
		return errs.Wrap(errs.Unavailable, err, "the server's disk is too full to store the sandbox's memory: it runs on")
	}
	return err
}
