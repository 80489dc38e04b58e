package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cordonhq/cordon/internal/agent"
	"github.com/cordonhq/cordon/internal/statefile"
)

// guestAgent is where sandboxes find the agent.
const guestAgent = "/.cordon/cordon-agent"

// installAgent writes the agent, and the certificates that it adds to those
// of images, to a folder named by their contents, so that sandboxes of an older server
// keep theirs, and returns that folder.
func installAgent(programs fs.FS, stateDir string, cas certificates) (string, error) {
	program, err := fs.ReadFile(programs, filepath.Base(guestAgent))
	if errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("this binary was built without the agent: build it with make build")
	}
	if err != nil {
		return "", err
	}
	files := []struct {
		name    string
		content []byte
		mode    os.FileMode
	}{{filepath.Base(guestAgent), program, 0o755}, {agent.OwnCAs, cas.own, 0o644}, {agent.Machine, cas.machine, 0o644}}
	sum := sha256.New()
	for _, f := range files {
		fmt.Fprintln(sum, f.name, len(f.content))
		sum.Write(f.content)
	}
	dir := filepath.Join(stateDir, "agent", hex.EncodeToString(sum.Sum(nil)[:8]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, f.content) {
			continue
		}
		if err := statefile.Replace(path, f.content, f.mode); err != nil {
			return "", fmt.Errorf("install agent: %w", err)
		}
	}
	return dir, nil
}

// environment is what commands need besides: Node has its own list of CAs, and reads
// the named file at each start, so that names only what its list lacks.
func (c certificates) environment() map[string]string {
	if len(c.own) == 0 {
		return nil
	}
	return map[string]string{"NODE_EXTRA_CA_CERTS": filepath.Join(filepath.Dir(guestAgent), agent.OwnCAs)}
}
