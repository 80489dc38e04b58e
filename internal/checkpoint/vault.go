// Package checkpoint keeps the memory and files of sandboxes on disk: the folder of
// checkpoints and what makes them whole, the copies of images whose start command
// is ready, and the disk space that all of them share.
package checkpoint

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
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// Vault keeps checkpoints on disk, each in a folder of its own:
//
//	<name>/…               what the runtime wrote
//	<name>/manifest.json   sizes and digests of that; its presence means whole
//	<name>.partial         one being written, or left by a crash
//
// A kept checkpoint is on disk, file by file and then by name, before Keep returns
// and a record can name it. Which checkpoints are needed is known from the records;
// the vault only counts readings, so that a checkpoint that is dropped meanwhile is
// removed after the last of them.
type Vault struct {
	dir string

	mu      sync.Mutex // guards the others
	readers map[string]int
	dropped map[string]bool // to be removed after the last reader
	sizes   map[string]int64
}

// NewVault returns the vault of a folder; Sweep makes it.
func NewVault(dir string) *Vault {
	return &Vault{dir: dir, readers: map[string]int{}, dropped: map[string]bool{}, sizes: map[string]int64{}}
}

const (
	manifestFile   = "manifest.json"
	manifestFormat = 1
	partialSuffix  = ".partial"
	// smallFile is up to which size a file is compared with its digest before
	// anything is restored from it; larger ones are compared meanwhile.
	smallFile = 4 << 20
)

// Manifest says what a checkpoint must be to be restored from.
type Manifest struct {
	Format  int       `json:"format"`
	Created time.Time `json:"created"`
	Files   []Part    `json:"files"`
	// Token is the control token that the agent in the checkpoint answers to.
	Token string `json:"token"`
	// Label says what a checkpoint that no record names is for: see Warm.
	Label string `json:"label,omitempty"`
}

// Part is one file of a checkpoint.
type Part struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Bytes is how large the files are together.
func (m *Manifest) Bytes() (sum int64) {
	for _, p := range m.Files {
		sum += p.Size
	}
	return sum
}

var form = regexp.MustCompile(`^c[0-9a-z]{20}$`)

// NewName returns the name of a new checkpoint.
func NewName() string { return sandboxid.Name('c') }

// Path is the folder of a checkpoint.
func (v *Vault) Path(name string) string { return filepath.Join(v.dir, name) }

// Keep has save write a checkpoint and puts it under its name when it is whole
// and on disk. After an error nothing of it is left.
func (v *Vault) Keep(name string, m Manifest, save func(dir string) error) (man Manifest, err error) {
	partial := v.Path(name) + partialSuffix
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(partial))
		}
	}()
	if err := v.write(partial, save); err != nil {
		return Manifest{}, err
	}
	m.Format, m.Created = manifestFormat, time.Now().UTC()
	if m.Files, err = syncedParts(partial); err != nil {
		return Manifest{}, fmt.Errorf("put the checkpoint on disk: %w", err)
	}
	if err := writeManifest(partial, &m); err != nil {
		return Manifest{}, err
	}
	if err := os.Rename(partial, v.Path(name)); err != nil {
		return Manifest{}, fmt.Errorf("name the checkpoint: %w", err)
	}
	if err := syncDir(v.dir); err != nil {
		return Manifest{}, errors.Join(err, os.RemoveAll(v.Path(name)))
	}
	return m, nil
}

// Temporary has save write a checkpoint that is not to outlive this process, and
// returns what removes it. It does not wait for the disk.
func (v *Vault) Temporary(save func(dir string) error) (dir string, remove func() error, err error) {
	dir = v.Path(NewName()) + partialSuffix
	remove = func() error { return os.RemoveAll(dir) }
	if err := v.write(dir, save); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return dir, remove, nil
}

// Copy keeps a checkpoint that has the files of another: they are never written to again.
func (v *Vault) Copy(name string) (copied string, man Manifest, err error) {
	read, err := v.Open(name)
	if err != nil {
		return "", Manifest{}, err
	}
	copied = NewName()
	man, err = v.Keep(copied, Manifest{Token: read.Token}, func(dir string) error {
		for _, p := range read.Files {
			if err := os.Link(filepath.Join(read.Dir, p.Name), filepath.Join(dir, p.Name)); err != nil {
				return err
			}
		}
		return nil
	})
	return copied, man, errors.Join(err, read.Close())
}

func (v *Vault) write(dir string, save func(dir string) error) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return fmt.Errorf("make the checkpoint's folder: %w", err)
	}
	if err := save(dir); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return closeToOthers(dir)
}

// closeToOthers makes the files of a checkpoint readable by this user only, whatever modes
// the runtime gave them: they hold the memory of a sandbox, with its secrets. The folder
// keeps other users out as well, but a copy of the files, in a backup say, is without it.
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
func syncedParts(dir string) ([]Part, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	parts := make([]Part, len(entries))
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
	f, err := os.Open(path) // fsync flushes what any process wrote to the file
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

func digest(path string) (Part, error) {
	f, err := os.Open(path)
	if err != nil {
		return Part{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return Part{Name: filepath.Base(path), Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

func writeManifest(dir string, m *Manifest) error {
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

// Reading is a checkpoint that is being restored from.
type Reading struct {
	Dir string
	Manifest
	// Close ends the reading; a second time does nothing.
	Close func() error

	large []Part // compared by Verify
}

// Open starts reading a checkpoint: its files are there, of the size they had,
// and the small ones, which say what the large ones mean, are unchanged. The
// caller closes it.
func (v *Vault) Open(name string) (_ *Reading, err error) {
	if !form.MatchString(name) {
		return nil, fmt.Errorf("checkpoint %q: not a checkpoint's name", name)
	}
	v.mu.Lock()
	v.readers[name]++
	v.mu.Unlock()
	r := &Reading{Dir: v.Path(name), Close: sync.OnceValue(func() error { return v.closed(name) })}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	b, err := os.ReadFile(filepath.Join(r.Dir, manifestFile))
	if err != nil {
		return nil, damaged(err)
	}
	if err := json.Unmarshal(b, &r.Manifest); err != nil {
		return nil, damaged(fmt.Errorf("read the manifest: %w", err))
	}
	if r.Format != manifestFormat {
		return nil, damaged(fmt.Errorf("manifest of format %d, want %d", r.Format, manifestFormat))
	}
	for _, p := range r.Files {
		if p.Size > smallFile {
			r.large = append(r.large, p)
			err = sameSize(filepath.Join(r.Dir, p.Name), p.Size)
		} else {
			err = unchangedFile(r.Dir, p)
		}
		if err != nil {
			return nil, damaged(err)
		}
	}
	return r, nil
}

// Verify compares the large files with their digests. It reads them as fast as
// a restore does, so it belongs beside one and not before it.
func (r *Reading) Verify(ctx context.Context) error {
	for _, p := range r.large {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unchangedFile(r.Dir, p); err != nil {
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

func unchangedFile(dir string, want Part) error {
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

// closed counts a reading less, and removes what was dropped meanwhile after the last.
func (v *Vault) closed(name string) error {
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

// Drop removes a checkpoint, at once or after its last reader. Dropping one
// that is not there is not an error.
func (v *Vault) Drop(name string) error {
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
func (v *Vault) remove(name string) error {
	v.mu.Lock()
	delete(v.sizes, name)
	v.mu.Unlock()
	gone := v.Path(name) + partialSuffix
	if err := os.Rename(v.Path(name), gone); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	return nil
}

// Sweep makes the folder, or removes everything in it but the named checkpoints: what a
// crash left, and what no record names any more. Call it before all other methods but
// Warm.Load.
func (v *Vault) Sweep(keep map[string]bool) error {
	if err := errors.Join(os.MkdirAll(v.dir, 0o700), os.Chmod(v.dir, 0o700)); err != nil {
		return fmt.Errorf("make the snapshot directory: %w", err)
	}
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return fmt.Errorf("look through the checkpoints: %w", err)
	}
	var failed []error
	for _, e := range entries {
		name := e.Name()
		if keep[name] { // of an earlier version, maybe
			failed = append(failed, os.Chmod(v.Path(name), 0o700), closeToOthers(v.Path(name)))
			continue
		}
		if !form.MatchString(strings.TrimSuffix(name, partialSuffix)) {
			continue
		}
		failed = append(failed, os.RemoveAll(v.Path(name)))
	}
	return errors.Join(failed...)
}

// Size is how many bytes a checkpoint has; 0 of one that is not there.
func (v *Vault) Size(name string) int64 {
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
	v.sizes[name] = man.Bytes()
	return v.sizes[name]
}

// manifestOf reads a checkpoint's manifest and compares nothing with it.
func (v *Vault) manifestOf(name string) (m Manifest, err error) {
	b, err := os.ReadFile(filepath.Join(v.Path(name), manifestFile))
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(b, &m)
}
