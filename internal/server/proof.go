package server

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/statefile"
)

// domainProof is what binding a custom domain demands. Its secret is made at the
// first start: without it users would have to set their records anew.
func (c *Config) domainProof() (*sandbox.DomainProof, error) {
	file := filepath.Join(c.StateDir, "domain-proof.secret")
	secret, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		secret = []byte(rand.Text() + rand.Text())
		err = statefile.Replace(file, secret, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("secret of domain proofs: %w", err)
	}
	if len(secret) < 32 {
		return nil, fmt.Errorf("%s holds %d bytes, at least 32 are needed: remove it, and a new one is made", file, len(secret))
	}
	return &sandbox.DomainProof{Secret: secret, LookupTXT: net.DefaultResolver.LookupTXT, Without: c.Sandboxes.DomainsFree}, nil
}
