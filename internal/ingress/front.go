package ingress

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
)

// A proxy in front says who its client is in the first bytes of a connection
// (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt). They are read
// only from trusted addresses, where they must be there: a proxy that leaves them
// out is not set up as its operator thinks.
const (
	frontPending = 1024 // headers awaited at a time; more connections wait to be accepted
	frontLine    = 107  // of version 1, with its line break; section 2.1
	frontBlock   = 4096 // of version 2, behind its first 16 octets; addresses and type-length-values
)

// frontUnspecified is version 2 of a connection whose addresses the proxy does not say.
var frontUnspecified = append(bytes.Clone(proxyproto.SIGV2), byte(proxyproto.PROXY), byte(proxyproto.UNSPEC))

// fronted is a connection whose client is another than its peer.
type fronted struct {
	*net.TCPConn
	client net.Addr
}

// RemoteAddr is the client's.
func (f *fronted) RemoteAddr() net.Addr { return f.client }

// frontListener hands out connections once their header is read.
type frontListener struct {
	net.Listener
	in     *Ingress
	ready  chan accepted
	closed context.Context
	close  context.CancelFunc
}

type accepted struct {
	conn net.Conn
	err  error
}

// behindProxies returns l as it is, or reading headers when that is configured.
// Its run must be called then.
func (in *Ingress) behindProxies(l net.Listener) *frontListener {
	f := &frontListener{Listener: l, in: in, ready: make(chan accepted)}
	f.closed, f.close = context.WithCancel(in.base)
	return f
}

// run accepts until the listener is closed.
func (f *frontListener) run() {
	var pending sync.WaitGroup
	defer pending.Wait()
	free := make(chan struct{}, frontPending)
	for f.closed.Err() == nil {
		c, err := f.Listener.Accept()
		if err != nil {
			f.hand(nil, err)
			continue
		}
		select {
		case free <- struct{}{}:
		case <-f.closed.Done():
			c.Close()
			return
		}
		pending.Go(func() {
			defer func() { <-free }()
			if c := f.identify(c); c != nil {
				f.hand(c, nil)
			}
		})
	}
}

func (f *frontListener) hand(c net.Conn, err error) {
	select {
	case f.ready <- accepted{c, err}:
	case <-f.closed.Done():
		if c != nil {
			c.Close()
		}
	}
}

// Accept returns the next connection whose client is known.
func (f *frontListener) Accept() (net.Conn, error) {
	select {
	case a := <-f.ready:
		return a.conn, a.err
	case <-f.closed.Done():
		return nil, net.ErrClosed
	}
}

// Close ends the listener and what it has not handed out.
func (f *frontListener) Close() error {
	f.close()
	return f.Listener.Close()
}

// identify reads the header of a trusted peer. When that fails it closes c and
// returns nil.
func (f *frontListener) identify(c net.Conn) net.Conn {
	tcp, ok := c.(*net.TCPConn)
	if !ok || !f.in.sources.proxy(c) {
		return c
	}
	stop := context.AfterFunc(f.closed, func() { c.Close() })
	defer stop()
	tcp.SetReadDeadline(time.Now().Add(f.in.cfg.Limits.HeaderTimeout)) //nolint:errcheck // a dead connection shows in the read
	client, err := readFront(tcp)
	if err != nil {
		c.Close()
		f.in.log.Warn("proxy in front not understood", "src", c.RemoteAddr(), "err", err)
		return nil
	}
	tcp.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	if !client.IsValid() {
		return c
	}
	return &fronted{tcp, net.TCPAddrFromAddrPort(client)}
}

// readFront reads a header and not one octet more. The zero address stands for the
// peer itself: a health check of the proxy's.
func readFront(r io.Reader) (netip.AddrPort, error) {
	none := netip.AddrPort{}
	raw, err := frontOctets(r)
	if err != nil {
		return none, err
	}
	if bytes.HasPrefix(raw, frontUnspecified) { // the package refuses it, as receivers may
		return none, nil
	}
	h, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(raw), len(raw)))
	if err != nil {
		return none, fmt.Errorf("the PROXY header %.60q: %w", raw, err)
	}
	if h.Command.IsLocal() {
		return none, nil
	}
	if addr, ok := h.SourceAddr.(*net.TCPAddr); ok {
		client := addr.AddrPort()
		return netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), nil
	}
	return none, fmt.Errorf("the PROXY header is of the family %#x, which is not TCP's", byte(h.TransportProtocol))
}

// frontOctets reads as many octets as the header says that it has.
func frontOctets(r io.Reader) ([]byte, error) {
	raw := make([]byte, len(proxyproto.SIGV2), frontLine)
	_, err := io.ReadFull(r, raw)
	switch {
	case err != nil:
	case bytes.HasPrefix(raw, []byte("PROXY ")):
		for b := make([]byte, 1); err == nil && raw[len(raw)-1] != '\n' && len(raw) < frontLine; { // what follows is the client's
			if _, err = io.ReadFull(r, b); err == nil {
				raw = append(raw, b...)
			}
		}
	case bytes.Equal(raw, proxyproto.SIGV2):
		head := make([]byte, 4)
		if _, err = io.ReadFull(r, head); err != nil {
			break
		}
		size := int(binary.BigEndian.Uint16(head[2:]))
		if size > frontBlock {
			return nil, fmt.Errorf("the PROXY header has %d octets, the limit is %d", size, frontBlock)
		}
		block := make([]byte, size)
		_, err = io.ReadFull(r, block)
		raw = append(append(raw, head...), block...)
	default:
		return nil, errors.New("it sends no header of the PROXY protocol: switch it on there, or take the address out of listen.trusted_proxies")
	}
	if err != nil {
		return nil, fmt.Errorf("read header of the PROXY protocol: %w", err)
	}
	return raw, nil
}
