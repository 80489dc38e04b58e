package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// services are the servers of the internet. All of them answer on every address
// the internet owns, and say which address was used.
type services struct {
	ctx     context.Context
	ns      *Netns
	ca      *CA
	journal *Journal
	log     *slog.Logger
	ipv6    bool
	sites   sync.Map // host name -> http.Handler: the web servers' own sites

	wg      sync.WaitGroup
	mu      sync.Mutex // guards the fields below
	closers []io.Closer
	conns   map[net.Conn]struct{} // of the raw services
	closed  bool
}

// networks are the socket families to listen in: apart, since an address that is
// mapped from one to the other would show in what the servers report.
func (s *services) networks(proto string) []string {
	if s.ipv6 {
		return []string{proto + "4", proto + "6"}
	}
	return []string{proto + "4"}
}

func wildcard(network string, port int) string {
	if strings.HasSuffix(network, "6") {
		return fmt.Sprintf("[::]:%d", port)
	}
	return fmt.Sprintf("0.0.0.0:%d", port)
}

func (s *services) listen(network string, port int) (net.Listener, error) {
	l, err := s.ns.Listen(s.ctx, network, wildcard(network, port))
	if err != nil {
		return nil, fmt.Errorf("listen on port %d of the internet: %w", port, err)
	}
	s.onClose(l)
	return l, nil
}

func (s *services) listenPacket(network string, port int) (net.PacketConn, error) {
	p, err := s.ns.ListenPacket(s.ctx, network, wildcard(network, port))
	if err != nil {
		return nil, fmt.Errorf("listen on UDP port %d of the internet: %w", port, err)
	}
	s.onClose(p)
	return p, nil
}

func (s *services) run(f func()) { s.wg.Go(f) }

func (s *services) onClose(c io.Closer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closers = append(s.closers, c)
}

// close ends all servers, newest first, and their connections.
func (s *services) close() error {
	s.mu.Lock()
	closers := slices.Clone(s.closers)
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	var err error
	for _, c := range slices.Backward(closers) {
		// A listener is often closed by its server before its turn comes.
		if cerr := c.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) && !strings.Contains(cerr.Error(), "not started") {
			err = errors.Join(err, cerr)
		}
	}
	s.wg.Wait()
	return err
}

// serveRaw starts the services below HTTP.
func (s *services) serveRaw() error {
	streams := []struct {
		port  int
		serve func(net.Conn)
	}{
		{7, echo},
		{4000, echo},
		{22, banner("SSH-2.0-cordon_lab\r\n")},
		{25, s.smtp},
		{587, s.smtp},
	}
	for _, network := range s.networks("tcp") {
		for _, st := range streams {
			l, err := s.listen(network, st.port)
			if err != nil {
				return err
			}
			s.run(func() { s.accept(l, st.serve) })
		}
	}
	for _, network := range s.networks("udp") {
		for _, port := range []int{7, 123, 4000} {
			if err := s.serveUDP(network, port, true); err != nil {
				return err
			}
		}
		if err := s.serveUDP(network, 443, false); err != nil { // QUIC: heard, not spoken
			return err
		}
	}
	return nil
}

// accept serves each connection until the listener closes.
func (s *services) accept(l net.Listener, serve func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if !s.track(c) {
			c.Close()
			return
		}
		s.journal.add(Request{Proto: "tcp", Server: addrPort(c.LocalAddr()), Remote: addrPort(c.RemoteAddr())})
		s.run(func() {
			defer s.untrack(c)
			serve(c)
		})
	}
}

func (s *services) track(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *services) untrack(c net.Conn) {
	c.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func echo(c net.Conn) {
	_, _ = io.Copy(c, c) // the client sees where it ended
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.CloseWrite()
	}
}

// banner speaks first, then echoes.
func banner(text string) func(net.Conn) {
	return func(c net.Conn) {
		if _, err := io.WriteString(c, text); err == nil {
			echo(c)
		}
	}
}

// smtp is as much of a mail server as a client needs to start TLS (RFC 3207) and
// to hand over one message, which is counted and forgotten.
func (s *services) smtp(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(c)
	say := func(line string) { _, _ = io.WriteString(c, line+"\r\n") } // a lost client ends the next read
	say("220 lab ESMTP")
	data := false
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		verb := strings.ToUpper(strings.TrimSpace(line))
		switch {
		case data && verb == ".":
			data = false
			say("250 kept")
		case data:
		case strings.HasPrefix(verb, "EHLO"), strings.HasPrefix(verb, "HELO"):
			say("250-lab\r\n250 STARTTLS")
		case verb == "STARTTLS":
			say("220 go ahead")
			t := tls.Server(c, s.tlsConfig("smtp"))
			c, r = t, bufio.NewReader(t)
		case verb == "DATA":
			data = true
			say("354 end with a dot")
		case verb == "QUIT":
			say("221 bye")
			return
		default:
			say("250 ok")
		}
	}
}

// serveUDP records datagrams and, if it answers, sends them back from the
// address they were sent to.
func (s *services) serveUDP(network string, port int, answers bool) error {
	p, err := s.listenPacket(network, port)
	if err != nil {
		return err
	}
	if network == "udp4" {
		pc := ipv4.NewPacketConn(p)
		if err := pc.SetControlMessage(ipv4.FlagDst, true); err != nil {
			return fmt.Errorf("ask for destination addresses: %w", err)
		}
		s.run(func() { s.echo4(pc, uint16(port), answers) })
		return nil
	}
	pc := ipv6.NewPacketConn(p)
	if err := pc.SetControlMessage(ipv6.FlagDst, true); err != nil {
		return fmt.Errorf("ask for destination addresses: %w", err)
	}
	s.run(func() { s.echo6(pc, uint16(port), answers) })
	return nil
}

func (s *services) echo4(pc *ipv4.PacketConn, port uint16, answers bool) {
	buf := make([]byte, 64<<10)
	for {
		n, cm, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		dst, _ := netip.AddrFromSlice(cm.Dst.To4())
		s.journal.add(Request{Proto: "udp", Server: netip.AddrPortFrom(dst, port), Remote: addrPort(from), Bytes: n})
		if answers {
			_, _ = pc.WriteTo(buf[:n], &ipv4.ControlMessage{Src: cm.Dst}, from) // UDP: no promise
		}
	}
}

func (s *services) echo6(pc *ipv6.PacketConn, port uint16, answers bool) {
	buf := make([]byte, 64<<10)
	for {
		n, cm, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		dst, _ := netip.AddrFromSlice(cm.Dst.To16())
		s.journal.add(Request{Proto: "udp", Server: netip.AddrPortFrom(dst, port), Remote: addrPort(from), Bytes: n})
		if answers {
			_, _ = pc.WriteTo(buf[:n], &ipv6.ControlMessage{Src: cm.Dst}, from) // UDP: no promise
		}
	}
}

// addrPort reads the address of a connection, unmapped.
func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Request is one request as a server of the internet understood it.
type Request struct {
	Time   time.Time
	Proto  string         // "http", "https", "tls" (a hello), "dns", "tcp", "udp"
	Server netip.AddrPort // the address the client used
	Remote netip.AddrPort
	Host   string // Host of HTTP, name of a DNS question
	SNI    string // of the hello
	Method string // of HTTP; the type of a DNS question
	Path   string // path and query
	Bytes  int    // of a datagram
}

// Journal keeps the requests the internet's servers received, oldest first.
type Journal struct {
	mu    sync.Mutex // guards the fields below
	kept  []Request
	first int // number of kept[0]
}

const journalSize = 100_000

func (j *Journal) add(r Request) {
	r.Time = time.Now()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.kept = append(j.kept, r)
	if len(j.kept) > journalSize {
		j.kept = slices.Delete(j.kept, 0, journalSize/10)
		j.first += journalSize / 10
	}
}

// Mark returns the moment after the last request.
func (j *Journal) Mark() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.first + len(j.kept)
}

// Since returns the requests after a mark for which keep is true; keep may be
// nil. Requests of the far past are forgotten after 100,000.
func (j *Journal) Since(mark int, keep func(Request) bool) []Request {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []Request
	for _, r := range j.kept[min(max(mark-j.first, 0), len(j.kept)):] {
		if keep == nil || keep(r) {
			out = append(out, r)
		}
	}
	return out
}
