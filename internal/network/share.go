package network

import (
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/sysctl"
)

// The tracker's table is the whole machine's. When it is full the kernel drops what
// is new, of the machine too; so what one sandbox can take of it has a bound.
//
// MaxFlows bounds the connections that live. Those that are over are not counted by
// the kernel (nf_conncount), but stay in the table, two minutes by default: at
// MaxNewFlows a second one sandbox would fill any table. So those of sandboxes stay a few seconds.

const trackerMax = "net/netfilter/nf_conntrack_max"

// fitTracker makes the tracker's table fit what the sandboxes may have, or says that it
// does not. An entry takes some 400 bytes while it is in use and none before, so the
// table may grow to a sixteenth of the memory.
func (s *shares) fitTracker() {
	defer s.measure()
	have, err := sysctl.Number(trackerMax)
	if err != nil {
		s.conf.Log.Warn("the size of the connection tracker's table is not known", "err", err)
		return
	}
	one := uint64(s.conf.MaxFlows) + nft.RememberWait*uint64(s.conf.MaxNewFlows)
	want := max(uint64(s.conf.MaxFlows)*uint64(s.conf.Sandboxes), 2*one)
	if want <= have {
		return
	}
	const entry, part = 400, 16
	if top := memory() / part / entry; top > have {
		if err := sysctl.Write(trackerMax, strconv.FormatUint(min(want, top), 10)); err == nil {
			s.conf.Log.Info("the connection tracker's table may grow", "entries", min(want, top), "before", have)
			have = min(want, top)
		}
	}
	if few*one > have {
		s.conf.Log.Warn(trackerAdvice, "entries", have, "each", one)
	}
	if most := have / 2; uint64(s.conf.MaxFlows) > most {
		s.conf.MaxFlows = uint32(most)
		s.conf.Log.Warn("one sandbox may have half of the connection tracker's table, not more", "flows", most)
	}
}

// few sandboxes at their limits are to be expected; all of them at once are not.
const few = 4

const trackerAdvice = "a few sandboxes can fill the connection tracker's table; when it is full new connections of the" +
	" whole machine are refused: raise net.netfilter.nf_conntrack_max, or lower network.limits.connections or network.limits.new_connections"

// memory is the machine's, in bytes.
func memory() uint64 {
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil {
		return 0
	}
	return s.Totalram * uint64(s.Unit)
}
