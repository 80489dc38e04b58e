package gvisor

import (
	"slices"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/socket"
	"gvisor.dev/gvisor/pkg/sentry/socket/netstack"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/syserr"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	_ "unsafe" // for go:linkname
)

// congestionControl is Linux's default. gVisor's is reno, which takes far longer to
// fill a path with loss and delay; no setting of the runtime chooses another.
const congestionControl = tcpip.CongestionControlOption("cubic")

// families are gVisor's makers of sockets by address family, asked in their order.
//
//go:linkname families gvisor.dev/gvisor/pkg/sentry/socket.families
var families map[int][]socket.Provider

// setStackDefaults gives every network stack of the sentry that this process becomes
// Linux's defaults where they differ, before its first socket.
func setStackDefaults() {
	for _, family := range []int{linux.AF_INET, linux.AF_INET6} {
		families[family] = slices.Insert(families[family], 0, socket.Provider(stackDefaults{}))
	}
}

// stackDefaults makes no sockets: it is asked first, and has the others asked.
type stackDefaults struct{}

func (stackDefaults) Socket(t *kernel.Task, stype linux.SockType, _ int) (*vfs.FileDescription, *syserr.Error) {
	if stype&linux.SOCK_TYPE_MASK != linux.SOCK_STREAM {
		return nil, nil
	}
	// A sandbox may make stacks of its own, in network namespaces, at any time.
	ns := t.GetNetworkNamespace()
	defer ns.DecRef(t)
	if s, ok := ns.Stack().(*netstack.Stack); ok {
		useCongestionControl(s)
	}
	return nil, nil
}

// useCongestionControl sets the default of a stack, unless it is set.
func useCongestionControl(s *netstack.Stack) {
	var now tcpip.CongestionControlOption
	if err := s.Stack.TransportProtocolOption(tcp.ProtocolNumber, &now); err == nil && now == congestionControl {
		return
	}
	option := congestionControl
	_ = s.Stack.SetTransportProtocolOption(tcp.ProtocolNumber, &option) // a test looks at what comes of it
}

func (stackDefaults) Pair(*kernel.Task, linux.SockType, int) (*vfs.FileDescription, *vfs.FileDescription, *syserr.Error) {
	return nil, nil, nil
}
