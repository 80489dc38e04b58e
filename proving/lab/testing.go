package lab

import (
	"context"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// TB is what the helpers below need of testing.TB; naming it here keeps package
// testing out of the server's binary.
type TB interface {
	Helper()
	Cleanup(func())
	Skip(args ...any)
	Fatal(args ...any)
	Error(args ...any)
	TempDir() string
}

// Privileged skips the test without root, or fails it when REQUIRE_PRIVILEGED is
// set, as in CI.
func Privileged(t TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_PRIVILEGED") != "" {
		t.Fatal("this test needs root, and REQUIRE_PRIVILEGED is set")
	}
	t.Skip("this test needs root")
}

// Start returns a running lab that ends with the test.
func Start(t TB, cfg Config) *Lab {
	t.Helper()
	Privileged(t)
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l, err := New(ctx, cfg)
	if err != nil {
		t.Fatal("start the lab:", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error("close the lab:", err)
		}
	})
	return l
}

// Empty returns a fresh network namespace that holds nothing but its loopback,
// which is up. It ends with the test.
func Empty(t TB) *Netns {
	t.Helper()
	Privileged(t)
	n, err := newNetns()
	if err != nil {
		t.Fatal("create a namespace:", err)
	}
	t.Cleanup(func() { _ = n.Close() })
	if err := loopbackUp(n); err != nil {
		t.Fatal("bring up the loopback:", err)
	}
	return n
}

// Enter puts the calling test, locked to its thread, into a fresh network
// namespace until the test ends. Goroutines that the test starts are not in it.
func Enter(t TB) *Netns {
	t.Helper()
	n := Empty(t)
	runtime.LockOSThread()
	home, err := currentNetns()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
		t.Fatal("enter a namespace:", err)
	}
	t.Cleanup(func() {
		defer home.Close()
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error("leave a namespace:", err) // the thread stays locked and ends with the test
			return
		}
		runtime.UnlockOSThread()
	})
	return n
}
