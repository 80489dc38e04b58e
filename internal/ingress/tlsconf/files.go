// Package tlsconf hides where certificates come from and how they are replaced
// while connections are being accepted: files that are read again when they
// change, a certificate authority of this machine's own, or an ACME server.
package tlsconf

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// checkEvery is how often a handshake looks whether a certificate has changed.
const checkEvery = 10 * time.Second

// Files returns a configuration that serves the certificate chain and key in two
// PEM files, and reads them again within ten seconds of a change. When a new pair
// cannot be read, the old one stays and the log says why.
func Files(certFile, keyFile string, log *slog.Logger) (*tls.Config, error) {
	f := &files{cert: certFile, key: keyFile, log: log}
	if err := f.load(); err != nil {
		return nil, err
	}
	return config(f.get), nil
}

func config(get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: get}
}

// files is a certificate in two files.
type files struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex // guards the fields below
	loaded  *tls.Certificate
	stamp   stamp // of the files loaded or refused last
	checked time.Time
}

// stamp changes whenever one of the files does.
type stamp struct {
	cert, key         time.Time
	certSize, keySize int64
}

func (f *files) stat() (stamp, error) {
	c, err := os.Stat(f.cert)
	if err != nil {
		return stamp{}, fmt.Errorf("certificate: %w", err)
	}
	k, err := os.Stat(f.key)
	if err != nil {
		return stamp{}, fmt.Errorf("certificate key: %w", err)
	}
	return stamp{c.ModTime(), k.ModTime(), c.Size(), k.Size()}, nil
}

func (f *files) load() error {
	now, err := f.stat()
	if err != nil {
		return err
	}
	f.stamp = now
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.cert, f.key, err)
	}
	f.loaded = &pair
	return nil
}

func (f *files) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.checked) >= checkEvery {
		f.checked = now
		if s, err := f.stat(); err != nil {
			f.log.Error("certificate not read, the former one stays", "err", err)
		} else if s != f.stamp {
			if err := f.load(); err != nil {
				f.log.Error("certificate not read, the former one stays", "err", err)
			}
		}
	}
	return f.loaded, nil
}
