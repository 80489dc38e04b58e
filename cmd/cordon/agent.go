package main

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// embedded holds the agent that `make build` put there.
//
//go:embed all:embedded
var embedded embed.FS

// guestAgent is where sandboxes find the agent.
const guestAgent = "/.cordon/cordon-agent"

// installAgent writes the embedded agent to a folder named by its contents, so
// that sandboxes of an older server keep theirs, and returns its path.
func installAgent(stateDir string) (string, error) {
	program, err := embedded.ReadFile("embedded/cordon-agent")
	if errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("this binary was built without the agent: build it with make build")
	}
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(program)
	dir := filepath.Join(stateDir, "agent", hex.EncodeToString(sum[:8]))
	path := filepath.Join(dir, filepath.Base(guestAgent))
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, program) {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := writeFileSync(path, program, 0o755); err != nil {
		return "", fmt.Errorf("install agent: %w", err)
	}
	return path, nil
}
