package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/cordonhq/cordon/internal/errs"
)

// head remembers the highest revision of a bucket that is known to be on disk,
// in a file beside the engine's. The engine cuts its log at the first damaged
// entry and goes on from there: records would vanish and, worse, deleted ones
// (a revoked key) would be back. A head above what the engine recovered tells.
//
// The file is written after each write of the engine and not synced, so that it
// can lag behind after a power failure but never run ahead.
type head struct {
	path string

	mu  sync.Mutex // guards f's content and rev
	f   *os.File
	rev uint64
}

const headSize = 8 // one big-endian revision

// openHead opens the head of a bucket and compares it with the revision the
// engine recovered.
func openHead(dir, part string, recovered uint64) (*head, error) {
	h := &head{path: filepath.Join(dir, part+".head")}
	f, err := os.OpenFile(h.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open head of %s: %w", part, err)
	}
	h.f = f
	b := make([]byte, headSize)
	switch n, err := f.ReadAt(b, 0); {
	case n == headSize:
		h.rev = binary.BigEndian.Uint64(b)
	case err != nil && !errors.Is(err, io.EOF):
		return nil, errors.Join(fmt.Errorf("read head of %s: %w", part, err), f.Close())
	}
	if h.rev > recovered {
		err := errs.New(errs.Internal, "state directory %s is damaged: %s were written up to revision %d and can be read up to %d only: restore the directory from a backup, or remove %s to go on without the lost records (deleted ones may be back)",
			dir, part, h.rev, recovered, h.path)
		return nil, errors.Join(err, f.Close())
	}
	return h, nil
}

// reach notes that rev is on disk.
func (h *head) reach(rev uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if rev <= h.rev || h.f == nil {
		return nil
	}
	if _, err := h.f.WriteAt(binary.BigEndian.AppendUint64(nil, rev), 0); err != nil {
		return fmt.Errorf("write %s: %w", h.path, err)
	}
	h.rev = rev
	return nil
}

func (h *head) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.f == nil {
		return nil
	}
	err := errors.Join(h.f.Sync(), h.f.Close())
	h.f = nil
	return err
}
