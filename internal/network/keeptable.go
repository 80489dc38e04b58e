package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// guardTable puts the table back when it is deleted: a restart of the
// distribution's nftables service flushes all rules of the machine. Without the
// table sandboxes would be routed like any other link.
func (n *Network) guardTable(ctx context.Context) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return fmt.Errorf("guard the table: open netlink: %w", err)
	}
	defer c.Close()
	if err := c.SetReadBuffer(eventBuffer); err != nil {
		return fmt.Errorf("guard the table: enlarge the buffer: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		// Nothing may have happened between Reconcile and Dial, or while events were lost.
		if err := n.ensureTable(); err != nil {
			n.cfg.Log.Error("put the deleted table back", "err", err)
			if !sleep(ctx, 100*time.Millisecond) {
				return nil
			}
			continue
		}
		if err := awaitDeletion(c); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("guard the table: %w", err)
		}
	}
}

// awaitDeletion returns when some table was deleted.
func awaitDeletion(c *netlink.Conn) error {
	const deleted = netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE)
	for {
		msgs, err := c.Receive()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(msgs, func(m netlink.Message) bool { return m.Header.Type == deleted }) {
			return nil
		}
	}
}

// sleep waits, and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// ensureTable makes the table anew if it is gone.
func (n *Network) ensureTable() error {
	there, err := n.kern.hasTable(n.table().Table().Name)
	if err == nil && there && !n.hidden.Load() {
		return n.hide() // it failed when the table was put back
	}
	if err != nil || there {
		return err
	}
	n.cfg.Log.Error("the table that confines the sandboxes was deleted; putting it back", "table", n.table().Table().Name)
	n.mu.Lock()
	slots := make([]*slotState, 0, len(n.slots))
	for _, s := range n.slots {
		if s != nil {
			slots = append(slots, s)
		}
	}
	n.mu.Unlock()
	var kept []adopted
	for _, s := range slots {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.retired {
			continue
		}
		k := adopted{slot: s}
		if o := n.owners[s.Num].Load(); o != nil && !o.gone {
			k.id, k.policy = o.id, o.policy
		}
		kept = append(kept, k)
	}
	if there, err = n.kern.hasTable(n.table().Table().Name); err != nil || there {
		return err
	}
	return n.replaceTable(kept)
}
