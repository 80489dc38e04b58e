package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// domainProof is what binding a custom domain demands. Its secret is made at the
// first start: without it users would have to set their records anew.
func (c *config) domainProof() (*sandbox.DomainProof, error) {
	file := filepath.Join(c.StateDir, "domain-proof.secret")
	secret, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		secret = []byte(rand.Text() + rand.Text())
		err = writeNew(file, secret)
	}
	if err != nil {
		return nil, fmt.Errorf("secret of domain proofs: %w", err)
	}
	if len(secret) < 32 {
		return nil, fmt.Errorf("%s holds %d bytes, at least 32 are needed: remove it, and a new one is made", file, len(secret))
	}
	return &sandbox.DomainProof{Secret: secret, LookupTXT: net.DefaultResolver.LookupTXT, Without: c.Sandboxes.DomainsFree}, nil
}

// writeNew writes a file that only root reads, whole or not at all.
func writeNew(file string, b []byte) error {
	next := file + ".new"
	if err := os.WriteFile(next, b, 0o600); err != nil {
		return err
	}
	return os.Rename(next, file)
}
