package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Server is the process that everything is requested from. Each service does as
// little as it can, so that the way to it weighs in the figures.
type Server struct {
	ctx context.Context
}

// ServerConfig says what to serve. A zero address serves nothing.
type ServerConfig struct {
	Raw, TLS, Web, DNS netip.AddrPort
	Cert               string // PEM file with certificate and key
}

// Serve starts the services.
func (s *Server) Serve(c ServerConfig, _ *struct{}) error {
	pair, err := tls.LoadX509KeyPair(c.Cert, c.Cert)
	if err != nil {
		return err
	}
	secure := &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
	for _, service := range []struct {
		addr   netip.AddrPort
		handle func(net.Conn)
	}{
		{c.Raw, serveRaw}, {c.Web, serveHTTP},
		{c.TLS, func(conn net.Conn) { serveOneByte(tls.Server(conn, secure)) }},
	} {
		if !service.addr.IsValid() {
			continue
		}
		l, err := s.listen(service.addr)
		if err != nil {
			return err
		}
		go acceptAll(l, service.handle)
	}
	if !c.DNS.IsValid() {
		return nil
	}
	return s.serveDNS(c.DNS)
}

func (s *Server) listen(addr netip.AddrPort) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	lc.KeepAlive = -1
	return lc.Listen(s.ctx, "tcp", addr.String())
}

func acceptAll(l net.Listener, handle func(net.Conn)) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors for a moment
			continue
		}
		go func() {
			defer c.Close()
			handle(c)
		}()
	}
}

// What a client of the raw service asks for, after a ClientHello or without one.
const (
	opDown byte = 'd' // octets until the client goes away
	opUp   byte = 'u' // octets until the client ends its half; then their count
	opEcho byte = 'e' // every message of messageSize back
)

// messageSize is a request's and an answer's, in octets.
const messageSize = 128

// chunk is what bulk transfers read and write at a time, in octets.
const chunk = 256 << 10

func serveRaw(c net.Conn) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(c, head[:1]); err != nil {
		return
	}
	if head[0] == recordHandshake { // a hello, for proxies on the way: skip it
		if _, err := io.ReadFull(c, head[1:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint16(head[3:]))); err != nil {
			return
		}
		if _, err := c.Write(helloAnswer[:]); err != nil {
			return
		}
		if _, err := io.ReadFull(c, head[:1]); err != nil {
			return
		}
	}
	switch head[0] {
	case opDown:
		for b := make([]byte, chunk); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	case opUp:
		n := drain(c, nil)
		_, _ = c.Write(binary.BigEndian.AppendUint64(nil, uint64(n)))
	case opEcho:
		for b := make([]byte, messageSize); ; {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}
}

// drain reads to the end, or until stop says so, and counts.
func drain(c net.Conn, stop func() bool) (n int64) {
	for b := make([]byte, chunk); stop == nil || !stop(); {
		k, err := c.Read(b)
		n += int64(k)
		if err != nil {
			break
		}
	}
	return n
}

// recordHandshake is the type of a TLS record with a hello (RFC 8446, 5.1).
const recordHandshake = 22

// helloAnswer begins a ServerHello up to its random value (RFC 8446, 4.1.3). A proxy
// that looks for a second ClientHello looks no further once it has seen this much.
var helloAnswer = [43]byte{recordHandshake, 3, 3, 0, 38, 2, 0, 0, 34, 3, 3}

// serveOneByte answers one octet with one.
func serveOneByte(c net.Conn) {
	b := make([]byte, 1)
	if _, err := io.ReadFull(c, b); err == nil {
		_, _ = c.Write(b)
	}
	c.Close() // a TLS connection's own end, before the one below
}

var (
	answer  = append([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 128\r\n\r\n"), make([]byte, messageSize)...)
	lastOne = append([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 128\r\nConnection: close\r\n\r\n"), make([]byte, messageSize)...)
	// To the key of RFC 6455, 1.3, which the clients use.
	switching = []byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
)

// serveHTTP answers requests of HTTP/1.1; only those for bulk may have a body.
func serveHTTP(c net.Conn) {
	r := bufio.NewReaderSize(c, 1024)
	for {
		reply, last, bulk := answer, false, ""
		for {
			line, err := r.ReadSlice('\n')
			if err != nil {
				return
			}
			if len(line) <= 2 {
				break
			}
			if bytes.HasPrefix(line, []byte(bulkDown)) || bytes.HasPrefix(line, []byte(bulkUp)) {
				bulk = string(line)
			}
			name, value, _ := bytes.Cut(bytes.ToLower(line), []byte(":"))
			switch {
			case string(name) == "connection" && bytes.Contains(value, []byte("close")):
				reply, last = lastOne, true
			case string(name) == "upgrade":
				reply = switching
			}
		}
		if bulk != "" {
			if serveBulk(c, r, bulk) != nil {
				return
			}
			continue
		}
		if _, err := c.Write(reply); err != nil || last {
			return
		}
	}
}

// serveDNS answers A questions for the names of the bench.
func (s *Server) serveDNS(addr netip.AddrPort) error {
	p, err := (&net.ListenConfig{}).ListenPacket(s.ctx, "udp", addr.String())
	if err != nil {
		return err
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		if a, ok := names[strings.TrimSuffix(q.Question[0].Name, ".")]; ok && q.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300},
				A:   a.Addr().AsSlice(),
			}}
		}
		_ = w.WriteMsg(m)
	})
	d := &dns.Server{PacketConn: p, Handler: handler}
	go func() { _ = d.ActivateAndServe() }()
	return nil
}
