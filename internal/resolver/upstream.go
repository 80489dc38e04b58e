package resolver

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// How long the upstreams may take: one of them, and all together.
const (
	tryTimeout   = 2 * time.Second
	totalTimeout = 5 * time.Second
)

// exchange asks the upstreams in turn until one gives an answer that means something.
func (r *Resolver) exchange(ctx context.Context, q question) (*answers, error) {
	var failed []error
	for _, s := range r.order() {
		m, err := r.askOne(ctx, s.addr, q)
		if err != nil {
			r.suspect(s)
			failed = append(failed, fmt.Errorf("upstream %s: %w", s.addr, err))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		// One server's trouble (SERVFAIL, REFUSED, …) may not be the next one's.
		if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
			failed = append(failed, fmt.Errorf("upstream %s: %s", s.addr, dns.RcodeToString[m.Rcode]))
			continue
		}
		a := readAnswers(q, m, time.Now())
		a.upstream = s.addr
		return a, nil
	}
	return nil, errors.Join(failed...)
}

// askOne asks one upstream over UDP, and over TCP when the answer is too long.
func (r *Resolver) askOne(ctx context.Context, server netip.AddrPort, q question) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	m, err := r.roundTrip(ctx, "udp", server, q)
	if err == nil && m.Truncated {
		m, err = r.roundTrip(ctx, "tcp", server, q)
	}
	return m, err
}

// roundTrip sends a fresh query on a fresh socket: the source port and the ID are
// both random (RFC 5452), and what a sandbox sent is in neither.
func (r *Resolver) roundTrip(ctx context.Context, network string, server netip.AddrPort, q question) (*dns.Msg, error) {
	c, err := r.cfg.Dial(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return nil, fmt.Errorf("set deadline: %w", err)
		}
	}
	out, id, err := freshQuery(q)
	if err != nil {
		return nil, err
	}
	if network == "tcp" {
		out = append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)
	}
	if _, err := c.Write(out); err != nil {
		return nil, err
	}
	return readReply(c, network, id, q)
}

// maxReply is more than the datagram that an upstream may send.
const maxReply = 4096

// readReply waits for the reply to a query. Over UDP, what does not match is
// the reply to another query, or forged, and is passed over.
func readReply(c net.Conn, network string, id uint16, q question) (*dns.Msg, error) {
	size := maxReply
	if network == "tcp" {
		size = dns.MaxMsgSize
	}
	buf := make([]byte, size)
	for {
		n, err := readMessage(c, network, buf)
		if err != nil {
			return nil, err
		}
		var m dns.Msg
		if err := m.Unpack(buf[:n]); err == nil && matches(&m, id, q) {
			return &m, nil
		}
		if network == "tcp" {
			return nil, errors.New("the reply does not match the question")
		}
	}
}

func readMessage(c net.Conn, network string, buf []byte) (int, error) {
	if network != "tcp" {
		return c.Read(buf)
	}
	if _, err := io.ReadFull(c, buf[:2]); err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint16(buf))
	return io.ReadFull(c, buf[:n])
}

// freshQuery builds the message to an upstream from nothing but the question.
func freshQuery(q question) (wire []byte, id uint16, err error) {
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails
	m := new(dns.Msg).SetQuestion(dns.Fqdn(q.name), q.qtype)
	m.Id = binary.BigEndian.Uint16(b[:])
	m.SetEdns0(maxUDP, false)
	wire, err = m.Pack()
	if err != nil {
		return nil, 0, fmt.Errorf("pack the query: %w", err)
	}
	return wire, m.Id, nil
}

// matches reports whether m is a reply to the question.
func matches(m *dns.Msg, id uint16, q question) bool {
	return m.Response && m.Id == id && m.Opcode == dns.OpcodeQuery && len(m.Question) == 1 &&
		m.Question[0].Qtype == q.qtype && m.Question[0].Qclass == dns.ClassINET &&
		strings.EqualFold(m.Question[0].Name, dns.Fqdn(q.name))
}

// HostUpstreams reads the servers of a resolv.conf, the machine's own. Where there is
// no such file, or it names no server, they are two public ones; never where it does,
// because names of a private network would then be asked for in public.
func HostUpstreams(resolvConf string) ([]netip.AddrPort, error) {
	text, err := os.ReadFile(resolvConf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the machine's DNS servers: %w", err)
	}
	cfg, err := dns.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("read the machine's DNS servers from %s: %w", resolvConf, err)
	}
	if len(cfg.Servers) == 0 {
		return []netip.AddrPort{netip.AddrPortFrom(policy.DefaultNameserver, 53), netip.AddrPortFrom(policy.SecondNameserver, 53)}, nil
	}
	var out []netip.AddrPort
	for _, s := range cfg.Servers {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
	}
	if len(out) == 0 {
		return nil, errs.New(errs.Invalid, "%s names %q as name server, which is no address: correct it, or set network.upstreams", resolvConf, cfg.Servers[0])
	}
	return out, nil
}
