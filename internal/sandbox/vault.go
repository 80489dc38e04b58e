package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/internal/errs"
)

// vault keeps checkpoints on disk, each in a folder of its own:
//
//	<name>/…               what the runtime wrote
//	<name>/manifest.json   sizes and digests of that; its presence means whole
//	<name>.partial         one being written, or left by a crash
//
// A kept checkpoint is on disk, file by file and then by name, before anything
// durable speaks of it. Who needs one is known to the records; the vault only
// counts who is reading, so that a checkpoint that is dropped meanwhile goes
// after its last reader.
type vault struct {
	dir string

	mu      sync.Mutex // guards the others
	readers map[string]int
	dropped map[string]bool // to be removed after the last reader
	sizes   map[string]int64
}

func newVault(dir string) *vault {
	return &vault{dir: dir, readers: map[string]int{}, dropped: map[string]bool{}, sizes: map[string]int64{}}
}

const (
	manifestFile   = "manifest.json"
	manifestFormat = 1
	partialSuffix  = ".partial"
	// smallFile is up to which size a file is compared with its digest before
	// anything is restored from it; larger ones are compared meanwhile.
	smallFile = 4 << 20
)

// manifest says what a checkpoint must be to be believed.
type manifest struct {
	Format  int            `json:"format"`
	Created time.Time      `json:"created"`
	Files   []manifestPart `json:"files"`
	// Token is the control token that the agent in the checkpoint answers to.
	Token string `json:"token"`
	// Label says what a checkpoint that no record speaks of is good for.
	Label string `json:"label,omitempty"`
}

type manifestPart struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

func (m *manifest) bytes() (sum int64) {
	for _, p := range m.Files {
		sum += p.Size
	}
	return sum
}

var checkpointForm = regexp.MustCompile(`^c[0-9a-z]{20}$`)

// newCheckpointName returns a name nobody has.
func newCheckpointName() string { return "c" + string(NewID()[1:]) }

func (v *vault) path(name string) string { return filepath.Join(v.dir, name) }

// keep has save write a checkpoint and puts it under its name when it is whole
// and on disk. After an error nothing of it is left.
func (v *vault) keep(name string, m manifest, save func(dir string) error) (man manifest, err error) {
	partial := v.path(name) + partialSuffix
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(partial))
		}
	}()
	if err := v.write(partial, save); err != nil {
		return manifest{}, err
	}
	m.Format, m.Created = manifestFormat, time.Now().UTC()
	if m.Files, err = syncedParts(partial); err != nil {
		return manifest{}, fmt.Errorf("put the checkpoint on disk: %w", err)
	}
	if err := writeManifest(partial, &m); err != nil {
		return manifest{}, err
	}
	if err := os.Rename(partial, v.path(name)); err != nil {
		return manifest{}, fmt.Errorf("name the checkpoint: %w", err)
	}
	if err := syncDir(v.dir); err != nil {
		return manifest{}, errors.Join(err, os.RemoveAll(v.path(name)))
	}
	return m, nil
}

// lend has save write a checkpoint that is not to outlive this process, and
// returns what removes it: it costs no wait for the disk.
func (v *vault) lend(save func(dir string) error) (dir string, remove func() error, err error) {
	dir = v.path(newCheckpointName()) + partialSuffix
	remove = func() error { return os.RemoveAll(dir) }
	if err := v.write(dir, save); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return dir, remove, nil
}

func (v *vault) write(dir string, save func(dir string) error) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return fmt.Errorf("make the checkpoint's folder: %w", err)
	}
	if err := save(dir); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return closeToOthers(dir)
}

// closeToOthers takes the files of a checkpoint, whatever modes the runtime gave them, from
// everyone else: they hold the memory of a sandbox, secrets and all. The folder keeps
// others out as well, but not from a copy, as in a backup.
func closeToOthers(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("close the checkpoint to others: %w", err)
	}
	for _, e := range entries {
		if err := os.Chmod(filepath.Join(dir, e.Name()), 0o600); err != nil {
			return fmt.Errorf("close the checkpoint to others: %w", err)
		}
	}
	return nil
}

// syncedParts flushes and digests the files of a folder, all at once: what is
// read is still in memory while it goes to disk.
func syncedParts(dir string) ([]manifestPart, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	parts := make([]manifestPart, len(entries))
	var g errgroup.Group
	for i, e := range entries {
		path := filepath.Join(dir, e.Name())
		g.Go(func() error { return syncFile(path) })
		g.Go(func() (err error) {
			parts[i], err = digest(path)
			return err
		})
	}
	return parts, g.Wait()
}

func syncFile(path string) error {
	f, err := os.Open(path) // fsync flushes the file, whoever wrote it
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func syncDir(dir string) error {
	if err := syncFile(dir); err != nil {
		return fmt.Errorf("put %s on disk: %w", dir, err)
	}
	return nil
}

func digest(path string) (manifestPart, error) {
	f, err := os.Open(path)
	if err != nil {
		return manifestPart{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return manifestPart{Name: filepath.Base(path), Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

func writeManifest(dir string, m *manifest) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode the manifest: %w", err)
	}
	path := filepath.Join(dir, manifestFile)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	if err := errors.Join(syncFile(path), syncFile(dir)); err != nil {
		return fmt.Errorf("put the manifest on disk: %w", err)
	}
	return nil
}

// reading is a checkpoint somebody restores from.
type reading struct {
	dir string
	manifest
	large []manifestPart
	close func() error
}

// open starts reading a checkpoint: its files are there, of the size they had,
// and the small ones, which say what the large ones mean, are unchanged. The
// caller closes it.
func (v *vault) open(name string) (_ *reading, err error) {
	if !checkpointForm.MatchString(name) {
		return nil, fmt.Errorf("checkpoint %q: not a checkpoint's name", name)
	}
	v.mu.Lock()
	v.readers[name]++
	v.mu.Unlock()
	r := &reading{dir: v.path(name), close: sync.OnceValue(func() error { return v.release(name) })}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	b, err := os.ReadFile(filepath.Join(r.dir, manifestFile))
	if err != nil {
		return nil, damaged(err)
	}
	if err := json.Unmarshal(b, &r.manifest); err != nil {
		return nil, damaged(fmt.Errorf("read the manifest: %w", err))
	}
	if r.Format != manifestFormat {
		return nil, damaged(fmt.Errorf("manifest of format %d, want %d", r.Format, manifestFormat))
	}
	for _, p := range r.Files {
		if p.Size > smallFile {
			r.large = append(r.large, p)
			err = sameSize(filepath.Join(r.dir, p.Name), p.Size)
		} else {
			err = unchangedFile(r.dir, p)
		}
		if err != nil {
			return nil, damaged(err)
		}
	}
	return r, nil
}

// verify compares the large files with their digests. It reads them as fast as
// a restore does, so it belongs beside one and not before it.
func (r *reading) verify(ctx context.Context) error {
	for _, p := range r.large {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unchangedFile(r.dir, p); err != nil {
			return damaged(err)
		}
	}
	return nil
}

func sameSize(path string, want int64) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if fi.Size() != want {
		return fmt.Errorf("%s has %d bytes, it had %d", filepath.Base(path), fi.Size(), want)
	}
	return nil
}

func unchangedFile(dir string, want manifestPart) error {
	got, err := digest(filepath.Join(dir, want.Name))
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%s has digest %s and %d bytes, it had %s and %d", want.Name, got.SHA256, got.Size, want.SHA256, want.Size)
	}
	return nil
}

// damaged is the error for a checkpoint that is not what was written.
func damaged(err error) error {
	return errs.Wrap(errs.Conflict, err, "its stored memory is damaged or missing on the server's disk: it cannot be restored")
}

func (v *vault) release(name string) error {
	v.mu.Lock()
	v.readers[name]--
	last := v.readers[name] <= 0
	if last {
		delete(v.readers, name)
	}
	remove := last && v.dropped[name]
	if remove {
		delete(v.dropped, name)
	}
	v.mu.Unlock()
	if remove {
		return v.remove(name)
	}
	return nil
}

// drop removes a checkpoint, at once or after its last reader. Dropping one
// that is not there is not an error.
func (v *vault) drop(name string) error {
	if name == "" {
		return nil
	}
	v.mu.Lock()
	busy := v.readers[name] > 0
	if busy {
		v.dropped[name] = true
	}
	v.mu.Unlock()
	if busy {
		return nil
	}
	return v.remove(name)
}

// remove takes the name away first, so that what is half removed does not look whole.
func (v *vault) remove(name string) error {
	v.mu.Lock()
	delete(v.sizes, name)
	v.mu.Unlock()
	gone := v.path(name) + partialSuffix
	if err := os.Rename(v.path(name), gone); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	return nil
}

// sweep removes everything but the named checkpoints: what a crash left, and
// what nobody speaks of any more. Nobody reads or writes meanwhile.
func (v *vault) sweep(keep map[string]bool) error {
	entries, err := os.ReadDir(v.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look through the checkpoints: %w", err)
	}
	var failed []error
	for _, e := range entries {
		name := e.Name()
		if keep[name] { // of an earlier version, maybe
			failed = append(failed, os.Chmod(v.path(name), 0o700), closeToOthers(v.path(name)))
			continue
		}
		if !checkpointForm.MatchString(strings.TrimSuffix(name, partialSuffix)) {
			continue
		}
		failed = append(failed, os.RemoveAll(v.path(name)))
	}
	return errors.Join(failed...)
}

// size is how many bytes a checkpoint has; 0 of one that is not there.
func (v *vault) size(name string) int64 {
	v.mu.Lock()
	n, known := v.sizes[name]
	v.mu.Unlock()
	if known || name == "" {
		return n
	}
	man, err := v.manifestOf(name)
	if err != nil {
		return 0
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sizes[name] = man.bytes()
	return v.sizes[name]
}

// manifestOf reads a checkpoint's manifest without believing the rest.
func (v *vault) manifestOf(name string) (m manifest, err error) {
	b, err := os.ReadFile(filepath.Join(v.path(name), manifestFile))
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(b, &m)
}
