package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// bundles are where programs look for trusted certificates: Debian and Alpine,
// then Fedora.
var bundles = []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"}

// trust returns the binds that show an image's certificate bundle with the
// operator's certificates added. They are not part of the image, so that a
// changed certificate needs no new build.
func (l *Library) trust(rootfs, key string) ([]sandbox.Bind, error) {
	if l.cfg.CABundle == "" {
		return nil, nil
	}
	extra, err := readCertificates(l.cfg.CABundle)
	if err != nil || len(extra) == 0 {
		return nil, err
	}
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return nil, fmt.Errorf("open rootfs: %w", err)
	}
	defer root.Close()
	var binds []sandbox.Bind
	for i, guest := range bundles {
		rel, err := tree{root}.resolve(guest)
		if err != nil {
			return nil, err
		}
		own, err := root.ReadFile(rel)
		if err != nil {
			continue // this image keeps none there
		}
		host, err := l.merge(fmt.Sprintf("%s-%d", key, i), own, extra)
		if err != nil {
			return nil, err
		}
		binds = append(binds, sandbox.Bind{Host: host, Guest: "/" + rel})
	}
	return binds, nil
}

// merge writes own and extra to a file of the server's state that is named after
// its content, so that one in use is never changed.
func (l *Library) merge(name string, own, extra []byte) (string, error) {
	text := slices.Concat(bytes.TrimRight(own, "\n"), []byte("\n"), extra)
	sum := sha256.Sum256(text)
	dir := filepath.Join(l.cfg.StateDir, "trust")
	path := filepath.Join(dir, name+"-"+hex.EncodeToString(sum[:8])+".crt")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("write certificates: %w", err)
	}
	return path, step("write certificates", replaceFile(path, text, 0o644))
}

// readCertificates returns the certificates of a PEM file or of the *.crt files
// of a directory.
func readCertificates(path string) ([]byte, error) {
	files := []string{path}
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.Invalid, "CA bundle %q does not exist: name a PEM file or a directory of *.crt files", path)
	}
	if err != nil {
		return nil, fmt.Errorf("read CA bundle: %w", err)
	}
	if fi.IsDir() {
		if files, err = filepath.Glob(filepath.Join(path, "*.crt")); err != nil {
			return nil, fmt.Errorf("read CA bundle: %w", err)
		}
	}
	var out []byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read CA bundle: %w", err)
		}
		found := false
		for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
			if block.Type == "CERTIFICATE" {
				out, found = append(out, pem.EncodeToMemory(block)...), true
			}
		}
		if !found {
			return nil, errs.New(errs.Invalid, "CA bundle %q has no PEM certificate", f)
		}
	}
	return out, nil
}

// replaceFile writes a file so that readers see the old or the new one.
func replaceFile(path string, text []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
