// Package atomicfile writes files that are whole or absent, also after a crash.
package atomicfile

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
)

// Write puts data in a file of the given mode, which replaces one that is there.
func Write(path string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err := cmp.Or(err, tmp.Chmod(mode), tmp.Sync()); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
