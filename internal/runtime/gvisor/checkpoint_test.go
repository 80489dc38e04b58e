package gvisor

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/runtime/runtimetest"
)

// TestRefusedRestores says why a checkpoint of another machine, version or
// server cannot be restored, before anything is made.
func TestRefusedRestores(t *testing.T) {
	runtimetest.Privileged(t)
	r := open(t, testConfig(t))
	good := checkpointMeta{Runtime: r.Name(), Args: []string{"/agent"}, Binds: []string{}, CPU: cpuFeatures()}
	if len(good.CPU) == 0 {
		t.Error("this machine's CPU has no features")
	}
	rootfs, slot := runtimetest.Rootfs(t), runtimetest.NewSlot(t, 1)
	for name, c := range map[string]struct {
		change func(*checkpointMeta)
		want   string
	}{
		"another runtime": {func(m *checkpointMeta) { m.Runtime = "gvisor/v0" }, "gvisor/v0"},
		"a better CPU":    {func(m *checkpointMeta) { m.CPU = append(slices.Clone(m.CPU), "avx9000") }, "avx9000"},
		"other binds":     {func(m *checkpointMeta) { m.Binds = []string{"/usr"} }, "/usr"},
	} {
		meta, dir := good, t.TempDir()
		c.change(&meta)
		b, err := json.Marshal(meta)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, metaFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := spec(rootfs, slot)
		err = r.Restore(t.Context(), s, dir)
		if !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want a conflict that names %s", name, err, c.want)
		}
		if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, s.ID) {
			t.Errorf("%s: it is listed, %v", name, err)
		}
	}
}
