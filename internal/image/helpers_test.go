package image

import (
	"os"
	"syscall"
	"testing"
)

func owner(t testing.TB, path string) (uid, gid uint32) {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	return st.Uid, st.Gid
}

// credential is the default user of a root file system.
func credential(string) *syscall.Credential { return &syscall.Credential{Uid: userID, Gid: userID} }
