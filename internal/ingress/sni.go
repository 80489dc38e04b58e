package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// errNoName: the handshake asks for a name that leads nowhere. The client gets the
// alert unrecognized_name (RFC 6066, section 3).
var errNoName = errors.New("the name shown leads to no public port of a running sandbox")

// serveNamed carries one connection of mode TLSTCP: TLS ends here, the name that the
// handshake asks for says which port of which sandbox, and from then on bytes go
// through unread. There is no place for a token, so only public sandboxes answer. It
// ends with the client, the service, the sandbox or the Ingress.
func (in *Ingress) serveNamed(info *connInfo, c net.Conn) {
	v := &named{in: in, from: caller{info.addr, info.inside}, access: access{start: time.Now(), src: info.addr}}
	conn := tls.Server(c, v.config())
	defer conn.Close()
	handshake, cancel := context.WithTimeout(in.base, in.cfg.Limits.HeaderTimeout)
	err := conn.HandshakeContext(handshake)
	cancel()
	if err == nil {
		err = v.carry(in.base, conn)
	}
	if err != nil {
		relay.Abort(conn) // nothing was said: no end that could be taken for one
	}
	v.access.sandbox, v.access.port = v.to.id, v.to.port
	in.over("connection served", v.access, slog.Any("err", err))
}

// named is a connection on its way to the port its handshake names.
type named struct {
	in     *Ingress
	from   caller
	to     place
	access access
}

func (v *named) config() *tls.Config {
	conf := v.in.cfg.TLS.Clone()
	conf.MinVersion = max(conf.MinVersion, tls.VersionTLS12)
	next := conf.GetConfigForClient
	conf.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		own := conf
		if next != nil {
			c, err := next(hello)
			if err != nil {
				return nil, err
			}
			if c != nil {
				own = c
			}
		}
		own = own.Clone()
		own.GetConfigForClient = nil
		if v.to = v.lookup(hello.ServerName); v.to.id == "" {
			own.Certificates, own.GetCertificate = nil, nil // sends unrecognized_name
			return own, nil
		}
		own.NextProtos = protocolOf(hello.SupportedProtos)
		return own, nil
	}
	return conf
}

// protocolOf takes the first protocol the client offers, which is the service's to
// speak. HTTP/2 is the exception: services speak HTTP/1.1 behind a TLS they do not see.
func protocolOf(offered []string) []string {
	for _, p := range offered {
		if p != "h2" {
			return []string{p}
		}
	}
	return nil
}

// lookup returns what a server name leads to for this caller; the zero place is nothing.
func (v *named) lookup(name string) place {
	p, err := v.in.locate(name)
	if err != nil || p.kind != sandboxHost {
		return place{}
	}
	t, ok := v.in.cfg.Lookup(p.id)
	if !ok || !v.mayAsk(t, p.port) || t.State != Running && (!t.AutoResume || !t.wakes(v.waker(), false)) {
		return place{}
	}
	return p
}

func (v *named) waker() Waker {
	return Waker{Method: http.MethodConnect, Source: v.from.addr, Port: v.to.port, Upgrade: true}
}

// mayAsk is what admit is to requests.
func (v *named) mayAsk(t *Target, port uint16) bool {
	return t.Public && port != t.agentPort() && t.allows(v.from)
}

func (v *named) carry(ctx context.Context, conn *tls.Conn) (err error) {
	judged := v.in.judged.Load()
	t, ok := v.in.cfg.Lookup(v.to.id)
	if !ok || !v.mayAsk(t, v.to.port) {
		return errNoName
	}
	if t.State != Running {
		by := v.waker()
		if !t.wakes(by, false) {
			return errNoName
		}
		var refused *refusal
		if t, refused = v.in.wake(ctx, t, by); refused != nil {
			return errors.New(refused.Message)
		}
	}
	b := v.in.backend(t)
	if b == nil {
		return errNoName
	}
	if refused := b.occupy(v.from.addr); refused != nil {
		return errors.New(refused.Message)
	}
	g := &guest{from: v.from, busy: true, conn: conn}
	if !b.join(g, t, time.Time{}, judged) {
		return errNoName
	}
	defer b.depart(g)
	v.in.traffic(t)
	v.access.octets, err = b.pool.Carry(ctx, conn, v.to.port)
	return err
}
