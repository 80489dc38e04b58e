package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
	"github.com/cordonhq/cordon/internal/statefile"
)

// systemBundle is the CA bundle of a Debian system.
const systemBundle = "/etc/ssl/certs/ca-certificates.crt"

// HostBundle is the machine's CA bundle with cordon's own CA, for clients that
// read one file only.
func (c *Config) HostBundle() string { return filepath.Join(c.caDir(), "bundle.pem") }

// CaFile is the certificate of cordon's own CA.
func (c *Config) CaFile() string { return filepath.Join(c.caDir(), "ca.pem") }

// LocalCA reports whether the server's certificates are from a CA of its own.
func (t *TLSConfig) LocalCA() bool { return t.Cert == "" && t.ACME.Email == "" }

func (t *TLSConfig) validate() error {
	bad := func(format string, args ...any) error {
		return errs.New(errs.Invalid, "configuration: tls"+format, args...)
	}
	switch dns := t.ACME.DNS.settings(); {
	case (t.Cert == "") != (t.Key == ""):
		return bad(" is %s: name both cert and key, or neither", t.Cert+t.Key)
	case t.Cert == "" && len(t.Certificates) > 0:
		return bad(".certificates come after tls.cert and tls.key: name those first")
	case t.HSTS < 0:
		return bad(".hsts is %s: use a positive duration such as 8760h", t.HSTS)
	case t.ACME.RenewInterval < time.Second:
		return bad(".acme.renew_interval is %s: use a second or more", t.ACME.RenewInterval)
	case t.ACME.Email == "" && (t.ACME.CA != "" || dns.Provider != ""):
		return bad(".acme.email is missing: it names the account, and without it ACME is not used")
	case t.ACME.Email == "" || t.Cert != "":
		return nil
	default:
		if err := dns.Check(); err != nil {
			return bad(".acme.dns.%v (a wildcard certificate needs it; or name tls.cert and tls.key)", err)
		}
		return nil
	}
}

func (d *DNSConfig) settings() tlsconf.DNS { return tlsconf.DNS(*d) }

// serverTLS is where the ingress's certificates come from: the operator's files, an
// ACME server, files with an ACME server for custom domains, or a local CA. bound
// says which custom domains there are, and whose.
func (c *Config) serverTLS(bound func(name string) (owner string, ok bool), proven func(context.Context, string) error, log *slog.Logger) (*tls.Config, *tlsconf.ACME, error) {
	var own *tls.Config
	var err error
	switch {
	case c.TLS.Cert != "":
		pairs := []tlsconf.Pair{{Cert: c.TLS.Cert, Key: c.TLS.Key}}
		for _, dir := range c.TLS.Certificates {
			pairs = append(pairs, tlsconf.Pair{Cert: filepath.Join(dir, "fullchain.pem"), Key: filepath.Join(dir, "privkey.pem")})
		}
		own, err = tlsconf.Files(pairs, log)
	case c.TLS.LocalCA():
		own, _, err = tlsconf.LocalCA(c.caDir(), c.allDomains(), log)
	}
	if err != nil || c.TLS.ACME.Email == "" {
		return own, nil, err
	}
	a := c.TLS.ACME
	cfg := tlsconf.ACMEConfig{
		Dir: filepath.Join(c.StateDir, "acme"), Email: a.Email, CA: a.CA, Profile: a.Profile, Interval: a.RenewInterval,
		Domains: c.allDomains(), DNS: a.DNS.settings(), Log: log,
		Allow: func(name string) bool { _, ok := bound(name); return ok },
		Owner: func(name string) string { owner, _ := bound(name); return owner }, Proven: proven,
	}
	if own != nil {
		cfg.Own = own.GetCertificate
	}
	if cfg.HTTPS, cfg.HTTP = first(c.Listen.HTTPS), first(c.Listen.HTTP); cfg.HTTPS == "" {
		return nil, nil, errs.New(errs.Invalid, "configuration: tls.acme is set and listen.https is empty: nothing would use a certificate")
	}
	if a.CARoot != "" {
		if cfg.Roots, err = pool(a.CARoot); err != nil {
			return nil, nil, errs.Wrap(errs.Invalid, err, "configuration: tls.acme.ca_root")
		}
	}
	acme, err := tlsconf.NewACME(cfg)
	if err != nil {
		return nil, nil, errs.Wrap(errs.Invalid, err, "configuration: tls")
	}
	return acme.TLS(), acme, nil
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// allDomains are the domain and the further ones.
func (c *Config) allDomains() []string { return append([]string{c.Domain}, c.Domains...) }

// pool holds the certificates in a file.
func pool(file string) (*x509.CertPool, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return p, nil
}

// certificates are what sandboxes trust besides their image's own: the agent adds them.
type certificates struct {
	own     []byte // PEM: the server's CA, so that a sandbox can open another's public URL, and the operator's extra ones
	machine []byte // PEM: what this machine trusts
}

// sandboxCAs returns what sandboxes trust, and writes the CA bundle for clients on this
// machine. serverTLS has made the CA before.
func sandboxCAs(c *Config, log *slog.Logger) (out certificates, err error) {
	out.machine, err = os.ReadFile(systemBundle)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return out, fmt.Errorf("read the machine's CA bundle: %w", err)
	}
	if err != nil {
		log.Warn("this machine has no CA bundle: sandboxes trust their image's CAs and cordon's only", "file", systemBundle)
	}
	if err := os.MkdirAll(c.caDir(), 0o755); err != nil {
		return out, err
	}
	var parts [][]byte
	if c.TLS.LocalCA() {
		own, err := os.ReadFile(c.CaFile())
		if err != nil {
			return out, err
		}
		parts = append(parts, bytes.TrimSpace(own))
		if err := statefile.Replace(c.HostBundle(), join(append([][]byte{bytes.TrimSpace(out.machine)}, parts...)), 0o644); err != nil {
			return out, err
		}
	}
	if c.Sandboxes.ExtraCA != "" {
		extra, err := os.ReadFile(c.Sandboxes.ExtraCA)
		if err != nil {
			return out, errs.Wrap(errs.Invalid, err, "configuration: sandboxes.extra_ca")
		}
		if !x509.NewCertPool().AppendCertsFromPEM(extra) {
			return out, errs.New(errs.Invalid, "configuration: sandboxes.extra_ca %s holds no PEM certificate", c.Sandboxes.ExtraCA)
		}
		parts = append(parts, bytes.TrimSpace(extra))
	}
	if len(parts) > 0 {
		out.own = join(parts)
	}
	return out, nil
}

func join(parts [][]byte) []byte { return append(bytes.Join(parts, []byte("\n")), '\n') }
