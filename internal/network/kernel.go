package network

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/network/nft"
)

// kernel is the one connection to nftables. Each transaction is atomic in the
// kernel and serialised here.
type kernel struct {
	mu    sync.Mutex // guards what follows, and holds during a transaction
	conn  *nftables.Conn
	sock  *netlink.Conn
	setID uint32
}

// Limits of one transaction. The kernel takes a batch in one piece and answers all
// of it before we read, so the buffers must hold both: a policy of 10,000 prefixes
// is about 1 MB, a table with 1,000 slots 25,000 answers of 1 KiB.
const (
	sendBuffer         = 128 << 20
	receiveBuffer      = 128 << 20
	transactionTimeout = 30 * time.Second
)

// do runs one transaction: build queues changes, and all of them take effect at
// once or none does.
func (k *kernel) do(build func(*nft.Batch)) error {
	var b nft.Batch
	build(&b)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.open(); err != nil {
		return err
	}
	err := b.Queue(k.conn, func() uint32 { k.setID++; return k.setID })
	if err == nil {
		err = k.sock.SetDeadline(time.Now().Add(transactionTimeout))
	}
	if err == nil {
		err = k.conn.Flush()
	}
	if err != nil {
		// Answers to the rest of the batch may still come: start with a new socket.
		k.reset()
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

// read runs queries on the connection.
func (k *kernel) read(query func(*nftables.Conn) error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.open(); err != nil {
		return err
	}
	err := k.sock.SetDeadline(time.Now().Add(transactionTimeout))
	if err == nil {
		err = query(k.conn)
	}
	if err != nil {
		k.reset()
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

func (k *kernel) open() error {
	if k.conn != nil {
		return nil
	}
	var sock *netlink.Conn
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		sock = c
		return errors.Join(c.SetWriteBuffer(sendBuffer), c.SetReadBuffer(receiveBuffer))
	}))
	if err != nil {
		return fmt.Errorf("nftables: open netlink: %w", err)
	}
	k.conn, k.sock = conn, sock
	return nil
}

func (k *kernel) reset() {
	if k.conn != nil {
		_ = k.conn.CloseLasting()
	}
	k.conn, k.sock = nil, nil
}

func (k *kernel) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reset()
}

// absent reports whether an error says that something to be deleted is not there.
func absent(err error) bool { return errors.Is(err, unix.ENOENT) }

// sendBatch makes changes of an inet table that take effect together.
func sendBatch(batch []nft.Message) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(transactionTimeout)); err != nil {
		return err
	}
	// struct nfgenmsg: family, version, and the subsystem that a batch is for.
	edge := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	msgs := []netlink.Message{{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: edge}}
	for _, m := range batch {
		data, err := netlink.MarshalAttributes(m.Attrs)
		if err != nil {
			return err
		}
		msgs = append(msgs, netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | m.Kind), Flags: netlink.Request | netlink.Acknowledge | m.Flags},
			Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, data...),
		})
	}
	msgs = append(msgs, netlink.Message{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: edge})
	if _, err := c.SendMessages(msgs); err != nil {
		return err
	}
	for answered := 0; answered < len(batch); {
		answers, err := c.Receive() // an error of the kernel's, if it is one
		if err != nil {
			return err
		}
		answered += len(answers)
	}
	return nil
}
