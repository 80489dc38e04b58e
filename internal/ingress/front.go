package ingress

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
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

var frontSignature = []byte("\r\n\r\n\x00\r\nQUIT\n")

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
	start := make([]byte, len(frontSignature))
	if _, err := io.ReadFull(r, start); err != nil {
		return netip.AddrPort{}, fmt.Errorf("read header of the PROXY protocol: %w", err)
	}
	if bytes.Equal(start, frontSignature) {
		return readFrontBlock(r)
	}
	if !bytes.HasPrefix(start, []byte("PROXY ")) {
		return netip.AddrPort{}, errors.New("it sends no header of the PROXY protocol: switch it on there, or take the address out of listen.trusted_proxies")
	}
	return readFrontLine(r, start)
}

// readFrontLine reads version 1, octet by octet: what follows is the client's.
func readFrontLine(r io.Reader, line []byte) (netip.AddrPort, error) {
	var b [1]byte
	for !bytes.HasSuffix(line, []byte("\r\n")) {
		if len(line) == frontLine {
			return netip.AddrPort{}, errors.New("the PROXY line is too long")
		}
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return netip.AddrPort{}, fmt.Errorf("read PROXY line: %w", err)
		}
		line = append(line, b[0])
	}
	words := strings.Split(string(line[:len(line)-2]), " ")
	if words[1] == "UNKNOWN" {
		return netip.AddrPort{}, nil
	}
	if len(words) != 6 || words[1] != "TCP4" && words[1] != "TCP6" {
		return netip.AddrPort{}, fmt.Errorf("the PROXY line %q is not of the form PROXY TCP4 source destination port port", line)
	}
	var ends [2]netip.AddrPort
	for i := range ends {
		addr, err := netip.ParseAddr(words[2+i])
		port, ok := parsePort(words[4+i])
		if err != nil || addr.Zone() != "" || addr.Is4() != (words[1] == "TCP4") || !ok && words[4+i] != "0" {
			return netip.AddrPort{}, fmt.Errorf("the PROXY line %q has an address that is none", line)
		}
		ends[i] = netip.AddrPortFrom(addr.Unmap(), port)
	}
	return ends[0], nil
}

// readFrontBlock reads version 2 behind its signature.
func readFrontBlock(r io.Reader) (netip.AddrPort, error) {
	none := netip.AddrPort{}
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return none, fmt.Errorf("read header of the PROXY protocol: %w", err)
	}
	size := int(binary.BigEndian.Uint16(head[2:]))
	if size > frontBlock {
		return none, fmt.Errorf("the PROXY header has %d octets, the limit is %d", size, frontBlock)
	}
	block := make([]byte, size)
	if _, err := io.ReadFull(r, block); err != nil {
		return none, fmt.Errorf("read header of the PROXY protocol: %w", err)
	}
	switch head[0] {
	case 0x20: // LOCAL: whatever follows is to be ignored
		return none, nil
	case 0x21: // PROXY
	default:
		return none, fmt.Errorf("the PROXY header has the version and command %#x", head[0])
	}
	switch head[1] {
	case 0x11: // TCP over IPv4
		if size >= 12 {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(block[:4])), binary.BigEndian.Uint16(block[8:])), nil
		}
	case 0x21: // TCP over IPv6
		if size >= 36 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(block[:16])).Unmap(), binary.BigEndian.Uint16(block[32:])), nil
		}
	case 0x00: // UNSPEC
		return none, nil
	}
	return none, fmt.Errorf("the PROXY header is of the family %#x with %d octets of addresses", head[1], size)
}
