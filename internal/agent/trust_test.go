package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func cert(name string) string {
	return "-----BEGIN CERTIFICATE-----\n" + name + "\n-----END CERTIFICATE-----\n"
}

func TestTrustedCertificatesAreAdded(t *testing.T) {
	const debian, fedora = "etc/ssl/certs/ca-certificates.crt", "etc/pki/tls/certs/ca-bundle.crt"
	local := "usr/local/share/ca-certificates/"
	for _, c := range []struct {
		name          string
		own, machine  string
		image, result map[string]string
	}{
		{"to those of the image", cert("own") + "# more\n" + cert("extra"), cert("public") + cert("office"),
			map[string]string{debian: cert("public") + cert("image")},
			map[string]string{debian: cert("public") + cert("image") + cert("office") + cert("own") + cert("extra"),
				local + "cordon-1.crt": cert("own"), local + "cordon-2.crt": cert("extra")}},
		{"to an image without any", cert("own"), cert("public"), nil,
			map[string]string{debian: cert("public") + cert("own"), local + "cordon-1.crt": cert("own")}},
		{"after a file without a last newline", cert("own"), "", map[string]string{debian: strings.TrimSpace(cert("image"))},
			map[string]string{debian: cert("image") + cert("own"), local + "cordon-1.crt": cert("own")}},
		{"where Fedora keeps them", cert("own"), "", map[string]string{fedora: cert("image"), "etc/pki/ca-trust/source/anchors/x": ""},
			map[string]string{debian: cert("own"), fedora: cert("image") + cert("own"),
				"etc/pki/ca-trust/source/anchors/x": "", "etc/pki/ca-trust/source/anchors/cordon-1.crt": cert("own"), local + "cordon-1.crt": cert("own")}},
		{"once", cert("own"), cert("public") + cert("own"), map[string]string{debian: cert("own") + cert("public")},
			map[string]string{debian: cert("own") + cert("public"), local + "cordon-1.crt": cert("own")}},
		{"with other line ends", strings.ReplaceAll(cert("own"), "\n", "\r\n"), "", map[string]string{debian: cert("own")},
			map[string]string{debian: cert("own"), local + "cordon-1.crt": cert("own")}},
		{"if there are any", "", "", map[string]string{debian: cert("image")}, map[string]string{debian: cert("image")}},
		{"only if they are whole", "-----BEGIN CERTIFICATE-----\nbroken", "", map[string]string{debian: cert("image")}, map[string]string{debian: cert("image")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			folder, root := t.TempDir(), t.TempDir()
			put := func(path, text string) {
				t.Helper()
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			put(filepath.Join(folder, OwnCAs), c.own)
			put(filepath.Join(folder, Machine), c.machine)
			for path, text := range c.image {
				put(filepath.Join(root, path), text)
			}
			for range 2 { // the second time changes nothing
				if err := TrustCAs(folder, root); err != nil {
					t.Fatal(err)
				}
			}
			var got, want []string
			_ = filepath.Walk(root, func(path string, fi os.FileInfo, err error) error {
				if err == nil && fi.Mode().IsRegular() {
					b, _ := os.ReadFile(path)
					got = append(got, strings.TrimPrefix(path, root+"/")+": "+string(b))
				}
				return err
			})
			for path, text := range c.result {
				want = append(want, path+": "+text)
			}
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}
