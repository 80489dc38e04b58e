package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// watched are the groups of route netlink that tell of addresses and routing rules.
const watched = 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1) | 1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1)

// watchPause lets changes gather: a pool being filled is hundreds of addresses.
const watchPause = 50 * time.Millisecond

// watchHost follows the machine's own addresses, and puts our routing rules back
// when they are removed.
func (n *Network) watchHost(ctx context.Context) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: watched})
	if err != nil {
		return fmt.Errorf("watch the host: open netlink: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		// Things may have changed before Dial, or while events were lost.
		if err := errors.Join(n.readAddrs(), n.keepRoutes()); err != nil {
			n.cfg.Log.Error("follow the host's addresses and routing rules", "err", err)
		}
		if _, err := c.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch the host: %w", err)
		}
		if !sleep(ctx, watchPause) {
			return nil
		}
	}
}

func (m *machine) keepRoutes() error {
	lo, err := m.link.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	return errors.Join(m.routeMarked(lo), m.routeGuard())
}
