// Package tlsconf provides certificates and replaces them while connections are being
// accepted. They come from files that are read again when they
// change, a certificate authority of this machine's own, or an ACME server.
package tlsconf

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// checkEvery is how often a handshake looks whether a certificate has changed.
const checkEvery = 10 * time.Second

// Pair names a certificate chain and its key, as PEM files.
type Pair struct{ Cert, Key string }

// Files returns a configuration that serves the certificates in files, each for the
// names in it and the first for all others, and reads them again within ten seconds
// of a change. When a new pair cannot be read, the old one stays and the log says why.
func Files(pairs []Pair, log *slog.Logger) (*tls.Config, error) {
	if len(pairs) == 0 {
		return nil, errors.New("certificate files: none named")
	}
	all := make(filesSet, len(pairs))
	for i, p := range pairs {
		all[i] = &files{Pair: p, log: log}
		if err := all[i].load(); err != nil {
			return nil, err
		}
	}
	return config(all.get), nil
}

func config(get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: get}
}

// filesSet is at least one certificate.
type filesSet []*files

func (s filesSet) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	first := s[0].current()
	if len(s) == 1 || hello.ServerName == "" || first.Leaf.VerifyHostname(hello.ServerName) == nil {
		return first, nil
	}
	for _, f := range s[1:] {
		if c := f.current(); c.Leaf.VerifyHostname(hello.ServerName) == nil {
			return c, nil
		}
	}
	return first, nil
}

// files is a certificate in two files.
type files struct {
	Pair
	log *slog.Logger

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
	c, err := os.Stat(f.Cert)
	if err != nil {
		return stamp{}, fmt.Errorf("certificate: %w", err)
	}
	k, err := os.Stat(f.Key)
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
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.Cert, f.Key, err)
	}
	f.loaded = &pair
	return nil
}

// current is the certificate in the files, or the one that was there when they
// could be read last.
func (f *files) current() *tls.Certificate {
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
	return f.loaded
}
