package image

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/statefile"
)

// cas is the directory of unpacked images:
//
//	<key>/manifest.json, <key>/rootfs   an image; its presence means complete
//	.<key>.lock                         flock: exclusive to make or remove, shared to use
//	.<key>.tmp-*                        one being made
type cas struct{ dir string }

const (
	manifestFormat = 1
	waitTick       = 100 * time.Millisecond
)

var keyForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

// Manifest describes an image. It is written last and never changed.
type Manifest struct {
	Format   int               `json:"format"`
	Key      string            `json:"key"` // what it is made from: a recipe's digest or an OCI image's
	Kind     Kind              `json:"kind"`
	Source   string            `json:"source"`   // for people: "Debian bookworm, 17 packages", "docker.io/library/x@sha256:…"
	Platform string            `json:"platform"` // "linux/amd64"
	Contents string            `json:"contents"` // "sha256:…" over every file
	Bytes    int64             `json:"bytes"`
	Files    int64             `json:"files"`
	Created  time.Time         `json:"created"`
	Env      map[string]string `json:"env"`
	User     string            `json:"user"`
	Workdir  string            `json:"workdir"`
}

func (c cas) rootfs(key string) string { return filepath.Join(c.dir, key, "rootfs") }

// load reads the manifest of a complete image, or returns os.ErrNotExist.
func (c cas) load(key string) (Manifest, error) {
	var m Manifest
	path := filepath.Join(c.dir, key, "manifest.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return m, fmt.Errorf("read image manifest: %w", err)
	}
	if err := json.Unmarshal(b, &m); err != nil || m.Format != manifestFormat || m.Key != key {
		return m, fmt.Errorf("image manifest %s is damaged or of another version: remove %s and try again", path, filepath.Dir(path))
	}
	if fi, err := os.Lstat(c.rootfs(key)); err != nil || !fi.IsDir() {
		return m, fmt.Errorf("image %s has no rootfs: remove that directory and try again", filepath.Join(c.dir, key))
	}
	return m, nil
}

// job is one image being made.
type job struct {
	rootfs string // to be created, in a directory of its own
	// lock is inherited by the processes that build, so that the directory is not
	// swept while an orphaned one still writes to it.
	lock     *os.File
	progress *progress
}

// maker makes j.rootfs and returns what it knows of the manifest.
type maker func(ctx context.Context, j job) (Manifest, error)

// ensure returns the image of key, making it if it is not there. One process
// makes it, others wait. An interrupted attempt leaves nothing that counts.
func (c cas) ensure(ctx context.Context, key string, p *progress, make maker) (Manifest, error) {
	lock, err := c.lock(ctx, key, p)
	if err != nil {
		return Manifest{}, err
	}
	defer lock.Close()
	if m, err := c.load(key); err == nil || !errors.Is(err, os.ErrNotExist) {
		return m, err // another process made it meanwhile
	}
	if err := c.sweep(key); err != nil {
		return Manifest{}, err
	}
	tmp, err := os.MkdirTemp(c.dir, "."+key+".tmp-")
	if err != nil {
		return Manifest{}, fmt.Errorf("create image directory: %w", err)
	}
	m, err := c.fill(ctx, key, job{rootfs: filepath.Join(tmp, "rootfs"), lock: lock, progress: p}, make)
	if err != nil {
		return Manifest{}, errors.Join(err, removeTree(tmp))
	}
	return m, nil
}

// fill makes the image in a temporary directory and renames that into place.
func (c cas) fill(ctx context.Context, key string, j job, make maker) (Manifest, error) {
	tmp, p := filepath.Dir(j.rootfs), j.progress
	if err := os.Chmod(tmp, 0o755); err != nil { // the runtime's unprivileged parts pass through
		return Manifest{}, fmt.Errorf("open image directory: %w", err)
	}
	m, err := make(ctx, j)
	if err != nil {
		return m, err
	}
	p.step("computing the digest of the contents")
	sum, err := hashTree(ctx, j.rootfs)
	if err != nil {
		return m, err
	}
	m.Format, m.Key, m.Created = manifestFormat, key, time.Now().UTC()
	m.Contents, m.Bytes, m.Files = sum.digest, sum.bytes, sum.files
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return m, fmt.Errorf("encode image manifest: %w", err)
	}
	if err := os.WriteFile(filepath.Join(tmp, "manifest.json"), append(b, '\n'), 0o644); err != nil {
		return m, fmt.Errorf("write image manifest: %w", err)
	}
	p.step("writing to disk")
	if err := syncFS(tmp); err != nil {
		return m, err
	}
	if err := os.Rename(tmp, filepath.Join(c.dir, key)); err != nil {
		return m, fmt.Errorf("put image into place: %w", err)
	}
	p.step("done: %d MB in %d files", m.Bytes>>20, m.Files)
	return m, syncFS(c.dir)
}

// syncFS flushes the file system of dir: after a power failure an image is
// either complete or absent.
func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("flush image: %w", err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("flush image: %w", err)
	}
	return nil
}

// sweep removes what interrupted attempts left. The lock is held, so nobody is at it.
func (c cas) sweep(key string) error {
	left, err := filepath.Glob(filepath.Join(c.dir, "."+key+".tmp-*"))
	if err != nil {
		return fmt.Errorf("look for unfinished images: %w", err)
	}
	for _, dir := range left {
		if err := removeTree(dir); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes an image nobody uses.
func (c cas) remove(key string) error {
	f, err := c.tryLock(key, false)
	if err != nil {
		return err
	}
	if f == nil {
		return errs.New(errs.Conflict, "image %s is in use by another cordon server or being built: stop that first", key)
	}
	defer f.Close()
	dir := filepath.Join(c.dir, key)
	gone := filepath.Join(c.dir, "."+key+".tmp-removed")
	if err := os.Rename(dir, gone); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove image: %w", err)
	}
	return c.sweep(key)
}

// lock waits for the exclusive lock of key.
func (c cas) lock(ctx context.Context, key string, p *progress) (*os.File, error) {
	for {
		f, err := c.tryLock(key, false)
		if f != nil || err != nil {
			return f, err
		}
		p.step("waiting: another process is making or using the same image")
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for image lock: %w", ctx.Err())
		case <-time.After(waitTick):
		}
		// One that was made meanwhile may be in use already: its users hold the
		// lock shared, and there is nothing to wait for.
		if _, err := c.load(key); err == nil {
			return c.share(key)
		}
	}
}

// share takes the lock that keeps others from removing an image.
func (c cas) share(key string) (*os.File, error) {
	f, err := c.tryLock(key, true)
	if err == nil && f == nil {
		return nil, errs.New(errs.Conflict, "image %s is being removed or rebuilt: try again", key)
	}
	return f, err
}

// tryLock returns nil without an error when the lock is taken.
func (c cas) tryLock(key string, shared bool) (*os.File, error) {
	return statefile.TryLock(filepath.Join(c.dir, "."+key+".lock"), shared)
}

// removeTree deletes dir, but refuses when something is mounted below it: a
// build killed half-way may leave the machine's own /dev there.
func removeTree(dir string) error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			return fmt.Errorf("remove %s: %s is mounted there: unmount it first", dir, f[4])
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove image directory: %w", err)
	}
	return nil
}

// treeSum is the result of hashTree.
type treeSum struct {
	digest string
	bytes  int64
	files  int64
}

// hashTree digests names, types, permissions, owners and contents of all files
// below dir; not times, which a later build of the same packages changes.
func hashTree(ctx context.Context, dir string) (treeSum, error) {
	var sum treeSum
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		n, err := hashFile(h, path, rel)
		sum.bytes += n
		sum.files++
		return err
	})
	if err != nil {
		return treeSum{}, fmt.Errorf("digest image: %w", err)
	}
	sum.digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return sum, nil
}

func hashFile(h hash.Hash, path, rel string) (int64, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	field(h, rel)
	for _, v := range []uint32{st.Mode, st.Uid, st.Gid} {
		h.Write(binary.BigEndian.AppendUint32(nil, v))
	}
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		if err != nil {
			return 0, err
		}
		field(h, target)
	case fi.Mode().IsRegular():
		field(h, capability(path))
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(fi.Size())))
		f, err := os.Open(path)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		return io.Copy(h, f)
	}
	return 0, nil
}

// field writes s so that neighbours cannot run together.
func field(h hash.Hash, s string) {
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
	_, _ = io.WriteString(h, s) // a hash never fails
}

// capability returns a file's capabilities (ping's, for one), or nothing.
func capability(path string) string {
	b := make([]byte, 64)
	n, err := unix.Lgetxattr(path, "security.capability", b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}
