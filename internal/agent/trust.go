package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The files with certificates that the host shows beside the agent.
const (
	OwnCAs  = "ca.pem"     // the server's CA and the operator's extra ones
	Machine = "bundle.pem" // what the machine trusts
)

// bundles are where programs look for trusted certificates, as one file.
var bundles = []string{
	"etc/ssl/certs/ca-certificates.crt",     // Debian, Ubuntu, Alpine, Arch, openSUSE; made where there is none
	"etc/pki/tls/certs/ca-bundle.crt",       // Fedora, RHEL
	"var/lib/ca-certificates/ca-bundle.pem", // openSUSE
}

// anchors are where distributions look for further CAs when they write those files
// anew: update-ca-certificates(8), update-ca-trust(8).
var anchors = []string{
	"usr/local/share/ca-certificates",          // Debian, Ubuntu, Alpine; made where there is none
	"etc/pki/ca-trust/source/anchors",          // Fedora, RHEL
	"etc/ca-certificates/trust-source/anchors", // Arch
	"usr/share/pki/trust/anchors",              // openSUSE
}

// TrustCAs adds the certificates in a folder to what programs below root trust. The
// image's own certificates stay. They are files like others of the image, so its tools
// may replace them, and find ours again where they look for further ones.
func TrustCAs(folder, root string) error {
	own, err := os.ReadFile(filepath.Join(folder, OwnCAs))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	machine, err := os.ReadFile(filepath.Join(folder, Machine))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	all := append(certificates(machine), certificates(own)...)
	var failed []error
	for i, name := range bundles {
		failed = append(failed, extend(filepath.Join(root, name), all, i == 0))
	}
	for i, dir := range anchors {
		failed = append(failed, anchor(filepath.Join(root, dir), certificates(own), i == 0))
	}
	return errors.Join(failed...)
}

// certificates are the PEM blocks of a bundle, each with a newline at its end.
func certificates(bundle []byte) (out [][]byte) {
	begin, end := []byte("-----BEGIN CERTIFICATE-----"), []byte("-----END CERTIFICATE-----")
	for {
		i := bytes.Index(bundle, begin)
		if i < 0 {
			return out
		}
		n := bytes.Index(bundle[i:], end)
		if n < 0 {
			return out
		}
		block := bytes.ReplaceAll(bundle[i:i+n+len(end)], []byte("\r"), nil)
		out = append(out, append(bytes.Clone(block), '\n'))
		bundle = bundle[i+n+len(end):]
	}
}

// extend appends to a bundle the certificates that it lacks.
func extend(path string, certs [][]byte, create bool) error {
	have, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && create:
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	known := map[string]bool{}
	for _, c := range certificates(have) {
		known[string(c)] = true
	}
	var more bytes.Buffer
	if len(have) > 0 && have[len(have)-1] != '\n' {
		more.WriteByte('\n')
	}
	for _, c := range certs {
		if !known[string(c)] {
			known[string(c)] = true
			more.Write(c)
		}
	}
	if more.Len() <= 1 {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(more.Bytes())
	return errors.Join(err, f.Close())
}

// anchor puts each certificate into a file of its own, as tools want them.
func anchor(dir string, certs [][]byte, create bool) error {
	if len(certs) == 0 {
		return nil
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) && !create {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i, c := range certs {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("cordon-%d.crt", i+1)), c, 0o644); err != nil {
			return err
		}
	}
	return nil
}
