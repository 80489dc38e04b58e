package network

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
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

// transaction is a batch being built. The first error sticks.
type transaction struct {
	*nftables.Conn
	kern *kernel
	err  error
}

// do runs one transaction: build queues changes, and all of them take effect at
// once or none does.
func (k *kernel) do(build func(*transaction)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.open(); err != nil {
		return err
	}
	tx := &transaction{Conn: k.conn, kern: k}
	build(tx)
	err := tx.err
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

// set queues a new set with its elements, in messages small enough for netlink's
// 16-bit attribute length.
func (tx *transaction) set(s *nftables.Set, elems []nftables.SetElement) {
	tx.kern.setID++
	s.ID = tx.kern.setID
	tx.note(tx.AddSet(s, nil))
	tx.add(s, elems)
}

// add queues elements for a set.
func (tx *transaction) add(s *nftables.Set, elems []nftables.SetElement) {
	for len(elems) > 0 {
		k := min(len(elems), elementsPerMessage)
		tx.note(tx.SetAddElements(s, elems[:k]))
		elems = elems[k:]
	}
}

// remove queues the deletion of elements.
func (tx *transaction) remove(s *nftables.Set, elems ...nftables.SetElement) {
	tx.note(tx.SetDeleteElements(s, elems))
}

// rules queues rules for the end of a chain.
func (tx *transaction) rules(c *nftables.Chain, rules ...rule) {
	for _, r := range rules {
		tx.AddRule(&nftables.Rule{Table: c.Table, Chain: c, Exprs: r})
	}
}

func (tx *transaction) note(err error) {
	if tx.err == nil {
		tx.err = err
	}
}

// elementsPerMessage keeps the widest element (IPv6 with port, both ends) below
// 64 KiB a message.
const elementsPerMessage = 400

// absent reports whether an error says that something to be deleted is not there.
func absent(err error) bool { return errors.Is(err, unix.ENOENT) }
