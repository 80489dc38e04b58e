package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/cordonhq/cordon/internal/errs"
)

// unpacker applies layers, lowest first, to a directory
// (https://github.com/opencontainers/image-spec/blob/main/layer.md). What a
// layer says is not trusted: names cannot lead out of the root, sizes and numbers
// are bounded, devices are left out.
type unpacker struct {
	t        tree
	ctx      context.Context // ends the unpacking between two reads
	bytes    int64           // left to write
	stream   int64           // left to read, of all layers' uncompressed bytes
	files    int             // left to make
	maxBytes int64           // for messages
	maxFiles int
	made     map[string]bool // paths of the layer at hand, relative and resolved
}

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	maxLink  = 4096 // PATH_MAX
)

func newUnpacker(ctx context.Context, root *os.Root, maxBytes int64, maxFiles int) *unpacker {
	return &unpacker{t: tree{root}, ctx: ctx, bytes: maxBytes, stream: maxBytes, files: maxFiles, maxBytes: maxBytes, maxFiles: maxFiles}
}

// layer applies one uncompressed layer.
func (u *unpacker) layer(r io.Reader) error {
	u.made = map[string]bool{}
	tr := tar.NewReader(meter{u, r})
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return badLayer(err, "is not a readable tar stream")
		}
		if u.files--; u.files < 0 {
			return errs.New(errs.Invalid, "image has more than %d files: raise the limit if you trust it", u.maxFiles)
		}
		if err := u.entry(h, tr); err != nil {
			return err
		}
	}
}

// meter counts a stream against the limit and ends it with the context.
type meter struct {
	u *unpacker
	r io.Reader
}

func (m meter) Read(b []byte) (int, error) {
	if err := m.u.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.r.Read(b)
	if m.u.stream -= int64(n); m.u.stream < 0 {
		return n, m.u.tooBig()
	}
	return n, err
}

func (u *unpacker) tooBig() error {
	return errs.New(errs.Invalid, "image is larger than %d bytes unpacked: raise the limit if you trust it", u.maxBytes)
}

func badLayer(err error, format string, args ...any) error {
	if err == nil || errs.KindOf(err) != errs.Internal || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return errs.New(errs.Invalid, "image layer %s: %v", fmt.Sprintf(format, args...), err)
}

// entry applies one entry of a layer.
func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	for part := range strings.SplitSeq(h.Name, "/") {
		if part == ".." {
			return errs.New(errs.Invalid, "image layer has the entry %q, which leaves the root", h.Name)
		}
	}
	name, err := u.t.resolve(h.Name)
	if err != nil {
		return badLayer(err, "has the entry %q", h.Name)
	}
	if name == "." {
		return nil // the root's own mode is ours to choose
	}
	if base := path.Base(name); strings.HasPrefix(base, whiteout) {
		return badLayer(u.whiteout(path.Dir(name), base), "has the whiteout %q", h.Name)
	}
	if err := u.create(h, name, r); err != nil {
		return badLayer(err, "has the entry %q", h.Name)
	}
	u.made[name] = true
	return nil
}

// whiteout removes what a lower layer put there.
func (u *unpacker) whiteout(dir, base string) error {
	if base == opaque {
		return u.hideChildren(dir)
	}
	name := strings.TrimPrefix(base, whiteout)
	if name == "" || name == "." || name == ".." || strings.HasPrefix(name, whiteout) {
		return nil // bookkeeping of old storage drivers
	}
	if name = path.Join(dir, name); u.made[name] {
		return nil // hides lower layers only
	}
	return u.t.root.RemoveAll(name)
}

// hideChildren removes what lower layers put into dir.
func (u *unpacker) hideChildren(dir string) error {
	entries, err := fs.ReadDir(u.t.root.FS(), dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		if u.made[name] && e.IsDir() {
			err = u.hideChildren(name)
		} else if !u.made[name] {
			err = u.t.root.RemoveAll(name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// create makes one file, directory or link, replacing what is there.
func (u *unpacker) create(h *tar.Header, name string, r io.Reader) error {
	if err := u.t.mkdir(path.Dir(name)); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		return u.dir(h, name)
	}
	target := ""
	if h.Typeflag == tar.TypeLink {
		var err error
		if target, err = u.t.resolve(h.Linkname); err != nil {
			return err
		}
		if fi, err := u.t.root.Lstat(target); err != nil {
			return err
		} else if !fi.Mode().IsRegular() && fi.Mode().Type() != fs.ModeSymlink {
			return fmt.Errorf("hard link to %q, which is no file", h.Linkname)
		}
		if target == name {
			return nil
		}
	}
	if err := u.t.root.RemoveAll(name); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return u.file(h, name, r)
	case tar.TypeSymlink:
		if len(h.Linkname) > maxLink {
			return fmt.Errorf("link target of %d bytes", len(h.Linkname))
		}
		if err := u.t.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return u.t.root.Lchown(name, h.Uid, h.Gid)
	case tar.TypeLink:
		return u.t.root.Link(target, name)
	}
	return nil // devices, pipes: the runtime provides /dev
}

func (u *unpacker) dir(h *tar.Header, name string) error {
	fi, err := u.t.root.Lstat(name)
	if err == nil && !fi.IsDir() {
		if err := u.t.root.RemoveAll(name); err != nil {
			return err
		}
	}
	if err := u.t.mkdir(name); err != nil {
		return err
	}
	return u.own(h, name)
}

func (u *unpacker) file(h *tar.Header, name string, r io.Reader) error {
	if h.Size > u.bytes {
		return u.tooBig()
	}
	w, err := u.t.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(w, io.LimitReader(r, u.bytes+1))
	if u.bytes -= n; u.bytes < 0 {
		err = u.tooBig()
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	if err := u.own(h, name); err != nil {
		return err
	}
	return u.t.root.Chtimes(name, h.ModTime, h.ModTime)
}

// own sets owner, then mode: changing the owner clears set-user-ID.
func (u *unpacker) own(h *tar.Header, name string) error {
	if err := u.t.root.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	return u.t.root.Chmod(name, h.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky))
}
