package image

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/statefile"
)

const (
	importVersion = 3 // of what Import makes of an image; part of its key
	importLimit   = 30 * time.Minute
	maxLayers     = 512
	maxConfig     = 8 << 20 // bytes of an image's configuration
	maxNesting    = 3       // of indexes in indexes
	headerTimeout = 30 * time.Second
)

// Import makes a template of an OCI image and gives it a name, replacing an
// earlier one of that name. ref is a registry reference
// ("docker.io/library/python:3.12-slim"), the directory of an OCI layout, or a
// tarball of a layout or of docker save; a path begins with "/", "./" or "../".
// Every layer's digest is verified.
func (l *Library) Import(ctx context.Context, ref, as string) (Manifest, error) {
	if err := l.checkName(as); err != nil {
		return Manifest{}, err
	}
	if os.Geteuid() != 0 {
		return Manifest{}, errs.New(errs.Unavailable, "images are imported as root, to keep their files' owners: run cordon as root")
	}
	ctx, cancel := context.WithTimeout(ctx, importLimit)
	defer cancel()
	p := l.progress(as)
	p.step("reading %s", ref)
	img, source, done, err := l.open(ctx, ref)
	if err != nil {
		return Manifest{}, err
	}
	defer done()
	c, err := readImage(img)
	if err != nil {
		return Manifest{}, err
	}
	c.source = source
	man, err := l.cas.ensure(ctx, c.key(), p, func(ctx context.Context, j job) (Manifest, error) {
		return l.unpack(ctx, j, c)
	})
	if err != nil {
		return Manifest{}, err
	}
	if err := os.MkdirAll(filepath.Dir(l.nameFile(as)), 0o755); err != nil {
		return Manifest{}, fmt.Errorf("name image: %w", err)
	}
	l.cfg.Log.Info("image imported", "template", as, "source", man.Source, "bytes", man.Bytes)
	return man, step("name image", statefile.Replace(l.nameFile(as), []byte(man.Key+"\n"), 0o644))
}

// open finds the image for this machine's platform behind ref.
func (l *Library) open(ctx context.Context, ref string) (v1.Image, string, func(), error) {
	nothing := func() {}
	if !strings.HasPrefix(ref, "/") && !strings.HasPrefix(ref, "./") && !strings.HasPrefix(ref, "../") {
		img, source, err := l.fetch(ctx, ref)
		return img, source, nothing, err
	}
	fi, err := os.Stat(ref)
	if err != nil {
		return nil, "", nil, errs.Wrap(errs.Invalid, err, "image %q is not readable: name a directory or tarball that exists", ref)
	}
	if fi.IsDir() {
		img, err := fromLayout(ref)
		return img, ref, nothing, err
	}
	dir, err := os.MkdirTemp(l.cfg.StateDir, "import-")
	if err != nil {
		return nil, "", nil, fmt.Errorf("create import directory: %w", err)
	}
	done := func() { os.RemoveAll(dir) }
	img, err := l.fromTarball(ctx, ref, dir)
	if err != nil {
		done()
	}
	return img, ref, done, err
}

// fetch opens an image in a registry.
func (l *Library) fetch(ctx context.Context, ref string) (v1.Image, string, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return nil, "", errs.Wrap(errs.Invalid, err, "image %q is neither a registry reference such as docker.io/library/debian:12 nor a path beginning with / or ./", ref)
	}
	img, err := remote.Image(r, remote.WithContext(ctx), remote.WithPlatform(platform()),
		remote.WithAuth(authn.Anonymous), remote.WithTransport(registryTransport(r.Context().RegistryStr())))
	if err != nil {
		return nil, "", errs.New(errs.Invalid, "image %q cannot be fetched for linux/%s: %v", ref, runtime.GOARCH, err)
	}
	d, err := img.Digest()
	if err != nil {
		return nil, "", errs.Wrap(errs.Invalid, err, "image %q has no readable manifest", ref)
	}
	return img, r.Context().Name() + "@" + d.String(), nil
}

func platform() v1.Platform { return v1.Platform{OS: "linux", Architecture: runtime.GOARCH} }

// encrypted refuses plain HTTP, also of redirects and of the services that hand out
// tokens, unless the registry itself is on this machine and so is what is asked: the
// library behind it would use plain HTTP for all private networks, and a registry
// elsewhere has no business with this machine's services.
type encrypted struct {
	next  http.RoundTripper
	local bool // the registry is on this machine
}

func registryTransport(registry string) http.RoundTripper {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = headerTimeout
	u, err := url.Parse("//" + registry)
	return encrypted{next: t, local: err == nil && thisMachine(u.Hostname())}
}

func thisMachine(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (e encrypted) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && (!e.local || !thisMachine(r.URL.Hostname())) {
		return nil, fmt.Errorf("%s speaks plain HTTP: only a registry on this machine may, and none may lead there", r.URL.Host)
	}
	return e.next.RoundTrip(r)
}

// fromTarball unpacks a tarball of a layout or of docker save into dir.
func (l *Library) fromTarball(ctx context.Context, file, dir string) (v1.Image, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, errs.Wrap(errs.Invalid, err, "image %q is not readable", file)
	}
	defer f.Close()
	plain, err := decompress(f)
	if err != nil {
		return nil, errs.Wrap(errs.Invalid, err, "image %q is not a tarball", file)
	}
	defer plain.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open import directory: %w", err)
	}
	defer root.Close()
	if err := newUnpacker(ctx, root, l.cfg.MaxBytes, l.cfg.MaxFiles).layer(plain); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", file, err)
	}
	if _, err := root.Stat("oci-layout"); err == nil {
		return fromLayout(dir)
	}
	if _, err := root.Stat("manifest.json"); err != nil {
		return nil, errs.New(errs.Invalid, "image %q has neither oci-layout nor manifest.json in it: save it with 'docker save' or as an OCI archive", file)
	}
	img, err := tarball.ImageFromPath(file, nil)
	if err != nil {
		return nil, errs.New(errs.Invalid, "image %q is not readable: %v", file, err)
	}
	return img, nil
}

// fromLayout opens the image for this machine's platform in an OCI layout.
func fromLayout(dir string) (v1.Image, error) {
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, errs.New(errs.Invalid, "image %q is not an OCI layout: %v", dir, err)
	}
	img, err := pick(idx, maxNesting)
	if err != nil {
		return nil, err
	}
	if img == nil {
		return nil, errs.New(errs.Invalid, "image %q has no manifest for linux/%s", dir, runtime.GOARCH)
	}
	return img, nil
}

// pick returns the first image of an index that fits, or nil.
func pick(idx v1.ImageIndex, depth int) (v1.Image, error) {
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, errs.Wrap(errs.Invalid, err, "image index is not readable")
	}
	for _, d := range m.Manifests {
		switch {
		case d.MediaType.IsIndex() && depth > 0:
			sub, err := idx.ImageIndex(d.Digest)
			if err != nil {
				return nil, errs.Wrap(errs.Invalid, err, "image index %s is not readable", d.Digest)
			}
			if img, err := pick(sub, depth-1); img != nil || err != nil {
				return img, err
			}
		case d.MediaType.IsImage() && (d.Platform == nil || d.Platform.Satisfies(platform())):
			img, err := idx.Image(d.Digest)
			if err != nil {
				return nil, errs.Wrap(errs.Invalid, err, "image manifest %s is not readable", d.Digest)
			}
			raw, err := img.RawManifest()
			if err != nil || sum(raw) != d.Digest {
				return nil, errs.Wrap(errs.Invalid, err, "image manifest does not have its digest %s", d.Digest)
			}
			return img, nil
		}
	}
	return nil, nil
}

func sum(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}

// content is an image whose manifest and configuration have been checked.
type content struct {
	source string
	digest v1.Hash
	config *v1.ConfigFile
	layers []v1.Layer
	descs  []v1.Descriptor
}

func (c content) key() string {
	s := sha256.Sum256(fmt.Appendf(nil, "oci %d %s %s", importVersion, c.digest, runtime.GOARCH))
	return hex.EncodeToString(s[:16])
}

// readImage reads the manifest and the configuration and checks that they
// belong together, fit this machine and are within bounds.
func readImage(img v1.Image) (content, error) {
	var c content
	bad := func(err error) error { return errs.New(errs.Invalid, "image is not readable: %v", err) }
	m, err := img.Manifest()
	if err != nil {
		return c, bad(err)
	}
	if len(m.Layers) > maxLayers || m.Config.Size > maxConfig {
		return c, errs.New(errs.Invalid, "image has %d layers and a configuration of %d bytes: the limits are %d and %d", len(m.Layers), m.Config.Size, maxLayers, maxConfig)
	}
	for _, d := range m.Layers {
		if len(d.URLs) > 0 || !d.MediaType.IsDistributable() {
			return c, errs.New(errs.Invalid, "image layer %s is kept outside its registry: such images cannot be imported", d.Digest)
		}
	}
	raw, err := img.RawConfigFile()
	if err != nil {
		return c, bad(err)
	}
	if sum(raw) != m.Config.Digest {
		return c, errs.New(errs.Invalid, "image configuration does not have its digest %s", m.Config.Digest)
	}
	if c.config, err = v1.ParseConfigFile(bytes.NewReader(raw)); err != nil {
		return c, bad(err)
	}
	if c.config.OS != "linux" || c.config.Architecture != runtime.GOARCH {
		return c, errs.New(errs.Invalid, "image is for %s/%s, this machine needs linux/%s", c.config.OS, c.config.Architecture, runtime.GOARCH)
	}
	if len(c.config.RootFS.DiffIDs) != len(m.Layers) {
		return c, errs.New(errs.Invalid, "image has %d layers, its configuration names %d", len(m.Layers), len(c.config.RootFS.DiffIDs))
	}
	if c.layers, err = img.Layers(); err != nil {
		return c, bad(err)
	}
	c.descs = m.Layers
	if c.digest, err = img.Digest(); err != nil {
		return c, bad(err)
	}
	return c, nil
}

// unpack makes the root file system of an image.
func (l *Library) unpack(ctx context.Context, j job, c content) (man Manifest, err error) {
	if err := os.Mkdir(j.rootfs, 0o755); err != nil {
		return man, fmt.Errorf("create rootfs: %w", err)
	}
	root, err := os.OpenRoot(j.rootfs)
	if err != nil {
		return man, fmt.Errorf("open rootfs: %w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	u := newUnpacker(ctx, root, l.cfg.MaxBytes, l.cfg.MaxFiles)
	for i, layer := range c.layers {
		j.progress.step("unpacking layer %d of %d (%d MB)", i+1, len(c.layers), c.descs[i].Size>>20)
		if err := u.verified(layer, c.descs[i].Digest, c.config.RootFS.DiffIDs[i]); err != nil {
			return man, err
		}
	}
	return l.adapt(tree{root}, c)
}

// adapt makes a sandbox's root of an unpacked image. What its configuration says
// holds, or the import is refused.
func (l *Library) adapt(t tree, c content) (Manifest, error) {
	man := Manifest{Kind: OCI, Source: c.source, Platform: "linux/" + runtime.GOARCH, Env: environment(c.config.Config.Env)}
	who, err := t.login(c.config.Config.User)
	if err != nil {
		return man, err
	}
	if err := t.adopt(who); err != nil {
		return man, errs.New(errs.Invalid, "image cannot be adapted: %v", err)
	}
	man.User = who.name
	if err := t.keepEnvironment(man.Env); err != nil {
		return man, errs.New(errs.Invalid, "image cannot be adapted: %v", err)
	}
	man.Workdir, err = t.workdir(who, c.config.Config.WorkingDir)
	return man, err
}

// workdir returns where commands start, made where the image only names it. Without
// one it is the user's home.
func (t tree) workdir(who login, dir string) (string, error) {
	switch dir = path.Clean("/" + dir); {
	case dir != "/":
	case who.name == userName || who.uid == 0 && !who.add:
		return userHome, nil
	default:
		return "~", nil
	}
	rel, err := t.resolve(dir)
	if err == nil {
		if _, missing := t.root.Stat(rel); errors.Is(missing, fs.ErrNotExist) {
			err = t.mkdir(rel)
		}
	}
	if err != nil {
		return "", errs.New(errs.Invalid, "image's working directory is %q, which cannot be made: %v", dir, err)
	}
	return dir, nil
}

// verified applies a layer and compares both its digests: of the compressed
// bytes with the manifest, of the plain ones with the configuration.
func (u *unpacker) verified(layer v1.Layer, digest, diffID v1.Hash) error {
	rc, err := layer.Compressed()
	if err != nil {
		return badLayer(err, "%s cannot be read", digest)
	}
	defer rc.Close()
	packed, plain := sha256.New(), sha256.New()
	stream := io.TeeReader(rc, packed)
	r, err := decompress(stream)
	if err != nil {
		return badLayer(err, "%s cannot be decompressed", digest)
	}
	defer r.Close()
	tee := io.TeeReader(r, plain)
	if err := u.layer(tee); err != nil {
		return err
	}
	// The tar stream ends before its padding does.
	if _, err := io.Copy(io.Discard, meter{u, tee}); err != nil {
		return badLayer(err, "%s cannot be decompressed", digest)
	}
	if _, err := io.Copy(io.Discard, meter{u, stream}); err != nil {
		return badLayer(err, "%s cannot be read", digest)
	}
	for _, c := range []struct {
		h    hash.Hash
		want v1.Hash
	}{{packed, digest}, {plain, diffID}} {
		if got := hex.EncodeToString(c.h.Sum(nil)); c.want.Algorithm != "sha256" || got != c.want.Hex {
			return errs.New(errs.Invalid, "image layer has digest sha256:%s, %s was promised: the source is damaged or lies", got, c.want)
		}
	}
	return nil
}

// decompress finds out by the first bytes whether r is gzip, zstd or plain. The
// manifest's media type is not asked: it is often wrong.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}): // RFC 1952
		return gzip.NewReader(b)
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}): // RFC 8878
		d, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// adopt adds what a sandbox needs and an image may lack, and who its commands run as.
func (t tree) adopt(who login) error {
	for _, dir := range []string{"dev", "proc", "sys", "etc", "run", "tmp", "home"} {
		fi, err := t.root.Lstat(dir)
		if err == nil && fi.IsDir() {
			continue
		}
		if err == nil && fi.Mode().Type() == fs.ModeSymlink && (dir == "run" || dir == "tmp" || dir == "home") {
			continue // leads elsewhere in the image, which is its business
		}
		if err := t.root.RemoveAll(dir); err != nil {
			return err
		}
		if err := t.mkdir(dir); err != nil {
			return err
		}
		if dir == "tmp" {
			if err := t.root.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
				return err
			}
		}
	}
	for _, f := range sharedFiles() {
		if err := t.write(f); err != nil {
			return err
		}
	}
	return t.enrol(who)
}

// environment turns an image's environment into a map, with the defaults it lacks.
func environment(list []string) map[string]string {
	out := defaultEnv()
	for _, kv := range list {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" {
			out[k] = v
		}
	}
	return out
}
