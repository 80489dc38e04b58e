package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
)

func TestANameHasOneServer(t *testing.T) {
	const name = "one"
	dir := filepath.Join(t.TempDir(), "locks")
	hold := func() (io.Closer, error) { return holdName(t.Context(), dir, name) }
	first, err := hold()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hold(); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), name) {
		t.Errorf("a second server: %v, want a conflict that names %s", err, name)
	}
	other, err := holdName(t.Context(), dir, "two")
	if err != nil {
		t.Fatalf("another name: %v", err)
	}
	time.AfterFunc(nameWait/4, func() { first.Close() })
	second, err := hold()
	if err != nil {
		t.Fatalf("the first one's end was not waited for: %v", err)
	}
	if err := errors.Join(second.Close(), other.Close()); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestNoOtherUserHoldsAName: the folder of the locks is root's alone, also one that was
// open, and a socket of the server's name, which any user may open, means nothing.
func TestNoOtherUserHoldsAName(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	squatter, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", "@cordon-squat")
	if err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	lock, err := holdName(t.Context(), dir, "squat")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the folder of locks has mode %v (%v), want 0700", fi.Mode(), err)
	}
}

func TestTheAdminKeyIsShownOnATerminalOnly(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{StateDir: dir}
	cfg.setDefaults()
	secret := "e2b_" + strings.Repeat("0123456789", 4)
	if err := os.WriteFile(cfg.AdminKeyFile(), []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	pipeOut, pipeIn, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipeOut.Close()
	for _, out := range []*os.File{file, pipeIn} {
		if err := greet(out, &cfg, true); err != nil {
			t.Fatal(err)
		}
	}
	pipeIn.Close()
	written, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	piped, err := io.ReadAll(pipeOut)
	if err != nil {
		t.Fatal(err)
	}
	for what, got := range map[string][]byte{"a file": written, "a pipe": piped} {
		if bytes.Contains(got, []byte(secret)) || !bytes.Contains(got, []byte(cfg.AdminKeyFile())) {
			t.Errorf("%s gets %q, want the path of the key's file and no key", what, got)
		}
	}
	master, terminal := openPTY(t)
	if err := greet(terminal, &cfg, false); err != nil {
		t.Fatal(err)
	}
	terminal.Close()
	shown, err := io.ReadAll(master) // one read may return a part; a terminal ends with EIO
	if !errors.Is(err, unix.EIO) || !bytes.Contains(shown, []byte(secret)) {
		t.Errorf("a terminal gets %q (%v), want the lines with the key", shown, err)
	}
}

// openPTY returns both ends of a pseudo terminal; the second is what a shell has.
func openPTY(t *testing.T) (master, terminal *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return master, terminal
}
