package server

import (
	"cmp"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/egress"
	"github.com/cordonhq/cordon/internal/ingress"
)

// wantedDescriptors lets every limit below have its own default: Linux allows a
// process no more (fs.nr_open).
const wantedDescriptors = 1 << 20

// descriptors raises this process's limit of open descriptors as far as it may,
// and returns it.
func descriptors() (int, error) {
	want := unix.Rlimit{Cur: wantedDescriptors, Max: wantedDescriptors}
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		return 0, err
	}
	if now.Cur >= want.Cur {
		return wantedDescriptors, nil
	}
	want.Max = max(want.Max, now.Max)
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &want) == nil {
		return wantedDescriptors, nil
	}
	return int(now.Cur), nil // without the right to raise it
}

// The proxies hold two descriptors for each connection that somebody else opens.
// All sandboxes together may take a quarter of the process's, one source outside a
// sixteenth, so that enough is left for what keeps the service going: the API, new
// sandboxes, the store.

func egressLimits(descriptors int) egress.Limits {
	total := min(100_000, descriptors/8)
	return egress.Limits{TotalConns: total, Conns: min(4096, total/8)}
}

// ingressLimits are the configured ones, or a share of the descriptors where there
// is none. What is configured counts also beyond that share.
func (l *ListenConfig) ingressLimits(descriptors int) ingress.Limits {
	share := min(16_384, descriptors/32)
	return ingress.Limits{ConnsPerSource: cmp.Or(l.PerSource, share), ConnsPerSandbox: cmp.Or(l.PerSandbox, share)}
}
