package gvisor

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/runtime/runtimetest"
	"github.com/cordonhq/cordon/internal/sandbox"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// TestMain gives the test binary the sandbox's other names, as main does.
func TestMain(m *testing.M) {
	Dispatch()
	os.Exit(m.Run())
}

// testConfig is a Runtime's configuration over folders and cgroups of the
// test's own, which are gone afterwards.
func testConfig(t testing.TB) Config {
	t.Helper()
	runtimetest.Privileged(t)
	dir, err := os.MkdirTemp("", "gvisor")
	if err != nil {
		t.Fatal(err)
	}
	var name [4]byte
	rand.Read(name[:])
	cfg := Config{
		StateDir:     filepath.Join(dir, "state"),
		DataDir:      filepath.Join(dir, "data"),
		CgroupParent: "/cordontest-" + hex.EncodeToString(name[:]) + "/runtime",
		Log:          slog.New(slog.DiscardHandler),
	}
	t.Cleanup(func() { cleanUp(t, dir, cfg) })
	return cfg
}

func cleanUp(t testing.TB, dir string, cfg Config) {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Error(err)
		return
	}
	ids, err := r.List(t.Context())
	if err != nil {
		t.Error(err)
	}
	for _, id := range ids {
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Errorf("destroy what the test left: %v", err)
		}
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	for _, m := range r.groups.mounts {
		for _, path := range []string{cfg.CgroupParent, filepath.Dir(cfg.CgroupParent)} {
			if err := unix.Rmdir(filepath.Join(m, path)); err != nil && !errors.Is(err, unix.ENOENT) {
				t.Errorf("remove the test's cgroup: %v", err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
}

func open(t testing.TB, cfg Config) *Runtime {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func spec(rootfs string, slot *runtimetest.Slot) sandbox.RuntimeSpec {
	s := sandbox.RuntimeSpec{
		ID: sandboxid.New(), Rootfs: rootfs, Hostname: "sandbox", Args: runtimetest.GuestArgs(),
		Env:       []string{"PATH=/"},
		Resources: sandbox.Resources{CPUs: 1, MemoryMB: 256, DiskMB: 64, Processes: 64},
	}
	if slot != nil {
		s.NetNS = slot.NetNS
	}
	return s
}

func TestContract(t *testing.T) {
	cfg := testConfig(t)
	runtimetest.Run(t, func(t *testing.T) sandbox.Runtime { return open(t, cfg) })
}
