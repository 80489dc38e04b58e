package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/cordonhq/cordon/internal/errs"
)

// entry0 is one tar entry of a layer made by a test.
type entry0 struct {
	name, link, text string
	kind             byte // tar.TypeReg when zero
	mode             int64
	uid              int
}

func tarOf(t testing.TB, entries []entry0) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if e.kind == 0 {
			e.kind = tar.TypeReg
		}
		if e.mode == 0 {
			e.mode = 0o755
		}
		h := &tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.kind, Mode: e.mode, Uid: e.uid, Gid: e.uid, Size: int64(len(e.text)), Format: tar.FormatPAX}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func layerOf(t testing.TB, entries []entry0) v1.Layer {
	t.Helper()
	b := tarOf(t, entries)
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// imageOf makes an image for a platform of layers, lowest first.
func imageOf(t testing.TB, arch string, config v1.Config, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.ConfigFile(img, func() *v1.ConfigFile {
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		c.OS, c.Architecture, c.Config = "linux", arch, config
		return c
	}())
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func layoutOf(t testing.TB, img v1.Image) string {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	return dir
}

func otherArch() string {
	if runtime.GOARCH == "amd64" {
		return "arm64"
	}
	return "amd64"
}

// small is a plausible image: two layers, of which the upper hides and replaces.
func small(t testing.TB, arch string) v1.Image {
	return imageOf(t, arch,
		v1.Config{Env: []string{"PATH=/opt/bin:/bin", "GREETING=hi", "broken"}, User: "1001:1001", WorkingDir: "/srv/app"},
		layerOf(t, []entry0{
			{name: "bin/", kind: tar.TypeDir}, {name: "bin/sh", text: "shell"}, {name: "bin/su", text: "su", mode: 0o4755},
			{name: "etc/passwd", text: "root:x:0:0::/root:/bin/sh\napp:x:1001:1001::/srv/app:/bin/sh\nother:x:1000:1000::/:/bin/sh", mode: 0o644},
			{name: "var/", kind: tar.TypeDir}, {name: "run/", kind: tar.TypeDir}, {name: "var/run", kind: tar.TypeSymlink, link: "/run"},
			{name: "gone", text: "x"}, {name: "cache/a", text: "a"}, {name: "cache/b/c", text: "c"}, {name: "turns", text: "file"},
			{name: "data", text: "shared", uid: 33, mode: 0o640}, {name: "hard", kind: tar.TypeLink, link: "data"},
			{name: "dev/null", kind: tar.TypeChar}, {name: "pipe", kind: tar.TypeFifo},
		}),
		layerOf(t, []entry0{
			{name: ".wh.gone"}, {name: "cache/new", text: "new"}, {name: "cache/.wh..wh..opq"},
			{name: "turns/", kind: tar.TypeDir, mode: 0o1777}, {name: "turns/into", text: "directory"},
			{name: "var/run/app.pid", text: "1"}, {name: ".wh..wh.plnk"},
		}))
}

func checkSmall(t *testing.T, l *Library, as string) {
	t.Helper()
	img, err := l.Resolve(t.Context(), as)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"PATH": "/opt/bin:/bin", "GREETING": "hi", "LANG": locale}
	if diff := cmp.Diff(want, img.Env); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	if img.User != "app" || img.Workdir != "/srv/app" || img.Name != as || !strings.HasPrefix(img.Digest, "sha256:") {
		t.Errorf("%+v", img)
	}
	for file, want := range map[string]string{
		"bin/sh": "shell", "cache/new": "new", "turns/into": "directory", "run/app.pid": "1", "hard": "shared",
		"etc/passwd": "user:x:1002:1002::/home/user:/bin/sh\n", "etc/resolv.conf": "nameserver", "etc/group": "user:x:1002:",
	} {
		b, err := os.ReadFile(filepath.Join(img.Rootfs, file))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %q, %v", file, b, err)
		}
	}
	for _, file := range []string{"gone", ".wh.gone", "cache/a", "cache/b", "dev/null", "pipe", "cache/.wh..wh..opq"} {
		if _, err := os.Lstat(filepath.Join(img.Rootfs, file)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", file, err)
		}
	}
	for file, want := range map[string]os.FileMode{
		"bin/su": 0o755 | os.ModeSetuid, "data": 0o640, "turns": 0o777 | os.ModeSticky | os.ModeDir, "tmp": 0o777 | os.ModeSticky | os.ModeDir, "proc": 0o755 | os.ModeDir,
	} {
		if fi, err := os.Lstat(filepath.Join(img.Rootfs, file)); err != nil || fi.Mode() != want {
			t.Errorf("%s: %v, want %v", file, fi.Mode(), want)
		}
	}
	if uid, _ := owner(t, filepath.Join(img.Rootfs, "data")); uid != 33 {
		t.Errorf("data belongs to %d", uid)
	}
	if uid, _ := owner(t, filepath.Join(img.Rootfs, "home/user")); uid != 1002 {
		t.Errorf("home belongs to %d", uid)
	}
	if err := l.Verify(t.Context(), as); err != nil {
		t.Error(err)
	}
}

func TestImportFromARegistry(t *testing.T) {
	privileged(t)
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	ref, err := name.ParseReference(host + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	// An index of two platforms: ours must be picked.
	idx := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: imageOf(t, otherArch(), v1.Config{}), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: otherArch()}}},
		mutate.IndexAddendum{Add: small(t, runtime.GOARCH), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	l := library(t, t.TempDir())
	man, err := l.Import(t.Context(), host+"/app:1", "App_1.x")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(man.Source, host+"/app@sha256:") {
		t.Errorf("source %s", man.Source)
	}
	checkSmall(t, l, "App_1.x")
	if _, err := l.Resolve(t.Context(), "app_1.x"); !errs.Is(err, errs.NotFound) {
		t.Errorf("names differ by case: %v", err)
	}
	list, err := l.List(t.Context())
	if err != nil || len(list) != 4 || list[0].Name != "App_1.x" || !list[0].Built || list[1].Name != "base" {
		t.Errorf("%+v, %v", list, err)
	}
	if err := l.Remove(t.Context(), "App_1.x"); err != nil {
		t.Fatal(err)
	}
	if left := visible(t, l.cfg.Dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := l.Import(t.Context(), host+"/nothing:1", "x"); !errs.Is(err, errs.Invalid) {
		t.Errorf("absent image: %v", err)
	}
}

func TestImportFromFiles(t *testing.T) {
	privileged(t)
	img := small(t, runtime.GOARCH)
	dir := layoutOf(t, img)
	saved := filepath.Join(t.TempDir(), "saved.tar")
	tag, err := name.NewTag("app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(saved, tag, img); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "oci.tar.gz")
	f, err := os.Create(archive)
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	w := tar.NewWriter(z)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	for what, ref := range map[string]string{"layout": dir, "docker-save": saved, "archive": archive} {
		t.Run(what, func(t *testing.T) {
			l := library(t, t.TempDir())
			if _, err := l.Import(t.Context(), ref, "app"); err != nil {
				t.Fatal(err)
			}
			checkSmall(t, l, "app")
			if left, _ := filepath.Glob(filepath.Join(l.cfg.StateDir, "import-*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestHostileLayers imports layers that try to leave the root. Whatever the
// outcome, nothing outside may change.
func TestHostileLayers(t *testing.T) {
	privileged(t)
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	reset := func() {
		os.RemoveAll(outside)
		if err := errors.Join(os.MkdirAll(outside, 0o755), os.WriteFile(secret, []byte("secret"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	up := strings.Repeat("../", 20)
	tests := map[string][][]entry0{
		"a name that climbs":                        {{{name: up + outside[1:] + "/secret", text: "owned"}}},
		"a name that climbs from inside":            {{{name: "a/" + up + outside[1:] + "/new", text: "owned"}}},
		"an absolute name":                          {{{name: secret, text: "owned"}}},
		"a link to the outside, then through it":    {{{name: "l", kind: tar.TypeSymlink, link: outside}, {name: "l/secret", text: "owned"}}},
		"the same over two layers":                  {{{name: "l", kind: tar.TypeSymlink, link: outside}}, {{name: "l/secret", text: "owned"}}},
		"a climbing link, then through it":          {{{name: "l", kind: tar.TypeSymlink, link: up + outside[1:]}, {name: "l/secret", text: "owned"}}},
		"a link over which a file is written":       {{{name: "l", kind: tar.TypeSymlink, link: secret}}, {{name: "l", text: "owned"}}},
		"a hard link to the outside":                {{{name: "h", kind: tar.TypeLink, link: secret}, {name: "h", text: "owned"}}},
		"a hard link through a link":                {{{name: "l", kind: tar.TypeSymlink, link: outside}, {name: "h", kind: tar.TypeLink, link: "l/secret"}}},
		"a hard link to a link, then written":       {{{name: "l", kind: tar.TypeSymlink, link: secret}, {name: "h", kind: tar.TypeLink, link: "l"}, {name: "h", text: "owned"}}},
		"a whiteout through a link":                 {{{name: "l", kind: tar.TypeSymlink, link: outside}}, {{name: "l/.wh.secret"}}},
		"an opaque whiteout through a link":         {{{name: "l", kind: tar.TypeSymlink, link: outside}}, {{name: "l/.wh..wh..opq"}}},
		"a whiteout of the parent":                  {{{name: ".wh..."}, {name: "a/.wh..."}, {name: ".wh.."}}},
		"a directory's mode through a link":         {{{name: "l", kind: tar.TypeSymlink, link: outside}, {name: "l/", kind: tar.TypeDir, mode: 0o777}}},
		"etc as a link":                             {{{name: "etc", kind: tar.TypeSymlink, link: outside}}},
		"passwd as a link":                          {{{name: "etc/passwd", kind: tar.TypeSymlink, link: secret}}},
		"home as a link":                            {{{name: "home", kind: tar.TypeSymlink, link: outside}}},
		"user's home as a link":                     {{{name: "home/user", kind: tar.TypeSymlink, link: outside}}},
		"skel as a link":                            {{{name: "etc/skel", kind: tar.TypeSymlink, link: outside}}},
		"a file of skel as a link":                  {{{name: "etc/skel/x", kind: tar.TypeSymlink, link: secret}}},
		"sudoers.d as a link":                       {{{name: "etc/sudoers.d", kind: tar.TypeSymlink, link: outside}}},
		"resolv.conf as a link":                     {{{name: "etc/resolv.conf", kind: tar.TypeSymlink, link: secret}}},
		"proc as a link":                            {{{name: "proc", kind: tar.TypeSymlink, link: outside}}},
		"links in a circle":                         {{{name: "a", kind: tar.TypeSymlink, link: "b"}, {name: "b", kind: tar.TypeSymlink, link: "a"}, {name: "a/x", text: "x"}}},
		"a file as a directory":                     {{{name: "a", text: "file"}, {name: "a/b", text: "x"}}},
		"a passwd that is a directory":              {{{name: "etc/passwd/", kind: tar.TypeDir}}},
		"a passwd that is not text":                 {{{name: "etc/passwd", text: "user:\x00:::::\nuser:x:-1:0:::"}}},
		"a user with a number that is none of ours": {{{name: "etc/passwd", text: "user:x:99999999999999:0::/:\n"}}},
		"a name of a thousand directories":          {{{name: strings.Repeat("d/", 1000) + "f", text: "x"}}},
		"a device":                                  {{{name: "sda", kind: tar.TypeBlock}}},
	}
	for what, layers := range tests {
		t.Run(what, func(t *testing.T) {
			reset()
			var ls []v1.Layer
			for _, entries := range layers {
				ls = append(ls, layerOf(t, entries))
			}
			l := library(t, t.TempDir())
			_, err := l.Import(t.Context(), layoutOf(t, imageOf(t, runtime.GOARCH, v1.Config{}, ls...)), "x")
			t.Logf("import: %v", err)
			if err != nil && !errs.Is(err, errs.Invalid) {
				t.Errorf("a bad image is not invalid but: %v", err)
			}
			if err != nil && len(visible(t, l.cfg.Dir)) > 0 {
				t.Errorf("left: %v", visible(t, l.cfg.Dir))
			}
			b, err := os.ReadFile(secret)
			if err != nil || string(b) != "secret" {
				t.Errorf("the secret was changed: %q, %v", b, err)
			}
			if fi, err := os.Stat(outside); err != nil || fi.Mode().Perm() != 0o755 {
				t.Errorf("the directory outside was changed: %v, %v", fi, err)
			}
			if e, _ := os.ReadDir(outside); len(e) != 1 {
				t.Errorf("files were made outside: %v", e)
			}
			if uid, _ := owner(t, outside); uid != 0 {
				t.Errorf("the directory outside now belongs to %d", uid)
			}
			noCopies(t, l.cfg.Dir)
		})
	}
}

// noCopies fails when the secret got into an image.
func noCopies(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if b, err := os.ReadFile(path); err == nil && string(b) == "secret" {
			t.Errorf("the secret is in %s", path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestLimits(t *testing.T) {
	privileged(t)
	many := make([]entry0, 6000)
	for i := range many {
		many[i] = entry0{name: fmt.Sprint("f", i)}
	}
	var zeros bytes.Buffer // a small layer that unpacks to 80 MB
	z := gzip.NewWriter(&zeros)
	tw := tar.NewWriter(z)
	if err := tw.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: 80 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(tw, zeroes{}, 80<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tw.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	bomb, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(zeros.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, want string
		img        v1.Image
	}{
		{"too many files", "more than 5000 files", imageOf(t, runtime.GOARCH, v1.Config{}, layerOf(t, many))},
		{"too many bytes", "larger than", imageOf(t, runtime.GOARCH, v1.Config{}, bomb)},
		{"another machine's image", "this machine needs linux/" + runtime.GOARCH, imageOf(t, otherArch(), v1.Config{})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := library(t, t.TempDir())
			_, err := l.Import(t.Context(), layoutOf(t, tt.img), "x")
			if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if left := visible(t, l.cfg.Dir); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestDamagedBlobsAreRefused changes each blob of a layout in turn.
func TestDamagedBlobsAreRefused(t *testing.T) {
	privileged(t)
	dir := layoutOf(t, small(t, runtime.GOARCH))
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil || len(blobs) != 4 { // manifest, configuration, two layers
		t.Fatalf("%v, %v", blobs, err)
	}
	for _, blob := range blobs {
		good, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		if bad[0] == '{' {
			bad = append([]byte(" "), bad...) // the same JSON of another digest
		} else {
			bad[9]++ // gzip's operating system: the same contents of another digest
		}
		if err := os.WriteFile(blob, bad, 0o644); err != nil {
			t.Fatal(err)
		}
		l := library(t, t.TempDir())
		if _, err := l.Import(t.Context(), dir, "x"); !errs.Is(err, errs.Invalid) {
			t.Errorf("damaged %.20s…: %v", good, err)
		}
		if err := os.WriteFile(blob, good, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := library(t, t.TempDir()).Import(t.Context(), dir, "x"); err != nil {
		t.Errorf("undamaged: %v", err)
	}
}

func TestZstdLayers(t *testing.T) {
	privileged(t)
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	plain := tarOf(t, []entry0{{name: "hello", text: "zstd"}})
	if _, err := w.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }, tarball.WithMediaType(types.OCILayerZStd))
	if err != nil {
		t.Fatal(err)
	}
	l := library(t, t.TempDir())
	man, err := l.Import(t.Context(), layoutOf(t, imageOf(t, runtime.GOARCH, v1.Config{}, layer)), "z")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(l.cas.rootfs(man.Key), "hello")); err != nil || string(got) != "zstd" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestImportRefusals(t *testing.T) {
	privileged(t)
	l := library(t, t.TempDir())
	empty := filepath.Join(t.TempDir(), "empty.tar")
	if err := os.WriteFile(empty, tarOf(t, []entry0{{name: "x"}}), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, ref, as, want string }{
		{"a built-in's name", "/x", "base", "built-in"},
		{"the host's name", "/x", "host", "built-in"},
		{"a name that is a path", "/x", "../x", "use up to 63"},
		{"no name", "/x", "", "use up to 63"},
		{"a file that does not exist", "/does/not/exist", "x", "exists"},
		{"a directory that is no layout", t.TempDir(), "x", "not an OCI layout"},
		{"a tarball without an image", empty, "x", "neither oci-layout nor manifest.json"},
		{"a reference that is none", "no spaces allowed", "x", "neither a registry reference"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := l.Import(t.Context(), tt.ref, tt.as); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestPlainHTTPOnlyToThisMachine(t *testing.T) {
	for registry, allowed := range map[string]map[string]bool{
		"localhost:5000": {
			"http://127.0.0.1:5000/v2/": true, "http://localhost:5000/v2/": true, "http://[::1]:5000/v2/": true, "https://registry.test/v2/": true,
			"http://10.0.0.1:5000/v2/": false, "http://registry.test/v2/": false, "http://localhost.evil.test/v2/": false, "http://169.254.169.254/": false,
		},
		"registry.test": {
			"https://registry.test/v2/": true, "https://blobs.test/x": true,
			"http://registry.test/v2/": false, "http://127.0.0.1:5000/v2/": false, "http://localhost/": false, "http://[::1]/": false, "http://blobs.test/x": false,
		},
	} {
		for url, want := range allowed {
			asked := false
			e := registryTransport(registry).(encrypted)
			e.next = roundTripper(func(*http.Request) (*http.Response, error) { asked = true; return nil, io.EOF })
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := e.RoundTrip(r); err == nil || asked != want {
				t.Errorf("%s of registry %s: asked %v, want %v", url, registry, asked, want)
			}
		}
	}
}

// TestARegistryThatLeadsToPlainHTTP redirects its blobs from TLS to plain HTTP.
func TestARegistryThatLeadsToPlainHTTP(t *testing.T) {
	reached := false
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer plain.Close()
	secure := httptest.NewTLSServer(http.RedirectHandler(plain.URL+"/blob", http.StatusTemporaryRedirect))
	defer secure.Close()
	client := &http.Client{Transport: encrypted{next: secure.Client().Transport}}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, secure.URL+"/v2/app/blobs/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(r)
	if err == nil {
		res.Body.Close()
	}
	if err == nil || reached || !strings.Contains(err.Error(), "plain HTTP") {
		t.Errorf("%v, reached %v: want a refusal", err, reached)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestStalledRegistry stops answering in the middle of a layer.
func TestStalledRegistry(t *testing.T) {
	privileged(t)
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	stall := make(chan struct{})
	pushed := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if pushed && strings.Contains(r.URL.Path, "/blobs/") {
			select {
			case <-stall:
			case <-r.Context().Done():
			}
			return
		}
		reg.ServeHTTP(w, r)
	}))
	defer srv.Close()
	defer close(stall)
	host := strings.TrimPrefix(srv.URL, "http://")
	ref, err := name.ParseReference(host + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, small(t, runtime.GOARCH)); err != nil {
		t.Fatal(err)
	}
	pushed = true
	l := library(t, t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := l.Import(ctx, host+"/app:1", "x"); err == nil || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	if left := visible(t, l.cfg.Dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// FuzzLayer unpacks arbitrary bytes as a layer, over a link that leads outside.
func FuzzLayer(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root")
	}
	f.Add(tarOf(f, []entry0{{name: "a/b", text: "x"}, {name: "l", kind: tar.TypeSymlink, link: "../.."}, {name: "l/x", text: "y"}}))
	f.Add(tarOf(f, []entry0{{name: "out/.wh.secret"}, {name: "out/.wh..wh..opq"}, {name: "h", kind: tar.TypeLink, link: "out/secret"}}))
	f.Add([]byte("not a tar"))
	f.Fuzz(func(t *testing.T, layer []byte) {
		dir := t.TempDir()
		inside, outside := filepath.Join(dir, "in"), filepath.Join(dir, "out")
		if err := errors.Join(os.Mkdir(inside, 0o755), os.Mkdir(outside, 0o755), os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600),
			os.Symlink(outside, filepath.Join(inside, "out")), os.Symlink("../out", filepath.Join(inside, "up"))); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(inside)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		r, err := decompress(bytes.NewReader(layer))
		if err != nil {
			return
		}
		defer r.Close()
		u := newUnpacker(t.Context(), root, 1<<20, 100)
		if err := u.layer(r); err == nil {
			for _, user := range []string{"", "app", "1001:0"} {
				who, err := u.t.login(user)
				if err == nil && u.t.adopt(who) == nil {
					_ = u.t.keepEnvironment(defaultEnv())
					_, _ = u.t.workdir(who, "srv/app")
				}
			}
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 2 {
			t.Fatalf("outside: %v, %v", entries, err)
		}
		if b, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(b) != "secret" {
			t.Fatalf("the secret was changed: %q, %v", b, err)
		}
		if e, err := os.ReadDir(outside); err != nil || len(e) != 1 {
			t.Fatalf("outside: %v, %v", e, err)
		}
	})
}
