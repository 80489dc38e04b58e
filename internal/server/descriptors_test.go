package server

import "testing"

func TestNobodyCanTakeAllDescriptors(t *testing.T) {
	for _, have := range []int{1024, 20_000, 65_536, wantedDescriptors} {
		out, in := egressLimits(have), new(ListenConfig).ingressLimits(have)
		if out.TotalConns < 1 || out.Conns < 1 || in.ConnsPerSource < 1 || in.ConnsPerSandbox < 1 {
			t.Fatalf("of %d descriptors: %+v %+v: zero would mean the default", have, out, in)
		}
		if 2*out.TotalConns > have/4 {
			t.Errorf("of %d descriptors sandboxes may take %d", have, 2*out.TotalConns)
		}
		if 4*out.Conns > out.TotalConns {
			t.Errorf("one sandbox may open %d of %d connections", out.Conns, out.TotalConns)
		}
		if 2*in.ConnsPerSource > have/16 || 2*in.ConnsPerSandbox > have/16 {
			t.Errorf("of %d descriptors one source may take %d", have, 2*in.ConnsPerSource)
		}
	}
	if out, in := egressLimits(wantedDescriptors), new(ListenConfig).ingressLimits(wantedDescriptors); out.TotalConns != 100_000 || in.ConnsPerSource != 16_384 {
		t.Errorf("with all that Linux allows: %+v %+v", out, in)
	}
	set := ListenConfig{PerSandbox: 24, PerSource: 7}
	if in := set.ingressLimits(wantedDescriptors); in.ConnsPerSandbox != 24 || in.ConnsPerSource != 7 {
		t.Errorf("configured limits: %+v", in)
	}
}
