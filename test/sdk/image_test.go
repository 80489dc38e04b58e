package sdk

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// profileOfDebian sets PATH anew, as most distributions' do.
const profileOfDebian = `if [ "$(id -u)" -eq 0 ]; then
  PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
else
  PATH="/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
fi
export PATH
if [ -d /etc/profile.d ]; then
  for i in /etc/profile.d/*.sh; do if [ -r $i ]; then . $i; fi; done
  unset i
fi
`

// TestSettingsOfAnImageHold imports a small image whose ENV, USER and WORKDIR differ
// from all that a sandbox has by default, and asks each SDK what its commands see.
func TestSettingsOfAnImageHold(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	s := newStand(t)
	dir := t.TempDir()
	writeImage(t, dir)
	output(t, s, "image", "import", dir, "settings")
	t.Cleanup(func() {
		s.Stop(t, syscall.SIGTERM) // the server keeps the images it uses
		output(t, s, "image", "remove", "settings")
	})
	for _, sdk := range []string{"novita", "e2b"} {
		t.Run("JavaScript "+sdk, func(t *testing.T) { s.runScenarios(t, node(t), "js/image.mjs", sdk) })
		t.Run("Python "+sdk, func(t *testing.T) { s.runScenarios(t, python(t), "python/image.py", sdk) })
	}
	t.Run("cordon exec", func(t *testing.T) {
		id := strings.TrimSpace(output(t, s, "create", "settings"))
		defer output(t, s, "kill", id)
		if got := output(t, s, "exec", id, "hi; id -u; id -g; pwd"); got != "hi from the tool\n1001\n0\n/data\n" {
			t.Errorf("got %q", got)
		}
	})
}

// output runs cordon on the server's machine.
func output(t *testing.T, s *live, args ...string) string {
	t.Helper()
	cmd := s.Command(context.Background(), args...) // also while the test ends
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("cordon %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// writeImage writes an OCI layout: bash and two programs of this machine, and a tool
// in a folder of its own.
func writeImage(t *testing.T, dir string) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, mode int64, uid int, kind byte, link string, content []byte) {
		t.Helper()
		h := &tar.Header{Name: name, Mode: mode, Uid: uid, Typeflag: kind, Linkname: link, Size: int64(len(content))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range programs(t) {
		add(name, 0o755, 0, tar.TypeReg, "", content)
	}
	add("bin/sh", 0, 0, tar.TypeSymlink, "bash", nil)
	add("etc/profile", 0o644, 0, tar.TypeReg, "", []byte(profileOfDebian))
	add("etc/profile.d/more.sh", 0o644, 0, tar.TypeReg, "", []byte("PATH=$PATH:/opt/more\n"))
	add("etc/passwd", 0o644, 0, tar.TypeReg, "", []byte("root:x:0:0:root:/root:/bin/bash\n"))
	add("etc/group", 0o644, 0, tar.TypeReg, "", []byte("root:x:0:\n"))
	add("opt/tool/bin/hi", 0o755, 0, tar.TypeReg, "", []byte("#!/bin/bash\necho hi from the tool\n"))
	add("data/", 0o770, 1001, tar.TypeDir, "", nil)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Env: []string{"PATH=/opt/tool/bin:/bin", "GREETING=a b", "LANG=C"}, User: "1001:0", WorkingDir: "/data"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
}

// programs are programs of this machine with the libraries they load, by their path
// in the image.
func programs(t *testing.T) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, name := range []string{"bash", "cat", "id"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		from := map[string]string{"bin/" + name: path}
		libraries, err := exec.CommandContext(t.Context(), "ldd", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		for field := range strings.FieldsSeq(string(libraries)) {
			if filepath.IsAbs(field) {
				from[strings.TrimPrefix(field, "/")] = field
			}
		}
		for in, path := range from {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			out[in] = content
		}
	}
	return out
}
