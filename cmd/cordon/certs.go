package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
)

// guestBundle is the CA bundle of a Debian system, which curl, OpenSSL and
// Python read.
const guestBundle = "/etc/ssl/certs/ca-certificates.crt"

// hostBundle is the machine's CA bundle with cordon's own CA, for clients that
// read one file only.
func (c *config) hostBundle() string { return filepath.Join(c.caDir(), "bundle.pem") }

// caFile is the certificate of cordon's own CA.
func (c *config) caFile() string { return filepath.Join(c.caDir(), "ca.pem") }

// serverTLS is the ingress's certificate: the operator's files, or a local CA's.
func (c *config) serverTLS(log *slog.Logger) (*tls.Config, error) {
	if c.TLS.Cert != "" {
		return tlsconf.Files(c.TLS.Cert, c.TLS.Key, log)
	}
	cfg, _, err := tlsconf.LocalCA(c.caDir(), []string{c.Domain}, log)
	return cfg, err
}

// writeBundles writes the CA bundle for clients on this machine, and the one
// every sandbox gets, whose path it returns: the machine's, cordon's own CA, so
// that a sandbox can open another's public URL, and the operator's extra ones.
// serverTLS has made the CA before.
func writeBundles(c *config, log *slog.Logger) (string, error) {
	system, err := os.ReadFile(guestBundle)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the machine's CA bundle: %w", err)
	}
	if err != nil {
		log.Warn("this machine has no CA bundle: sandboxes trust cordon's CA only", "file", guestBundle)
	}
	if err := os.MkdirAll(c.caDir(), 0o755); err != nil {
		return "", err
	}
	parts := [][]byte{bytes.TrimSpace(system)}
	if c.TLS.Cert == "" {
		own, err := os.ReadFile(c.caFile())
		if err != nil {
			return "", err
		}
		parts = append(parts, bytes.TrimSpace(own))
		if err := writeFileSync(c.hostBundle(), join(parts), 0o644); err != nil {
			return "", err
		}
	}
	if c.Sandboxes.ExtraCA != "" {
		extra, err := os.ReadFile(c.Sandboxes.ExtraCA)
		if err != nil {
			return "", errs.Wrap(errs.Invalid, err, "configuration: sandboxes.extra_ca")
		}
		if !x509.NewCertPool().AppendCertsFromPEM(extra) {
			return "", errs.New(errs.Invalid, "configuration: sandboxes.extra_ca %s holds no PEM certificate", c.Sandboxes.ExtraCA)
		}
		parts = append(parts, bytes.TrimSpace(extra))
	}
	path := filepath.Join(c.caDir(), "sandbox-bundle.pem")
	return path, writeFileSync(path, join(parts), 0o644)
}

func join(parts [][]byte) []byte { return append(bytes.Join(parts, []byte("\n")), '\n') }

// clientTLS trusts the CA that a server with this configuration made for itself.
func (c *config) clientTLS() (*tls.Config, error) {
	b, err := os.ReadFile(c.caFile())
	if err != nil {
		return nil, fmt.Errorf("read cordon's CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no certificate", c.caFile())
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}
